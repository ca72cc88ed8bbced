"""Captions around the writer: languages, seeds, choosing among many, references, baselines, judges, commands, errors."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stub_models as stubs
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import mm
from mm.cli import app
from mm.data.emoji import EmojiSource, concepts
from mm.errors import UserError
from mm.hub import Model
from mm.run.captioning import caption, evaluate_captioning
from mm.run.writing import DRAWN, Caption
from mm.systems.vq import VqConfig
from mm.types import Captions, Decoding, OnTokens, Sample, System, TextBatch, Written

NAMES = ("red heart", "green heart", "blue heart", "yellow heart", "black heart")
COLOURS = dict(zip(NAMES, (stubs.COLOURS[name.split()[0]] for name in NAMES), strict=True))
BY_NAME = {concept["name"]: concept for concept in concepts().values()}

Say = Callable[[str, str, int], str]
"""From the colour's name, the beginning and the seed to the caption."""


class StubWriter(System):
    """Writes what ``say`` makes of the colour that it sees, and remembers what it was asked for."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.say, self.rows, self.decodings = say, list[int](), set[Decoding]()

    @property
    def beginnings(self) -> Mapping[str, str]:
        return {"en": "", "zh": "zh"}

    def caption(
        self,
        image: Tensor,
        beginning: TextBatch,
        decoding: Decoding,
        seeds: Sequence[int],
        *,
        on_tokens: OnTokens | None = None,
    ) -> list[Written]:
        self.rows.append(len(image))
        self.decodings.add(decoding)
        written = []
        for pixels, ids, length, seed in zip(image, beginning.ids, beginning.lengths.tolist(), seeds, strict=True):
            begun = ids[:length].tolist()
            assert begun[0] == stubs.TEXT.start
            assert stubs.TEXT.end not in begun
            texts = [self.say(seen(pixels), stubs.TEXT.decode(begun), seed + beam) for beam in range(decoding.beams)]
            best, *others = (Written(tuple(stubs.TEXT.encode(text)), -float(len(text)), True) for text in texts)
            written.append(replace(best, others=tuple(others)))
        return written

    def caption_likelihoods(self, image: Tensor, text: TextBatch) -> Tensor:
        return torch.zeros(len(image))


def seen(pixels: Tensor) -> str:
    mean = pixels.float().mean((1, 2))
    return min(COLOURS, key=lambda name: float((mean - torch.tensor(COLOURS[name], dtype=torch.float)).norm()))


def right(name: str, begun: str, _: int) -> str:
    return BY_NAME[name]["names"]["zh"] if begun == "zh" else name


def drawn(name: str, _: str, seed: int) -> str:
    return NAMES[seed % len(NAMES)]


def writer(say: Say = right) -> tuple[Model, StubWriter]:
    system = StubWriter(say).eval()
    assert isinstance(system, Captions)
    processor = stubs.processor()
    return Model(system=system, processor=processor, config=VqConfig(), name="writer"), system


def png(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (stubs.SIDE, stubs.SIDE), colour).save(file, "png")
    return file.getvalue()


class Art(EmojiSource):
    """Hearts as squares of their colour, under the names and with the task of the embedded data."""

    def __init__(self, name: str, pictures: Sequence[str], colours: Sequence[str] | None = None) -> None:
        self.name = name
        self.fingerprint = "0" * 64 + name
        self._of = [(BY_NAME[shown], png(COLOURS[colour])) for shown, colour in zip(pictures, colours or pictures, strict=True)]

    def __len__(self) -> int:
        return len(self._of)

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def fields(self, index: int) -> Mapping[str, Any]:
        return self._of[index][0]

    def read(self, index: int) -> Sample:
        fields, picture = self._of[index]
        return Sample(self.key(index), {"image": picture}, (fields["name"],), fields)


TEST = Art("emoji:test", NAMES)
OPTIONS: dict[str, Any] = {"judge": "none", "neighbour": "none", "train": "none", "cache": False, "device": "cpu"}


def values(result: Any) -> dict[str, float]:
    return {name: interval.value for name, interval in result.metrics.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(png(colour))
        lines.append({"image": f"{name}.png", "caption": f"a {name}", "also": [name, "a heart"]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_pictures_are_described_in_the_chosen_language(folder: Path) -> None:
    model, _ = writer()
    written = caption(model, [folder / "red heart.png", folder / "blue heart.png"], device="cpu")
    assert [one.text for one in written] == ["red heart", "blue heart"]
    assert [one.log_likelihood for one in written] == [-9.0, -10.0]
    assert written[0].image == str(folder / "red heart.png")
    assert caption(model, [png(COLOURS["red heart"])], language="zh")[0].text == BY_NAME["red heart"]["names"]["zh"]
    begun: list[str] = []
    prompted, _ = writer(lambda name, beginning, _: begun.append(beginning) or name)
    caption(prompted, [folder], prompt="red black")
    assert begun == ["red black"] * len(NAMES)


def test_equal_seeds_draw_equal_captions_whatever_is_drawn_along(folder: Path) -> None:
    model, system = writer(lambda name, _, seed: f"{name} {seed % 1000}")
    several = caption(model, [folder], count=20, seed=3)
    assert max(system.rows) == 64
    assert len({one.text for one in several}) > 90
    alone = caption(model, [folder / "red heart.png"], count=20, seed=3)
    assert [one for one in several if "red" in one.image] == alone
    assert caption(model, [folder / "red heart.png"], count=20, seed=4) != alone
    assert {one.temperature for one in system.decodings} == {1.0}
    caption(model, [folder / "red heart.png"])
    assert system.decodings == {replace(decoding, end=stubs.TEXT.end) for decoding in (DRAWN, Decoding())}


@pytest.mark.parametrize("decoding", [None, DRAWN])
def test_both_models_have_a_say_in_the_choice(folder: Path, decoding: Decoding | None) -> None:
    """Of beams or drawn captions those with the highest sum of log-likelihood and the ranker's logit, each text once."""
    model, _ = writer(drawn)
    ranker = stubs.clip()
    chosen = caption(model, [folder], count=2, best_of=6, ranker=ranker, decoding=decoding)
    everything = caption(model, [folder], count=12, decoding=decoding or Decoding(beams=12))
    for place, picture in enumerate(dict.fromkeys(one.image for one in everything)):
        candidates = [one for one in everything if one.image == picture]
        assert len(candidates) == 12
        logits = ranker.scores(ranker.embed_images([picture]), ranker.embed_texts([one.text for one in candidates]))[0]
        scores = {one.text: one.log_likelihood + float(logit) for one, logit in zip(candidates, logits, strict=True)}
        expected = sorted(scores, key=lambda text: -scores[text])[:2]
        pair = chosen[2 * place : 2 * place + 2]
        assert [one.text for one in pair] == expected
        assert [one.score for one in pair] == pytest.approx([scores[text] for text in expected], abs=1e-4)


