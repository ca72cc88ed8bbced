"""Image-text contrastive loss against momentum encoders and queues, with soft targets from the momentum encoders.

Source: ALBEF https://arxiv.org/abs/2107.07651, section 3.2 (equations 1 and 2) and 3.3 (equation 6). What shows the same thing
is never a negative: targets are spread over all columns of a row's own group, in the batch and in the queue.

Columns are features of momentum encoders, through which no gradient passes. So a rank needs the columns of all ranks and
nothing of their gradients: the mean over ranks is the loss of the global batch, and gradients averaged over ranks are its.

Shapes: B rows of this rank, K columns of all ranks and of the queue, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mm.losses.gather import Gather
from mm.losses.queue import Queued
from mm.nn.precision import full_precision


class Views(NamedTuple):
    """Unit vectors of the pictures and of the texts of the same samples."""

    image: Float[Tensor, "b d"]
    text: Float[Tensor, "b d"]


def ramped(alpha: float, step: int, ramp_steps: int) -> float:
    """The share of soft targets at a step, the first being 0: rises linearly to ``alpha`` over ``ramp_steps``, then stays."""
    return alpha * min(1.0, step / ramp_steps) if ramp_steps else alpha


@full_precision
def distilled_contrastive(
    student: Views,
    teacher: Views,
    logit_scale: Float[Tensor, ""],
    groups: Int[Tensor, " b"],
    *,
    alpha: float = 0.0,
    queued: tuple[Queued, Queued] | None = None,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """Mean of the cross-entropies of pictures over momentum texts and of texts over momentum pictures, in nats.

    The target of a row is ``alpha * softmax(momentum logits) + (1 - alpha) * matches / number of matches``.

    Args:
        student: Of the trained encoders.
        teacher: Of their momentum copies, for the same samples.
        logit_scale: Multiplier of the cosines itself, not its logarithm.
        groups: Equal numbers mark what shows the same thing, over all ranks and, with queues, over all batches.
        alpha: Share of the soft targets, in 0..1.
        queued: Past momentum features of pictures and of texts.
        gather: Ranks to compare with; None for this process alone.
    """
    precise = torch.promote_types(student.image.dtype, torch.float32)
    student, scale = Views(*(side.to(precise) for side in student)), logit_scale.to(precise)
    teacher = Views(*(side.detach().to(precise) for side in teacher))
    image_columns = _columns(teacher.image, groups, queued and queued[0], gather)
    text_columns = _columns(teacher.text, groups, queued and queued[1], gather)
    image_to_text = _one_way(student.image, teacher.image, text_columns, scale, groups, alpha)
    text_to_image = _one_way(student.text, teacher.text, image_columns, scale, groups, alpha)
    return (image_to_text + text_to_image) / 2


def _columns(features: Tensor, groups: Tensor, queued: Queued | None, gather: Gather | None) -> Queued:
    """What rows are compared with, and its groups: the momentum features of all ranks, then the queue."""
    if gather is not None:
        features, groups = gather(features), gather(groups)
    if queued is None:
        return Queued(features, groups)
    return Queued(torch.cat([features, queued.features.to(features.dtype)]), torch.cat([groups, queued.ids]))


def _one_way(rows: Tensor, teacher: Tensor, columns: Queued, scale: Tensor, groups: Tensor, alpha: float) -> Tensor:
    logits = scale * rows @ columns.features.T
    matches = (groups[:, None] == columns.ids).to(logits.dtype)
    target = matches / matches.sum(1, keepdim=True)
    if alpha:
        target = target.lerp((scale.detach() * teacher @ columns.features.T).softmax(1), alpha)
    return F.cross_entropy(logits, target)
