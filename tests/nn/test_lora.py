"""Low-rank corrections: nothing at first, only they learn, and folded in they are gone."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import mm
from mm.errors import UserError
from mm.nn.lora import LoraConfig, add_lora, merge_lora
from mm.systems.clip import ClipConfig, build
from mm.training.ema import Ema


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
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 2 * (6 + 4) + 1


def test_a_pattern_without_a_layer_is_refused(net: Net) -> None:
    with pytest.raises(UserError, match=r"matches no layer; there are such as .*attention"):
        add_lora(net, LoraConfig(targets=("*.attentoin",)))


def test_what_is_locked_stays_as_it_is(net: Net) -> None:
    net.conv.requires_grad_(False)
    corrected = add_lora(net, LoraConfig(rank=2))
    assert not any(name.startswith("conv.") for name in corrected)
    with pytest.raises(UserError, match=r"'conv' matches no layer"):
        add_lora(net, LoraConfig(targets=("conv",)))


def test_a_locked_tower_gets_no_correction() -> None:
    small = {"width": 16, "layers": 1, "heads": 2, "vocab_size": 64}
    image = {"backbone": "resnet18", "image_size": 32, "options": {"channels": [8, 8, 8, 8]}}
    system = build(ClipConfig.model_validate({"image": image, "text": small, "embed_dim": 8, "lock": ["image"]}))
    corrected = add_lora(system, LoraConfig(rank=2))
    assert any("text" in name for name in corrected)
    assert [name for name in corrected if "image" in name] == ["towers.projections.image.weight"]


def test_dropout_acts_on_corrections_in_training_only(net: Net) -> None:
    x = torch.randn(4, 3, 8, 8)
    add_lora(net, LoraConfig(rank=2, dropout=0.5))
    steps(net, x)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


def test_folding_frees_the_running_statistics(net: Net) -> None:
    add_lora(net, LoraConfig(rank=2))
    assert not net.train().norm.training
    merge_lora(net)
    assert net.train().norm.training


def test_under_autocast_nothing_changes_at_first_and_all_corrections_learn(net: Net) -> None:
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = net.eval()(x)
        add_lora(net, LoraConfig(rank=2))
        assert torch.equal(net(x), before)
        net(x).float().square().mean().backward()
    ups = [parameter for name, parameter in net.named_parameters() if name.endswith(".up")]
    assert len(ups) == 4
    assert all(up.grad is not None and up.grad.dtype == torch.float32 and bool(up.grad.any()) for up in ups)


def test_averages_follow_the_corrections_alone(net: Net) -> None:
    x = torch.randn(4, 3, 8, 8)
    add_lora(net, LoraConfig(rank=2))
    ema = Ema(net, 0.5)
    steps(net, x, count=1)
    ema.update()
    live, averaged = net.state_dict(), ema.state_dict(net)
    assert list(averaged) == list(live)
    changed = {name for name in live if not torch.equal(live[name], averaged[name])}
    assert changed
    assert all(name.endswith((".up", ".down", "logit_scale")) for name in changed)


def test_a_copy_has_its_own_corrections(net: Net) -> None:
    x = torch.randn(4, 3, 8, 8)
    add_lora(net, LoraConfig(rank=2))
    twin = copy.deepcopy(net)
    before = twin.eval()(x)
    steps(net, x)
    assert torch.equal(twin(x), before)
    assert not twin.train().norm.training


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
