"""FID and KID on Inception features equal torch-fidelity's on the same picture files, and weights are read with care."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mm.errors import UserError
from mm.evaluation.fid import frechet_distance, kernel_distance
from mm.evaluation.inception import open_inception

torch_fidelity = pytest.importorskip("torch_fidelity")
PICTURES, SIDE = 8, 48


def random_state() -> dict[str, Tensor]:
    """Weights of the network's shapes, scaled so that features of different pictures differ."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        options: dict[str, Any] = {"feature_extractor_weights_path": "none"}
        network = Network("inception", ["2048"], **options)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return network.state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_state(), path)
    return path


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Two folders of PNG pictures, the same as tensors."""
    found = {}
    for number, name in enumerate(("made", "real")):
        folder = tmp_path_factory.mktemp(name)
        pixels = np.random.default_rng(number).integers(0, 200 + 50 * number, (PICTURES, SIDE, SIDE, 3), dtype=np.uint8)
        for index, picture in enumerate(pixels):
            Image.fromarray(picture).save(folder / f"{index:02d}.png")
        found[name] = folder, torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return found


def theirs(sides: dict[str, tuple[Path, Tensor]], weights: Path, **metrics: Any) -> dict[str, float]:
    options = {"feature_extractor_weights_path": str(weights), "cuda": False, "verbose": False, "cache": False}
    return torch_fidelity.calculate_metrics(
        input1=str(sides["made"][0]), input2=str(sides["real"][0]), batch_size=4, **options, **metrics
    )


def test_kid(sides: dict[str, tuple[Path, Tensor]], weights: Path) -> None:
    inception = open_inception(weights)
    made, real = (inception(pixels) for _, pixels in sides.values())
    peer = theirs(sides, weights, kid=True, kid_subsets=2, kid_subset_size=PICTURES)
    assert made.std(0).max() > 0, "random weights must tell pictures apart"
    ours = kernel_distance(made, real, subsets=2)[0]
    assert ours == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-3)


@pytest.mark.slow  # the peer takes all eigenvalues of a 2048 x 2048 matrix
def test_fid(sides: dict[str, tuple[Path, Tensor]], weights: Path) -> None:
    inception = open_inception(weights)
    made, real = (inception(pixels) for _, pixels in sides.values())
    peer = theirs(sides, weights, fid=True)
    assert frechet_distance(made, real) == pytest.approx(peer["frechet_inception_distance"], rel=1e-3)


def test_other_weights_are_never_called_the_published_ones(weights: Path) -> None:
    assert "NOT the published ones" in open_inception(weights).name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.weight": torch.zeros(3)}, "holds another network than the FID Inception"),
        ([1, 2], "holds no weights"),
        (nn.Linear(2, 2), "cannot be read as weights"),
    ],
)
def test_what_is_not_the_network_is_one_line(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        open_inception(tmp_path / "other.pth")


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_no_code_of_the_file_is_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(tmp_path / "was-here")))
    with pytest.raises(UserError, match="cannot be read as weights"):
        open_inception(tmp_path / "evil.pth")
    assert not (tmp_path / "was-here").exists()


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"pip install \"mm-suite\[fidelity\]\""):
        open_inception(tmp_path / "none.pth")