def test_a_perfect_writer_scores_one_in_both_languages() -> None:
    model, _ = writer()
    english = evaluate_captioning(model, TEST, **OPTIONS)
    chinese = evaluate_captioning(model, TEST, language="zh", **OPTIONS)
    for result in (english, chinese):
        assert all(values(result)[name] == 1 for name in ("exact", "token_f1", "rouge_l", "subgroup"))
        assert values(result)["cider"] > 0
    assert english.protocol["reference"] == "field name"
    assert chinese.protocol["reference"] == "field names.zh"
    assert (english.protocol["language"], chinese.protocol["language"]) == ("en", "zh")
    assert "temperature=0" in english.protocol["decoding"]
    mixed = evaluate_captioning(model, TEST, language="zh", label="name", **OPTIONS)
    assert values(mixed)["exact"] == values(mixed)["subgroup"] == 0


def test_a_known_name_of_the_right_subgroup_is_half_right() -> None:
    said = {"red heart": "Green Heart!", "green heart": "pizza", "blue heart": "blue heart", "yellow heart": "hearty"}
    model, _ = writer(lambda name, *_: said.get(name, ""))
    result = evaluate_captioning(model, TEST, **OPTIONS)
    assert values(result)["exact"] == pytest.approx(1 / 5)
    assert values(result)["subgroup"] == pytest.approx(2 / 5)
    assert "any other caption counts as wrong" in result.protocol["subgroup"]
    assert result.protocol["captions_without_words"] == 1


