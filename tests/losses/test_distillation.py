"""The contrastive loss with momentum features, queues and soft targets against its definition by loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.losses.contrastive import info_nce
from mm.losses.distillation import Views, distilled_contrastive, ramped
from mm.losses.queue import Queued

GROUPS = torch.tensor([0, 0, 1, 2])


def vectors(seed: int, rows: int = 4) -> Tensor:
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def one_way(rows: Tensor, teacher: Tensor, columns: Tensor, ids: list[int], scale: float, alpha: float) -> Tensor:
    terms = []
    for i, group in enumerate(GROUPS.tolist()):
        own = [j for j, other in enumerate(ids) if other == group]
        logits = torch.stack([scale * torch.dot(rows[i], column) for column in columns])
        soft = torch.stack([scale * torch.dot(teacher[i], column) for column in columns]).softmax(0)
        for j in range(len(ids)):
            target = alpha * soft[j] + (1 - alpha) * (1 / len(own) if j in own else 0)
            terms.append(-target * logits.log_softmax(0)[j])
    return torch.stack(terms).sum() / len(rows)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("queue", [False, True])
def test_loss_is_its_definition(alpha: float, queue: bool) -> None:
    student, teacher = Views(vectors(0), vectors(1)), Views(vectors(2), vectors(3))
    ids = torch.tensor([2, 7, 8])
    queued = (Queued(vectors(4, 3), ids), Queued(vectors(5, 3), ids)) if queue else None
    found = distilled_contrastive(student, teacher, torch.tensor(5.0), GROUPS, alpha=alpha, queued=queued)
    texts, images, numbers = teacher.text, teacher.image, GROUPS.tolist()
    if queued is not None:
        images, texts = (torch.cat([side, past.features]) for side, past in zip(teacher, queued, strict=True))
        numbers = numbers + ids.tolist()
    expected = one_way(student.image, teacher.image, texts, numbers, 5.0, alpha)
    expected = expected + one_way(student.text, teacher.text, images, numbers, 5.0, alpha)
    torch.testing.assert_close(found, expected / 2)


def test_without_distillation_and_momentum_it_is_plain_info_nce() -> None:
    student, scale = Views(vectors(0), vectors(1)), torch.tensor(5.0)
    plain = info_nce(*student, scale, groups=GROUPS)
    torch.testing.assert_close(distilled_contrastive(student, student, scale, GROUPS), plain)


def test_what_shows_the_same_thing_is_no_negative_from_the_queue() -> None:
    """A queued copy of the row's own match adds to the loss as a stranger, but not as one of its group."""
    side = Views(vectors(1)[:1], vectors(1)[:1])
    group, scale = torch.tensor([0]), torch.tensor(50.0)
    losses = []
    for number in (0, 9):
        past = Queued(side.text, torch.tensor([number]))
        losses.append(distilled_contrastive(side, side, scale, group, queued=(past, past)))
    torch.testing.assert_close(torch.stack(losses), torch.tensor(2.0).log().expand(2))
    row = torch.autograd.functional.jacobian(
        lambda x: distilled_contrastive(Views(x, x), side, scale, group, queued=(past._replace(ids=group),) * 2), side.image
    )
    assert row.abs().max() < 1e-5


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = Views(vectors(2).requires_grad_(), vectors(3).requires_grad_())
    student, scale = Views(vectors(0).requires_grad_(), vectors(1)), torch.tensor(5.0, requires_grad=True)
    loss = distilled_contrastive(student, teacher, scale, GROUPS, alpha=0.5)
    image, scale_gradient, *nothing = torch.autograd.grad(loss, [student.image, scale, *teacher], allow_unused=True)
    assert image.any()
    assert scale_gradient.any()
    assert nothing == [None, None]


def test_the_share_of_soft_targets_rises_over_the_ramp() -> None:
    assert [ramped(0.4, step, 4) for step in (0, 1, 2, 4, 9)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert ramped(0.4, 0, 0) == 0.4
