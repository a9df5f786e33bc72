"""Counts of pixels by intervals of scores, exact until there are too many."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .exact import starts_of

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Bins:
    """Counts by intervals of scores, which rise.

    A score is known by its bits, turned so that they rise with it. An interval is all scores that share their leading
    bits: two of them lie in each other or apart.

    Attributes:
        keys: ``(n,)`` the lowest score of each, as bits.
        shifts: ``(n,)`` number of bits that its scores do not share; 0 for a single score.
        pixels: ``(n,)`` pixels in it.
        anomalous: ``(n,)`` anomalous ones.
        shares: ``(n,)`` the shares of regions that these are.
    """

    keys: Integers
    shifts: Integers
    pixels: Integers
    anomalous: Integers
    shares: Floats

    @classmethod
    def none(cls) -> Bins:
        """Nothing counted yet."""
        nothing = np.empty(0, np.int64)
        return cls(nothing, nothing, nothing, nothing, np.empty(0))

    @classmethod
    def of(cls, pixels: Integers, anomalous: Integers, shares: Floats) -> Bins:
        """Of columns ``(n, 3)``: keys, shifts and pixels, and ``(m, 2)``: keys and anomalous pixels, with their shares.

        The intervals may come in any order; what lies in another is added to it.
        """
        keys, shifts, counts = np.ascontiguousarray(pixels.T)
        if (keys[1:] < keys[:-1] + (1 << shifts[:-1])).any():
            order = np.argsort(keys << 6 | 63 - shifts, kind="stable")  # runs that rise are merged
            keys, shifts = keys[order], shifts[order]
            reached = np.maximum.accumulate(keys + (1 << shifts))
            starts = np.flatnonzero(np.append(True, keys[1:] >= reached[:-1]))
            keys, shifts, counts = keys[starts], shifts[starts], np.add.reduceat(counts[order], starts)
        bins = cls(keys, shifts, counts, np.zeros_like(keys), np.zeros(len(keys)))
        return bins.marked(anomalous[:, 0], anomalous[:, 1], shares)

    def marked(self, keys: Integers, counts: Integers | None, shares: Floats) -> Bins:
        """With these anomalous pixels, which are counted as pixels already."""
        places = np.searchsorted(self.keys, keys, side="right") - 1
        number = len(self.keys)
        marked = np.bincount(places, counts, number).astype(np.int64)
        of_regions = np.bincount(places, shares, number)
        return replace(self, anomalous=self.anomalous + marked, shares=self.shares + of_regions)

    def joined(self, keys: Integers, anomalous: Integers, shares: Floats) -> Bins:
        """With pixels of these scores, which rise, and of anomalous ones among them."""
        starts = starts_of(keys)
        counts, keys = np.diff(starts, append=keys.size), keys[starts]
        places = np.searchsorted(self.keys, keys, side="right")
        known = places > 0
        known[known] = keys[known] <= self.lasts[places[known] - 1]
        pixels = self.pixels.copy()
        np.add.at(pixels, places[known] - 1, counts[known])
        new, at = keys[~known], places[~known]
        joined = Bins(
            keys=np.insert(self.keys, at, new),
            shifts=np.insert(self.shifts, at, 0),
            pixels=np.insert(pixels, at, counts[~known]),
            anomalous=np.insert(self.anomalous, at, 0),
            shares=np.insert(self.shares, at, 0.0),
        )
        return joined.marked(anomalous, None, shares)

    @property
    def values(self) -> NDArray[np.float32]:
        """``(n,)`` the lowest score of each interval."""
        return values_of(self.keys)

    @property
    def lasts(self) -> Integers:
        """``(n,)`` the highest score of each interval, as bits."""
        return self.keys + (1 << self.shifts) - 1

    def coarsened(self, most: int) -> Bins:
        """At most so many intervals: those are merged first that hold few pixels and lie low in the ranking."""
        bins = self
        while len(bins.keys) > most:
            bins = bins.merged(len(bins.keys) - most)
        return bins

    def merged(self, number: int) -> Bins:
        """So many intervals fewer, or as few as one pass over them may leave."""
        # Bits that neighbours do not share. Where it is fewer than beside them, nothing else lies in what they share.
        levels = np.frexp((self.keys[:-1] ^ self.lasts[1:]).astype(np.float64))[1].astype(np.int64)
        padded = np.concatenate([[64], levels, [64]])
        places = np.flatnonzero((levels < padded[:-2]) & (levels < padded[2:]))
        rank = np.cumsum(self.pixels[::-1])[::-1]  # pixels at or above
        harm = (self.pixels[places] + self.pixels[places + 1]) ** 2 / rank[places]
        taken = min(number, (len(places) + 1) // 2)
        places = places[np.argpartition(harm, taken - 1)[:taken]]
        keys, shifts = self.keys.copy(), self.shifts.copy()
        keys[places], shifts[places] = keys[places] >> levels[places] << levels[places], levels[places]
        kept = np.ones(len(keys), dtype=bool)
        kept[places + 1] = False
        starts = np.flatnonzero(kept)
        pixels, anomalous = (np.add.reduceat(counts, starts) for counts in (self.pixels, self.anomalous))
        return Bins(keys[kept], shifts[kept], pixels, anomalous, np.add.reduceat(self.shares, starts))


def keys_of(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Bits of single-precision scores, turned so that they rise with the scores; both zeros get one key."""
    bits = (values + np.float32(0)).view(np.uint32)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31)).astype(np.int64)


def values_of(keys: NDArray[np.int64]) -> NDArray[np.float32]:
    """The scores that ``keys_of`` made these of."""
    bits = keys.astype(np.uint32)
    return np.where(bits >> np.uint32(31), bits & np.uint32(2**31 - 1), ~bits).view(np.float32)
