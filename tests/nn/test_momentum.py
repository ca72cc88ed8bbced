"""The momentum copy: an average by its formula, whole in the state, never trained, and right after weights were loaded."""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mm.losses.queue import FeatureQueue
from mm.nn.lora import LoraConfig, add_lora
from mm.nn.momentum import Momentum


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.momentum = Momentum(self.net, 0.9)


def change(owner: Owner) -> None:
    with torch.no_grad():
        for parameter in owner.net.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_the_average_is_its_formula() -> None:
    owner = Owner()
    expected = [p.detach().clone() for p in owner.momentum.average.parameters()]
    for _ in range(3):
        change(owner)
        owner.momentum.update()
        expected = [0.9 * before + 0.1 * now for before, now in zip(expected, owner.net.parameters(), strict=True)]
    for found, value in zip(owner.momentum.average.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), value.detach())
        assert not found.requires_grad


def test_it_is_in_the_state_once_and_resumes_exactly() -> None:
    owner, other = Owner(), Owner()
    change(owner)
    owner.momentum.update()
    state = copy.deepcopy(owner.state_dict())
    assert sum(name.startswith("momentum.") for name in state) == len(owner.net.state_dict()) + 1
    other.load_state_dict(state)
    with torch.no_grad():
        for mine, theirs in zip(owner.net.parameters(), other.net.parameters(), strict=True):
            mine.mul_(2)
            theirs.mul_(2)
    for one in (owner, other):
        one.momentum.update()
    for mine, theirs in zip(owner.momentum.average.parameters(), other.momentum.average.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_before_the_first_update_it_follows_loaded_weights() -> None:
    owner, trained = Owner(), Owner()
    owner.net.load_state_dict(trained.net.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(owner.eval().momentum.average(x), trained.eval().net(x))


def test_low_rank_corrections_are_followed() -> None:
    owner = Owner()
    add_lora(owner.net, LoraConfig(targets=("0",), rank=2))
    with torch.no_grad():
        owner.net[0].parametrizations.weight[0].up.fill_(1.0)
    torch.testing.assert_close(owner.momentum.average[0].weight, owner.net[0].weight)


class Transfers(TorchDispatchMode):
    """Counts numbers that Python takes out of a tensor, for which it waits where tensors live on an accelerator."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_a_count() -> None:
    """Once a step has been made, or the state of one was loaded and read."""
    owner, queue = Owner(), FeatureQueue(4, 2)
    rows = torch.ones(3, 2), torch.tensor([1, 2, 3])
    for step in range(4):
        with Transfers() as transfers:
            copied = owner.momentum.average
            queue.stage(*rows, step)
            queue.commit()
            assert len(queue.content().ids) == min(4, 3 * (step + 1))
            owner.momentum.update()
        assert copied is owner.momentum.average
        assert (transfers.count == 0) == (step > 0)
    earlier, behind = copy.deepcopy(owner.state_dict()), copy.deepcopy(queue.state_dict())
    owner.load_state_dict(Owner().state_dict())
    queue.load_state_dict(FeatureQueue(4, 2).state_dict())
    assert len(queue) == 0, "what was known before is forgotten"
    change(owner)
    torch.testing.assert_close(owner.momentum.average[0].weight, owner.net[0].weight)
    owner.load_state_dict(earlier)
    queue.load_state_dict(behind)
    change(owner)
    assert len(queue) == 4
    assert torch.equal(owner.momentum.average[0].weight, earlier["momentum._average.0.weight"])
