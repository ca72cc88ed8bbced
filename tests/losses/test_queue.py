"""The feature queue: first in, first out, and never a negative of what shows the same thing."""

import torch
import torch.nn.functional as F

from mm.losses.contrastive import info_nce
from mm.losses.queue import FeatureQueue


def push(queue: FeatureQueue, ids: list[int]) -> None:
    """Features carry their id in every entry."""
    numbers = torch.tensor(ids)
    queue.push(numbers.float()[:, None].expand(-1, 2), numbers)


def test_keeps_the_latest_in_any_order() -> None:
    queue = FeatureQueue(5, 2)
    assert len(queue) == 0
    assert len(queue.content().ids) == 0
    expected: list[int] = []
    for ids in ([1, 2], [3, 4], [5, 6, 7], list(range(10, 23)), [30], [31, 32, 33, 34, 35]):
        push(queue, ids)
        expected = (expected + ids)[-5:]
        content = queue.content()
        assert sorted(content.ids.tolist()) == sorted(expected)
        assert (content.features == content.ids[:, None]).all()


def test_state_restores_the_queue_and_its_position() -> None:
    queue, copy = FeatureQueue(4, 2), FeatureQueue(4, 2)
    push(queue, [1, 2, 3, 4, 5])
    copy.load_state_dict(queue.state_dict())
    for one in (queue, copy):
        push(one, [6, 7])
    assert torch.equal(queue.ids, copy.ids)
    assert torch.equal(queue.content().features, copy.content().features)


def test_content_is_not_disturbed_by_a_later_push() -> None:
    queue = FeatureQueue(2, 2)
    push(queue, [1, 2])
    content = queue.content()
    push(queue, [3, 4])
    assert content.ids.tolist() == [1, 2]


def test_staged_features_wait_for_their_step() -> None:
    queue = FeatureQueue(8, 2)
    queue.stage(torch.ones(2, 2), torch.tensor([1, 2]), step=0)  # a step that is never applied
    queue.stage(torch.ones(1, 2), torch.tensor([3]), step=1)
    queue.stage(torch.ones(1, 2), torch.tensor([4]), step=1)
    assert len(queue) == 0
    queue.commit()
    queue.commit()
    assert queue.content().ids.tolist() == [3, 4]


def test_the_same_thing_is_never_a_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, past = F.normalize(torch.randn(3, 4, 8, generator=generator), dim=2)
    scale, groups = torch.tensor(10.0), torch.tensor([0, 1, 2, 3])
    queues = FeatureQueue(8, 8), FeatureQueue(8, 8)
    plain = info_nce(a, b, scale, groups=groups)
    for queue in queues:
        queue.push(past[:1], groups[:1])
    only_others = info_nce(a, b, scale, groups=groups, negatives=(queues[0].content(), queues[1].content()))
    same = groups * 0
    assert only_others > plain
    torch.testing.assert_close(
        info_nce(a, b, scale, groups=same, negatives=(queues[0].content(), queues[1].content())),
        info_nce(a, b, scale, groups=same),
    )
