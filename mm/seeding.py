"""Randomness as a pure function of names, so that any batch can be made again by any worker after any interruption."""

import hashlib

import numpy as np

Part = int | str


def derive_seed(*parts: Part) -> int:
    """Hash an ordered list of integers and strings to a seed in ``[0, 2**63)``, the same on every platform."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = f"{type(part).__name__}:{part}".encode()
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(*parts: Part) -> np.random.Generator:
    """A NumPy generator for one purpose, e.g. ``generator(seed, epoch, sample_id, "crop")``."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))
