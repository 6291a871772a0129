"""What the auditor has a script do that learns while it scores, in a process with the script.

The probes have the shape of those in audit_probes.py. They read documents that are made for it: cut
from the text at random places, in lengths at which faults are likely.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from audit_candidate import Candidate
from audit_documents import (
    Trials,
    off_by,
    predicted,
    read_rows,
    seconds_of_prediction,
    side_by_side,
)
from audit_text import split_documents
from shards import BOS_ID

# The share of the time that may go into a document longer than a window, in each probe; and about
# how many predictions a chunk takes there, learning among them.
LONG_SHARE = 0.04
PREDICTIONS = 15
# Texts that are read with other tokens behind some points.
ROUNDS = 3


# ---- Documents for the probes
def made_text(
    candidate: Candidate, tokens: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Make a text of documents with many chunks and few, more than stand side by side: int64.

    The last one is not followed by a BOS.
    """
    chunk = candidate.chunk
    lengths = [longest(candidate), 2 * chunk, 3 * chunk + 1, 1, chunk, chunk + 1, 2]
    # The second batch has documents of one chunk.
    lengths += generator.integers(2, chunk + 1, candidate.documents - 2).tolist()
    words = tokens[tokens != BOS_ID].astype(np.int64)
    text = []
    for length in lengths:
        start = generator.integers(0, len(words))
        text += [BOS_ID, *np.resize(words[start:], length - 1)]
    return np.array(text)


