"""Fitting: equal to torchvision's own transforms, exact about alpha, bounded for absurd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from mm.media.geometry import ImageSpec, composite, fit_image


def noise(channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (33, 33), (20, 31), (200, 113)])
def test_crop_equals_resize_then_centre_crop(shape: tuple[int, int], interpolation: str) -> None:
    image = noise(3, *shape)
    mode = InterpolationMode(interpolation)
    reference = Compose([Resize(32, interpolation=mode, antialias=True), CenterCrop(32)])(image)
    assert torch.equal(fit_image(image, ImageSpec(size=32, interpolation=interpolation)), reference)


def test_squash_takes_the_whole_picture() -> None:
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)
    image[:, :, 50:] = 255
    fitted = fit_image(image, ImageSpec(size=20, fit="squash"))
    assert fitted.shape == (3, 20, 20)
    assert fitted[:, :, :8].max() <= 1
    assert fitted[:, :, 12:].min() >= 254


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_transparency_is_composited_before_resizing(fit: str) -> None:
    image = noise(4, 50, 70)
    spec = ImageSpec(size=24, fit=fit, background=(10, 200, 30))
    assert torch.equal(fit_image(image, spec), fit_image(composite(image, spec.background), spec))


def test_composite_is_exact_to_the_nearest_integer() -> None:
    image = noise(4, 30, 30)
    alpha = image[3:].double() / 255
    expected = image[:3] * alpha + torch.tensor([9, 99, 199.0]).view(3, 1, 1) * (1 - alpha)
    assert (composite(image, (9, 99, 199)) - expected).abs().max() <= 0.5
    opaque = torch.cat([image[:3], torch.full((1, 30, 30), 255, dtype=torch.uint8)])
    assert torch.equal(composite(opaque, (0, 0, 0)), image[:3])


@pytest.mark.parametrize("fit", ["crop", "squash", "content"])
def test_kept_alpha_composites_to_the_same_picture(fit: str) -> None:
    image = noise(4, 60, 44)
    image[:, :10] = 0
    spec = ImageSpec(size=40, fit=fit, background=(250, 20, 90), interpolation="bilinear")
    kept = fit_image(image, spec, keep_alpha=True)
    assert kept.shape == (4, 40, 40)
    difference = (composite(kept, spec.background).int() - fit_image(image, spec).int()).abs()
    assert difference.max() <= 2


def test_hidden_colours_do_not_bleed() -> None:
    image = torch.zeros(4, 32, 32, dtype=torch.uint8)
    image[1] = 255  # green everywhere, but hidden
    image[:, :, 16:] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8).view(4, 1, 1)
    kept = fit_image(image, ImageSpec(size=13, fit="squash"), keep_alpha=True)
    visible = kept[3] > 0
    assert kept[0][visible].min() >= 250
    assert kept[1][visible].max() <= 5


def test_opaque_pictures_get_alpha_when_it_is_kept() -> None:
    image = noise(3, 40, 40)
    kept = fit_image(image, ImageSpec(size=32), keep_alpha=True)
    assert torch.equal(kept[:3], fit_image(image, ImageSpec(size=32)))
    assert bool((kept[3] == 255).all())


@pytest.mark.parametrize("channels", [3, 4])
def test_content_ignores_where_the_thing_stands_in_its_frame(channels: int) -> None:
    """The same thing in two frames, each with another amount of free space, gives the same picture."""
    thing = noise(channels, 30, 20)
    thing[:3] //= 2  # dark, so that it differs from a white frame everywhere
    if channels == 4:
        thing[3] = 255
    fitted = []
    for top, left, side in [(0, 0, 40), (31, 5, 90)]:
        frame = torch.full((channels, side, side), 255 if channels == 3 else 0, dtype=torch.uint8)
        frame[:, top : top + 30, left : left + 20] = thing
        fitted.append(fit_image(frame, ImageSpec(size=50, fit="content", margin=0.1)))
    assert torch.equal(*fitted)
    rows = (fitted[0] != 255).any(0).any(1).nonzero()
    columns = (fitted[0] != 255).any(0).any(0).nonzero()
    assert (int(rows[0]), int(rows[-1]) + 1) == (5, 45)
    assert abs(int(columns[-1]) + 1 - int(columns[0]) - 27) <= 1


def test_content_pads_opaque_pictures_with_their_border_colour() -> None:
    image = torch.tensor([10, 60, 200], dtype=torch.uint8).view(3, 1, 1).expand(3, 50, 50).clone()
    image[:, 20:30, 10:40] = 255
    fitted = fit_image(image, ImageSpec(size=32, fit="content"))
    assert fitted[:, 0, 0].tolist() == [10, 60, 200]


@pytest.mark.parametrize("channels", [3, 4])
def test_a_picture_without_content_is_taken_whole(channels: int) -> None:
    empty = torch.zeros(channels, 30, 50, dtype=torch.uint8)
    fitted = fit_image(empty, ImageSpec(size=32, fit="content", background=(1, 2, 3)))
    assert fitted[:, 16, 16].tolist() == ([0, 0, 0] if channels == 3 else [1, 2, 3])


@pytest.mark.parametrize("fit", ["crop", "squash", "content"])
@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 1), (1, 1)])
def test_absurd_shapes_stay_small(fit: str, shape: tuple[int, int]) -> None:
    """Resizing a 1 x 50,000 strip by its shortest side would ask for 7.5 GB."""
    assert fit_image(noise(3, *shape), ImageSpec(size=224, fit=fit)).shape == (3, 224, 224)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([3, 4]),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(8, 48),
    fit=st.sampled_from(["crop", "squash", "content"]),
    keep_alpha=st.booleans(),
)
def test_the_result_always_has_the_wanted_shape(
    channels: int, height: int, width: int, size: int, fit: str, keep_alpha: bool
) -> None:
    fitted = fit_image(noise(channels, height, width, seed=height), ImageSpec(size=size, fit=fit), keep_alpha)
    assert fitted.shape == (4 if keep_alpha else 3, size, size)
    assert fitted.dtype == torch.uint8


@pytest.mark.parametrize(("value", "fit"), [(0, "crop"), (137, "squash"), (255, "content")])
def test_a_plain_colour_stays_that_colour(value: int, fit: str) -> None:
    image = torch.full((3, 61, 37), value, dtype=torch.uint8)
    fitted = fit_image(image, ImageSpec(size=20, fit=fit))
    assert fitted.unique().tolist() == [value]


def test_the_centre_is_cut_out_of_a_larger_resize() -> None:
    picture = torch.arange(3 * 40 * 40).remainder(251).to(torch.uint8).view(3, 40, 40)
    for fit in ("crop", "squash"):
        cut = fit_image(picture, ImageSpec(size=32, fit=fit, resize_to=40))
        assert torch.equal(cut, picture[:, 4:36, 4:36])


def test_a_centre_between_two_pixels_is_torchvisions_or_rounded_down() -> None:
    picture = torch.arange(3 * 32 * 35).remainder(251).to(torch.uint8).view(3, 32, 35)
    assert torch.equal(fit_image(picture, ImageSpec(size=32)), picture[:, :, 2:34])
    assert torch.equal(fit_image(picture, ImageSpec(size=32, centre="down")), picture[:, :, 1:33])


def test_a_cut_larger_than_the_resize_is_refused() -> None:
    with pytest.raises(ValueError, match="resize_to 16"):
        ImageSpec(size=32, resize_to=16)
