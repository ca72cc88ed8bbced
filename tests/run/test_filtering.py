"""Captions that do not fit their pictures are left out, those that a captioner writes are held to the same, all are counted."""

import io
import json
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mm.cli import app
from mm.data.sources import open_source
from mm.errors import UserError
from mm.hub import Model, load
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.run.filtering import WRITTEN_FIELD, filter_captions
from mm.systems.captioner import CaptionerConfig
from mm.tokenizers.text import TextTokenizer
from mm.types import Decoding, Encoded, Sample, System, TextBatch, Written

WORDS = ("red square", "blue square", "green square")
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}
TOKENIZER = TextTokenizer.train_bpe(WORDS * 2, 300)


class Judge(System):
    """Matches where the text's first word is the colour of the picture."""

    def encode_image(self, image: torch.Tensor) -> Encoded:
        mean = image.float().mean((2, 3))
        return Encoded(mean[:, None], torch.ones(len(image), 1, dtype=torch.bool), mean)

    def encode_text(self, text: TextBatch) -> Encoded:
        first = [TOKENIZER.decode(row[:length].tolist()).split()[0] for row, length in zip(text.ids, text.lengths, strict=True)]
        named = torch.tensor([COLOURS[word] for word in first]).float()
        return Encoded(named[:, None], torch.ones(len(named), 1, dtype=torch.bool), named)

    def match(self, image: Encoded, text: Encoded) -> torch.Tensor:
        return 10 - (image.pooled - text.pooled).abs().sum(1)


class Writer(System):
    """Calls the first picture of a batch what it is, and every other one red."""

    beginnings = {"en": "say:"}  # noqa: RUF012
    seen: Sequence[int] = ()

    def caption(self, image, beginning, decoding: Decoding, seeds, *, on_tokens=None) -> list[Written]:
        assert decoding.end == TOKENIZER.end
        assert TOKENIZER.decode(beginning.ids[0].tolist()) == "say:"
        self.seen = [*self.seen, *seeds]
        first = max(COLOURS, key=lambda name: float((image[0].float().mean((1, 2)) * torch.tensor(COLOURS[name])).sum()))
        names = [first] + ["red"] * (len(image) - 1)
        return [Written(tuple(TOKENIZER.encode(f"{name} square")), -1.0, True) for name in names]

    def caption_likelihoods(self, image, text):
        return torch.zeros(len(image))


class Pictures:
    """One-coloured pictures with given captions, a `mm.types.Source`; the last one is damaged."""

    name, fingerprint = "pictures", "0"

    def __init__(self, entries: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries) + 1

    def key(self, index: int) -> str:
        return f"p{index}"

    def fields(self, index: int):
        return {"number": index}

    def read(self, index: int) -> Sample:
        if index == len(self.entries):
            return Sample("broken", {"image": b"\xff\xd8\xff\xe0 no more"}, ("red square",))
        colour, texts = self.entries[index]
        data = io.BytesIO()
        Image.new("RGB", (8, 8), COLOURS[colour]).save(data, "PNG")
        return Sample(self.key(index), {"image": data.getvalue()}, texts, self.fields(index))


def model(system: System, name: str) -> Model:
    processor = Processor(image=ImageSpec(size=8, fit="squash"), tokenizer=TOKENIZER, context_length=16)
    return Model(system=system, processor=processor, config=CaptionerConfig(), name=name)


SOURCE = Pictures(
    [
        ("blue", ("blue square", "red square")),
        ("green", ("red square",)),
        ("red", ("blue square",)),
        ("green", ()),
    ]
)


def test_what_fits_is_kept_and_the_rest_is_counted(tmp_path) -> None:
    writer = Writer()
    result = filter_captions(SOURCE, tmp_path / "out", model(Judge(), "judge"), captioner=model(writer, "writer"))
    assert (result.given, result.given_kept) == (4, 1)
    assert (result.written, result.written_kept) == (2, 1)  # "blue" was given for the first, "red" for the second
    assert (result.samples, result.dropped) == (2, 2)
    assert sum(result.bad.values()) == 1
    kept = open_source(str(tmp_path / "out"))
    samples = {kept.key(i): kept.read(i) for i in range(len(kept))}
    assert samples["p0"].texts == ("blue square",)
    assert WRITTEN_FIELD not in samples["p0"].fields
    assert samples["p2"].texts == ("red square",)
    assert samples["p2"].fields[WRITTEN_FIELD] == ["red square"]
    assert samples["p2"].fields["number"] == 2
    assert len(set(writer.seen)) == 4


def test_without_a_captioner_it_only_filters(tmp_path) -> None:
    result = filter_captions(SOURCE, tmp_path / "out", model(Judge(), "judge"))
    assert (result.given_kept, result.written, result.samples, result.dropped) == (1, 0, 1, 3)


def test_what_cannot_be_done_is_told(tmp_path) -> None:
    judge, writer = model(Judge(), "judge"), model(Writer(), "writer")
    with pytest.raises(UserError, match="neither reads pictures with texts"):
        filter_captions(SOURCE, tmp_path / "a", writer)
    with pytest.raises(UserError, match="between 0 and 1"):
        filter_captions(SOURCE, tmp_path / "a", judge, threshold=1.5)
    with pytest.raises(UserError, match="does not write captions"):
        filter_captions(SOURCE, tmp_path / "a", judge, captioner=judge)
    with pytest.raises(UserError, match="emoji-albef does not write captions"):
        filter_captions(SOURCE, tmp_path / "a", judge, captioner="emoji-albef")
    with pytest.raises(UserError, match="give one between -1 and 1"):
        filter_captions(SOURCE, tmp_path / "a", "emoji-clip")
    with pytest.raises(UserError, match="no caption fits"):
        filter_captions(Pictures([("red", ("blue square",))]), tmp_path / "b", judge)


def test_swapped_names_are_found_by_the_shipped_reader(tmp_path) -> None:
    """Of 40 pictures by the validation artist every second one has the name of another."""
    source = open_source("emoji:validation/core/seen", image_size=48)

    class Swapped:
        name, fingerprint = "swapped", "1"

        def __len__(self) -> int:
            return 40

        def key(self, index: int) -> str:
            return source.key(index)

        def fields(self, index: int):
            return source.fields(index)

        def read(self, index: int) -> Sample:
            sample = source.read(index)
            text = sample.texts[0] if index % 2 else source.read(index + 300).texts[0]
            return Sample(sample.id, sample.media, (text,), {"true": bool(index % 2)})

    filter_captions(Swapped(), tmp_path / "out", load("emoji-albef", device="cpu"))
    kept = open_source(str(tmp_path / "out"))
    right = [kept.fields(i)["true"] for i in range(len(kept))]
    assert sum(right) >= 14
    assert len(right) - sum(right) <= 2


def test_command_writes_shards_and_counts(tmp_path) -> None:
    file = tmp_path / "result.json"
    arguments = ["data", "filter", "emoji:test/core/seen/emojione", "--judge", "emoji-clip", "--threshold", "0.9"]
    outcome = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out"), "--json", str(file)])
    assert outcome.exit_code == 0, outcome.output
    counts = json.loads(file.read_text())
    assert counts["given"] == counts["samples"] + counts["dropped"]
    assert 0 < counts["given_kept"] < counts["given"]
