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

FSQ_EPS = 1e-3
"""Keeps the outermost values of a channel reachable."""

KMEANS_STEPS = 10


@dataclass(frozen=True)
class Quantized:
    """Codes ``(B, N, D)`` through which gradients pass, their ids ``(B, N)`` int64, and the quantizer's own loss, a scalar."""

    codes: Tensor
    ids: Tensor
    loss: Tensor


class FiniteScalarQuantizer(nn.Module):
    """Rounds each channel to one of a few values (https://arxiv.org/abs/2309.15505). Nothing to train, nothing to collapse.

    Args:
        levels: Values of each channel; D is their number, K their product.
    """

    levels: Tensor
    radix: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("radix", torch.tensor([1, *levels[:-1]]).cumprod(0), persistent=False)
        self.codebook_size, self.width = math.prod(levels), len(levels)

    def forward(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """Codes in -1..1 and their ids; gradients pass as if nothing had been rounded."""
        with torch.autocast(z.device.type, enabled=False):
            steps = self._bounded(z.float())
            rounded = steps + (steps.round() - steps).detach()
            half = self.levels // 2
            ids = ((rounded.detach().long() + half) * self.radix).sum(-1)
            return Quantized(rounded / half, ids, z.new_zeros((), dtype=torch.float32))

    def lookup(self, ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Codes of ids."""
        half = self.levels // 2
        return ((ids[..., None] // self.radix) % self.levels - half) / half

    def _bounded(self, z: Tensor) -> Tensor:
        """Squash to the range of the steps; an even number of them is centred half a step lower."""
        half = (self.levels - 1) * (1 - FSQ_EPS) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(z + (offset / half).atanh()) * half - offset


class VectorQuantizer(nn.Module):
    """Takes the nearest vector of a codebook (https://arxiv.org/abs/1711.00937).

    The codebook follows the features by moving averages (appendix A.1 of the paper) unless ``ema_decay`` is 0. It starts at the
    centres of the first batch (k-means), and codes that have fallen out of use are started anew at features of the current
    batch, their averages included. All processes of a run keep the same codebook.

    The moving averages are collected in `forward` and applied by `update_`, to be called after each optimizer step: several
    forward passes of a step add up. Under gradient checkpointing a pass would count twice, so quantizers stay outside of it.

    Args:
        codebook_size: K.
        width: D.
        commitment: Weight of the loss that keeps features near their code. (Two well-known codebases weight the other term.)
        ema_decay: Of the moving averages; 0 trains the codebook by gradient.
        unit_length: Compare directions: features and codes are brought to unit length (https://arxiv.org/abs/2110.04627).
        dead_after: A code is started anew when its average number of uses in a step falls below this; 0 never does.
    """

    codebook: Tensor
    uses: Tensor
    sums: Tensor
    started: Tensor

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
        self._collected: list[tuple[Tensor, Tensor]] = []

    def forward(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """Nearest codes; the loss is the commitment, and without moving averages also the codebook's own distance."""
        with torch.autocast(z.device.type, enabled=False):
            z = self._scaled(z.float())
            flat = z.detach().reshape(-1, self.width)
            if self.training and not self.started:
                self._start(flat)
            ids = torch.cdist(flat, self._scaled(self.codebook.detach())).argmin(1).view(z.shape[:2])
            codes = self.lookup(ids)
            if self.training:
                self._collected.append((flat, ids.flatten()))
            loss = self.commitment * F.mse_loss(z, codes.detach())
            if not self.ema_decay:
                loss = loss + F.mse_loss(codes, z.detach())
            return Quantized(z + (codes - z).detach(), ids, loss)

    def lookup(self, ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Codes of ids."""
        return self._scaled(F.embedding(ids, self.codebook))

    @torch.no_grad()
    def update_(self) -> None:
        """Apply what the forward passes since the last call have collected: averages, then new starts of unused codes."""
        if not self._collected:
            return
        features = torch.cat([features for features, _ in self._collected])
        ids = torch.cat([ids for _, ids in self._collected])
        self._collected = []
        counts = torch.bincount(ids, minlength=self.codebook_size).float()
        sums = torch.zeros_like(self.codebook).index_add_(0, ids, features)
        _sum_over_processes(counts, sums)
        decay = self.ema_decay or 0.99
        self.uses.lerp_(counts, 1 - decay)
        if self.ema_decay:
            self.sums.lerp_(sums, 1 - decay)
            smoothed = (self.uses + 1e-5) / (self.uses.sum() + self.codebook_size * 1e-5) * self.uses.sum()
            self.codebook.copy_(self.sums / smoothed[:, None])
        if self.dead_after:
            self._revive(features)

    def _revive(self, features: Tensor) -> None:
        dead = (self.uses < self.dead_after).nonzero().flatten()
        fresh = _same_everywhere(features[torch.randint(len(features), (len(dead),), device=features.device)])
        self.codebook[dead] = fresh
        self.uses[dead] = 1.0
        if self.ema_decay:
            self.sums[dead] = fresh

    def _start(self, features: Tensor) -> None:
        """K-means on the features of the first batch; where they are fewer than the codes, noise tells copies apart."""
        with torch.no_grad():
            chosen = torch.randperm(len(features), device=features.device)[: self.codebook_size]
            missing = self.codebook_size - len(chosen)
            centres = features[chosen]
            if missing > 0:
                extra = features[torch.randint(len(features), (missing,), device=features.device)]
                centres = torch.cat([centres, extra + 1e-2 * features.std() * torch.randn_like(extra)])
            for _ in range(KMEANS_STEPS):
                nearest = torch.cdist(features, centres).argmin(1)
                counts = torch.bincount(nearest, minlength=self.codebook_size).float()[:, None]
                means = torch.zeros_like(centres).index_add_(0, nearest, features) / counts.clamp(min=1)
                centres = torch.where(counts > 0, means, centres)
            centres = _same_everywhere(centres)
            self.codebook.copy_(centres)
            if self.ema_decay:
                self.sums.copy_(centres)
            self.started.fill_(True)

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.unit_length else vectors


class GumbelQuantizer(nn.Module):
    """Draws codes from a relaxed categorical distribution (dVAE, https://arxiv.org/abs/2102.12092).

    Args:
        codebook_size: K.
        width: D.
        temperature: Of the relaxation; low values are close to a choice. A plain attribute, annealed by whoever trains.
    """

    def __init__(self, codebook_size: int, width: int, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.codebook_size, self.width = codebook_size, width
        self.temperature = temperature
        self.codebook = nn.Parameter(torch.randn(codebook_size, width))

    def forward(self, logits: Float[Tensor, "b n k"]) -> Quantized:
        """Mixtures of codes in training, the likeliest code otherwise; the loss is the divergence from equal use, in nats."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            ids = logits.argmax(-1)
            weights = (
                F.gumbel_softmax(logits, self.temperature) if self.training else F.one_hot(ids, self.codebook_size).float()
            )
            log_share = logits.log_softmax(-1)
            divergence = (log_share.exp() * (log_share + math.log(self.codebook_size))).sum(-1).mean()
            return Quantized(weights @ self.codebook, ids, divergence)

    def lookup(self, ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Codes of ids."""
        return F.embedding(ids, self.codebook)


class CodeUsage:
    """Counts how often each code occurs.

    Args:
        codebook_size: K.
    """

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.float64)

    def update(self, ids: Tensor) -> None:
        """Count ids of any shape."""
        self.counts += torch.bincount(ids.flatten().cpu(), minlength=len(self.counts))

    @property
    def usage(self) -> float:
        """Share of the codes that occurred, 0..1."""
        return (self.counts > 0).double().mean().item()

    @property
    def perplexity(self) -> float:
        """Number of equally frequent codes that would carry as much information, 1..K; 0 before any code."""
        if not self.counts.any():
            return 0.0
        share = self.counts / self.counts.sum()
        return torch.special.entr(share).sum().exp().item()


def _sum_over_processes(*tensors: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def _same_everywhere(tensor: Tensor) -> Tensor:
    """The first process's values."""
    if dist.is_available() and dist.is_initialized():
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor
