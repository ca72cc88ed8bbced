"""Checkpoints of ALBEF's authors: results are those of published parts, and what cannot be used is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import mm
from mm.errors import CheckpointError, UserError
from mm.hub import Model
from mm.processor import Processor
from mm.published.albef import resized_positions
from mm.published.convert import Added, import_file
from mm.run.conversion import convert
from mm.types import TextBatch

pytest.importorskip("transformers")

from albef_reference import (
    HIDDEN,
    PATCH,
    SIDE,
    TOLERANCE,
    WORDS,
    Reference,
    bert_tokenizer,
    drawn_set,
    near,
    pictures,
    tuned,
)

TEXTS = [
    "The dog's un-able!",
    "x",
    "Two dogs, and <PERSON> (unable) ~ a/b",
    "[SEP] $5 日本 Äpfel \t  \n",
    "",
    "the dog " * 40,
]


def caption(text: str) -> str:
    """What ALBEF does to a caption before BERT's tokenizer, which cares for no whitespace."""
    kept = (character for character in text.lower() if character not in ",.'!?\"()*#:;~")
    return "".join(" " if character in "-/" else character for character in kept).replace("<person>", "person")


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


def converted(content: object, vocab: Path, **options: Any) -> Model:
    file = vocab.parent / "ALBEF.pth"
    torch.save(content, file)
    convert(file, vocab.parent / "model", trusted=True, vocab=vocab, **options)
    return mm.load(vocab.parent / "model", device="cpu", precision="fp32")


