"""The CLIP system: it learns, every option does what it says, and impossible configurations stop early."""

import math

import pytest
import torch
from torch import Tensor

from mm.config import validate
from mm.errors import ConfigError
from mm.losses.contrastive import info_nce, siglip, supervised_contrastive
from mm.systems.clip import Clip, ClipConfig, build
from mm.types import Batch, CachesGradients, TextBatch, capabilities

SMALL = {
    "image": {"backbone": "convnext_atto", "image_size": 32, "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
    "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 8, "vocab_size": 32},
    "embed_dim": 8,
}
OPTIONS: list[dict[str, object]] = [
    {},
    {"chunk_size": 2, "label_smoothing": 0.1},
    {"loss": "siglip"},
    {"loss": "siglip", "chunk_size": 2, "image_image_weight": 0.5},
    {"image_image_weight": 1.0, "queue_size": 16},
]


def small(**options: object) -> Clip:
    torch.manual_seed(0)
    return build(validate(ClipConfig, SMALL | options, "test"))


def batch(seed: int = 0, size: int = 6, groups: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        ids=tuple(f"{seed}/{i}" for i in range(size)),
        image=torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator),
        text=TextBatch(torch.randint(1, 32, (size, 8), generator=generator), torch.full((size,), 8)),
        groups=groups,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_trainable_parameter_learns(options: dict[str, object]) -> None:
    model = small(**options).train()
    groups = torch.tensor([0, 0, 1, 2, 3, 4])
    model(batch(1, groups=groups + 10), 0)
    model.after_step(0)
    losses = model(batch(0, groups=groups), 1)
    losses.total.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == []
    assert not any(part.requires_grad for part in losses.parts.values())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_is_that_of_its_representations(options: dict[str, object]) -> None:
    model = small(**options).eval()
    groups = torch.tensor([0, 0, 1, 2, 3, 4])
    data = batch(groups=groups)
    vectors = model.represent(data)
    image, text, scale, bias = vectors["image"], vectors["text"], model.towers.scale(), model.towers.logit_bias
    if bias is None:
        expected = info_nce(image, text, scale, groups=groups, label_smoothing=model.label_smoothing)
    else:
        expected = siglip(image, text, scale, bias, groups=groups)
    expected = expected + model.image_image_weight * supervised_contrastive(image, scale, groups)
    torch.testing.assert_close(model(data, 0).total, expected)
    torch.testing.assert_close(model.loss_from(vectors, data, 0).total, expected)
    torch.testing.assert_close(vectors["image"], model.embed_image(data.image))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("options", [{}, {"loss": "siglip"}], ids=str)
def test_overfits_one_batch(options: dict[str, object]) -> None:
    model, data = small(**options).train(), batch(size=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        model(data, step).total.backward()
        optimizer.step()
        model.after_step(step)
    model.eval()
    with torch.no_grad():
        scores = model.scores(**dict(zip(("queries", "items"), model.represent(data).values(), strict=True)))
    assert scores.argmax(1).tolist() == scores.argmax(0).tolist() == [0, 1, 2, 3]


def test_capabilities() -> None:
    model = small()
    assert capabilities(model) == {"embeds"}
    assert isinstance(model, CachesGradients)


def test_locked_tower_keeps_its_weights_and_its_mode() -> None:
    model = small(lock=["image"]).train()
    model(batch(), 0).total.backward()
    assert not model.towers.encoders["image"].training
    assert all(parameter.grad is None for parameter in model.towers.encoders["image"].parameters())
    locked = set(map(id, model.towers.encoders["image"].parameters()))
    assert not any(id(parameter) in locked for group in model.parameter_groups() for parameter in group["params"])


def test_ready_encoders_replace_configured_ones() -> None:
    donor = small()
    encoders = dict(donor.towers.encoders.items())
    model = build(validate(ClipConfig, SMALL, "test"), encoders)
    assert model.towers.encoders["image"] is encoders["image"]
    assert model.towers.encoders["text"] is encoders["text"]


def test_scale_is_clamped_after_a_step() -> None:
    model = small()
    with torch.no_grad():
        model.towers.logit_scale.fill_(9.0)
    model.after_step(0)
    assert model.towers.scale().item() == pytest.approx(100)


def test_siglips_scale_is_free() -> None:
    """The published one is about 117: fine-tuning must not begin by cutting it."""
    model = small(loss="siglip")
    with torch.no_grad():
        model.towers.logit_scale.fill_(math.log(117))
    model.after_step(0)
    assert model.towers.scale().item() == pytest.approx(117)


def test_queue_holds_the_features_of_applied_steps_only() -> None:
    model = small(queue_size=10).train()
    first = batch(0, groups=torch.zeros(6, dtype=torch.int64))
    plain = model(first, 0).total
    assert len(model._queues["image"]) == 0  # the optimizer may still refuse the step
    model.after_step(0)
    assert len(model._queues["image"]) == 6
    model.after_step(1)
    assert len(model._queues["image"]) == 6
    torch.testing.assert_close(model(first, 1).total, plain)  # what shows the same thing is no negative
    assert model(batch(1), 1).total > small()(batch(1), 1).total


def test_evaluation_leaves_the_queue_alone() -> None:
    model = small(queue_size=10)
    model.eval()
    model(batch(0), 0)
    model.train()
    with torch.no_grad():
        model(batch(0), 0)
    model.after_step(0)
    assert len(model._queues["text"]) == 0


def test_saved_state_resumes_the_queue_exactly() -> None:
    model, copy = small(queue_size=10).train(), small(queue_size=10).train()
    for step in range(3):
        model(batch(step), step)
        model.after_step(step)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(model(batch(9), 3).total, copy(batch(9), 3).total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "siglip", "label_smoothing": 0.1}, "label_smoothing belongs to loss: infonce"),
        ({"loss": "siglip", "queue_size": 8}, "queue_size belongs to loss: infonce"),
        ({"lock": ["image", "image"]}, "names a tower twice"),
        ({"lock": ["audio"]}, "lock"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"chunk_size": -1}, "chunk_size"),
        ({"chunksize": 1}, "did you mean 'chunk_size'"),
    ],
)
def test_impossible_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ClipConfig, SMALL | options, "test.yaml")