def test_baselines_give_the_caption_of_the_nearest_known_picture() -> None:
    model, _ = writer()
    train = Art("emoji:train", ("red heart", "green heart", "pizza"), ("red heart", "green heart", "blue heart"))
    finder = stubs.clip()
    result = evaluate_captioning(model, TEST, **OPTIONS | {"train": train, "neighbour": finder})
    found = values(result)
    assert found["exact"] == 1
    assert found["baseline_exact"] == pytest.approx(2 / 5)
    pictures = [png(colour) for colour in COLOURS.values()]
    nearest = (finder.embed_images(pictures) @ finder.embed_images(pictures[:3]).T).argmax(1).tolist()
    borrowed = [("red heart", "green heart", "pizza")[row] for row in nearest]
    assert found["neighbour_exact"] == pytest.approx(sum(map(str.__eq__, borrowed, NAMES)) / 5)
    assert found["neighbour_subgroup"] == pytest.approx(sum(one != "pizza" for one in borrowed) / 5)
    assert "emoji:train" in result.protocol["baseline"]
    assert "clip-0" in result.protocol["neighbour"]


def test_the_judge_ranks_what_was_written_and_what_is_right() -> None:
    model, _ = writer(lambda name, *_: "red heart")
    judge = stubs.clip(1)
    result = evaluate_captioning(model, TEST, **OPTIONS | {"judge": judge})
    names = list(TEST.task.classes)
    scores = judge.embed_images([png(colour) for colour in COLOURS.values()]) @ judge.embed_texts(names).T
    likeliest = [{names[column] for column in row} for row in scores.topk(5).indices.tolist()]
    assert values(result)["judge_rank5"] == pytest.approx(sum("red heart" in five for five in likeliest) / 5)
    real = [name in five for name, five in zip(NAMES, likeliest, strict=True)]
    assert values(result)["judge_rank5_real"] == pytest.approx(sum(real) / 5)
    assert result.protocol["clipscore_by"] == "clip-1"
    assert "clipscore" in result.metrics
    assert "clip-1" in result.protocol["judge"]


def test_candidates_are_ranked_in_the_evaluation_too() -> None:
    model, _ = writer(drawn)
    ranker = stubs.clip()
    chosen: list[Caption] = []
    result = evaluate_captioning(model, TEST, best_of=8, ranker=ranker, on_written=chosen.extend, **OPTIONS)
    assert [one.image for one in chosen] == [TEST.key(row) for row in range(5)]
    assert all(one.score is not None for one in chosen)
    assert result.protocol["chosen"] == "best of 8 by likelihood and clip-0"
    assert result.protocol["clipscore_by"] == "clip-0"


