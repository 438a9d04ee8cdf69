"""What :func:`segmentation.augment.normalise` must know of an image, also of one that is never in memory as a whole.

Percentiles are values of the image, found by their ranks. Numbers are written as whole numbers of the same order and
read from their highest digit on, as by radix selection: one pass over the pieces of an image counts the highest 16
bits of all values, the next one the following 16 bits of those that have the right ones so far. Types of up to 16 bits
take one pass, of 32 two, of 64 four. The last pass adds up what lies between the percentiles. No value is rounded, so
the result is that of the whole image, to the rounding of a sum in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CLIPPED = 0.05  # percent of the voxels at either end
FLAT = 1e-12  # what is left of the rounding of a constant is no contrast


class Intensities(NamedTuple):
    """Of every channel: values to clip at, and mean and standard deviation of the clipped; 0 for a constant."""

    low: list[float]
    high: list[float]
    mean: list[float]
    deviation: list[float]

    @classmethod
    def of(cls, image: NDArray) -> Intensities:
        """Of an image (channels, *size) in memory."""
        values = np.asarray(image).astype(np.float64).reshape(len(image), -1)
        low, high = np.percentile(values, [CLIPPED, 100 - CLIPPED], axis=1)
        values = values.clip(low[:, None], high[:, None])
        return cls.checked(low, high, values.mean(axis=1), values.std(axis=1))

    @classmethod
    def checked(cls, low: NDArray, high: NDArray, mean: NDArray, deviation: NDArray) -> Intensities:
        """With a deviation of 0 where there is no contrast."""
        flat = deviation <= FLAT * np.maximum(np.abs(low), np.abs(high))
        return cls(low.tolist(), high.tolist(), mean.tolist(), np.where(flat, 0.0, deviation).tolist())

    def apply(self, image: NDArray) -> NDArray[np.float32]:
        """Clip, shift and scale an image (channels, *size) or a part of one."""
        low, high, mean, deviation = (np.reshape(numbers, (-1, *[1] * (image.ndim - 1))) for numbers in self)
        values = np.asarray(image).astype(np.float64)
        values.clip(low, high, out=values)
        values -= mean
        values /= np.where(deviation == 0, np.inf, deviation)
        return values.astype(np.float32)


class Moments(NamedTuple):
    """Number, mean and summed squared distance from the mean of some values."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        count = self.count + other.count
        if not count:
            return self
        gap = other.mean - self.mean
        mean = self.mean + gap * other.count / count
        return Moments(count, mean, self.squares + other.squares + gap**2 * self.count * other.count / count)


class Tally(NamedTuple):
    """What one pass counts in one piece, in one channel."""

    unreal: int
    """Values that are infinite or not a number."""
    below: int
    """Values under all of those that are searched among."""
    between: Moments
    """Of the values between those that are searched among; only in the last pass."""
    above: int
    digits: dict[int, tuple[NDArray, NDArray]]
    """Of each beginning that is searched on: next digits that occur, and how often."""


class Question(NamedTuple):
    """What a pass is to count: the digit that comes next, behind these beginnings of every channel."""

    level: int
    beginnings: list[list[int]]


def count(image: NDArray, question: Question) -> list[Tally]:
    """Count in a piece (channels, *part)."""
    return [_count(channel, question.level, set(b)) for channel, b in zip(image, question.beginnings, strict=True)]


def _count(values: NDArray, level: int, beginnings: set[int]) -> Tally:
    values = values.ravel()
    unreal = int((~np.isfinite(values)).sum()) if values.dtype.kind == "f" and level == 0 else 0
    keys = to_keys(values)
    width, levels = _digits(values.dtype)
    rest = width * (levels - 1 - level)
    if level == 0:
        return Tally(unreal, 0, Moments(), 0, {0: _frequencies(keys >> rest)})
    heads = keys >> (rest + width)
    inside = np.isin(heads, list(beginnings))
    between = (heads > min(beginnings)) & (heads < max(beginnings)) & ~inside
    digits = {}
    for head in beginnings:
        digits[head] = _frequencies(keys[heads == head] >> rest & (2**width - 1))
    moments = _moments(values[between].astype(np.float64)) if rest == 0 else Moments()
    return Tally(0, int((heads < min(beginnings)).sum()), moments, int((heads > max(beginnings)).sum()), digits)


def _frequencies(digits: NDArray) -> tuple[NDArray, NDArray]:
    counts = np.bincount(digits.astype(np.int64), minlength=1)
    occurring = counts.nonzero()[0]
    return occurring, counts[occurring]


def _moments(values: NDArray[np.float64]) -> Moments:
    if not values.size:
        return Moments()
    mean = values.mean()
    return Moments(values.size, float(mean), float(((values - mean) ** 2).sum()))


