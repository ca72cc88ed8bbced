"""The optimizer follows the published rule, the schedule its formula, and both survive memory formats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_training import ToyClip, ToyRegression, make, toy_config

from mm.errors import CheckpointError
from mm.training.config import ParallelConfig
from mm.training.layout import Layout
from mm.training.optim import (
    align_strides,
    build_optimizer,
    load_optimizer_tensors,
    lr_factor,
    optimizer_tensors,
    set_lr,
)
from mm.training.parallel import World
from mm.types import Batch, Losses, System

CPU = torch.device("cpu")


class Conv(System):
    """One convolution in the memory format of picture encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def loss(self, batch: Batch, step: int) -> Losses:
        assert batch.image is not None
        return Losses(self.conv(batch.image).square().mean())


def test_update_is_adamw() -> None:
    """Against the formulas of https://arxiv.org/abs/1711.05101, with decay on matrices only."""
    config = toy_config(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-3)
    system = make(ToyClip)
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    optimizer = build_optimizer(system, config, CPU)
    averages = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in before.items()}
    for t in (1, 2, 3):
        for name, parameter in system.named_parameters():
            torch.manual_seed(t)
            parameter.grad = torch.randn_like(parameter)
            m, v = averages[name]
            m.mul_(0.8).add_(parameter.grad, alpha=0.2)
            v.mul_(0.9).addcmul_(parameter.grad, parameter.grad, value=0.1)
            decay = 0.5 if parameter.ndim >= 2 else 0.0
            before[name] -= 0.1 * decay * before[name]
            before[name] -= 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
        optimizer.step()
    for name, parameter in system.named_parameters():
        assert torch.allclose(parameter, before[name], atol=1e-5), name


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(1, 300),
    st.integers(0, 300),
    st.floats(0, 1),
)
def test_schedule(schedule: str, steps: int, warmup_steps: int, final_lr: float) -> None:
    config = toy_config(schedule=schedule, steps=steps, warmup_steps=warmup_steps, final_lr=final_lr)
    factors = [lr_factor(step, config) for step in range(steps + 5)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    rising, falling = factors[:warmup_steps], factors[warmup_steps:]
    assert rising == sorted(rising)
    assert all(factor > 0 for factor in rising), "a first step without learning would be wasted"
    assert falling == sorted(falling, reverse=True)
    if warmup_steps < steps:
        assert factors[warmup_steps] == pytest.approx(1)
        assert factors[steps] == pytest.approx(1 if schedule == "constant" else final_lr)


def test_cosine_halfway() -> None:
    config = toy_config(steps=110, warmup_steps=10, final_lr=0.2)
    assert lr_factor(60, config) == pytest.approx(0.6)
    assert lr_factor(35, config) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_groups_scale_the_learning_rate() -> None:
    system = make(ToyClip)
    system.parameter_groups = lambda: [  # type: ignore[method-assign]
        {"params": list(system.left.parameters()), "lr_scale": 0.1},
        {"params": list(system.right.parameters())},
        {"params": []},
    ]
    optimizer = build_optimizer(system, toy_config(), CPU)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.5]


@pytest.mark.parametrize(("max_norm", "after"), [(0, 5.0), (1, 1.0), (100, 5.0)])
def test_clipping(max_norm: float, after: float) -> None:
    a, b, without = torch.zeros(2), torch.zeros(1), torch.zeros(3)
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert Layout(World(0, 1, CPU), ParallelConfig()).clip([a, b, without], max_norm).item() == pytest.approx(5.0)
    assert math.hypot(a.grad[0], b.grad[0]) == pytest.approx(after, rel=1e-4)
    assert a.grad[0] / b.grad[0] == pytest.approx(0.75)


def step(system: System, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    image = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed))
    system.loss(Batch(("a", "b"), image), 0).total.backward()
    align_strides(optimizer)
    optimizer.step()


def test_state_returns_by_name_and_memory_format() -> None:
    """Fused kernels read raw memory, so averages must have their parameter's strides after a resume."""
    torch.manual_seed(0)
    config, unbroken = toy_config(), Conv()
    optimizer = build_optimizer(unbroken, config, CPU)
    step(unbroken, optimizer, 1)
    tensors = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in optimizer_tensors(optimizer, unbroken).items()
    }
    assert set(tensors) == {f"conv.{p}:{key}" for p in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")}
    resumed = Conv()
    resumed.load_state_dict(unbroken.state_dict())
    other = build_optimizer(resumed, config, CPU)
    load_optimizer_tensors(other, resumed, tensors)
    step(unbroken, optimizer, 2)
    step(resumed, other, 2)
    assert torch.equal(unbroken.conv.weight, resumed.conv.weight)
    assert torch.equal(unbroken.conv.bias, resumed.conv.bias)  # pyright: ignore[reportArgumentType]


def test_memory_format_changed_after_loading() -> None:
    torch.manual_seed(0)
    config, one = toy_config(), Conv()
    optimizer = build_optimizer(one, config, CPU)
    step(one, optimizer, 1)
    two = Conv().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    two.load_state_dict(one.state_dict())
    other = build_optimizer(two, config, CPU)
    load_optimizer_tensors(other, two, optimizer_tensors(optimizer, one))
    two.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    step(one, optimizer, 2)
    step(two, other, 2)
    assert torch.equal(one.conv.weight, two.conv.weight)


def test_state_of_another_network_is_refused() -> None:
    system = make(ToyRegression)
    optimizer = build_optimizer(system, toy_config(), CPU)
    with pytest.raises(CheckpointError, match="left"):
        load_optimizer_tensors(optimizer, system, {"left.0.weight:exp_avg": torch.zeros(16, 12)})
    with pytest.raises(CheckpointError, match=r"net\.0\.weight"):
        load_optimizer_tensors(optimizer, system, {"net.0.weight:exp_avg": torch.zeros(2, 2)})
