"""Running statistics of normalisation layers: state that a forward pass changes, unlike any other."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Means, variances and counts of all batch and instance normalisation layers, by their name in the state."""
    return {
        name: buffer
        for prefix, part in module.named_modules()
        if isinstance(part, _NormBase)
        for name, buffer in part.named_buffers(prefix, recurse=False)
    }
