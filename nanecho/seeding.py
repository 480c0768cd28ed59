"""Random numbers as pure functions of their purpose, so that there is no state to save or to lose.

They are the same on every machine and with every version of NumPy and torch, which neither promises for its own.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key(purpose: str, *numbers: int) -> int:
    """Return 64 bits that depend on every argument.

    >>> key("batch", 1337, 0) == key("batch", 1337, 0) != key("batch", 1337, 1)
    True
    """
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(key: int, start: int, stop: int) -> npt.NDArray[np.uint64]:
    """Return the numbers ``start`` to ``stop`` of the sequence that belongs to ``key``, uniform over 64 bits.

    SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), evaluated at any position.
    """
    z = np.arange(start + 1, stop + 1, dtype=np.uint64)
    z *= _GOLDEN  # wraps around, as the algorithm wants
    z += np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
