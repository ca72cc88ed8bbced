"""Features to discrete codes: finite scalar, vector and Gumbel quantization, and how much of a codebook is used.

Shapes: B batch, N positions, D width of a code, K codes. Quantizers compute in fp32 whatever surrounds them: in bf16
neighbouring codes merge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.ranks import data_peers

FSQ_EPS = 1e-3
"""Keeps bounded values strictly inside the outermost steps of a channel, so that rounding cannot leave them."""

KMEANS_STEPS = 10
KMEANS_NOISE = 1e-2
"""Tells copies of a feature apart where there are fewer features than codes; in standard deviations of the features."""

USES_DECAY = 0.99
"""Of the average number of uses where the codebook is trained by gradient."""

FEWEST_USES = 1e-5
"""A code with a smaller average number of uses stays where it is: the quotient of its averages would be rounding alone."""

DISTANCES_AT_ONCE = 1 << 26
"""Distances between features and codes in memory at the same time."""


@dataclass(frozen=True)
class Quantized:
    """Codes ``(B, N, D)`` through which gradients pass, their ids ``(B, N)`` int64, and the quantizer's own loss, a scalar."""

    codes: Tensor
    ids: Tensor
    loss: Tensor


class FiniteScalarQuantizer(nn.Module):
    """Rounds each channel to one of a few values (https://arxiv.org/abs/2309.15505). Nothing to train, nothing to collapse.

    Ids are numbers of mixed radix, the first channel being the least significant digit.

    Args:
        levels: Values of each channel, 2 or more; D is their number, K their product.

    Raises:
        ConfigError: When a channel has fewer than 2 values.
    """

    levels: Tensor
    radix: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ConfigError(f"levels: {list(levels)} leaves a channel without a choice; give each channel at least 2 values")
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("radix", torch.tensor([1, *levels[:-1]]).cumprod(0), persistent=False)
        self.codebook_size, self.width = math.prod(levels), len(levels)

    def forward(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """Codes in -1..1 and their ids; gradients pass as if nothing had been rounded. The loss is 0."""
        with torch.autocast(z.device.type, enabled=False):
            steps = self._bounded(z.float())
            rounded = steps.detach().round()
            half = self.levels // 2
            # Not a number has to reach the loss, where it is noticed, but must not become an id outside of the codebook.
            ids = ((rounded.nan_to_num().long() + half) * self.radix).sum(-1)
            return Quantized(_straight_through(rounded, steps) / half, ids, z.new_zeros((), dtype=torch.float32))

    def lookup(self, ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Codes of ids, the same bits that `forward` gives."""
        half = self.levels // 2
        return ((ids[..., None] // self.radix) % self.levels - half) / half

    def _bounded(self, z: Tensor) -> Tensor:
        """Squash to the range of the steps; an even number of them is centred half a step lower (the paper's appendix A.1)."""
        half = (self.levels - 1) * (1 - FSQ_EPS) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + (offset / half).tan()) * half - offset


class VectorQuantizer(nn.Module):
    """Takes the nearest vector of a codebook (https://arxiv.org/abs/1711.00937).

    The codebook follows the features by moving averages (appendix A.1 of the paper) unless ``ema_decay`` is 0. It starts at the
    centres of the first training batch (k-means), and codes that have fallen out of use are started anew at features of the
    latest batch, their averages included. All processes of a run keep the same codebook: statistics are summed over them,
    random choices are the first one's. Everything that outlives a step is in the buffers, so training resumes exactly.

    Statistics are collected in `forward`, in training mode and where gradients are recorded, and applied by `update_`, to be
    called after each optimizer step: several forward passes of a step add up. A pass that gradient checkpointing repeats would
    count twice, so quantizers stay outside of it.

    Args:
        codebook_size: K.
        width: D.
        commitment: Weight of the loss that keeps features near their code. (Two well-known codebases weight the other term.)
        ema_decay: Of the moving averages, 0 up to but not including 1; 0 trains the codebook by gradient.
        unit_length: Compare directions: features and codes are brought to unit length (https://arxiv.org/abs/2110.04627).
        dead_after: A code is started anew when its average number of uses in a step falls below this; 0 never does.
    """

    codebook: Tensor
    uses: Tensor
    sums: Tensor
    started: Tensor
    new_uses: Tensor
    new_sums: Tensor

    def __init__(
        self,
        codebook_size: int,
        width: int,
        *,
        commitment: float = 0.25,
        ema_decay: float = 0.99,
        unit_length: bool = False,
        dead_after: float = 0.05,
    ) -> None:
        super().__init__()
        self.codebook_size, self.width = codebook_size, width
        self.commitment, self.ema_decay = commitment, ema_decay
        self.unit_length, self.dead_after = unit_length, dead_after
        initial = torch.empty(codebook_size, width).uniform_(-1 / codebook_size, 1 / codebook_size)
        if ema_decay:
            self.register_buffer("codebook", initial)
            self.register_buffer("sums", initial.clone())
        else:
            self.codebook = nn.Parameter(initial)
        self.register_buffer("uses", torch.ones(codebook_size))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("new_uses", torch.zeros(codebook_size), persistent=False)
        self.register_buffer("new_sums", torch.zeros(codebook_size, width), persistent=False)
        self._latest: Tensor | None = None

    def forward(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """Nearest codes; the loss is the commitment, and without moving averages also the codebook's own mean squared error."""
        with torch.autocast(z.device.type, enabled=False):
            z = self._scaled(z.float())
            flat = z.detach().reshape(-1, self.width)
            learns = self.training and torch.is_grad_enabled()
            if learns and not self.started:
                self._start(flat)
            ids = _nearest(flat, self._scaled(self.codebook.detach().float()))
            if learns:
                self._collect(flat, ids)
            ids = ids.view(z.shape[:2])
            codes = self.lookup(ids).float()
            loss = self.commitment * F.mse_loss(z, codes.detach())
            if not self.ema_decay:
                loss = loss + F.mse_loss(codes, z.detach())
            return Quantized(_straight_through(codes, z), ids, loss)

    def lookup(self, ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Codes of ids."""
        return self._scaled(F.embedding(ids, self.codebook))

    @torch.no_grad()
    def update_(self) -> None:
        """Apply what the forward passes since the last call have collected: averages, then new starts of unused codes."""
        if self._latest is None:
            return
        sum_over_processes(self.new_uses, self.new_sums)
        self.uses.lerp_(self.new_uses, 1 - (self.ema_decay or USES_DECAY))
        if self.ema_decay:
            self.sums.lerp_(self.new_sums, 1 - self.ema_decay)
            uses = self.uses[:, None]
            self.codebook.copy_(torch.where(uses > FEWEST_USES, self.sums / uses, self.codebook))
        if self.dead_after:
            self._revive(self._latest)
        self.new_uses.zero_()
        self.new_sums.zero_()
        self._latest = None

    @torch.no_grad()
    def _collect(self, features: Tensor, ids: Tensor) -> None:
        """Add to the statistics; what is not finite is left out, because its step will be skipped but not forgotten."""
        finite = features.isfinite().all(1)
        self.new_uses.index_add_(0, ids, finite.float())
        self.new_sums.index_add_(0, ids, torch.where(finite[:, None], features, 0.0))
        self._latest = features

    def _revive(self, features: Tensor) -> None:
        dead = (self.uses < self.dead_after).nonzero().flatten()
        if not len(dead):
            return
        fresh = _same_everywhere(_draw(features, len(dead)))
        uses = max(1.0, 2 * self.dead_after)  # not dead again at once
        self.codebook[dead] = fresh
        self.uses[dead] = uses
        if self.ema_decay:
            self.sums[dead] = uses * fresh

    @torch.no_grad()
    def _start(self, features: Tensor) -> None:
        """Move the codebook to the features, unless they are not finite, in which case the next batch is tried."""
        centres = _same_everywhere(self._scaled(_kmeans(features, self.codebook_size)))
        if centres.isfinite().all():
            self.codebook.copy_(centres)
            if self.ema_decay:
                self.sums.copy_(centres * self.uses[:, None])
            self.started.fill_(True)

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.unit_length else vectors


class GumbelQuantizer(nn.Module):
    """Draws codes from a relaxed categorical distribution (dVAE, https://arxiv.org/abs/2102.12092).

    Args:
        codebook_size: K.
        width: D.
        temperature: Of the relaxation, above 0; low values are close to a choice. A plain attribute that training anneals.
        hard: Whether training, too, decodes one code instead of a mixture, with the mixture's gradients (straight-through).
    """

    def __init__(self, codebook_size: int, width: int, *, temperature: float = 1.0, hard: bool = False) -> None:
        super().__init__()
        self.codebook_size, self.width = codebook_size, width
        self.temperature, self.hard = temperature, hard
        self.codebook = nn.Parameter(torch.randn(codebook_size, width))

    def forward(self, logits: Float[Tensor, "b n k"]) -> Quantized:
        """Drawn mixtures of codes in training, the likeliest code otherwise.

        The ids are the likeliest codes in training, too: those of noisy draws would hide a collapse. The loss is the divergence
        of the codes' distribution from the uniform one, mean over positions, in nats (0 to log K).
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            ids = logits.argmax(-1)
            log_share = logits.log_softmax(-1)
            divergence = math.log(self.codebook_size) + (log_share.exp() * log_share).sum(-1).mean()
            if not self.training:
                return Quantized(self.lookup(ids).float(), ids, divergence)
            weights = F.gumbel_softmax(logits, self.temperature, hard=self.hard)
            return Quantized(weights @ self.codebook.float(), ids, divergence)

    def lookup(self, ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Codes of ids."""
        return F.embedding(ids, self.codebook)


class CodeUsage:
    """Counts how often each code occurs.

    Args:
        codebook_size: K.
    """

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, ids: Tensor) -> None:
        """Count ids of any shape."""
        self.counts += torch.bincount(ids.flatten().cpu(), minlength=len(self.counts))

    def merge(self, other: "CodeUsage") -> None:
        """Add what another one has counted."""
        self.counts += other.counts

    def reset(self) -> None:
        """Forget all counts."""
        self.counts.zero_()

    @property
    def usage(self) -> float:
        """Share of the codes that occurred, 0..1."""
        return (self.counts > 0).double().mean().item()

    @property
    def perplexity(self) -> float:
        """Number of equally frequent codes that would carry as much information, 1..K; 0 before any code."""
        if not self.counts.any():
            return 0.0
        share = self.counts.double() / self.counts.sum()
        return torch.special.entr(share).sum().exp().item()


def _straight_through(values: Tensor, source: Tensor) -> Tensor:
    """Exactly ``values``, with the gradients going to ``source``."""
    return values.detach() + (source - source.detach())


def _nearest(features: Tensor, codes: Tensor) -> Tensor:
    """Index of the code nearest to each feature; the features' own length does not matter for the order."""
    lengths, rows = codes.square().sum(1), max(1, DISTANCES_AT_ONCE // len(codes))
    return torch.cat([torch.addmm(lengths, part, codes.T, alpha=-2).argmin(1) for part in features.split(rows)])


def _draw(features: Tensor, count: int) -> Tensor:
    """Random features, none twice as long as there are enough."""
    order = torch.randperm(len(features), device=features.device)
    return features[order[torch.arange(count, device=features.device) % len(features)]]


def _kmeans(features: Tensor, count: int) -> Tensor:
    """Centres ``(count, D)`` of clusters of features; a cluster that loses all its features stays."""
    centres = _draw(features, count)
    if len(features) < count:
        centres = centres + KMEANS_NOISE * features.std() * torch.randn_like(centres)
    for _ in range(KMEANS_STEPS):
        nearest = _nearest(features, centres)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        means = torch.zeros_like(centres).index_add_(0, nearest, features) / sizes.clamp(min=1)
        centres = torch.where(sizes > 0, means, centres)
    return centres


def sum_over_processes(*tensors: Tensor) -> None:
    """Add up, in place, what the processes of a training have found in their samples."""
    peers = data_peers()
    if peers.size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, group=peers.group)


def _same_everywhere(tensor: Tensor) -> Tensor:
    """The first process's values."""
    if dist.is_available() and dist.is_initialized():
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor
