"""The verdicts on a score of track B, of a script that learns from what it has scored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from audit_judges import SUM_TOLERANCE, judge_causality
from audit_text import chunks_of, drawn_documents, split_documents
from checks import Check
from shards import BOS_ID

# Nats a target between two ways to compute it, with other rows beside it for one; and if the
# products are in bfloat16. Probes are in float32.
SAME_NATS = 1e-4
BFLOAT16_NATS = 1e-2
# The same of all documents together, among which rounding goes both ways: by 0 as measured.
BFLOAT16_TOGETHER = 2e-3
# Nats of a single chunk that products in bfloat16 may move, on top of those for each target.
BFLOAT16_CHUNK = 0.5
# Batches of documents of which a chunk is decoded: at least, and at most where there is the time.
FEWEST = 4
MOST = 16
# What rounding takes off a sum of a document's nats, as a share.
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
def judge_drawn(scored: dict, tokens: np.ndarray, seed: int) -> str:
    """Say what is wrong with the documents whose nats are returned; empty if nothing is.

    They must be the first ones of the random order, each once. A choice among them would have
    another mean, and the number of all says whether it is a sample. Nats are those of the chunks.
    """
    documents = drawn_documents(tokens, seed)
    found = sorted((int(first), int(end)) for _, first, end, _ in scored["rows"])
    expected = sorted(map(tuple, documents[: len(found)].tolist()))
    if found != expected:
        return f"the {len(found):,} documents that it returns are not those that were drawn"
    if scored["windows"] != len(documents):
        return f"it says that there are {scored['windows']:,} documents of {len(documents):,}"
    for (first, _, _, nats), parts in zip(scored["rows"], scored["by_chunk"], strict=True):
        if not abs(sum(parts) - nats) <= ROUNDING * nats:
            return f"the document at token {first} has {nats:.4f} nats, its chunks {sum(parts):.4f}"
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
    """A chunk of documents side by side, to be decoded behind so many `known` chunks.

    `documents`, rows of split_documents, are those of the `rows` of an evaluation.
    """

    rows: list[int]
    documents: np.ndarray
    chunk: int
    known: int

    @property
    def begin(self) -> int:
        """Targets of a document that stand before the chunk."""
        return self.known * self.chunk

    def before(self, tokens: np.ndarray) -> np.ndarray:
        """What the decoder is told: uint16 (documents, begin + 1)."""
        firsts = self.documents[:, 0]
        return tokens[firsts[:, None] + np.arange(self.begin + 1)]

    def targets(self, tokens: np.ndarray) -> list[list[int]]:
        """What it shall find of each document."""
        found = []
        for first, end in self.documents.tolist():
            stop = min(first + self.begin + self.chunk, end)
            found.append(tokens[first + self.begin + 1 : stop + 1].tolist())
        return found

    def text(self, tokens: np.ndarray) -> np.ndarray:
        """The documents up to the chunk's end, with what tells that it goes on or does not."""
        stops = self.documents[:, 0] + self.begin + self.chunk + 1
        stops = np.minimum(stops, self.documents[:, 1])
        return text_of_documents(tokens, np.stack([self.documents[:, 0], stops], axis=1))


def draw_challenges(
    tokens: np.ndarray,
    scored: dict,
    settings: dict,
    seconds_of_prediction: list[float],
    seconds: float,
    generator: np.random.Generator,
) -> list[Challenge]:
    """Draw chunks of documents that an evaluation has scored; none if no BOS follows any.

    They are drawn when the nats of all chunks are known, so nothing could be honest there alone.
    Each chunk is as likely as any other to be that of the first document. There are FEWEST, or as
    many as can be decoded within so many seconds, but no more than MOST.
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
        challenges.append(Challenge(rows, documents[rows], chunk, known))
        # Coded and decoded, each chunk takes a prediction and about two more to learn.
        spent += (2 * 3 * known + chunk) * seconds_of_prediction[-1]
    return challenges


def judge_challenges(
    challenges: list[Challenge],
    nats: list[list[float]],
    targets: list[list[list[int]]],
    scored: dict,
    bfloat16: bool,
) -> str:
    """Say what differs between the nats of chunks where they were coded and scored; or nothing."""
    tolerance = BFLOAT16_NATS if bfloat16 else SAME_NATS
    allowed_once = BFLOAT16_CHUNK if bfloat16 else 0.0
    for challenge, coded, texts in zip(challenges, nats, targets, strict=True):
        each = zip(challenge.rows, challenge.documents[:, 0], coded, texts, strict=True)
        for row, first, own, found in each:
            said = scored["by_chunk"][row][challenge.known]
            if not abs(own - said) <= tolerance * len(found) + allowed_once:
                return (
                    f"chunk {challenge.known} of the document at token {first} has {said:.4f} "
                    f"nats, but {own:.4f} where it was coded"
                )
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