CASES: dict[str, dict[str, Any]] = {
    "pretrained": {},
    "retrieval": {"retrieval": True},
    "wider words": {"width": 192, "picture_width": 64, "text_layers": 1, "fusion_layers": 3},
    "narrower words": {"width": 64, "picture_width": 192, "text_layers": 3, "fusion_layers": 1},
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_result_is_the_references(case: str, vocab: Path) -> None:
    options = dict(CASES[case])
    retrieval = options.pop("retrieval", False)
    reference = Reference(**options)
    model: Any = converted(reference.checkpoint(retrieval=retrieval), vocab)
    system, pixels = model.system, pictures(len(TEXTS))
    text = model.processor.text(TEXTS)
    assert len(set(text.lengths.tolist())) > 2
    inside = text.valid()

    picture, words = reference.picture_tokens(pixels), reference.text_tokens(text)
    image, encoded = system.encode_image(pixels), system.encode_text(text)
    near(image.tokens, picture)
    near(encoded.tokens[inside], words[inside])
    vectors = F.normalize(reference.vision_proj(picture[:, 0]), dim=-1), F.normalize(reference.text_proj(words[:, 0]), dim=-1)
    near(image.pooled, vectors[0])
    near(encoded.pooled, vectors[1])
    near(model.embed_pixels(pixels), vectors[0])
    near(model.scores(*vectors) * reference.temp, vectors[0] @ vectors[1].T)

    fused = reference.fused(words, text, picture)
    near(system.fuse(image, encoded).tokens[inside], fused[inside])
    no, yes = reference.itm_head(fused[:, 0]).unbind(1)
    near(system.match(image, encoded), yes - no)
    near(system.match(image, encoded).sigmoid(), reference.itm_head(fused[:, 0]).softmax(1)[:, 1])

    assert system.config.masked_weight == (0 if retrieval else 1)
    if not retrieval:
        hidden = text.inner() & (torch.rand(text.ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5)
        theirs = TextBatch(text.ids.masked_fill(hidden, HIDDEN), text.lengths)
        ours = TextBatch(text.ids.masked_fill(hidden, system.config.vocab_size), text.lengths)
        expected = reference.text_encoder.cls(reference.fused(reference.text_tokens(theirs), theirs, picture))
        found = system.network.words(system.fuse(image, system.encode_text(ours)).tokens)
        assert hidden.sum() > 5
        near(found[inside], expected[inside])


@torch.no_grad()
def test_the_reference_makes_a_difference(vocab: Path) -> None:
    """Token types, the place of the norms and their epsilon, head and temperature are seen by what is compared above."""
    reference = Reference()
    model: Any = converted(reference.checkpoint(), vocab)
    text = model.processor.text(TEXTS)
    words = reference.text_tokens(text)
    reference.text_encoder.bert.embeddings.token_type_embeddings.weight.zero_()
    assert (reference.text_tokens(text) - words)[text.valid()].abs().max() > 100 * TOLERANCE
    assert {part.eps for part in model.system.network.modules() if isinstance(part, nn.LayerNorm)} == {1e-12, 1e-6}
    assert model.system.network.towers.scale().item() == pytest.approx(1 / 0.03)


def test_texts_have_the_ids_of_berts_tokenizer(vocab: Path) -> None:
    model = converted(Reference().checkpoint(), vocab)
    expected = bert_tokenizer()([caption(text) for text in TEXTS], truncation=True, max_length=30)["input_ids"]
    batch = model.processor.text(TEXTS)
    assert [ids[:length] for ids, length in zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True)] == expected
    assert batch.lengths.max() == 30
    assert batch.ids[1].tolist() == [WORDS.index("[CLS]"), WORDS.index("x"), WORDS.index("[SEP]")] + [0] * 27
    assert model.processor.tokenizer.decode(batch.ids[0].tolist()) == "the dogs un able"


def test_pictures_are_squashed_as_the_authors_do(vocab: Path) -> None:
    model = converted(Reference().checkpoint(), vocab)
    raw = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    expected = np.asarray(raw.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(model.processor.image(raw).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("side", [48, 24])
@torch.no_grad()
def test_positions_follow_another_size_of_pictures(side: int, vocab: Path) -> None:
    reference = Reference()
    model: Any = converted(reference.checkpoint(), vocab, image_size=side)
    own = reference.visual_encoder.pos_embed
    grid = own[0, 1:].T.reshape(1, 128, 4, 4)
    grid = F.interpolate(grid, size=(side // PATCH, side // PATCH), mode="bicubic", align_corners=False)
    expected = Reference(side=side)
    expected.load_state_dict(
        reference.state_dict() | {"visual_encoder.pos_embed": torch.cat([own[:, :1], grid.flatten(2).transpose(1, 2)], 1)}
    )
    near(model.system.encode_image(pictures(side=side)).tokens, expected.picture_tokens(pictures(side=side)))
    assert model.processor.image_spec.size == side


def test_positions_of_the_same_grid_stay() -> None:
    for first in (0, 1, 5):
        positions = torch.randn(1, first + 16, 8)
        assert torch.equal(resized_positions(positions, 4), positions)
        assert torch.equal(resized_positions(positions, 6)[:, :first], positions[:, :first])


def test_the_command_makes_a_model_that_is_measured_and_trained(vocab: Path) -> None:
    folder = vocab.parent
    file, model, data = folder / "ALBEF.pth", folder / "converted", drawn_set(folder)
    torch.save(Reference().checkpoint(), file)
    command = [sys.executable, "-m", "mm.cli", "convert", str(file), "--i-trust-this-file", "--vocab", str(vocab)]
    done = subprocess.run([*command, "-o", str(model)], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(model)
    assert {path.name for path in model.iterdir()} == {
        *("config.yaml", "card.json", "model.safetensors", "processor.json", "tokenizer.json")
    }
    card = json.loads((model / "card.json").read_text())
    assert card["format"] == "albef"
    assert {"visual_encoder_m", "image_queue"} <= set(card["left_out"])
    assert mm.load(model, device="cpu").capabilities >= {"embeds", "matches"}
    measured = mm.evaluate("retrieval", str(model), str(data)).metrics["text_to_image_r1"]
    assert measured.value == pytest.approx(first_rank(mm.load(model, device="cpu").processor, data))
    tuned(model, data, folder / "run")
    assert mm.load(folder / "run", device="cpu").processor.tokenizer.vocab_size == len(WORDS)


@torch.no_grad()
def first_rank(processor: Processor, data: Path) -> float:
    """The share of captions whose own picture matches best, by the reference."""
    rows = [row.split(",") for row in data.read_text().splitlines()[1:]]
    text, pixels = processor.text([row[1] for row in rows]), processor.images([data.parent / row[0] for row in rows])
    reference = Reference()
    words, scores = reference.text_tokens(text), []
    for picture in reference.picture_tokens(pixels):
        fused = reference.fused(words, text, picture.expand(len(rows), -1, -1))
        no, yes = reference.itm_head(fused[:, 0]).unbind(1)
        scores.append(yes - no)
    return (torch.stack(scores).argmax(0) == torch.arange(len(rows))).float().mean().item()


class Harmful:
    """A pickle that would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def without(content: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {**content, "model": {name: t for name, t in content["model"].items() if not name.startswith(names)}}


def changed(content: Mapping[str, Any], name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {**content, "model": {**content["model"], name: change(content["model"][name])}}


EMBEDDINGS = "text_encoder.bert.embeddings"
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no matching": (lambda c: without(c, "itm_head."), "has no 'itm_head.weight'"),
    "no projection": (lambda c: without(c, "text_proj."), "has no 'text_proj.weight'"),
    "no temperature": (lambda c: without(c, "temp"), "has no 'temp'"),
    "no words": (lambda c: without(c, f"{EMBEDDINGS}.word"), "word_embeddings.weight"),
    "a lost norm": (lambda c: without(c, "text_encoder.bert.encoder.layer.2.output.LayerNorm"), "layer.2.output.LayerNorm"),
    "a lost layer": (lambda c: without(c, "text_encoder.bert.encoder.layer.0."), "no ALBEF"),
    "no cross-attention": (
        lambda c: {"model": {name: t for name, t in c["model"].items() if "crossattention" not in name}},
        "no ALBEF, in which the upper layers of words attend to the picture: here 0 of 4 do",
    ),
    "picture blocks": (lambda c: without(c, "visual_encoder.blocks.0."), "blocks.0"),
    "no positions of pictures": (lambda c: without(c, "visual_encoder.pos_embed"), "pos_embed"),
    "three classes": (lambda c: changed(c, "itm_head.weight", lambda t: torch.cat([t, t[:1]])), "too many values"),
    "temperature 0": (lambda c: changed(c, "temp", torch.zeros_like), "division by zero"),
    "other projection": (lambda c: changed(c, "text_proj.weight", lambda t: t[:, :-1]), "its configuration says"),
    "head of its own": (
        lambda c: changed(c, "text_encoder.cls.predictions.decoder.weight", lambda t: t + 1),
        "by other vectors",
    ),
    "not tensors": (lambda _: {"model": {"visual_encoder": 1}}, "holds no weights"),
    "a dual tower": (lambda _: {"state_dict": {"visual.proj": torch.ones(2)}}, "takes no --vocab"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_checkpoint_is_one_line_and_leaves_no_model(fault: str, vocab: Path) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as caught:
        converted(change(Reference().checkpoint()), vocab)
    assert "\n" not in str(caught.value)
    assert not (vocab.parent / "model").exists()


def test_code_in_a_pickle_is_not_run(vocab: Path) -> None:
    marker = vocab.parent / "harmed"
    with pytest.raises(CheckpointError, match=r"asks for '\w+\.mkdir', which is no weight") as caught:
        converted(Reference().checkpoint() | {"config": Harmful(marker)}, vocab)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_what_has_to_be_added_is_said(vocab: Path) -> None:
    file = vocab.parent / "ALBEF.pth"
    torch.save(Reference().checkpoint(), file)

    def refused(message: str, *, trusted: bool = True, added: Added | None = None) -> None:
        with pytest.raises(UserError, match=message) as caught:
            import_file(file, architecture=None, trusted=trusted, added=added)
        assert "\n" not in str(caught.value)

    refused("--i-trust-this-file", trusted=False)
    refused(r"give its vocabulary: --vocab vocab\.txt")
    torch.save(
        without(Reference().checkpoint(), "text_encoder.bert.encoder.layer.0.", "text_encoder.bert.encoder.layer.1."), file
    )
    refused("no ALBEF, in which the upper layers of words attend to the picture: here 2 of 2 do")
    torch.save(Reference().checkpoint(), file)
    refused("cannot be read as a vocabulary", added=Added(vocab=vocab.parent / "absent.txt"))
    for content, message in (
        ("\n".join(WORDS[:-1]), rf"holds {len(WORDS) - 1} words, the checkpoint {len(WORDS)}; take the vocab\.txt"),
        ("\n".join([*WORDS[:-1], "dog"]), "a word twice"),
        ("\n".join(word for word in WORDS if word != "[MASK]"), r"has no \[MASK\]"),
        ("{}", r"has no \[PAD\]"),
    ):
        vocab.write_text(content, encoding="utf-8")
        refused(message, added=Added(vocab=vocab))
    vocab.write_bytes(b"\xff\xfe")
    refused("cannot be read as a vocabulary", added=Added(vocab=vocab))
