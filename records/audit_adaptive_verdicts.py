"""The verdicts on a score of track B, of a script that learns from what it has scored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from audit_judges import SUM_TOLERANCE, judge_causality
from audit_text import BATCH, PART, chunks_of, split_documents
from checks import Check
from shards import BOS_ID

# Nats a target between two ways to compute it, with other rows beside it for one; and if the
# products are in bfloat16. Probes are in float32.
SAME_NATS = 1e-4
BFLOAT16_NATS = 1e-2
# The same of all documents together, among which rounding goes both ways: by 0 as measured.
BFLOAT16_TOGETHER = 2e-3
# Nats of a single part that products in bfloat16 may move, on top of those for each target.
BFLOAT16_PART = 0.5
# Batches of documents of which a chunk is decoded: at least, and at most where there is the time.
FEWEST = 4
MOST = 16
# Windows of which a part is decoded, at least.
FEWEST_WINDOWS = 4
# What rounding takes off a sum of nats, as a share.
ROUNDING = 1e-9
# Bits that a coded file may take beyond what its nats say: eight, as its last byte is not full, one
# to name a place inside of the interval, and one for what is rounded.
CODING_BITS = 10
# Documents to be decoded have so many chunks at least, where the text and the time allow: from the
# second one on the script has learnt something.
ENOUGH_CHUNKS = 3
# Tokens that are coded at most: the coder's integers grow with them.
MOST_CODED = 1 << 16


def judge_targets(found: dict) -> tuple[bool, str]:
    """One number for each target, the auditor's own; and the script's score is their mean."""
    targets = found["targets"]
    if found["numbers"] != [targets]:
        return False, f"{found['numbers']} numbers for {targets:,} targets"
    figure = f"{targets:,} targets, one number each, {found['difference']:.2g} nats from own"
    if found["missing"]:
        return False, f"{found['missing']:,} of {targets:,} targets have no number"
    wrong = []
    if not found["difference"] <= SAME_NATS:
        wrong.append(f"that of target {found['place']:,} is another")
    if found["counted"] != targets:
        wrong.append(f"the score counts {found['counted']:,}")
    if not found["sum_difference"] <= SAME_NATS:
        wrong.append(f"the score's loss is {found['sum_difference']:.2g} nats from their mean")
    return not wrong, "; ".join([figure, *wrong])


def judge_documents(found: dict) -> tuple[bool, str]:
    """A document's numbers are its own, whatever stands before and beside it.

    But for rounding: with fewer rows, or in another one, products are summed in another order.
    """
    figure = f"{found['documents']:,} documents in {found['batches']} batches"
    for where, difference in found["differences"].items():
        figure += f", {where} {difference:.2g}"
    passed = all(difference <= SAME_NATS for difference in found["differences"].values())
    return passed, f"{figure} nats from before"


def judge_normalization(found: dict) -> tuple[bool, str]:
    """All probabilities are there, none is below 0, and they sum to 1."""
    figure = f"sums over the vocabulary {found['off']:.2g} from 1 at {found['places']:,} places, "
    figure += f"{found['learnt']:,} of them behind what was learnt"
    return bool(found["off"] <= SUM_TOLERANCE), figure


def judge_evaluation(
    check: Check, scored: dict, decoded: dict[int, float], bfloat16: bool = False
) -> Check:
    """The verdict on a score, and on the distributions that it is made of.

    They sum to 1, and depend on nothing behind them; and the documents that were decoded, whose
    nats are known by their first token, have the same nats among all others.
    """
    wrong = []
    if not scored["off"] <= SUM_TOLERANCE:
        wrong.append(f"sums over the vocabulary are {scored['off']:.2g} from 1")
    if scored["wrong"]:
        wrong.append(
            f"with other text behind, predictions differ by {scored['difference']:.2g} "
            f"at {len(scored['wrong'])} of {scored['tried']} places"
        )
    figure = f"{check.figure}; {scored['tried']} predictions with other text behind"
    compared = 0
    lower = 0.0
    targets = 0
    tolerance = BFLOAT16_NATS if bfloat16 else SAME_NATS
    for first, _, end, nats in scored["rows"]:
        if first in decoded:
            compared += 1
            lower += decoded[first] - nats
            targets += end - first
            if not abs(decoded[first] - nats) <= tolerance * (end - first):
                wrong.append(
                    f"the document at token {first} has {nats:.4f} nats, but {decoded[first]:.4f} "
                    "where it was coded"
                )
    if bfloat16 and not wrong and not lower <= BFLOAT16_TOGETHER * targets:
        wrong.append(f"decoded documents have {lower:.4f} nats less than where they were coded")
    if decoded:
        figure += f", {compared} of {len(decoded)} decoded documents among them"
    if wrong:
        return check._replace(passed=False, figure="; ".join([figure, *wrong[:3]]), unproven="")
    return check._replace(figure=figure)


# ---- What was scored, against what is decoded
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
        if not (min(parts) >= 0 and abs(sum(parts) - nats) <= ROUNDING * nats):
            return f"from target {first} on there are {nats:.4f} nats, but {parts[:5]} in parts"
    return ""


def judge_size(nats: list[float], targets: int, size: int) -> str:
    """Say what is wrong with a coded file of so many bytes; empty if nothing is.

    It must not be larger than the nats of its targets say: these would be too low.
    """
    bits = sum(nats) / math.log(2)
    allowed = CODING_BITS + SAME_NATS / math.log(2) * targets
    if 8 * size - bits <= allowed:
        return ""
    return f"its nats are {bits / 8:.1f} bytes, but it was coded into {size:,}"


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


# By the names of the auditor's checks: the row's name, and what judges the probe of that name.
JUDGES: dict[str, tuple[str, Callable[[dict], tuple[bool, str]]]] = {
    "adaptive_targets": ("adaptive targets", judge_targets),
    "adaptive_causality": ("adaptive causality", judge_causality),
    "adaptive_documents": ("adaptive documents", judge_documents),
    "adaptive_normalization": ("adaptive sums", judge_normalization),
}


def documents_to_code(
    tokens: np.ndarray,
    settings: dict,
    seconds_of_prediction: list[float],
    seconds: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """Whole documents, drawn at random, that can be decoded within so many seconds.

    Each target takes a prediction of all rows. Of the documents with few enough chunks those with
    ENOUGH_CHUNKS come first; if all are too long, the shortest ones are taken. Rows of
    split_documents: int64 (documents, 2); none if the text has none that a BOS follows.
    """
    chunk = settings["ttt_chunk_size"]
    rows = settings["ttt_batch_size"]
    documents = split_documents(tokens)
    # One that is followed by a BOS.
    documents = documents[tokens[documents[:, 1]] == BOS_ID]
    if not len(documents):
        return documents
    chunks = chunks_of(documents, chunk)
    most = affordable_chunks(chunk, rows, seconds_of_prediction, seconds)
    order = generator.permutation(len(documents))
    # Few chunks last, and those that cannot be afforded behind them, the shortest first.
    rank = np.where(chunks >= ENOUGH_CHUNKS, 0, ENOUGH_CHUNKS - chunks)
    rank = np.where(chunks <= most, rank, ENOUGH_CHUNKS + chunks)
    order = order[np.argsort(rank[order], kind="stable")][:rows]
    fits = chunks[order] <= max(most, chunks[order[0]])
    return documents[order[fits]]


def text_of_documents(tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The text of documents, one behind the other, and a BOS at the end: uint16 (tokens,)."""
    pieces = [tokens[first:end] for first, end in documents]
    return np.concatenate([*pieces, [BOS_ID]]).astype(np.uint16)


def affordable_chunks(
    chunk: int, rows: int, seconds_of_prediction: list[float], seconds: float
) -> int:
    """How many chunks of a batch can be decoded, with a prediction for each of their tokens.

    Predicting chunk c takes about as long as the first one and a share for each before it.
    """
    one, three = seconds_of_prediction
    growth = max(three - one, 0.0) / 2
    most = max(1, MOST_CODED // (rows * chunk))
    spent = 0.0
    for chunks in range(1, most + 1):
        spent += chunk * (one + growth * (chunks - 1))
        if spent > seconds:
            return max(1, chunks - 1)
    return most