def test_captions_of_a_table_are_the_references(folder: Path) -> None:
    model, _ = writer()
    data = str(folder / "rows.jsonl")
    result = mm.evaluate("captioning", model, data, limit=4, **OPTIONS)
    assert values(result)["exact"] == 0
    assert values(result)["token_f1"] == pytest.approx(0.8)
    assert "subgroup" not in result.metrics
    assert result.protocol["pictures"] == 4
    several = mm.evaluate("captioning", model, data, label="also", **OPTIONS)
    assert values(several)["exact"] == 1
    assert several.protocol["references"] == "10, 2 to 2 a picture"
    judged = evaluate_captioning(model, data, **OPTIONS | {"judge": stubs.clip(), "train": data})
    assert values(judged)["baseline_exact"] == 1
    assert "judge_rank5" not in judged.metrics
    assert "clipscore" in judged.metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "de"}, r"writes no captions in the language 'de'"),
        ({"language": "zh", "prompt": "a"}, "give one of them"),
        ({"prompt": "x " * 40}, "leave no room for a caption"),
        ({"best_of": 2}, "best_of needs a ranker"),
        ({"best_of": 2, "ranker": "clip", "decoding": Decoding()}, "take 2 beams, or a temperature above 0"),
        ({"best_of": 2, "ranker": "writer"}, "has no shared space"),
        ({"judge": "writer"}, "judge writer: has no shared space"),
        ({"neighbour": "writer"}, "neighbour writer: has no shared space"),
        ({"judge": "clip", "ranker": "clip", "best_of": 2}, "also chooses"),
        ({"label": "nam"}, "no sample has a field 'nam'; did you mean 'name'"),
    ],
)
def test_faults_are_found_before_anything_is_written(options: dict[str, Any], message: str) -> None:
    model, system = writer()
    models = {"clip": stubs.clip(), "writer": model}
    given = {key: models.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UserError, match=message):
        evaluate_captioning(model, TEST, **OPTIONS | given)
    assert not system.rows


def test_models_and_sources_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clip-0 writes no captions"):
        caption(stubs.clip(), [folder])
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    model, _ = writer()
    with pytest.raises(UserError, match="no sample has a caption; name the field with --label"):
        evaluate_captioning(model, str(tmp_path), **OPTIONS)
    with pytest.raises(UserError, match="no pictures to describe"):
        caption(model, [])
    with pytest.raises(UserError, match="0 captions of a picture"):
        caption(model, [folder], count=0)


def test_names_in_a_language_that_the_source_lacks() -> None:
    system = writer()[1]
    model, _ = writer()
    system.__class__ = type("Polyglot", (StubWriter,), {"beginnings": property(lambda _: {"tlh": ""})})
    polyglot = Model(system=system, processor=model.processor, config=model.config, name="polyglot")
    assert values(evaluate_captioning(polyglot, TEST, **OPTIONS))["exact"] == 1
    with pytest.raises(UserError, match="no names in the language 'tlh'"):
        evaluate_captioning(polyglot, TEST, language="tlh", **OPTIONS)


def test_commands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, system = writer()
    monkeypatch.setattr("mm.run.captioning.loaded", lambda *_: model)  # what the commands name
    output = tmp_path / "captions.json"
    shown = CliRunner().invoke(app, ["caption", "writer", str(folder), "--language", "zh", "--json", str(output)])
    assert shown.exit_code == 0, shown.output
    assert BY_NAME["red heart"]["names"]["zh"] in shown.output
    written = json.loads(output.read_text())["captions"]
    assert len(written) == 5
    assert set(written[0]) == {"image", "text", "log_likelihood", "finished", "number", "score"}
    CliRunner().invoke(app, ["caption", "writer", str(folder), "-n", "2", "--top-p", "0.9", "--max-tokens", "7"])
    end = stubs.TEXT.end
    assert Decoding(max_tokens=7, temperature=1.0, top_p=0.9, end=end) in system.decodings
    CliRunner().invoke(app, ["caption", "writer", str(folder), "--beams", "4"])
    assert Decoding(beams=4, end=end) in system.decodings
    arguments = ["eval", "captioning", "writer", "--data", str(folder / "rows.jsonl"), "--label", "also"]
    shown = CliRunner().invoke(app, [*arguments, "--train", "none", "--json", str(output)])
    assert shown.exit_code == 0, shown.output
    result = json.loads(output.read_text())
    assert result["metrics"]["exact"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert "PTB" in result["protocol"]["words"]
