"""Tensor parallelism: each process computes some heads of every attention and some hidden features of every feed-forward.

The first linear layers of a part keep some of their rows, the last one the matching columns, so one sum over processes ends the
part, and one of gradients begins its backward pass. Everything else is computed by all alike.

Source: Megatron-LM https://arxiv.org/abs/1909.08053, section 3. Parameters stay plain tensors, not DTensors: keys and values
(with timm's towers queries, too) share a matrix that no placement of a DTensor cuts by heads, and all that works on plain
tensors, optimizers and FSDP2 included, goes on to.

What is summed here are activations, in the type that layers compute in: each process's part has been rounded to it already, and
fp32 would double what is sent at every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from mm.errors import ConfigError
from mm.nn.attention import MultiHeadAttention
from mm.nn.linear import Linear
from mm.nn.transformer import FeedForward, GatedFeedForward
from mm.ranks import Peers, Split


@dataclass(frozen=True)
class Rule:
    """How a kind of part is cut.

    Args:
        first: Names of the linear layers that read its input, and how many matrices share their weight.
        last: Name of the one that makes its result.
        counts: Attributes that count what is shared out: heads.
    """

    first: Sequence[tuple[str, int]]
    last: str
    counts: Sequence[str] = ()


RULES = {
    MultiHeadAttention: Rule([("query", 1), ("key_value", 2)], "output", ["num_kv_heads"]),
    FeedForward: Rule([("input", 1)], "output"),
    GatedFeedForward: Rule([("gate", 1), ("input", 1)], "output"),
}
LIBRARY_RULES = {
    "timm.layers.attention.Attention": Rule([("qkv", 3)], "proj", ["num_heads", "attn_dim"]),
    "timm.layers.mlp.Mlp": Rule([("fc1", 1)], "fc2"),
}


def slice_layers(network: nn.Module, peers: Peers) -> None:
    """Leave this process its share of attention and feed-forward, in place; the network computes what it did before.

    Raises:
        ConfigError: There is nothing to share, or it cannot be shared by so many.
    """
    parts = [(name, part, rule) for name, part in network.named_modules() if (rule := _rule(part)) is not None]
    if not parts:
        raise ConfigError(
            f"parallel.tensor {peers.size}: this system has no transformer whose layers could be shared; set it to 1"
        )
    for name, part, rule in parts:
        _check(name, part, rule, peers.size)
    for _, part, rule in parts:
        for layer, matrices in rule.first:
            _cut(getattr(part, layer), ("weight", "bias"), Split(0, matrices, peers))
        last = getattr(part, rule.last)
        _cut(last, ("weight",), Split(1, 1, peers))
        last.forward = partial(_summed_linear, last, peers)
        for attribute in rule.counts:
            setattr(part, attribute, getattr(part, attribute) // peers.size)
        part.register_forward_pre_hook(partial(_share_inputs, peers), with_kwargs=True)


def _rule(part: nn.Module) -> Rule | None:
    if isinstance(part, MultiHeadAttention):
        return RULES[MultiHeadAttention]
    kind = type(part)
    rule = LIBRARY_RULES.get(f"{kind.__module__}.{kind.__name__}")
    if rule is not None and (_additions(part, rule) or not isinstance(getattr(part, "norm", None), nn.Identity)):
        return None  # a norm would need all features
    return rule or RULES.get(kind)


def _layers(part: nn.Module, rule: Rule) -> list[Any]:
    return [getattr(part, layer) for layer in (*(layer for layer, _ in rule.first), rule.last)]


def _additions(part: nn.Module, rule: Rule) -> bool:
    """Whether there are parameters that the rule says nothing about, or layers of another kind."""
    layers = _layers(part, rule)
    known = {id(parameter) for layer in layers for parameter in layer.parameters()}
    strange = any(id(parameter) not in known for parameter in part.parameters())
    return strange or any(type(layer) not in (nn.Linear, Linear) for layer in layers)


def _check(name: str, part: nn.Module, rule: Rule, size: int) -> None:
    if _additions(part, rule):
        raise ConfigError(f"parallel.tensor {size}: '{name}' has additions (tune), which are not shared out; set it to 1")
    for attribute in rule.counts[:1]:
        heads = getattr(part, attribute)
        if heads % size:
            raise ConfigError(f"parallel.tensor {size} does not divide the {heads} heads of '{name}'; take a divisor of them")
    features = _layers(part, rule)[-1].in_features
    if features % size:
        raise ConfigError(f"parallel.tensor {size} does not divide the {features} features of '{name}'; take a divisor of them")


def _cut(layer: nn.Module, names: Sequence[str], split: Split) -> None:
    for name in names:
        parameter: Any = getattr(layer, name)
        if parameter is not None:
            parameter.data = split.own(parameter.data).clone()
            parameter.sliced = split


def _share_inputs(peers: Peers, part: nn.Module, args: Any, options: Any) -> tuple[Any, Any]:
    def shared(value: Any) -> Any:
        return _share(value, peers) if isinstance(value, Tensor) and value.requires_grad else value

    known = ("context",)
    return tuple(map(shared, args)), {name: shared(value) if name in known else value for name, value in options.items()}


def _summed_linear(layer: nn.Linear, peers: Peers, input: Tensor) -> Tensor:
    total = _sum(F.linear(input, layer.weight), peers)
    return total if layer.bias is None else total + layer.bias.to(total.dtype)  # pyright: ignore[reportOptionalMemberAccess, reportOperatorIssue]


@_disable_dynamo  # compiled, sums of gradients are lost; torch.compiler.disable would load the compiler at once
def _share(x: Tensor, peers: Peers) -> Any:
    return _Shared.apply(x, peers)


@_disable_dynamo
def _sum(x: Tensor, peers: Peers) -> Any:
    return _Summed.apply(x, peers)


class _Shared(torch.autograd.Function):
    """What all processes have alike; its gradient is the sum of what each has of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.peers), None


class _Summed(torch.autograd.Function):
    """The sum of what each process has, which all have alike from here on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        return _summed(x, peers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _summed(x: Tensor, peers: Peers) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=peers.group)
    return total
