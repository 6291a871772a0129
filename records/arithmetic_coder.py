"""An arithmetic coder (Rissanen 1976) in exact integers.

A text is coded as one binary fraction. Each symbol takes of the interval that the symbols before it
have left a part as large as its probability, so the bytes that name a place inside of the last
interval are as many as the probabilities say.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# The frequencies of all symbols add up to this.
TOTAL = 1 << 32


def cumulative(logits: np.ndarray) -> np.ndarray:
    """Return where each symbol's frequency begins and, last, TOTAL: int64 (symbols + 1,).

    The frequencies are those of softmax(logits), but that none is 0. `logits`: (symbols,).
    """
    shares = np.exp(logits.astype(np.float64) - float(logits.max()))
    shares /= shares.sum()
    frequencies = 1 + np.floor(shares * (TOTAL - len(shares))).astype(np.int64)
    # The likeliest symbol gets what rounding has left.
    frequencies[shares.argmax()] += TOTAL - frequencies.sum()
    return np.append(0, frequencies.cumsum())


def encode(intervals: Iterable[tuple[int, int]]) -> bytes:
    """Return the shortest binary fraction inside of nested intervals, filled up to bytes by zeros.

    It has less than one bit more than the intervals' shares of TOTAL say. Each interval is a
    (begin, end) of TOTAL within the one before.
    """
    # The interval is [low, low + width) / whole.
    low = 0
    width = 1
    whole = 1
    for begin, end in intervals:
        low = low * TOTAL + width * begin
        width *= end - begin
        whole *= TOTAL
    # With fewer bits than these, no two fractions are as close as the interval is wide.
    bits = max(0, whole.bit_length() - width.bit_length() - 1)
    while True:
        # The first fraction with so many bits that is not below the interval: divided, rounded up.
        number = -(-(low << bits) // whole)
        if number * whole < (low + width) << bits:
            return (number << -bits % 8).to_bytes(-(-bits // 8), "big")
        bits += 1


def bits_of(data: bytes) -> int:
    """Return how many bits a binary fraction has, without the zeros at its end."""
    number = int.from_bytes(data, "big")
    ending = (number & -number).bit_length() - 1
    return 8 * len(data) - ending if number else 0


class Decoder:
    """Reads symbols from what encode() wrote, given the same frequencies in the same order."""

    def __init__(self, data: bytes):
        # The fraction place / whole lies in the interval of the next symbol.
        self.place = int.from_bytes(data, "big")
        self.whole = 1 << 8 * len(data)

    def symbol(self, begins: np.ndarray) -> int:
        """Return the next symbol; `begins` is what cumulative() gave for its place."""
        place = self.place * TOTAL // self.whole
        found = int(np.searchsorted(begins, place, side="right")) - 1
        begin = int(begins[found])
        end = int(begins[found + 1])
        # The symbol's interval becomes the whole.
        self.place = self.place * TOTAL - begin * self.whole
        self.whole *= end - begin
        return found
