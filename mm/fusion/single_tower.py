"""Single tower: the tokens of all modalities in one sequence, one transformer over it.

As an encoder every token sees every other (ViLT, https://arxiv.org/abs/2102.03334), as a decoder those before it (DALL-E,
https://arxiv.org/abs/2102.12092, with sparse attention among picture tokens where wanted; CogView).

Shapes: B batch, N tokens of all modalities, D width.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mm.nn.attention import KVCache
from mm.nn.embeddings import GridPositions, LearnedPositions
from mm.nn.masks import EVERYTHING, Mask, Pattern, attention_mask, layer_masks
from mm.nn.transformer import Transformer
from mm.types import Encoded


class SingleTower(nn.Module):
    """Joins modalities and runs a transformer over them.

    Args:
        transformer: Ends with its own norm.
        positions: Modalities in their order in the sequence, each with its positions, or None where its features know them.
        width: D.
        causal: Whether a token sees only those before it.
        patterns: Sparse attention, one for each layer or one for all; None is dense.
    """

    def __init__(
        self,
        transformer: Transformer,
        positions: Mapping[str, LearnedPositions | GridPositions | None],
        width: int,
        *,
        causal: bool = False,
        patterns: Sequence[Pattern | None] = (None,),
    ) -> None:
        super().__init__()
        assert len(patterns) in {1, len(transformer.blocks)}, f"{len(patterns)} patterns for {len(transformer.blocks)} layers"
        self.transformer = transformer
        self.modalities = tuple(positions)
        self.positions = nn.ModuleDict({name: module for name, module in positions.items() if module is not None})
        self.types = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in positions})
        self.causal = causal
        self.patterns = tuple(patterns)

    def join(
        self, parts: Mapping[str, Encoded | Tensor], starts: Mapping[str, int | Tensor] | None = None
    ) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"] | None, dict[str, slice]]:
        """One sequence of the given modalities, with positions and types added.

        Args:
            parts: Features ``(B, n, D)`` by modality, as tensors where there is no padding; modalities may be left out.
            starts: Positions of the first tokens in their modalities, 0 where none is given; an int64 tensor ``(1,)`` is that
                of a single token.

        Returns:
            The tokens, which of them may be attended to (None for all), and where each modality is.
        """
        assert parts.keys() <= set(self.modalities), f"of {', '.join(self.modalities)}, got {', '.join(parts)}"
        tokens, masks, slices, end = [], [], {}, 0
        for name in (name for name in self.modalities if name in parts):
            part = parts[name]
            x = part.tokens if isinstance(part, Encoded) else part
            masks.append(part.mask if isinstance(part, Encoded) else x.new_ones(x.shape[:2], dtype=torch.bool))
            if name in self.positions:
                x = x + self.positions[name](x.shape[1], (starts or {}).get(name, 0))
            tokens.append(x + self.types[name])
            slices[name] = slice(end, end := end + x.shape[1])
        padded = any(isinstance(part, Encoded) for part in parts.values())
        return torch.cat(tokens, 1), torch.cat(masks, 1) if padded else None, slices

    def forward(
        self,
        parts: Mapping[str, Encoded | Tensor],
        *,
        starts: Mapping[str, int | Tensor] | None = None,
        caches: list[KVCache] | None = None,
        position: Tensor | None = None,
    ) -> Encoded:
        """Fuse modalities.

        Args:
            parts: See `join`; with ``caches``, only what is not in them yet, and without padding.
            starts: See `join`.
            caches: From ``transformer.caches``, for step-by-step decoding; filled as a side effect.
            position: Where a single token is in the sequence, int64 ``(1,)``, for a causal tower whose step is compiled: no
                shape and no number then changes from step to step. Behind what the caches hold if None.

        Returns:
            Fused tokens; ``extras`` holds the slice of each modality by its name. What is pooled is the first token, or, in a
            causal tower, the last.
        """
        x, keys, slices = self.join(parts, starts)
        if position is not None:
            assert caches is not None, "positions are those of decoding from caches"
            assert self.causal, "only a causal tower is decoded step by step"
            masks = self._masks_at(position, caches[0].keys.shape[2])
        else:
            known = caches[0].length if caches else 0
            assert keys is None or not known, "what is decoded step by step has no padding"
            masks = self._masks(x.shape[1], known + x.shape[1], keys, x.device)
        tokens = self.transformer(x, mask=masks, caches=caches, position=position)
        mask = x.new_ones(x.shape[:2], dtype=torch.bool) if keys is None else keys
        return Encoded(tokens, mask, tokens[:, -1 if self.causal else 0], slices)

    def _masks(self, num_queries: int, num_keys: int, keys: Tensor | None, device: torch.device) -> Mask | list[Mask]:
        """One mask for all layers, or one for each."""
        options = {"causal": self.causal, "keys": keys, "device": device}
        return layer_masks(self.patterns, lambda pattern: attention_mask(num_queries, num_keys, pattern=pattern, **options))

    def _masks_at(self, position: Tensor, capacity: int) -> Mask | list[Mask]:
        """The same for a single query at ``position`` among ``capacity`` keys, those behind it not yet excluded."""
        keys = torch.arange(capacity, device=position.device)
        return layer_masks(
            self.patterns, lambda pattern: EVERYTHING if pattern is None else Mask(pattern.visible(position, keys))
        )
