"""Features of the Inception network of 2015 in TensorFlow's numbers, on which published FID and KID are measured.

The network is torch-fidelity's port, its weights a local file. https://arxiv.org/abs/1512.00567, https://arxiv.org/abs/1706.08500
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mm.errors import UserError

PUBLISHED = "6726825d"
"""First digits of the sha256 of the published weights, which their file is named after."""

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
MAX_BYTES = 256 << 20
LAYER = "2048"
"""torch-fidelity's name of the last pooling layer."""

ROWS = 32
"""Pictures that pass through the network together."""


class Inception:
    """Pictures to features. Resizes as the original graph does: bilinear to 299 pixels in TensorFlow 1's way, not antialiased.

    Args:
        network: torch-fidelity's.
        digest: sha256 of the weight file.
        version: torch-fidelity's.
        device: Where to compute.
    """

    def __init__(self, network: nn.Module, digest: str, version: str, device: torch.device) -> None:
        self._network, self._device = network.to(device), device
        weights = f"TF 2015 ({PUBLISHED})" if digest.startswith(PUBLISHED) else f"NOT the published ones (sha256 {digest[:16]})"
        self.name = (
            f"Inception v3, pool3, weights {weights}; resized to 299 px as TensorFlow 1 does (bilinear, not antialiased) "
            f"by torch-fidelity {version}"
        )

    @torch.no_grad()
    def __call__(self, pictures: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2048"]:
        """Features of pictures of any size, fp32 on the CPU."""
        return torch.cat([self._network(rows.to(self._device))[0].cpu() for rows in pictures.split(ROWS)])


def open_inception(path: str | Path, device: torch.device | str = "cpu") -> Inception:
    """Read the weights of the FID Inception, converted to PyTorch (``pt_inception-2015-12-05-6726825d.pth``).

    The file is read without running code. Weights that fit but are not the published ones are named so in the protocol.

    Args:
        path: The file.
        device: Where to compute.

    Raises:
        UserError: torch-fidelity is not installed, the file cannot be read, or it belongs to another network.
    """
    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError('Inception features need torch-fidelity; install it with: pip install "mm-suite[fidelity]"') from None
    content = _content(Path(path))
    state = _state(content, path)
    checked = io.BytesIO()
    torch.save(state, checked)  # the library unpickles what it is given: it gets tensors that were read without running code
    checked.seek(0)
    options: dict[str, Any] = {"feature_extractor_weights_path": checked}
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", [LAYER], **options)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: holds another network than the FID Inception ({first}); give {WEIGHTS}") from None
    return Inception(network, hashlib.sha256(content).hexdigest(), torch_fidelity.__version__, torch.device(device))


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB; give {WEIGHTS}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: Inception's weights cannot be read: {error.strerror}; give {WEIGHTS}") from None


def _state(content: bytes, path: str | Path) -> dict[str, Tensor]:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling what is no weight file raises nearly anything
        raise UserError(f"{path}: cannot be read as weights ({type(error).__name__}); give {WEIGHTS}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds no weights of a network; give {WEIGHTS}")
    return state
