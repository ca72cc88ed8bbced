"""VQA accuracy: every rule of normalisation, the leave-one-out average by brute force, guesses, intervals over pictures."""

import itertools
import random

import pytest

from mm.errors import UserError
from mm.evaluation.vqa import BlindGuess, accepted, accuracy, frequent_answers, normalise, vqa


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Yes", "yes"),
        ("  two\tdogs\n", "2 dogs"),
        ("A dog on the mat", "dog on mat"),
        ("an", ""),
        ("theory", "theory"),
        ("none", "0"),
        ("Zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("twofold", "twofold"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("y'all'dve", "y'all'd've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("its", "its"),
        ("shed", "shed"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("a -b-c", "bc"),
        ("1,000", "1000"),
        ("1,000-2", "10002"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("5.", "5"),
        (".5", ".5"),
        ("p.m.", "pm"),
        ("what?!", "what"),
        ("12:30", "12:30"),
        ("dog's", "dog's"),
        ("(left)", "left"),
        ("snow_man@home", "snow man home"),
        ('"stop"', "stop"),
        ("." * 32 + "x", "x"),
        ("." * 33 + "x", ".x"),
    ],
)
def test_answers_are_normalised_by_the_published_rules(raw: str, expected: str) -> None:
    assert normalise(raw) == expected


def leave_one_out(predicted: str, answers: list[str]) -> float:
    scores = []
    for left_out in range(len(answers)):
        others = [answer for place, answer in enumerate(answers) if place != left_out]
        scores.append(min(1.0, others.count(predicted) / 3))
    return sum(scores) / len(scores)


def test_accuracy_is_the_average_over_ten_subsets_of_nine() -> None:
    chance = random.Random(0)
    for _ in range(300):
        answers = [chance.choice(["cat", "dog", "red"]) for _ in range(10)]
        for predicted in ("cat", "dog", "red", "sky"):
            assert accuracy(predicted, answers) == pytest.approx(leave_one_out(predicted, answers))
    known = [accuracy("x", ["x"] * agreeing + ["y"] * (10 - agreeing)) for agreeing in range(6)]
    assert known == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


def test_ten_people_who_wrote_the_very_same_are_compared_letter_by_letter() -> None:
    assert accuracy("2", ["two"] * 10) == 0
    assert accuracy("two", ["two"] * 10) == 1
    assert accuracy("2", ["two"] * 9 + ["2"]) == 1
    assert accuracy("The Dog!", ["dog"] * 9 + ["a dog"]) == 1
    assert accuracy(" two\n", ["two"] * 10) == 1


def test_a_short_list_is_of_what_is_accepted() -> None:
    assert accuracy("Light blue", ["light blue", "blue"]) == accuracy("blue.", ["light blue", "blue"]) == 1
    assert accuracy("two", ["2"]) == accuracy("2", ["Two"]) == 1
    assert accuracy("red", ["blue"]) == accuracy("red", []) == 0


def test_what_is_learned_is_what_is_scored() -> None:
    answers = ["Two"] * 2 + ["2"] + ["3"] * 3 + ["the four"] * 4
    assert accepted(answers) == pytest.approx({"2": 0.9, "3": 0.9, "4": 1.0})
    assert accepted(["none"] * 10) == {"0": 1.0}
    assert accepted(["a", "The dog"]) == {"dog": 1.0}
    assert accepted([]) == {}


def test_the_most_frequent_answers_in_a_fixed_order() -> None:
    said = [["dog"], ["cat"], ["a cat"], ["bird"], ["x"] + ["y"] * 9]
    assert frequent_answers(said, 3) == ("cat", "bird", "dog")
    assert frequent_answers(reversed(said), 3) == ("cat", "bird", "dog")
    assert frequent_answers(said, 99) == ("cat", "bird", "dog", "y", "x")
    assert frequent_answers([], 3) == ()


def test_guesses_are_the_usual_answer_of_each_question() -> None:
    training = [("What is it?", ["dog"]), ("what is it", ["dog"]), ("what is it?", ["cat"]), ("is it red?", ["no"])]
    guess = BlindGuess(training)
    assert [guess("WHAT is it?"), guess("is it red?"), guess("never asked")] == ["dog", "no", "dog"]
    assert guess.majority == "dog"
    for order in itertools.permutations(training):
        assert BlindGuess(order)("what is it?") == "dog"


def test_figures_by_kind_and_subset_beside_guesses() -> None:
    predicted, answers = ["yes", "no", "dog", "cat"], [["yes"], ["yes"], ["dog"], ["dog"]]
    found = vqa(
        predicted,
        answers,
        kinds=["yes/no", "yes/no", "name", "name"],
        pictures=["a", "a", "b", "c"],
        guesses={"blind": ["yes", "yes", "x", "x"]},
        subsets={"novel": [False, True, True, True]},
        protocol={"data": "d"},
        resamples=200,
    )
    values = {name: interval.value for name, interval in found.metrics.items()}
    assert values == pytest.approx(
        {
            "accuracy": 0.5,
            "blind_accuracy": 0.5,
            "accuracy_name": 0.5,
            "blind_accuracy_name": 0,
            "accuracy_yes/no": 0.5,
            "blind_accuracy_yes/no": 1,
            "accuracy_novel": 1 / 3,
            "blind_accuracy_novel": 1 / 3,
        }
    )
    assert all(interval.low <= interval.value <= interval.high for interval in found.metrics.values())
    assert found.protocol["questions"] == 4
    assert found.protocol["pictures"] == 3
    assert found.protocol["subsets"] == {"name": 2, "yes/no": 2, "novel": 3}


def test_questions_about_one_picture_are_resampled_together() -> None:
    """With one picture there is nothing to resample; taken as independent the same answers have a wide interval."""
    predicted, answers = ["yes"] * 20, [["yes"], ["no"]] * 10
    together = vqa(predicted, answers, pictures=["a"] * 20).metrics["accuracy"]
    apart = vqa(predicted, answers).metrics["accuracy"]
    assert (together.low, together.high) == (0.5, 0.5)
    assert apart.high - apart.low > 0.3


def test_nothing_to_evaluate_and_uneven_lists_are_refused() -> None:
    with pytest.raises(UserError, match="no question is left"):
        vqa([], [])
    with pytest.raises(UserError, match="2 questions but 1 answers"):
        vqa(["a"], [["a"], ["b"]])
    with pytest.raises(UserError, match="2 questions but 1 blind"):
        vqa(["a", "b"], [["a"], ["b"]], guesses={"blind": ["a"]})
