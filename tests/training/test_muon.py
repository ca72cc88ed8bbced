"""Muon is torch's on matrices, orthogonalises convolutions, leaves the ends to AdamW, and goes on where it stopped."""

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_training import toy_config

from mm.nn.conv import PictureDecoder
from mm.nn.ends import end
from mm.training.muon import Muon, orthogonalised, split_groups
from mm.training.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from mm.types import Batch, Losses, System

CPU = torch.device("cpu")


class Net(System):
    """Each kind of parameter once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 10)
        self.conv = nn.Conv2d(4, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.head = end(nn.Linear(10, 7))
        self.tied = nn.Linear(6, 7, bias=False)
        self.tied.weight = self.words.weight

    def loss(self, batch: Batch, step: int) -> Losses:
        raise NotImplementedError


def random_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_matrices_are_inner_layers_only() -> None:
    net = Net()
    matrices, others = split_groups(net.parameter_groups(), net)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert {names[id(p)] for group in matrices for p in group["params"]} == {"inner.weight", "conv.weight"}
    everything = [id(p) for group in matrices + others for p in group["params"]]
    assert sorted(everything) == sorted(names)
    decoder = PictureDecoder(4, 4, (8, 16), 1)
    [group], _ = split_groups([{"params": list(decoder.parameters())}], decoder)
    assert id(decoder.output.weight) not in {id(p) for p in group["params"]}


def test_is_torchs_on_matrices() -> None:
    """Same coefficients, momentum, length and decay as torch.optim.Muon, which computes in bf16 everywhere."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(24, 10, bias=False), nn.Linear(24, 10, bias=False)
    theirs.load_state_dict(ours.state_dict())
    mine = Muon([{"params": [ours.weight]}], [], lr=0.1, weight_decay=0.3)
    reference = torch.optim.Muon([theirs.weight], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        random_gradients(ours, seed)
        random_gradients(theirs, seed)
        mine.step()
        reference.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=0.02)
    assert not torch.allclose(ours.weight, torch.zeros(()), atol=0.1)


@pytest.mark.parametrize("shape", [(20, 5), (5, 20), (12, 12)])
def test_singular_values_are_nearly_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    values: Tensor = torch.linalg.svdvals(orthogonalised(torch.randn(shape)).float())
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_convolution_is_the_matrix_of_its_flattened_kernels() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, bias=False)
    flat = nn.Linear(36, 8, bias=False)
    with torch.no_grad():
        flat.weight.copy_(conv.weight.flatten(1))
    gradient = torch.randn_like(conv.weight)
    conv.weight.grad, flat.weight.grad = gradient, gradient.flatten(1).clone()
    for layer in (conv, flat):
        Muon([{"params": [layer.weight]}], [], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(conv.weight.flatten(1), flat.weight)


def test_rest_takes_adamws_steps() -> None:
    net, plain = Net(), Net()
    muon = build_optimizer(net, toy_config(optimizer="muon", lr=0.1), CPU)
    adamw = build_optimizer(plain, toy_config(lr=0.1), CPU)
    for seed in range(3):
        for module, optimizer in ((net, muon), (plain, adamw)):
            random_gradients(module, seed)
            optimizer.step()
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (name not in {"inner.weight", "conv.weight"}), name


def test_goes_on_where_it_stopped() -> None:
    net = Net()
    optimizer = build_optimizer(net, toy_config(optimizer="muon", lr=0.1), CPU)
    random_gradients(net, 0)
    optimizer.step()
    again = copy.deepcopy(net)
    for layer, copied in zip(net.modules(), again.modules(), strict=True):
        if isinstance(layer, nn.Linear) and getattr(layer.weight, "end", False):
            end(copied)  # pyright: ignore[reportArgumentType]
    restored = build_optimizer(again, toy_config(optimizer="muon", lr=0.1), CPU)
    load_optimizer_tensors(restored, again, optimizer_tensors(optimizer, net))
    for module, which in ((net, optimizer), (again, restored)):
        random_gradients(module, 1)
        which.step()
    for (name, ours), theirs in zip(net.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
