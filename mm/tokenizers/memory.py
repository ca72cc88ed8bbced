"""Tokens of pictures that were seen before, for trainings in which the same pictures come back every epoch."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


class TokenMemory:
    """Remembers the ids of the first ``capacity`` different pictures.

    A picture is encoded by itself, so that its ids depend neither on its batch nor on what is remembered already: a resumed run
    sees the same ones.

    Args:
        encode: Pixels uint8 ``(B, 3, H, W)`` to ids ``(B, N)``.
        capacity: Number of pictures.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], capacity: int) -> None:
        self._encode, self._capacity = encode, capacity
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, image: Tensor) -> Tensor:
        """Ids ``(B, N)`` of pictures."""
        rows = zip(image, image.cpu(), strict=True)
        return torch.stack([self._ids(row, hashlib.blake2b(host.numpy().tobytes()).digest()) for row, host in rows])

    def _ids(self, picture: Tensor, digest: bytes) -> Tensor:
        if digest in self._known:
            return self._known[digest]
        [ids] = self._encode(picture[None])
        if len(self._known) < self._capacity:
            self._known[digest] = ids
        return ids
