"""How far a reconstructed picture is from the original: per pixel, in a network's features, to a discriminator.

Shapes: B batch, C channels, H and W pixels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mm.nn.precision import full_precision

ADAPTIVE_EPS = 1e-4
MAX_ADAPTIVE_WEIGHT = 1e4
"""As in VQGAN (https://arxiv.org/abs/2012.09841)."""


@full_precision
def logit_laplace(output: Float[Tensor, "b 6 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of pixels under logit-Laplace distributions (https://arxiv.org/abs/2102.12092, A.3).

    Args:
        output: Location (first three channels) and log scale (last three) in logit space.
        target: Pixels strictly between 0 and 1.
    """
    location, log_scale = output.float().chunk(2, 1)
    target = target.float()
    distance = (target.logit() - location).abs() * torch.exp(-log_scale)
    return (distance + log_scale + torch.log(2 * target * (1 - target))).mean()


def perceptual_distance(
    stages: Sequence[Float[Tensor, "b c h w"]], target_stages: Sequence[Float[Tensor, "b c h w"]]
) -> Float[Tensor, ""]:
    """Mean squared difference of feature maps at unit length, summed over channels, averaged over positions and stages.

    LPIPS (https://arxiv.org/abs/1801.03924) without its learned channel weights, which belong to one published network.
    """
    distances = [
        (F.normalize(one.float(), dim=1) - F.normalize(other.float(), dim=1)).square().sum(1).mean()
        for one, other in zip(stages, target_stages, strict=True)
    ]
    return torch.stack(distances).mean()


@full_precision
def hinge_loss(real_logits: Tensor, made_logits: Tensor) -> Float[Tensor, ""]:
    """Of a discriminator: real patches above 1, made ones below -1 cost nothing (https://arxiv.org/abs/1705.02894)."""
    return (F.relu(1 - real_logits.float()).mean() + F.relu(1 + made_logits.float()).mean()) / 2


def frozen_call(module: nn.Module, x: Tensor) -> Tensor:
    """The module's result with its parameters held fixed, so that gradients reach ``x`` alone."""
    return functional_call(module, {name: parameter.detach() for name, parameter in module.named_parameters()}, (x,))


def adaptive_weight(distance: Tensor, deception: Tensor, last_layer: Tensor) -> Float[Tensor, ""]:
    """The factor that gives ``deception`` a gradient as large as that of ``distance`` at the decoder's last layer."""
    gradient: Callable[[Tensor], Tensor] = lambda loss: torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()  # noqa: E731
    weight = gradient(distance) / (gradient(deception) + ADAPTIVE_EPS)
    return weight.clamp(0, MAX_ADAPTIVE_WEIGHT).detach()
