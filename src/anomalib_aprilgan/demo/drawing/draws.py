"""Random numbers that are the same on every machine and in every numpy version."""

import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Colour = tuple[float, float, float]
_Item = TypeVar("_Item")


class Draws:
    """A stream of random numbers named by a key; equal keys give equal streams.

    Only ``Generator.random`` (the top 53 bits of PCG64) is used and every other draw is
    derived from it by hand: numpy keeps the bits of PCG64 and ``SeedSequence`` fixed, but
    not the algorithms of its other distributions.

    Args:
        key: Non-negative integers and names. Names enter as their CRC-32.
    """

    def __init__(self, *key: int | str) -> None:
        words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))

    def array(self, *shape: int) -> Array:
        """Uniform numbers in ``[0, 1)`` of the given shape."""
        return self._generator.random(shape)

    def uniform(self, low: float, high: float) -> float:
        """One uniform number in ``[low, high)``."""
        return low + (high - low) * float(self._generator.random())

    def integer(self, low: int, high: int) -> int:
        """One integer in ``[low, high]``, both ends included."""
        return low + int(self._generator.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return float(self._generator.random()) < probability

    def pick(self, items: Sequence[_Item]) -> _Item:
        """One of the items, each equally likely."""
        return items[self.integer(0, len(items) - 1)]

    def sign(self) -> float:
        """-1.0 or 1.0."""
        return 1.0 if self.chance(0.5) else -1.0

    def colour(self, palette: Sequence[Colour], jitter: float = 0.05) -> Array:
        """A colour of the palette, a little lighter or darker and a little off in hue.

        Args:
            palette: RGB triples in ``[0, 1]``.
            jitter: Largest change of brightness; the hue moves by up to 0.4 times as much per channel.

        Returns:
            ``(3, 1, 1)``, ready to be broadcast over planes ``(3, H, W)``.
        """
        base = np.array(self.pick(palette))
        moved = base + self.uniform(-jitter, jitter) + 0.8 * jitter * (self.array(3) - 0.5)
        return np.clip(moved, 0.02, 0.97).reshape(3, 1, 1)
