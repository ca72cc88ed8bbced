"""Augmentation: each change does what it says, off means off, and a picture's result is its own."""

import pytest
import torch

from mm.config import validate
from mm.data.augment import AugmentConfig, augment, may_flip
from mm.errors import ConfigError
from mm.media.image import composite
from mm.seeding import derive_seed
from mm.types import Sample

EVERYTHING = AugmentConfig(
    flip=0.5, rotation=0.2, scale=(0.7, 1.1), aspect=0.1, shear=0.1, shift=0.06, perspective=0.06, elastic=0.3,
    hue=0.25, any_hue=0.05, saturation=0.35, grayscale=0.1, channel_permutation=0.2, channel_mix=0.2, contrast=0.2,
    brightness=0.1, tint=0.04, gamma=0.2, shade=0.3, edges=0.2, outline=0.4, background=0.4, cut=0.4, blur=0.2, noise=0.3,
)  # fmt: skip


def seeds(count):
    return [derive_seed(i) for i in range(count)]


def pictures(count, channels=4, size=24):
    """Smooth pictures, transparent outside a disc where there are four channels."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, channels, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")
    if channels == 4:
        axis = torch.linspace(-1, 1, size)
        image[:, 3] = (axis[:, None] ** 2 + axis[None] ** 2 < 0.6).float()
    return (image * 255).round().to(torch.uint8)


def test_off_means_off():
    opaque = pictures(5, channels=3)
    assert torch.equal(augment(opaque, seeds(5), AugmentConfig(), 24), opaque)
    clear = pictures(5)
    expected = torch.stack([composite(image, (255, 255, 255)) for image in clear])
    assert (augment(clear, seeds(5), AugmentConfig(), 24).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [24, 21])
def test_a_picture_comes_out_the_same_whatever_surrounds_it(channels, size):
    images = pictures(40, channels)
    whole = augment(images, seeds(40), EVERYTHING, size)
    for rows in ([7], [3, 39, 0, 12, 5]):
        assert torch.equal(augment(images[rows], [seeds(40)[row] for row in rows], EVERYTHING, size), whole[rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(augment(images, seeds(40), EVERYTHING, size), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_list_may_mix_transparent_and_opaque_pictures():
    mixed = [*pictures(3), *pictures(3, channels=3), *pictures(1)]
    result = augment(mixed, seeds(7), EVERYTHING, 24)
    for row, image in enumerate(mixed):
        assert torch.equal(augment([image], seeds(7)[row : row + 1], EVERYTHING, 24)[0], result[row])


def test_another_seed_gives_another_picture():
    image = pictures(1).repeat(30, 1, 1, 1)
    results = augment(image, seeds(30), EVERYTHING, 24)
    assert len({picture.numpy().tobytes() for picture in results}) == 30


@pytest.mark.parametrize(
    "name", [name for name in AugmentConfig.model_fields if name not in ("scale", "no_flip") and "ramp" not in name]
)
def test_each_setting_changes_some_pictures_and_no_other_setting(name):
    images = pictures(24)
    plain = augment(images, seeds(24), AugmentConfig(), 24)
    changed = augment(images, seeds(24), AugmentConfig(**{name: 0.5}), 24)
    different = (changed != plain).flatten(1).any(1).sum().item()
    assert 4 <= different <= 24
    again = augment(images, seeds(24), AugmentConfig(**{name: 0.5}), 24)
    assert torch.equal(changed, again)


def test_flip_is_a_mirror_image_and_can_be_forbidden():
    images = pictures(6, channels=3)
    assert torch.equal(augment(images, seeds(6), AugmentConfig(flip=1), 24), images.flip(-1))
    kept = augment(images, seeds(6), AugmentConfig(flip=1), 24, flippable=[True, False] * 3)
    assert torch.equal(kept[1::2], images[1::2])
    assert torch.equal(kept[::2], images[::2].flip(-1))


def test_scale_and_background():
    images = pictures(1)
    smaller = augment(images, [1], AugmentConfig(scale=(0.5, 0.5)), 24, background=(0, 0, 0))
    larger = augment(images, [1], AugmentConfig(scale=(1.2, 1.2)), 24, background=(0, 0, 0))
    area = [(picture.amax(0) > 0).sum().item() for picture in (smaller[0], larger[0])]
    assert 4.5 < area[1] / area[0] < 7  # (1.2 / 0.5) ** 2 = 5.8
    colored = augment(images.repeat(20, 1, 1, 1), seeds(20), AugmentConfig(background=1), 24)
    assert len({tuple(picture[:, 0, 0].tolist()) for picture in colored}) > 15


def test_grayscale_and_channel_permutation():
    images = pictures(12, channels=3)
    gray = augment(images, seeds(12), AugmentConfig(grayscale=1), 24).int()
    assert (gray.amax(1) - gray.amin(1)).max() <= 1
    permuted = augment(images, seeds(12), AugmentConfig(channel_permutation=1), 24)
    assert (permuted.int().sort(1)[0] - images.int().sort(1)[0]).abs().max() <= 1


def test_hue_keeps_grey():
    grey = torch.full((8, 3, 8, 8), 100, dtype=torch.uint8)
    turned = augment(grey, seeds(8), AugmentConfig(hue=2, any_hue=0.5, saturation=1), 8)
    assert (turned.int() - 100).abs().max() <= 1


def test_ramp():
    config = EVERYTHING.model_copy(update={"ramp_epochs": 10, "ramp_from": 0.5})
    assert config.at(0).rotation == pytest.approx(0.1)
    assert config.at(5).rotation == pytest.approx(0.15)
    assert config.at(0).scale == pytest.approx((0.7**0.5, 1.1**0.5))
    assert config.at(0).outline == config.outline
    assert config.at(10) == config


def test_words_that_forbid_mirroring():
    config = AugmentConfig(flip=0.5, no_flip=("arrow", "flags", "left"))
    assert not may_flip(Sample("a", {}, ("Right Arrows",)), config)
    assert not may_flip(Sample("a", {}, ("x",), {"group": "flags", "n": 3}), config)
    assert may_flip(Sample("a", {}, ("marrow cleft", "arrow"), {}), config)
    assert may_flip(Sample("a", {}, ("arrow",)), AugmentConfig(flip=0.5))


def test_impossible_settings_are_refused():
    for wrong in ({"flip": 1.5}, {"scale": [1.2, 0.8]}, {"scale": [0, 1]}, {"rotate": 0.1}):
        with pytest.raises(ConfigError):
            validate(AugmentConfig, wrong, "x.yaml")
    with pytest.raises(ValueError, match="4 pictures and 3 seeds"):
        augment(pictures(4), seeds(3), EVERYTHING, 24)
