"""Low-rank corrections: nothing at first, only they learn, and folded in they are gone."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import mm
from mm.errors import UserError
from mm.nn.lora import LoraConfig, add_lora, merge_lora, trainable


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.conv(x)).flatten(2).mT
        return self.logit_scale * self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def steps(net: Net, x: torch.Tensor, count: int = 5) -> None:
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()
    net.eval()


def test_at_first_nothing_changes_then_only_corrections_do(net: Net) -> None:
    x = torch.randn(4, 3, 8, 8)
    before, state = net.eval()(x), copy.deepcopy(net.state_dict())
    corrected = add_lora(net, LoraConfig(rank=2))
    assert corrected == ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    assert torch.equal(net.eval()(x), before)
    steps(net, x)
    assert not torch.equal(net(x), before)
    after = net.state_dict()
    for name in ("conv.parametrizations.weight.original", "attention.parametrizations.in_proj_weight.original"):
        assert torch.equal(after[name], state[name.replace(".parametrizations", "").removesuffix(".original")])
    for name in ("norm.running_mean", "norm.running_var", "norm.weight", "conv.bias"):
        assert torch.equal(after[name], state[name]), name


def test_every_correction_learns(net: Net) -> None:
    add_lora(net, LoraConfig(rank=2))
    steps(net, torch.randn(4, 3, 8, 8), count=2)
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == parameter.requires_grad, name


def test_folded_in_the_names_are_the_old_ones_and_the_outputs_the_new(net: Net) -> None:
    x, names = torch.randn(4, 3, 8, 8), list(net.state_dict())
    add_lora(net, LoraConfig(rank=2))
    steps(net, x)
    expected = net(x)
    merge_lora(net)
    assert list(net.state_dict()) == names or sorted(net.state_dict()) == sorted(names)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5)


def test_trainable_counts(net: Net) -> None:
    add_lora(net, LoraConfig(rank=2, targets=("head",)))
    assert trainable(net)[0] == 2 * (6 + 4) + 1


def test_a_pattern_without_a_layer_is_refused(net: Net) -> None:
    with pytest.raises(UserError, match=r"matches no layer; there are such as .*attention"):
        add_lora(net, LoraConfig(targets=("*.attentoin",)))


TUNED = ["train.steps=4", "train.batch_size=4", "train.checkpoint_every_steps=2", "train.tensorboard=false", "tune={rank: 2}"]


def test_a_tuned_run_is_a_model_and_resumes(tmp_path: Path) -> None:
    data = "data.train=emoji:train/core/noto/novel"
    whole = mm.train("configs/finetune.yaml", [*TUNED, data], out=tmp_path / "run")
    model = mm.load(tmp_path / "run", device="cpu")
    assert whole.checkpoint is not None
    base = mm.load("emoji-clip", device="cpu").system.state_dict()
    assert set(model.system.state_dict()) == {name for name in base if not name.startswith("queues.")}
    assert model.fingerprint != mm.load("emoji-clip", device="cpu").fingerprint
    mm.train("configs/finetune.yaml", [*TUNED, data, "train.steps=2"], out=tmp_path / "part")
    mm.train("configs/finetune.yaml", [*TUNED, data], out=tmp_path / "part")
    again = mm.load(tmp_path / "part", device="cpu").system.state_dict()
    for name, tensor in model.system.state_dict().items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)
