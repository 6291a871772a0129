"""What the auditor has the audited script's parts do, in a process with the script.

Each probe returns numbers, as a dictionary that can be written as JSON. audit_verdicts.py judges
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from audit_candidate import Candidate, own_losses
from audit_text import BATCH
from shards import BOS_ID

# Tokens of text that one call of the script's byte table gets.
TABLE_TOKENS = 1_000_000
# Pieces that are the target at once, where every piece in turn is the target.
PIECES = 128
# Octal digits of a sum of nats: below 2 ** 36, so that float64 keeps a mean times a count whole.
DIGITS = 12


def drawn_windows(
    candidate: Candidate, tokens: np.ndarray, rows: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw pieces of text that are one token longer than a window: int64 (rows, window + 1)."""
    length = min(candidate.window, len(tokens) - 1) + 1
    starts = generator.integers(0, len(tokens) - length + 1, rows)
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)


# ---- Causality
def probe_causality(
    candidate: Candidate, tokens: np.ndarray, rows: int, generator: np.random.Generator
) -> dict:
    """Change text behind a point, in every second row all of it, in the others one token.

    No loss of a target up to the point, and no logits up to it, may change by a bit.
    """
    text = drawn_windows(candidate, tokens, rows, generator)
    # The last token that is an input.
    last = text.shape[1] - 2
    points = changing_points(candidate, last, rows, generator)
    changed = text.copy()
    for row, point in enumerate(points):
        if row % 2 == 0:
            later = np.arange(point + 1, last + 2)
        else:
            later = generator.integers(point + 1, last + 2, 1)
        other = generator.integers(1, candidate.settings.vocab_size, len(later))
        changed[row, later] = (text[row, later] + other) % candidate.settings.vocab_size
    losses_before, logits_before = losses_and_logits(candidate, text)
    losses_after, logits_after = losses_and_logits(candidate, changed)
    compared = 0
    wrong = []
    difference = 0.0
    moved = True
    for row, point in enumerate(points):
        pairs = (
            (losses_before[row, :point], losses_after[row, :point]),
            (logits_before[row, : point + 1], logits_after[row, : point + 1]),
        )
        compared += 2 * point + 1
        if not all(np.array_equal(before, after) for before, after in pairs):
            wrong.append(point)
            for before, after in pairs:
                # At point 0 there is no loss yet.
                difference = max(difference, float(np.abs(before - after).max(initial=0.0)))
        # If all later text is another, later losses are others, too, or this proves nothing.
        if row % 2 == 0 and point < last:
            later = slice(point + 1, None)
            moved &= not np.array_equal(losses_before[row, later], losses_after[row, later])
    return dict(compared=compared, places=rows, wrong=wrong, difference=difference, moved=moved)


