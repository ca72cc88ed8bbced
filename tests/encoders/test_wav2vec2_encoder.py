"""wav2vec 2.0's encoder: what is behind a recording's end, or beside it in a batch, changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mm.encoders.wav2vec2 import (
    Wav2Vec2Encoder,
    Wav2Vec2EncoderConfig,
    build_wav2vec2_encoder,
    draw_negatives,
    span_mask,
)
from mm.processor import padded
from mm.types import AudioBatch

SMALL: dict[str, Any] = {
    "conv_layers": ((16, 10, 5), (16, 3, 2), (24, 2, 2)),
    "width": 32,
    "layers": 2,
    "heads": 4,
    "hidden": 48,
    "position_kernel": 8,
    "position_groups": 4,
}
BASE: dict[str, Any] = {"extractor": "group_norm"}
LARGE: dict[str, Any] = {"extractor": "layer_norm", "conv_bias": True, "norm_first": True}
BANDS: dict[str, Any] = LARGE | {"extractor": "log_mel", "conv_layers": ((16, 3, 1), (24, 5, 3))}


def encoder(**changes: Any) -> Wav2Vec2Encoder:
    torch.manual_seed(0)
    return build_wav2vec2_encoder(Wav2Vec2EncoderConfig(**{**SMALL, **changes})).eval()


def waves(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, generator=generator) for length in lengths]


@pytest.mark.parametrize("kind", [BASE, LARGE, BANDS], ids=["group", "layer", "bands"])
def test_a_recording_has_the_same_features_alone_and_in_any_batch(kind: dict[str, Any]) -> None:
    network = encoder(**kind)
    clips = waves(700, 401, 1300, 401, 12)
    together = network(padded(clips))
    assert together.tokens.shape[2] == network.width == together.pooled.shape[1]
    for row, clip in enumerate(clips):
        alone = network(padded([clip]))
        count = int(together.mask[row].sum())
        assert alone.mask.all()
        assert alone.mask.shape == (1, count)
        torch.testing.assert_close(together.tokens[row, :count], alone.tokens[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], atol=1e-5, rtol=1e-5)
    assert not together.tokens[~together.mask].any()
    torch.testing.assert_close(together.pooled[0], together.tokens[0][together.mask[0]].mean(0))


def test_group_norm_without_care_would_depend_on_padding() -> None:
    """What `_encode_by_length` is for: in training mode, which pads, the same recording gives something else."""
    network = encoder(**BASE, dropout=0, projection_dropout=0, attention_dropout=0, layer_drop=0)
    clip, other = waves(401, 1300)
    alone = network(padded([clip])).pooled[0]
    network.train()
    assert (network(padded([clip, other])).pooled[0] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [LARGE, BANDS], ids=["layer", "bands"])
def test_a_hundred_evaluations_on_one_and_two_threads_give_one_vector(kind: dict[str, Any]) -> None:
    network, batch = encoder(**kind), padded(waves(900))
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(1)
            first = network(batch).pooled
            assert all(torch.equal(network(batch).pooled, first) for _ in range(100))
            torch.set_num_threads(2)
            torch.testing.assert_close(network(batch).pooled, first, atol=1e-5, rtol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [LARGE, BANDS], ids=["layer", "bands"])
def test_frames_are_counted_as_the_convolutions_make_them(kind: dict[str, Any]) -> None:
    network = encoder(**kind)
    field = encoder(**LARGE).config.receptive_field
    for length in (1, field - 1, field, field + 1, 1234, 1239, 1240):
        batch = padded(waves(length))
        mask = network.frame_mask(batch)
        assert mask.shape == network.frames(batch).shape[:2]
        assert mask.all()
    assert Wav2Vec2EncoderConfig().receptive_field == 400


@pytest.mark.parametrize("kind", [LARGE, BANDS], ids=["layer", "bands"])
def test_every_parameter_learns(kind: dict[str, Any]) -> None:
    network = encoder(**kind)
    network.train()
    network(padded(waves(900, 700))).tokens.square().sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()]


def test_bands_do_not_depend_on_loudness_and_stay_in_fp32() -> None:
    network = encoder(**BANDS, position_groups=2)  # torch 2.11 adds up wrongly in bf16 where a group has fewer than 16 channels
    (clip,) = waves(4000)
    expected = network(padded([clip])).pooled
    torch.testing.assert_close(network(padded([clip * 0.1])).pooled, expected, atol=1e-4, rtol=1e-3)
    filters = network.trunk.feature_extractor.spectrogram.filters.clone()
    network.cast_(torch.bfloat16)
    assert network(padded([clip])).pooled.dtype == torch.bfloat16
    torch.testing.assert_close(network(padded([clip])).pooled.float(), expected, atol=0.05, rtol=0.05)
    assert torch.equal(network.trunk.feature_extractor.spectrogram.filters, filters)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 5},
        {"position_groups": 3},
        {"conv_layers": ((8, 0, 1),)},
        {"extractor": "log_mel", "conv_layers": ((8, 2, 2),)},
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"multiple|at least 1|odd kernels"):
        Wav2Vec2EncoderConfig(**{**SMALL, **change})


def test_spans_are_whole_inside_the_recording_and_as_many_as_asked_for() -> None:
    torch.manual_seed(0)
    valid = torch.arange(200) < torch.tensor([[200]] * 300 + [[50]] * 300 + [[10]] * 10 + [[9]] * 10)
    hidden = span_mask(valid, 0.65, 10)
    assert not (hidden & ~valid).any()
    for row in hidden[::50]:
        ends = torch.diff(row.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int)).nonzero()
        assert all(last - first >= 10 for first, last in ends.flatten().view(-1, 2).tolist())
    # Without replacement: 13 of 191 places; the share is what the published code gives, about 0.49.
    assert 0.47 < hidden[:300].float().mean() < 0.52
    assert hidden[600:610, :10].all()
    assert not hidden[610:].any()


def test_spans_begin_anywhere_with_equal_probability() -> None:
    torch.manual_seed(0)
    hidden = span_mask(torch.ones(20_000, 14, dtype=torch.bool), 0.1, 10)
    assert hidden.sum(1).eq(10).all()
    shares = hidden[:, 0].float().mean(), hidden[:, 13].float().mean()
    assert all(abs(float(share) - 1 / 5) < 0.015 for share in shares)


def test_negatives_are_other_hidden_frames_of_the_same_recording_evenly() -> None:
    torch.manual_seed(0)
    masked = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    places = draw_negatives(masked, 9000)
    assert places.shape == (3, 6, 9000)
    counts = torch.bincount(places[0, 2], minlength=6)
    assert counts[[0, 2, 3]].tolist() == [0, 0, 0]
    assert (counts[[1, 4, 5]] / 9000 - 1 / 3).abs().max() < 0.02
    assert places[1, 0].eq(1).all()
    assert places[1, 1].eq(0).all()


def test_a_batch_of_equal_lengths_needs_no_mask() -> None:
    network = encoder(**LARGE)
    clips = torch.stack(waves(800, 800))
    equal = network(AudioBatch(clips, torch.tensor([800, 800])))
    torch.testing.assert_close(equal.tokens[1:], network(padded([clips[1]])).tokens, atol=1e-5, rtol=1e-5)
