"""Where data meets the processor: evaluation sees what a user's raw input becomes; training is a function of its seeds."""

import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mm.data.augment import AugmentConfig
from mm.data.captions import Captioner, CaptionTemplate
from mm.errors import BadSample
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.run.preparation import EvalPreparation, TrainPreparation
from mm.tokenizers.text import TextTokenizer
from mm.types import Sample


@pytest.fixture
def processor() -> Processor:
    return Processor(
        image=ImageSpec(size=32, fit="content"), tokenizer=TextTokenizer.train_bpe(["a b"], 260), context_length=16
    )


def sample(number: int, mode: str = "RGBA") -> Sample:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (40, 30, len(mode)), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return Sample(f"id{number}", {"image": buffer.getvalue()}, (f"caption {number}", "other"), {"key": number % 3})


def training(processor: Processor, positives: str = "key", seed: int = 0) -> TrainPreparation:
    captioner = Captioner([CaptionTemplate(template="{text}"), CaptionTemplate(template="key {key}")])
    return TrainPreparation(processor, captioner, AugmentConfig(flip=0.5, hue=0.5, rotation=0.3), positives, seed)


def test_evaluation_sees_what_raw_input_becomes(processor: Processor) -> None:
    samples = [sample(0), sample(1, "RGB")]
    preparation = EvalPreparation(processor)
    batch = preparation.collate([preparation(s, 0) for s in samples], 0)
    assert batch.image is not None
    assert torch.equal(batch.image, processor.images([s.media["image"] for s in samples]))
    assert batch.captions == (("caption 0", "other"), ("caption 1", "other"))


def test_words_come_with_captions_where_they_are_asked_for(processor: Processor) -> None:
    samples = [sample(number) for number in range(3)]
    plain, marked = training(processor), replace(training(processor), words=True)
    without, batch = (one.collate([one(each, 0) for each in samples], 0) for one in (plain, marked))
    assert without.text is not None
    assert without.text.words is None
    assert batch.text is not None
    assert batch.text.words is not None
    assert torch.equal(batch.text.ids, without.text.ids)
    for rows in (slice(1, 3), torch.tensor([2, 0])):
        part = batch.text[rows].words
        assert part is not None
        assert torch.equal(part, batch.text.words[rows])
    moved = batch.to(torch.device("meta")).text
    assert moved is not None
    assert moved.words is not None
    assert moved.words.device.type == "meta"


def test_training_depends_on_seed_and_visit_alone(processor: Processor) -> None:
    samples = [sample(n, "RGBA" if n % 2 else "RGB") for n in range(6)]
    first = training(processor)
    copy = pickle.loads(pickle.dumps(first))  # noqa: S301 - what spawned loader workers do
    batch = first.collate([first(s, 3) for s in samples], 3)
    again = copy.collate([copy(s, 3) for s in samples], 3)
    alone = first.collate([first(samples[4], 3)], 3)
    other = first.collate([first(s, 4) for s in samples], 4)
    assert batch.image is not None
    assert batch.text is not None
    assert again.image is not None
    assert alone.image is not None
    assert other.image is not None
    assert torch.equal(batch.image, again.image)
    assert torch.equal(batch.image[4], alone.image[0])
    assert not torch.equal(batch.image, other.image)


def test_positives_share_a_group(processor: Processor) -> None:
    by_field, by_none = training(processor, "key"), training(processor, "none")
    groups = [by_field(sample(n), 0).group for n in range(6)]
    assert groups[:3] == groups[3:]
    assert len(set(groups)) == 3
    assert len({by_none(sample(n), 0).group for n in range(6)}) == 6
    by_text = training(processor, "text")
    items = [by_text(sample(n % 2), visit) for n in range(2) for visit in range(20)]
    assert all((a.group == b.group) == (a.texts == b.texts) for a in items for b in items)


def test_samples_without_picture_or_field_are_bad(processor: Processor) -> None:
    with pytest.raises(BadSample, match="no picture"):
        EvalPreparation(processor)(Sample("x", {}, ("a",)), 0)
    with pytest.raises(BadSample, match="missing field 'kind'"):
        training(processor, "kind")(sample(0), 0)
