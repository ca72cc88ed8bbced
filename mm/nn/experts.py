"""A feed-forward of several experts, of which each token takes one or a few: more parameters at the same work a token.

Switch https://arxiv.org/abs/2101.03961 (one expert, capacity, load-balance loss), GShard https://arxiv.org/abs/2006.16668
(several, first choices before second ones), hash layers https://arxiv.org/abs/2106.04426 (routing by the token itself). Within
towers of pictures and texts: LIMoE https://arxiv.org/abs/2206.02770.

Capacity, and with it the loss of tokens beyond it, is a matter of training alone: in evaluation each token gets its experts,
whatever stands beside it, so that results do not depend on the batch and decoding from caches agrees with the whole pass.
Deviation from GShard: a second choice is never left to chance.

Shapes: B batch, T positions, N = B T tokens, D width, E experts, K choices of a token.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.nn.precision import full_precision
from mm.types import Auxiliary, Losses

Routing = Literal["learned", "hash"]

HASH_MULTIPLIERS = (-0x61C8864680B583EB, 0x2545F4914F6CDD1D)
"""Odd numbers whose products spread neighbouring ids over all 64 bits."""


class ExpertsConfig(StrictConfig):
    """Feed-forward layers that are made of experts.

    Args:
        count: Experts of a layer, E.
        top_k: Experts that a token goes to, K; their results are weighted by the router.
        routing: By a router that is ``learned``, or by a fixed ``hash`` of the token's id, which only words have.
        capacity: In training an expert takes at most so many times its even share of the tokens; what comes later in the batch
            keeps what it had before the layer. None takes all.
        every: Every so many layers have experts, the last of each run: 2 is every other one.
        balance_weight: Of the loss that is least when all experts get as many tokens, for learned routing.
    """

    count: int = Field(ge=2)
    top_k: int = Field(default=1, ge=1)
    routing: Routing = "learned"
    capacity: float | None = Field(default=1.25, gt=0)
    every: int = Field(default=2, ge=1)
    balance_weight: float = Field(default=0.01, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> "ExpertsConfig":
        if self.top_k > self.count:
            raise ValueError(f"a token cannot go to {self.top_k} of {self.count} experts; lower top_k")
        if self.routing == "hash" and self.top_k > 1:
            raise ValueError("routing: hash gives each token one expert; leave top_k at 1")
        return self

    def in_layer(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return layer % self.every == self.every - 1


class Load(NamedTuple):
    """Sums over the tokens of one call: how many there are and, for each expert, how many have it as their first choice and how
    probable the router finds it; how many of all choices were dropped."""

    tokens: Float[Tensor, ""]
    chosen: Float[Tensor, " e"]
    probability: Float[Tensor, " e"]
    dropped: Float[Tensor, ""]


class Experts(Auxiliary):
    """Sends each token to some of its experts.

    Args:
        make_expert: Makes one expert, any module that keeps the shape ``(n, D)``; called ``config.count`` times.
        width: D.
        config: See `ExpertsConfig`.
        layer: Number of the layer, for hash routing to differ from layer to layer.
    """

    def __init__(self, make_expert: Callable[[], nn.Module], width: int, config: ExpertsConfig, layer: int = 0) -> None:
        super().__init__()
        self.experts = nn.ModuleList(make_expert() for _ in range(config.count))
        self.router = nn.Linear(width, config.count, bias=False) if config.routing == "learned" else None
        self.config = config
        self.layer = layer

    def forward(self, x: Float[Tensor, "b t d"], token_ids: Int[Tensor, "b t"] | None = None) -> Float[Tensor, "b t d"]:
        """Mix the results of each token's experts.

        Args:
            x: Tokens.
            token_ids: What they are, for hash routing; a negative number is padding, which takes no expert's room and does not
                count.
        """
        tokens = x.flatten(0, -2)
        ids = None if token_ids is None else token_ids.flatten()
        there = None if ids is None else ids >= 0
        probabilities, choices, weights = self._route(tokens, ids)
        if self.training and self.config.capacity is not None:
            even = len(tokens) * self.config.top_k / self.config.count
            mixed, dropped = self._within(math.ceil(self.config.capacity * even), tokens, choices, weights, there)
        else:
            fixed = torch.compiler.is_compiling() or torch.compiler.is_exporting() or tokens.is_meta
            mixed, dropped = (self._dense if fixed else self._all)(tokens, choices, weights), tokens.new_zeros(())
        if self.training and torch.is_grad_enabled():  # also where a checkpoint is computed again, which must do the same work
            load = self._load(probabilities, choices, there, dropped)
            if self.records is not None:
                self.records.append(load)
        return mixed.to(x.dtype).view_as(x)

    def auxiliary(self) -> Losses:
        """Switch's loss of the recorded calls, equations 4 to 6: E times the sum over experts of the share of tokens that chose
        it first times its mean probability. 1 where all are even; weighted in the total."""
        loads: list[Load] = self.records or []
        tokens, chosen, probability, dropped = (torch.stack(each).sum(0) for each in zip(*loads, strict=True))
        parts = {"dropped_tokens": dropped / (tokens * self.config.top_k)}
        if self.router is None:
            return Losses(tokens.new_zeros(()), parts)
        balance = self.config.count * (chosen * probability).sum() / tokens**2
        return Losses(self.config.balance_weight * balance, parts | {"balance": balance.detach()})

    def extra_repr(self) -> str:
        return f"top_k={self.config.top_k}, routing={self.config.routing}, capacity={self.config.capacity}"

    def _route(self, tokens: Tensor, ids: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Probabilities ``(N, E)`` where a router knows them, then the experts ``(N, K)`` and their weights, fp32."""
        if self.router is None:
            assert ids is not None, "hash routing goes by the ids of the tokens"
            choices = hashed(ids, self.layer, self.config.count)[:, None]
            return None, choices, torch.ones(choices.shape, device=tokens.device)
        probabilities = _probabilities(tokens, self.router.weight)
        weights, choices = probabilities.topk(self.config.top_k, dim=1)
        return probabilities, choices, weights / weights.sum(1, keepdim=True) if self.config.top_k > 1 else weights

    def _within(
        self, room: int, tokens: Tensor, choices: Tensor, weights: Tensor, there: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Each expert takes ``room`` places, filled in the order of the batch, first choices before second ones.

        Shapes depend on no number. Returns the mixture and how many choices found no place.
        """
        num_tokens, num_places = len(tokens), self.config.count * room
        chosen = choices.T.flatten()
        wanted = F.one_hot(chosen, self.config.count)
        if there is not None:
            wanted = wanted * there.repeat(self.config.top_k)[:, None]
        order = (wanted.cumsum(0) * wanted).sum(1) - 1  # among those that want the same expert; -1 for padding
        placed = (order >= 0) & (order < room)
        place = torch.where(placed, chosen * room + order, num_places)
        taker = place.new_full((num_places + 1,), num_tokens)
        taker[place] = torch.arange(num_tokens, device=place.device).repeat(self.config.top_k)
        seats = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])[taker[:-1]]
        results = torch.cat([expert(part) for expert, part in zip(self.experts, seats.split(room), strict=True)])
        results = torch.cat([results, results.new_zeros(1, results.shape[1])])[place].view(*choices.T.shape, -1)
        return (results * weights.T[..., None]).sum(0), (wanted.sum(1).bool() & ~placed).sum().float()

    def _all(self, tokens: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """Every token gets its experts, each of which computes as many as want it."""
        chosen = choices.T.flatten()
        order = chosen.argsort(stable=True)
        parts = tokens[order % len(tokens)].split(torch.bincount(chosen, minlength=self.config.count).tolist())
        results = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        return (results[order.argsort()].view(*choices.T.shape, -1) * weights.T[..., None]).sum(0)

    def _dense(self, tokens: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """The same where no shape may depend on the numbers: each expert computes all tokens, most of them for nothing."""
        shares = weights.new_zeros(weights.shape[0], self.config.count).scatter(1, choices, weights)
        results = torch.stack([expert(tokens) for expert in self.experts], dim=1)
        return (results * shares[..., None]).sum(1)

    def _load(self, probabilities: Tensor | None, choices: Tensor, there: Tensor | None, dropped: Tensor) -> Load:
        counted = torch.ones(len(choices), 1, device=choices.device) if there is None else there.float()[:, None]
        first = F.one_hot(choices[:, 0], self.config.count)
        likely = first if probabilities is None else probabilities
        return Load(counted.sum(), (counted * first).sum(0), (counted * likely).sum(0), dropped.float())


def hashed(ids: Int[Tensor, " n"], layer: int, count: int) -> Int[Tensor, " n"]:
    """An expert for each id, the same in every process and for ever."""
    mixed = (ids + 1) * HASH_MULTIPLIERS[0] + layer * HASH_MULTIPLIERS[1]
    mixed = (mixed ^ (mixed >> 29)) * HASH_MULTIPLIERS[1]
    return ((mixed >> 33) & 0x3FFFFFFF) % count


def refuse_hash(experts: ExpertsConfig | None) -> None:
    """Raises ValueError for routing by ids, for networks whose positions need not have one."""
    if experts is not None and experts.routing == "hash":
        raise ValueError("experts: routing: hash goes by the ids of words, which is for text encoders; take learned")


def feed_forward(make: Callable[[], nn.Module], width: int, experts: ExpertsConfig | None, layer: int) -> nn.Module:
    """The feed-forward of a layer: one, or experts that are made like it."""
    return Experts(make, width, experts, layer) if experts is not None and experts.in_layer(layer) else make()


@full_precision
def _probabilities(tokens: Tensor, weight: Tensor) -> Tensor:
    """What the router makes of tokens, ``(N, E)``, in at least fp32 as Switch has it: choices are sensitive to rounding."""
    precise = torch.promote_types(tokens.dtype, torch.float32)
    return F.linear(tokens.to(precise), weight.to(precise)).softmax(1)
