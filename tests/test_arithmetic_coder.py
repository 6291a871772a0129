"""The coder: what it gives back, and in how many bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from arithmetic_coder import TOTAL, Decoder, bits_of, cumulative, encode
from audit_candidate import own_losses


def distributions(symbols: int, kinds: int, seed: int, sharpness: float = 3.0) -> np.ndarray:
    """Logits, float32 (symbols, kinds)."""
    normal = np.random.default_rng(seed).standard_normal((symbols, kinds))
    return (sharpness * normal).astype(np.float32)


def intervals(logits: np.ndarray, symbols: list[int]) -> list[tuple[int, int]]:
    begins = [cumulative(row) for row in logits]
    pairs = zip(begins, symbols, strict=True)
    return [(int(row[symbol]), int(row[symbol + 1])) for row, symbol in pairs]


def decoded(data: bytes, logits: np.ndarray) -> list[int]:
    decoder = Decoder(data)
    return [decoder.symbol(cumulative(row)) for row in logits]


@pytest.mark.parametrize(
    "length, kinds, sharpness", [(0, 3, 1), (1, 2, 1), (300, 2, 9), (200, 1024, 3), (90, 70, 40)]
)
def test_the_coder_gives_back_what_it_took_in_as_few_bytes_as_possible(length, kinds, sharpness):
    logits = distributions(length, kinds, length, sharpness)
    drawn = np.random.default_rng(1).integers(0, kinds, length).tolist()
    likely = logits.argmax(1).tolist()
    for symbols in (drawn, likely):
        parts = intervals(logits, symbols)
        data = encode(parts)
        assert decoded(data, logits) == symbols
        bits = sum(math.log2(TOTAL / (end - begin)) for begin, end in parts)
        assert bits / 8 - 1 <= len(data) <= bits / 8 + 1
        assert bits_of(data) < bits + 1
        # Where the logits are sharper, some shares are below the smallest frequency.
        if length and sharpness < 9:
            entropy = float(own_losses(logits, np.array(symbols)).sum()) / math.log(2)
            assert abs(len(data) - entropy / 8) <= 1 + 1e-6 * entropy


@pytest.mark.parametrize("kinds, sharpness", [(2, 0), (1024, 3), (1024, 500), (65536, 1)])
def test_frequencies_add_up_and_none_is_zero(kinds, sharpness):
    begins = cumulative(distributions(1, kinds, 0, sharpness)[0])
    assert begins[0] == 0 and begins[-1] == TOTAL and (np.diff(begins) >= 1).all()


def test_other_probabilities_give_another_text():
    logits = distributions(100, 50, 3)
    symbols = np.random.default_rng(2).integers(0, 50, 100).tolist()
    data = encode(intervals(logits, symbols))
    wrong = logits.copy()
    wrong[40, symbols[40]] += 0.1
    found = decoded(data, wrong)
    assert found[:40] == symbols[:40] and found != symbols