def longest(candidate: Candidate) -> int:
    """Return the tokens of the longest document: more than a window, if there is the time."""
    chunk = candidate.chunk
    length = candidate.window + chunk + chunk // 2
    seconds = seconds_of_prediction(candidate)[-1] / 3 * candidate.window / chunk
    if PREDICTIONS * seconds * length / chunk > LONG_SHARE * candidate.seconds:
        length = min(length, 3 * chunk + chunk // 2)
    return length


def read_by_auditor(
    candidate: Candidate, text: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, float, int]:
    """Return nats by the auditor's own loop, with the documents in this order in batches.

    float64 (tokens - 1,); how far sums are off 1; and the number of distributions.
    """
    documents = split_documents(text)[order]
    nats = np.full(len(text) - 1, np.nan)
    off = 0.0
    places = 0
    for at in range(0, len(documents), candidate.documents):
        batch = documents[at : at + candidate.documents]
        rows = side_by_side(text, batch, candidate.documents, candidate.chunk)
        read = read_rows(candidate, rows)
        off = max(off, read.off)
        places += read.places
        for (first, end), own in zip(batch, read.nats, strict=False):
            nats[first:end] = own[: end - first]
    return nats, off, places


# ---- Every target once
def probe_targets(
    candidate: Candidate, tokens: np.ndarray, rows: int, generator: np.random.Generator
) -> dict:
    """Compare the script's nats of each target with the auditor's own, and its score with both."""
    text = made_text(candidate, tokens, generator)
    order = generator.permutation(len(split_documents(text)))
    own, _, _ = read_by_auditor(candidate, text, order)
    found = candidate.adaptive_nats(text)
    score = candidate.adaptive_score(text)
    if found.shape != own.shape:
        return dict(targets=len(own), numbers=list(found.shape))
    difference = np.abs(found - own)
    return dict(
        targets=len(own),
        numbers=list(found.shape),
        missing=int(np.isnan(found).sum()),
        difference=float(np.nan_to_num(difference).max()),
        place=int(np.nan_to_num(difference).argmax()),
        counted=score.targets,
        sum_difference=float(abs(score.val_loss * score.targets - own.sum()) / len(own)),
    )


# ---- Causality
def probe_causality(
    candidate: Candidate, tokens: np.ndarray, rows: int, generator: np.random.Generator
) -> dict:
    """Change later tokens: in the same chunk, in later chunks, in later documents.

    No number of an earlier target may change by a bit; nor may a distribution that the script
    predicts, with other text behind the place, or none.
    """
    text = made_text(candidate, tokens, generator)
    before = candidate.adaptive_nats(text)
    compared = 0
    wrong = []
    difference = 0.0
    moved = True
    places = 0
    for turn in range(ROUNDS):
        changed, points = changed_text(candidate, text, turn, generator)
        after = candidate.adaptive_nats(changed)
        for first, end, point in points:
            # Target point - 1 is the changed token.
            same = slice(first, min(point - 1, end))
            compared += same.stop - first
            places += int(point <= end)
            if not np.array_equal(before[same], after[same]):
                wrong.append(point - first)
                difference = max(difference, float(np.abs(before[same] - after[same]).max()))
            later = slice(point, end)
            if turn % 2 == 0 and point < end:
                moved &= not np.array_equal(before[later], after[later])
    trials = Trials(candidate, generator)
    documents = split_documents(text)[: candidate.documents]
    read_rows(
        candidate,
        side_by_side(text, documents, candidate.documents, candidate.chunk),
        trial=trials,
    )
    return dict(
        compared=compared + trials.compared,
        places=places + trials.places,
        wrong=wrong + trials.wrong,
        difference=max(difference, trials.difference),
        moved=moved,
    )


def changed_text(
    candidate: Candidate, text: np.ndarray, turn: int, generator: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Return the text with other tokens in each document behind a point, and (first, end, point).

    In even turns all tokens from the point on are others, in odd ones only one, and the first
    document, which has most chunks, stays as it is. No token becomes a BOS. The point of a document
    that stays lies behind its end.
    """
    changed = text.copy()
    points = []
    chunk = candidate.chunk
    for number, (first, end) in enumerate(split_documents(text).tolist()):
        # The document's own last token.
        last = end if end == len(text) - 1 else end - 1
        stays = last == first or (turn % 2 == 1 and number == 0)
        if stays:
            points.append((first, end, end + 1))
            continue
        likely = [chunk // 2, chunk, 2 * chunk, last - first]
        offset = min(likely[(number + turn) % len(likely)], last - first)
        if turn >= 2:
            offset = int(generator.integers(1, last - first + 1))
        point = first + max(offset, 1)
        stop = last + 1 if turn % 2 == 0 else point + 1
        changed[point:stop] = other_tokens(candidate, text[point:stop], generator)
        points.append((first, end, point))
    return changed, points


def other_tokens(
    candidate: Candidate, tokens: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return for each token another one, none of them a BOS."""
    vocabulary = candidate.settings.vocab_size
    found = tokens.copy()
    while (wrong := (found == tokens) | (found == BOS_ID)).any():
        found[wrong] = generator.integers(0, vocabulary, int(wrong.sum()))
    return found


# ---- Documents apart
def probe_documents(
    candidate: Candidate, tokens: np.ndarray, rows: int, generator: np.random.Generator
) -> dict:
    """Compare each document's nats with those that it has alone, after others, in other rows."""
    text = made_text(candidate, tokens, generator)
    documents = split_documents(text)
    nats = candidate.adaptive_nats(text)
    order = generator.permutation(len(documents))
    own, _, _ = read_by_auditor(candidate, text, order)
    # One with many chunks, and one of the last batch, that others came before.
    chosen = [2, len(documents) - 1]
    comparisons = [
        ("in another order", after_others(candidate, text, documents, nats, generator)),
        ("alone", alone(candidate, text, documents[chosen], nats)),
        ("in another row", in_other_rows(candidate, text, own, order, generator)),
    ]
    return dict(
        documents=len(documents),
        batches=-(-len(documents) // candidate.documents),
        differences=dict(comparisons),
    )


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Return the largest distance, where what is no number is infinitely far from anything."""
    return float(np.nan_to_num(np.abs(first - second), nan=np.inf).max(initial=0.0))


def after_others(
    candidate: Candidate,
    text: np.ndarray,
    documents: np.ndarray,
    nats: np.ndarray,
    generator: np.random.Generator,
) -> float:
    """Return by how much nats differ if the script gets the documents in another order."""
    order = generator.permutation(len(documents))
    pieces = [text[first:end] for first, end in documents]
    # The last document's last token is no input in the text.
    pieces[-1] = text[documents[-1, 0] :]
    found = candidate.adaptive_nats(np.concatenate([*(pieces[place] for place in order), [BOS_ID]]))
    difference = 0.0
    at = 0
    for place in order:
        first, end = documents[place]
        mine = found[at : at + end - first]
        difference = max(difference, largest_difference(mine, nats[first:end]))
        at += len(pieces[place])
    return difference


def alone(candidate: Candidate, text: np.ndarray, documents: np.ndarray, nats: np.ndarray) -> float:
    """Return by how much nats differ if the script gets a document and no other."""
    difference = 0.0
    for first, end in documents:
        found = candidate.adaptive_nats(text[first : end + 1])
        difference = max(difference, largest_difference(found, nats[first:end]))
    return difference


def in_other_rows(
    candidate: Candidate,
    text: np.ndarray,
    own: np.ndarray,
    order: np.ndarray,
    generator: np.random.Generator,
) -> float:
    """Return by how much the auditor's own nats differ if documents stand in other rows."""
    found, _, _ = read_by_auditor(candidate, text, np.roll(order, 1))
    return largest_difference(found, own)


# ---- Normalization
def probe_normalization(
    candidate: Candidate, tokens: np.ndarray, rows: int, generator: np.random.Generator
) -> dict:
    """Sum the probabilities of all pieces, before the script has learnt and behind that."""
    text = made_text(candidate, tokens, generator)
    documents = split_documents(text)[: candidate.documents]
    side = side_by_side(text, documents, candidate.documents, candidate.chunk)
    off = 0.0
    places = 0
    learnt = 0
    for chunk in predicted(candidate, side):
        is_scored = side.is_scored[:, chunk.places]
        off = max(off, off_by(chunk.shares[is_scored]))
        places += int(is_scored.sum())
        if chunk.places.start:
            learnt += int(is_scored.sum())
    return dict(off=off, places=places, learnt=learnt)


# By the names of the auditor's checks.
ADAPTIVE_PROBES: dict[str, Callable[[Candidate, np.ndarray, int, np.random.Generator], dict]] = {
    "adaptive_targets": probe_targets,
    "adaptive_causality": probe_causality,
    "adaptive_documents": probe_documents,
    "adaptive_normalization": probe_normalization,
}
