"""Heat over pictures: strongest where the heat is, the grey picture where there is none."""

import numpy as np
import pytest
import torch
from PIL import Image

from mm.evaluation.heat import COLOURS, PALE, STRONGEST, heat_over


def test_the_hottest_place_has_the_strongest_colour_and_the_rest_is_pale_grey() -> None:
    picture = Image.new("RGB", (90, 60), (200, 40, 40))
    heat = torch.zeros(2, 3)
    heat[1, 2] = 3e-9
    drawn = np.asarray(heat_over(picture, heat)).astype(int)
    assert drawn.shape == (60, 90, 3)
    grey = np.asarray(picture.convert("L"))[0, 0]
    pale = round(grey + PALE * (255 - grey))
    assert (abs(drawn[:20, :20] - pale) <= 1).all()
    strongest = pale + STRONGEST * (np.array(COLOURS[-1]) - pale)
    assert abs(drawn[50:, 80:] - strongest).max() <= 2


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (4, 3)])
def test_without_heat_nothing_is_laid_over(shape: tuple[int, int]) -> None:
    drawn = np.asarray(heat_over(torch.full((3, 30, 30), 100, dtype=torch.uint8), torch.zeros(shape)))
    assert (drawn == drawn[0, 0, 0]).all()
