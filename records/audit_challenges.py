"""Parts of what was scored, drawn when all nats are known, to be coded and decoded.

A script can return any nats. What is decoded where the text is not to be had is known from what
stands before it; the file that it comes out of is as large as its nats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from arithmetic_coder import bits_of
from audit_judges import BFLOAT16_NATS, BFLOAT16_PART, BFLOAT16_TOGETHER, SAME_NATS
from audit_text import BATCH, PART, chunks_of
from shards import BOS_ID

# Batches of documents of which a chunk is decoded: at least, and at most where there is the time.
FEWEST = 4
MOST = 16
# Windows of which a part is decoded, at least.
FEWEST_WINDOWS = 4
# What rounding takes off a sum of nats, as a share.
ROUNDING = 1e-9
# Bits that a coded file may take beyond what its nats say: to name a place inside of the interval.
CODING_BITS = 1
# Tokens that are coded at most: the coder's integers grow with them.
MOST_CODED = 1 << 16


def judge_drawn(scored: dict, drawn: np.ndarray, unit: str) -> str:
    """Say what is wrong with the windows or documents whose nats are returned; or nothing.

    They must be the first ones of the random order, each once: `drawn`, int64 (all, 3), has first
    token, first target and end of targets. A choice among them would have another mean, and the
    number of all says whether it is a sample. Nats are those of the parts, none of them below 0.
    """
    found = sorted(tuple(map(int, row[:3])) for row in scored["rows"])
    if found != sorted(map(tuple, drawn[: len(found)].tolist())):
        return f"the {len(found):,} {unit} that it returns are not those that were drawn"
    if scored["windows"] != len(drawn):
        return f"it says that there are {scored['windows']:,} {unit} of {len(drawn):,}"
    for (_, first, _, nats), parts in zip(scored["rows"], scored["by_part"], strict=True):
        if not (min(parts) >= -SAME_NATS and abs(sum(parts) - nats) <= ROUNDING * nats):
            return f"from target {first} on there are {nats:.4f} nats, but {parts[:5]} in parts"
    return ""


def judge_size(nats: list[float], targets: int, coded: bytes) -> str:
    """Say what is wrong with what so many targets were coded into; empty if nothing is.

    It must not be larger than their nats say: these would be too low.
    """
    bits = sum(nats) / math.log(2)
    allowed = CODING_BITS + SAME_NATS / math.log(2) * targets
    size = bits_of(coded)
    if size - bits <= allowed:
        return ""
    return f"{targets:,} targets have {bits:.1f} bits, but were coded into {size:,}"


class Challenge(NamedTuple):
    """Parts of windows or documents, to be coded side by side, and decoded by who knows no more.

    Each is the part of number `parts` of one of the `rows` of an evaluation. `spans`, int64 (rows,
    3): first token that is known, first target of the part, end of its targets. `most`: how many
    the decoder looks for, who does not know where a document ends.
    """

    rows: list[int]
    parts: list[int]
    spans: np.ndarray
    most: list[int]

    @property
    def known(self) -> list[int]:
        """How many targets of each row stand before its part."""
        return (self.spans[:, 1] - self.spans[:, 0]).tolist()

    @property
    def counts(self) -> list[int]:
        """How many targets each part has."""
        return (self.spans[:, 2] - self.spans[:, 1]).tolist()

    def text(self, tokens: np.ndarray) -> np.ndarray:
        """What is known of all rows, and their parts: uint16 (tokens,)."""
        return np.concatenate([tokens[first : end + 1] for first, _, end in self.spans])

    def before(self, tokens: np.ndarray) -> np.ndarray:
        """What the decoder is told: uint16 (tokens,)."""
        return np.concatenate([tokens[first : begin + 1] for first, begin, _ in self.spans])

    def targets(self, tokens: np.ndarray) -> list[list[int]]:
        """What it shall find of each row."""
        return [tokens[begin + 1 : end + 1].tolist() for _, begin, end in self.spans]


def draw_windows(
    scored: dict, seconds_per_window: float, seconds: float, generator: np.random.Generator
) -> list[Challenge]:
    """Draw parts of windows that an evaluation has scored, any PART of any window.

    They are drawn when the nats of all parts are known, so nothing could be honest there alone.
    There are FEWEST_WINDOWS, or as many as can be decoded within so many seconds.
    """
    # Each target takes a pass to decode it, and all of them together one to code them.
    count = int(seconds / seconds_per_window / (PART + 1))
    count = min(max(count, FEWEST_WINDOWS), MOST_CODED // PART, len(scored["rows"]))
    drawn = generator.permutation(len(scored["rows"]))[:count]
    challenges = []
    for at in range(0, count, BATCH):
        rows = drawn[at : at + BATCH].tolist()
        parts = []
        spans = []
        for row in rows:
            start, first, end, _ = scored["rows"][row]
            part = int(generator.integers(-(-(end - first) // PART)))
            begin = first + PART * part
            parts.append(part)
            spans.append((start, begin, min(begin + PART, end)))
        counts = [end - begin for _, begin, end in spans]
        challenges.append(Challenge(rows, parts, np.array(spans), counts))
    return challenges


def draw_chunks(
    tokens: np.ndarray,
    scored: dict,
    settings: dict,
    seconds_of_prediction: list[float],
    seconds: float,
    generator: np.random.Generator,
) -> list[Challenge]:
    """Draw chunks of documents that an evaluation has scored; none if no BOS follows any.

    As draw_windows. Each chunk is as likely as any other to be that of the first document. There
    are FEWEST batches, or as many as can be decoded within so many seconds, but no more than MOST.
    """
    chunk = settings["ttt_chunk_size"]
    documents = np.array([[int(first), int(end)] for _, first, end, _ in scored["rows"]])
    chunks = np.where(tokens[documents[:, 1]] == BOS_ID, chunks_of(documents, chunk), 0)
    challenges: list[Challenge] = []
    if not chunks.any():
        return challenges
    spent = 0.0
    while len(challenges) < MOST and (len(challenges) < FEWEST or spent < seconds):
        drawn = int(generator.choice(len(documents), p=chunks / chunks.sum()))
        known = int(generator.integers(chunks[drawn]))
        others = generator.permutation(np.flatnonzero(chunks > known))
        rows = [drawn, *others[others != drawn].tolist()][: settings["ttt_batch_size"]]
        firsts, ends = documents[rows].T
        begins = firsts + known * chunk
        spans = np.stack([firsts, begins, np.minimum(begins + chunk, ends)], axis=1)
        challenges.append(Challenge(rows, [known] * len(rows), spans, [chunk] * len(rows)))
        # Coded and decoded, each chunk takes a prediction and about two more to learn.
        spent += (2 * 3 * known + chunk) * seconds_of_prediction[-1]
    return challenges


def judge_challenges(
    challenges: list[Challenge], nats: list[list[float]], scored: dict, bfloat16: bool
) -> str:
    """Say what differs between the nats of parts where they were coded and scored; or nothing.

    What rounding to bfloat16 makes lower in one part, it makes higher in others.
    """
    tolerance = BFLOAT16_NATS if bfloat16 else SAME_NATS
    together = BFLOAT16_TOGETHER if bfloat16 else SAME_NATS
    allowed_once = BFLOAT16_PART if bfloat16 else 0.0
    lower = 0.0
    targets = 0
    for challenge, coded in zip(challenges, nats, strict=True):
        counts = challenge.counts
        for row, part, count, own in zip(
            challenge.rows, challenge.parts, counts, coded, strict=True
        ):
            said = scored["by_part"][row][part]
            if not abs(own - said) <= tolerance * count + allowed_once:
                first = scored["rows"][row][1]
                return (
                    f"part {part} of what begins at target {first} has {said:.4f} nats, but "
                    f"{own:.4f} where it was coded"
                )
            lower += own - said
            targets += count
    if not lower <= together * targets + allowed_once:
        return f"decoded parts have {lower:.4f} nats less than where they were coded"
    return ""
