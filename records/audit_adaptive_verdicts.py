"""The verdicts on a score of track B, of a script that learns from what it has scored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from audit_challenges import MOST_CODED
from audit_judges import (
    BFLOAT16_NATS,
    BFLOAT16_TOGETHER,
    SAME_NATS,
    SUM_TOLERANCE,
    judge_causality,
)
from audit_text import chunks_of, split_documents
from checks import Check
from shards import BOS_ID

# Documents to be decoded have so many chunks at least, where the text and the time allow: from the
# second one on the script has learnt something.
ENOUGH_CHUNKS = 3


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
