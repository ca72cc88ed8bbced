"""What is said of networks that cannot be cut, what is computed again, and whose pieces are whose."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mm.errors import ConfigError, UserError
from mm.nn.attention import MultiHeadAttention
from mm.nn.experts import Experts, ExpertsConfig
from mm.nn.lora import LoraConfig, add_lora
from mm.nn.parallel import divide, recompute_blocks
from mm.nn.stages import Pipeline
from mm.nn.transformer import Block, FeedForward, Transformer
from mm.placement import blocks
from mm.ranks import Peers, Split

ALONE, TWO = Peers(), Peers(0, 2)


def transformer(layers: int = 3, heads: int = 2, hidden: int = 32) -> Transformer:
    torch.manual_seed(0)

    def block(_: int) -> Block:
        feed_forward = FeedForward(16, hidden, nn.GELU())
        return Block(attention=MultiHeadAttention(16, heads), feed_forward=feed_forward, norm=lambda: nn.LayerNorm(16))

    return Transformer(block, layers)


def corrected() -> Transformer:
    network = transformer()
    add_lora(network, LoraConfig(rank=2))
    return network


def routed() -> nn.Module:
    return nn.Sequential(transformer(layers=2), Experts(lambda: FeedForward(16, 32, nn.GELU()), 16, ExpertsConfig(count=2)))


@pytest.mark.parametrize(
    ("network", "peers", "message"),
    [
        (nn.Linear(2, 2), {"slices": TWO}, "parallel.tensor 2: this system has no transformer"),
        (transformer(heads=1), {"slices": TWO}, "parallel.tensor 2 does not divide the 1 heads of 'blocks.0.attention'"),
        (transformer(hidden=33), {"slices": TWO}, "parallel.tensor 2 does not divide the 33 features"),
        (corrected(), {"slices": TWO}, "has additions"),
        (transformer(layers=1), {"stages": TWO}, "parallel.pipeline 2: this system has no stack of so many layers"),
        (routed(), {"stages": TWO}, "losses of experts do not reach the other stages"),
        (nn.Linear(2, 2), {"recompute": "full"}, "parallel.recompute: this system has no blocks"),
    ],
)
def test_what_cannot_be_cut_is_said_in_one_line(network: nn.Module, peers: dict[str, Peers], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        divide(network, **{"slices": ALONE, "stages": ALONE} | peers)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_layers_of_another_stage_are_not_here() -> None:
    network = transformer(layers=5)
    divide(network, stages=Peers(1, 2), slices=ALONE)
    held = [{parameter.is_meta for parameter in block.parameters()} for block in blocks(network)]
    assert held == [{True}, {True}, {False}, {False}, {False}]
    with pytest.raises(UserError, match="single layers"):
        network.blocks[0](torch.zeros(1, 2, 16))
    with pytest.raises(UserError, match="neither decode"):
        network(torch.zeros(1, 2, 16), maps=[])


@pytest.mark.parametrize(("layers", "size"), [(2, 2), (5, 2), (7, 3), (12, 5)])
def test_each_layer_is_of_one_stage(layers: int, size: int) -> None:
    stages = [Pipeline(Peers(rank, size), 1).own(layers) for rank in range(size)]
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


def test_pieces_of_keys_and_values_are_those_of_heads() -> None:
    whole = torch.arange(8)[:, None].expand(8, 3)  # two heads of two numbers: keys 0 to 3, values 4 to 7
    pieces = [Split(0, 2, Peers(rank, 2)).own(whole)[:, 0].tolist() for rank in range(2)]
    assert pieces == [[0, 1, 4, 5], [2, 3, 6, 7]]


@contextlib.contextmanager
def kept() -> Iterator[list[int]]:
    """Numbers that the forward pass keeps for the backward one."""
    sizes: list[int] = []
    seen: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


def test_computing_again_keeps_gradients_and_dropout() -> None:
    results = {}
    for kind in ("none", "selective", "full"):
        network, x = transformer(), torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
        for block in network.blocks:
            block.attention.dropout = 0.3
        if kind != "none":
            recompute_blocks(network, selective=kind == "selective")
        torch.manual_seed(2)
        with kept() as sizes:
            result = network(x)
        result.square().sum().backward()
        results[kind] = sum(sizes), [parameter.grad for parameter in network.parameters()]
    for kind in ("selective", "full"):
        for again, before in zip(results[kind][1], results["none"][1], strict=True):
            assert torch.equal(again, before)
    assert results["full"][0] < results["none"][0]


def test_a_network_in_evaluation_computes_nothing_again() -> None:
    network = transformer()
    expected = network(torch.ones(1, 4, 16))
    recompute_blocks(network, selective=False)
    with torch.no_grad():
        assert torch.equal(network(torch.ones(1, 4, 16)), expected)
