"""Questions put to a model: how often it is right, beside guesses that see no picture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mm.data.accounting import Accounting
from mm.data.captions import look_up
from mm.data.questions import Question, check_questions, question_of, questions_of
from mm.data.sources import Subset
from mm.evaluation.metrics import Result
from mm.evaluation.vqa import BlindGuess, accepted, normalise, vqa
from mm.hub import FREE_BEAMS, Model
from mm.run.evaluation import loaded, opened, refuse_incomplete, shared_out, stamp
from mm.run.preparation import QuestionPreparation
from mm.run.reading import evaluation_loader
from mm.training.parallel import open_world
from mm.types import Source

Progress = Callable[[int, int], None]


def evaluate_vqa(
    model: str | Path | Model,
    data: str | Source,
    *,
    train: str | Source | None = None,
    limit: int | None = None,
    free: bool = False,
    image_field: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
) -> Result:
    """The accuracy of a model's answers, in all and by kind of question, see `mm.evaluation.vqa.vqa`.

    Args:
        model: A loaded model or a MODEL reference.
        data: Questions with answers.
        train: Questions to guess from: ``blind_accuracy`` is of the usual answer to a question of the same words,
            ``majority_accuracy`` of the most usual answer of all. Default: the source's own; ``none`` leaves both out.
        limit: Take only so many questions, the first ones.
        free: Have answers written that need not be in the model's list, see `mm.hub.Model.answer`.
        image_field: Column of a table that holds the picture files, where its name is not a usual one.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        progress: Called with (questions done, in all).

    Raises:
        UserError: The model does not answer questions, or not freely; a source asks none, or too many of its samples cannot be
            used.
    """
    model = loaded(model, device, precision)
    known = frozenset((model.free_answering_system() if free else model.answering_system()).known_answers)
    source = opened(data, model, image_field=image_field)
    check_questions(source)
    training = train if train is not None else getattr(source, "reference", None)
    subset_field = getattr(source, "subsets", None)
    if limit is not None:
        source = Subset(source, range(min(limit, len(source))))
    guess = None if training in (None, "none") else _guesser(opened(training, model, image_field=image_field))
    with open_world(model.device.type) as world:
        answer = partial(answer_all, model, progress=progress, free=free)
        asked, accounting = shared_out(source, world, answer, Answered.read)
    refuse_incomplete(source, accounting)
    facts = stamp(model, source, accounting.describe())
    if free:
        listed = sum(normalise(one.answer) in known for one in asked) / len(asked)
        facts["answers"] = f"written freely by {FREE_BEAMS} beams, {listed:.1%} of them among the {len(known)} known"
    elif known:
        reach = [max((s for a, s in accepted(one.question.answers).items() if a in known), default=0.0) for one in asked]
        facts["answers"] = f"{len(known)} known, at best {sum(reach) / len(reach):.1%} right"
    guesses = {}
    if guess is not None:
        guesses = {"blind": [guess(one.question.text) for one in asked], "majority": [guess.majority] * len(asked)}
        facts["guesses"] = f"the usual answers of {training if isinstance(training, str) else 'the given training questions'}"
    values = [str(look_up(one.fields, subset_field)) for one in asked] if subset_field else []
    return vqa(
        [one.answer for one in asked],
        [one.question.answers for one in asked],
        kinds=[one.question.kind for one in asked],
        pictures=[one.question.picture for one in asked],
        guesses=guesses,
        subsets={name: [value == name for value in values] for name in sorted(set(values))},
        protocol=facts,
    )


@dataclass(frozen=True)
class Answered:
    """A question, the fields of its sample, and what the model answers."""

    question: Question
    fields: Mapping[str, Any]
    answer: str

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Answered":
        """From a dictionary that has been JSON."""
        question = values["question"]
        return cls(Question(**question | {"answers": tuple(question["answers"])}), values["fields"], values["answer"])


def answer_all(
    model: Model, source: Source, progress: Progress | None = None, *, free: bool = False
) -> tuple[list[Answered], Accounting]:
    """The model's best answer to every question of a source that can be used, in order, and the counts of those that cannot."""
    loader = evaluation_loader(source, model.processor, prepare=QuestionPreparation)
    found: list[Answered] = []
    for batch in loader.one_epoch():
        assert batch.image is not None
        questions = [question_of(fields, where) for fields, where in zip(batch.fields, batch.ids, strict=True)]
        ranked = model.answer_pixels(batch.image, [question.text for question in questions], free=free)
        best = (one.answers[0] for one in ranked)
        found += [Answered(*entry) for entry in zip(questions, batch.fields, best, strict=True)]
        if progress:
            progress(len(found), len(source))
    return found, loader.accounting


def _guesser(source: Source) -> BlindGuess:
    check_questions(source)
    return BlindGuess((question.text, question.answers) for question in questions_of(source))
