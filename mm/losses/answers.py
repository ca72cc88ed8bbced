"""Answers as classes: soft targets, since people disagree, and their loss.

Source: https://arxiv.org/abs/1708.02711, section 3.5, and ViLT's fine-tuning. Shapes: B questions, A known answers.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def answer_targets(answers: Sequence[Mapping[str, float]], places: Mapping[str, int]) -> Float[Tensor, "b a"]:
    """How right each known answer is for each question, 0..1.

    Args:
        answers: Right answers of each question and how right they are; those that are not known are left out.
        places: Column of each known answer.
    """
    targets = torch.zeros(len(answers), len(places))
    for row, right in enumerate(answers):
        for answer, score in right.items():
            if answer in places:
                targets[row, places[answer]] = score
    return targets


def answer_loss(logits: Float[Tensor, "b a"], targets: Float[Tensor, "b a"]) -> Float[Tensor, ""]:
    """Binary cross-entropy summed over the answers and averaged over the questions, in nats.

    The sum is the mean over all A classes times A, as in the reference: else the few right answers would be lost among them.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets) * targets.shape[1]


def answer_shares(targets: Float[Tensor, "b a"]) -> Float[Tensor, "b a"]:
    """How right each answer is as a share of its question: rows add up to 1, to 0 where no answer is right."""
    return targets / targets.sum(1, keepdim=True).where(targets.any(1, keepdim=True), 1)


def class_loss(logits: Float[Tensor, "b a"], targets: Float[Tensor, "b a"]) -> Float[Tensor, ""]:
    """Cross-entropy with `answer_shares`, averaged over the questions, in nats: each has one answer."""
    return -(answer_shares(targets) * logits.float().log_softmax(1)).sum(1).mean()
