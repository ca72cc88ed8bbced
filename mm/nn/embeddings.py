"""From ids and positions to vectors: token embedding, learned, sinusoidal and rotary positions.

Shapes: B batch, T positions, D width, H heads, E width of a head.
"""

from collections.abc import Callable
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """One trained vector a position, never decayed.

    Args:
        num_positions: Longest sequence.
        width: D.
    """

    def __init__(self, num_positions: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_positions, width))
        self.weight.no_decay = True  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, length: int, offset: int | Tensor = 0) -> Float[Tensor, "*b t d"]:
        """Vectors of the positions ``offset`` to ``offset + length``, or of those that an int64 tensor ``(length,)`` or
        ``(B, length)`` holds."""
        if isinstance(offset, Tensor):
            assert offset.shape[-1] == length, f"{offset.shape[-1]} positions for {length} vectors"
            return self.weight[offset]
        assert offset + length <= len(self.weight), f"{len(self.weight)} positions, {offset + length} were asked for"
        return self.weight[offset : offset + length]


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines of geometrically spaced frequencies, sines first (https://arxiv.org/abs/1706.03762, section 3.5).

    Args:
        width: D, even.
        base: Ratio of the longest to the shortest wavelength.
    """

    frequencies: Tensor

    def __init__(self, width: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", _frequencies(width, base), persistent=False)

    def forward(self, length: int, offset: int = 0) -> Float[Tensor, "t d"]:
        """Vectors of the positions ``offset`` to ``offset + length``."""
        angles = _angles(self.frequencies, length, offset)
        return torch.cat([angles.sin(), angles.cos()], -1).to(self.frequencies.dtype)


class _Exact(nn.Module):
    """Its buffers stay in fp32 where the network is cast: rounded frequencies would turn far positions by wrong angles."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class Rotary(_Exact):
    """Relative positions by rotating queries and keys (https://arxiv.org/abs/2104.09864); halves are rotated, as LLaMA's
    published weights expect, not neighbours.

    Args:
        head_width: E, even.
        base: Ratio of the longest to the shortest wavelength.
        change: Of the frequencies, for models that stretch some wavelengths.
    """

    frequencies: Tensor

    def __init__(self, head_width: int, base: float = 10_000.0, change: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        frequencies = _frequencies(head_width, base)
        self.register_buffer("frequencies", frequencies if change is None else change(frequencies), persistent=False)

    def forward(self, length: int, offset: int = 0) -> tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]]:
        """Cosines and sines of the positions ``offset`` to ``offset + length``, for `rotate`."""
        angles = _angles(self.frequencies, length, offset).repeat(1, 2)
        return angles.cos(), angles.sin()


class GridRotary(_Exact):
    """Rotary positions on a grid in raster order: half of each head's pairs turn with the row, half with the column.

    Args:
        rows: Of the grid.
        columns: Of the grid.
        head_width: E, a multiple of 4.
        base: Ratio of the longest to the shortest wavelength.
    """

    angles: Tensor

    def __init__(self, rows: int, columns: int, head_width: int, base: float = 100.0) -> None:
        super().__init__()
        frequencies = _frequencies(head_width // 2, base)
        along = [_angles(frequencies, length, 0) for length in (rows, columns)]
        pairs = [along[0][:, None].expand(-1, columns, -1), along[1][None].expand(rows, -1, -1)]
        self.register_buffer("angles", torch.cat(pairs, -1).flatten(0, 1).repeat(1, 2), persistent=False)

    def forward(self, length: int, offset: int = 0) -> tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]]:
        """Cosines and sines of the cells ``offset`` to ``offset + length``, for `rotate`."""
        angles = self.angles[offset : offset + length]
        return angles.cos(), angles.sin()


class TimeEmbedding(_Exact):
    """What a network reads of a moment: sines and cosines through two layers (https://arxiv.org/abs/2006.11239).

    Args:
        width: D.
        num_frequencies: Of sines, and of cosines.
    """

    frequencies: Tensor

    def __init__(self, width: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.register_buffer("frequencies", _frequencies(2 * num_frequencies, 10_000.0), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Vectors of moments, which are in 0 to about 1000."""
        angles = time[:, None].float() * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.layers(waves.to(next(self.layers.parameters()).dtype))


def rotate(x: Float[Tensor, "b h t e"], rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "b h t e"]:
    """Rotate each pair ``(x[i], x[i + E/2])`` by the angle of its position and frequency; the type of ``x`` is kept."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def _frequencies(width: int, base: float) -> Tensor:
    assert width % 2 == 0, f"width {width} must be even: positions come in pairs of sine and cosine"
    return base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)


def _angles(frequencies: Tensor, length: int, offset: int) -> Tensor:
    positions = torch.arange(offset, offset + length, device=frequencies.device, dtype=torch.float32)
    return positions[:, None] * frequencies.float()


class TokenEmbedding(nn.Module):
    """Token vectors plus position vectors; BERT-style models also normalise the sum.

    Args:
        vocab_size: Number of ids.
        width: D.
        positions: `LearnedPositions` or `SinusoidalPositions`; None where attention itself knows positions (`Rotary`).
        norm: Applied to the sum, if given.
        dropout: Probability of dropping a component of the result in training.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        positions: nn.Module | None = None,
        norm: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = positions
        self.norm = nn.Identity() if norm is None else norm
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, ids: Int[Tensor, "b t"], *, offset: int = 0, keep: Float[Tensor, "b t 1"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """Embed ``ids`` from position ``offset`` on; ``keep`` scales the token vectors (0 hides a word, not its place)."""
        x = self.tokens(ids)
        return self.place(x if keep is None else x * keep, offset)

    def place(self, vectors: Float[Tensor, "b t d"], offset: int | Tensor = 0) -> Float[Tensor, "b t d"]:
        """What `forward` makes of token vectors, for vectors that are no token's: positions, norm, dropout.

        The positions begin at ``offset``, or are what it holds, see `LearnedPositions.forward`.
        """
        if self.positions is not None:
            vectors = vectors + self.positions(vectors.shape[1], offset)
        return self.dropout(self.norm(vectors))


class GridPositions(nn.Module):
    """Trained vectors of rows and columns, added up for each cell of a grid in raster order.

    Args:
        rows: Of the grid.
        columns: Of the grid.
        width: D.
    """

    def __init__(self, rows: int, columns: int, width: int) -> None:
        super().__init__()
        self.rows, self.columns = LearnedPositions(rows, width), LearnedPositions(columns, width)

    def forward(self, length: int | None = None, offset: int | Tensor = 0) -> Float[Tensor, "n d"]:
        """Vectors of the cells ``offset`` to ``offset + length``, of all from ``offset`` on if no length is given.

        An int64 tensor ``(1,)`` in place of ``offset`` looks up a single cell.
        """
        if isinstance(offset, Tensor):
            assert length == 1, "a cell in a tensor is a single one"
            num_columns = len(self.columns.weight)
            return self.rows.weight[offset // num_columns] + self.columns.weight[offset % num_columns]
        cells = (self.rows.weight[:, None] + self.columns.weight).flatten(0, 1)
        return cells[offset:] if length is None else cells[offset : offset + length]