def changing_points(
    candidate: Candidate, last: int, rows: int, generator: np.random.Generator
) -> list[int]:
    """Return the token of each row behind which its text changes.

    The first ones are where faults are likely, the others anywhere.
    """
    memory = candidate.settings.memory_tokens
    likely = [last // 2, 1, last, memory, 0, memory + 1, last - 1, memory - 1]
    points = [*likely, *generator.integers(0, last + 1, rows)]
    return np.clip(points[:rows], 0, last).tolist()


def losses_and_logits(candidate: Candidate, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return losses (rows, window) and logits (rows, window, vocabulary).

    `text`: (rows, window + 1).
    """
    losses = []
    logits = []
    for at in range(0, len(text), BATCH):
        inputs = text[at : at + BATCH, :-1]
        losses.append(candidate.losses(inputs, text[at : at + BATCH, 1:]))
        logits.append(candidate.logits(inputs))
    return np.concatenate(losses), np.concatenate(logits)


# ---- Normalization
def probe_normalization(
    candidate: Candidate, tokens: np.ndarray, rows: int, generator: np.random.Generator
) -> dict:
    """Compare losses with the auditor's log-softmax, and sum probabilities over the vocabulary.

    The first is done at every place of full windows. The second takes every piece in turn as the
    target at each place of a short text.
    """
    text = drawn_windows(candidate, tokens, max(1, rows // 2), generator)
    counted = candidate.losses(text[:, :-1], text[:, 1:])
    own = own_losses(candidate.logits(text[:, :-1]), text[:, 1:])
    short = text[0, :16]
    sums = np.zeros(len(short))
    vocabulary = candidate.settings.vocab_size
    for first in range(0, vocabulary, PIECES):
        pieces = np.arange(first, min(first + PIECES, vocabulary))
        targets = np.repeat(pieces[:, None], len(short), axis=1)
        inputs = np.repeat(short[None], len(pieces), axis=0)
        sums += np.exp(-candidate.losses(inputs, targets)).sum(0)
    return dict(
        places=own.size,
        difference=float(np.abs(counted - own).max()),
        brute_places=len(short),
        brute=float(np.abs(sums - 1).max()),
    )


# ---- Every target once
def unique_pairs(length: int) -> tuple[np.ndarray, int]:
    """Return numbers in which no pair of neighbours stands twice, and how many kinds there are.

    The numbers, int64 (length,), are the start of the de Bruijn sequence of order 2.
    """
    kinds = math.isqrt(length) + 1
    numbers = []
    for first in range(kinds):
        numbers.append(first)
        for second in range(first + 1, kinds):
            numbers.extend((first, second))
    return np.array(numbers[:length]), kinds


class TargetCounter:
    """A text in which each target can be told from its token and the one before it.

    Stands in for the script's token_losses. The loss of target number `group` + d is 8 ** d, so the
    octal digit d of the sum says how often it was counted. All other losses are 0.
    """

    def __init__(self, length: int, vocab_size: int):
        numbers, kinds = unique_pairs(length)
        # Above BOS and padding.
        pieces = numbers + BOS_ID + 1
        self.text = pieces.astype(np.uint16)
        self.group = 0
        # The number of each target by its pair; -1 for pairs that are not in the text.
        self.numbers = torch.full((vocab_size, BOS_ID + 1 + kinds), -1)
        self.numbers[pieces[:-1], pieces[1:]] = torch.arange(length - 1)
        self.powers = torch.tensor([8.0**digit for digit in range(DIGITS)], dtype=torch.float64)

    def token_losses(self, model, tokens, targets, positions=None) -> torch.Tensor:
        """Return losses of targets (batch, scored) behind positions in tokens (batch, length)."""
        before = tokens
        if positions is not None:
            before = torch.take_along_dim(tokens, positions, 1)
        digits = self.numbers[before, targets] - self.group
        counted = (digits >= 0) & (digits < DIGITS)
        return torch.where(counted, self.powers[digits.clamp(0, DIGITS - 1)], 0.0)


def counts_of_targets(candidate: Candidate, name: str, length: int) -> np.ndarray:
    """Return how often Evaluator.score counts each target of a text of `length` tokens.

    `name` is the pass, plain or sliding. A count of 8 or more shows up as another target's.
    """
    evaluator = candidate.evaluator
    counter = TargetCounter(length, candidate.settings.vocab_size)
    counts = []
    kept = evaluator.token_losses
    evaluator.token_losses = counter.token_losses
    try:
        for group in range(0, length - 1, DIGITS):
            counter.group = group
            score = evaluator.score(candidate.model, counter.text, name)
            total = round(score.val_loss * score.targets)
            counts.extend(total >> 3 * digit & 7 for digit in range(DIGITS))
    finally:
        evaluator.token_losses = kept
    return np.array(counts[: length - 1])


def probe_targets(
    candidate: Candidate, tokens: np.ndarray, rows: int, generator: np.random.Generator
) -> dict:
    """Count targets in both passes, over texts made for it; `tokens` are not used.

    They are shorter and longer than a window, and no multiples of window or stride.
    """
    settings = candidate.settings
    stride = candidate.stride
    window = max(candidate.window, settings.train_seq_len - settings.memory_tokens)
    # So many different pairs are there.
    most = (settings.vocab_size - 4) ** 2
    wanted = (
        window // 2 + 2,
        window + stride // 2 + 2,
        3 * window + stride // 3 + 2,
        4 * window + stride + 3,
    )
    lengths = sorted({min(length, most) for length in wanted})
    counted = 0
    wrong = []
    for name in ("plain", "sliding"):
        for length in lengths:
            counts = counts_of_targets(candidate, name, length)
            counted += len(counts)
            bad = np.flatnonzero(counts != 1).tolist()
            if bad:
                example = f"such as {bad[0]}, counted {counts[bad[0]]} times"
                wrong.append(f"{name}: {len(bad)} of {length - 1} targets, {example}")
    return dict(counted=counted, lengths=lengths, wrong=wrong)


# ---- Bytes
def probe_bytes(
    candidate: Candidate, tokens: np.ndarray, rows: int, generator: np.random.Generator
) -> dict:
    """Sum the script's byte table over the whole text."""
    if hasattr(candidate.table, "sizes"):
        return dict(bytes=int(np.sum(candidate.table.sizes(tokens)[1:], dtype=np.int64)))
    # Scripts of records from before there were operators for letter case count by pairs.
    total = 0
    for at in range(0, len(tokens) - 1, TABLE_TOKENS):
        chunk = tokens[at : at + TABLE_TOKENS + 1].astype(np.int64)
        total += int(np.sum(candidate.table.count(chunk[:-1], chunk[1:])))
    return dict(bytes=total)


# By the names of the auditor's checks.
PROBES: dict[str, Callable[[Candidate, np.ndarray, int, np.random.Generator], dict]] = {
    "bytes": probe_bytes,
    "targets": probe_targets,
    "causality": probe_causality,
    "normalization": probe_normalization,
}