class Search:
    """Passes over an image in pieces, until everything is known.

    Args:
        dtype: of the image: truth values, integers or real numbers of up to 64 bits.
        channels: how many.
        voxels: of one channel.
    """

    def __init__(self, dtype: np.dtype, channels: int, voxels: int) -> None:
        self.dtype = dtype
        self.voxels = voxels
        self.passes = _digits(dtype)[1]
        places = [q / 100 * (voxels - 1) for q in (CLIPPED, 100 - CLIPPED)]
        self.fractions = [place - math.floor(place) for place in places]
        self.ranks = [min(r, voxels - 1) for place in places for r in (math.floor(place), math.floor(place) + 1)]
        # Of every channel and rank: the digits known so far, and the rank among the values that begin with them.
        self.found = [[(0, rank) for rank in self.ranks] for _ in range(channels)]

    def run(self, passes: Iterable[Iterable[list[Tally]]]) -> Intensities:
        """What is known after all passes over all pieces."""
        for tallies in passes:
            merged = _merge(tallies, len(self.found))
            self.found = [
                [_next(place, tally, _digits(self.dtype)[0]) for place in places]
                for places, tally in zip(self.found, merged, strict=True)
            ]
        return self._conclude(merged)

    def questions(self) -> Iterator[Question]:
        """One for every pass; each needs what the one before it found."""
        for level in range(self.passes):
            yield Question(level, [sorted({beginning for beginning, _ in places}) for places in self.found])

    def _conclude(self, tallies: Sequence[Tally]) -> Intensities:
        results = []
        width = _digits(self.dtype)[0]
        for places, tally in zip(self.found, tallies, strict=True):
            a, b, c, d = (float(v) for v in from_keys([key for key, _ in places], self.dtype))
            low, high = _interpolate(a, b, self.fractions[0]), _interpolate(c, d, self.fractions[1])
            total = Moments(tally.below, low) + tally.between + Moments(tally.above, high)
            for head, (digits, counts) in tally.digits.items():
                keys = [(head << width) + int(digit) for digit in digits]
                values = from_keys(keys, self.dtype).astype(np.float64).clip(low, high)
                number = int(counts.sum())
                if number:
                    mean = float((values * counts).sum() / number)
                    total += Moments(number, mean, float(((values - mean) ** 2 * counts).sum()))
            results.append((low, high, total.mean, math.sqrt(total.squares / total.count)))
        return Intensities.checked(*(np.array(numbers) for numbers in zip(*results, strict=True)))


def _merge(tallies: Iterable[list[Tally]], channels: int) -> list[Tally]:
    """Sums over pieces."""
    sums: list[Tally | None] = [None] * channels
    dense: list[dict[int, NDArray]] = [{} for _ in range(channels)]
    for piece in tallies:
        for channel, tally in enumerate(piece):
            old = sums[channel]
            sums[channel] = (
                tally if old is None else Tally(*(x + y for x, y in zip(old[:4], tally[:4], strict=True)), {})
            )
            for head, (digits, counts) in tally.digits.items():
                dense[channel].setdefault(head, np.zeros(2**16, np.int64))[digits] += counts
    merged = []
    for tally, counted in zip(sums, dense, strict=True):
        assert tally is not None
        sparse = {head: (counts.nonzero()[0], counts[counts.nonzero()[0]]) for head, counts in counted.items()}
        merged.append(tally._replace(digits=sparse))
    return merged


def _next(place: tuple[int, int], tally: Tally, width: int) -> tuple[int, int]:
    """One digit more of the value of a rank."""
    head, rank = place
    digits, counts = tally.digits[head]
    ends = counts.cumsum()
    at = int(np.searchsorted(ends, rank, side="right"))
    return (head << width) + int(digits[at]), rank - int(ends[at] - counts[at])


def _interpolate(low: float, high: float, fraction: float) -> float:
    """As numpy's percentiles do, to the last bit."""
    return high - (high - low) * (1 - fraction) if fraction >= 0.5 else low + (high - low) * fraction


def _digits(dtype: np.dtype) -> tuple[int, int]:
    """Bits of a digit, and how many digits a value has."""
    return (8, 1) if dtype.itemsize == 1 else (16, dtype.itemsize // 2)


def to_keys(values: NDArray) -> NDArray[np.uint64]:
    """Whole numbers from 0 that have the order of the values."""
    bits = 8 * values.dtype.itemsize
    raw = values.view(f"u{values.dtype.itemsize}")
    sign = raw.dtype.type(1 << (bits - 1))
    if values.dtype.kind == "i":
        raw = raw ^ sign
    elif values.dtype.kind == "f":
        # Negative numbers are ordered backwards.
        raw = np.where(raw & sign, ~raw, raw ^ sign)
    return raw


def from_keys(keys: Sequence[int], dtype: np.dtype) -> NDArray:
    """The values of :func:`to_keys`."""
    raw = np.array(keys, dtype=f"u{dtype.itemsize}")
    sign = raw.dtype.type(1 << (8 * dtype.itemsize - 1))
    if dtype.kind == "i":
        raw = raw ^ sign
    elif dtype.kind == "f":
        raw = np.where(raw & sign, raw ^ sign, ~raw)
    return raw.view(dtype)
