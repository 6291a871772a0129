"""Documents side by side, as the auditor reads them with the audited script's DocumentLearner.

Nothing here comes from the script but the distributions: which tokens belong together, what is
scored when, and what a score is, the auditor says itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arithmetic_coder import Decoder, cumulative, encode
from audit_candidate import Candidate, Learner
from audit_text import (
    Text,
    chunks_of,
    drawn_documents,
    split_documents,
    take_validation,
)
from shards import BOS_ID, read_shard

DATA = Path("data")
CODED = Path("coded_documents.bin")
DECODED = Path("decoded_documents.txt")
# Parts of what was scored, chunks of documents or targets of windows, and what stands before them.
CODED_PARTS = Path("coded_parts.bin")
BEFORE_PARTS = Path("before_parts.bin")
# Bytes at the beginning of the coded file: how many documents follow, and how many chunks the
# longest one has, two bytes each. Of what is decoded wrongly no document might ever end.
COUNT_BYTES = 2
# Batches of documents that are drawn together, so that those of like length can stand side by side.
DRAWN_BATCHES = 4
# The share of chunks of an evaluation at which the text behind a place is replaced.
TRIED = 0.1
# What stands for a probability of 0, of which there is no logarithm.
LEAST = 1e-38


# ---- Documents
class Rows(NamedTuple):
    """Documents side by side: inputs, targets and is_scored, each (rows, chunks * chunk).

    What is behind a document's end is 0 and not scored.
    """

    inputs: np.ndarray
    targets: np.ndarray
    is_scored: np.ndarray


def side_by_side(tokens: np.ndarray, documents: np.ndarray, rows: int, chunk: int) -> Rows:
    """Put documents into the first rows, and fill up with rows of zeros."""
    length = int(chunks_of(documents, chunk).max()) * chunk
    inputs = np.zeros((rows, length), dtype=np.int64)
    targets = np.zeros((rows, length), dtype=np.int64)
    is_scored = np.zeros((rows, length), dtype=bool)
    for row, (first, end) in enumerate(documents):
        inputs[row, : end - first] = tokens[first:end]
        targets[row, : end - first] = tokens[first + 1 : end + 1]
        is_scored[row, : end - first] = True
    return Rows(inputs, targets, is_scored)


# ---- Scoring
class Chunk(NamedTuple):
    """What was predicted for a chunk: its place, and the full distributions.

    `shares`: float32 (kept rows, chunk, vocabulary); `places` is the slice of the rows' positions.
    """

    places: slice
    shares: np.ndarray


def predicted(
    candidate: Candidate,
    rows: Rows,
    learns: bool = True,
    trial: Callable[[Learner, np.ndarray], None] | None = None,
    keeps: bool = False,
) -> Iterator[Chunk]:
    """Predict chunk after chunk with a new learner; the script learns from each behind its use.

    A `trial` gets the learner and what it will predict from next. With `keeps` rows behind the last
    document that goes on are left away, by halves; no decoder could know which these are.
    """
    learner = candidate.learner()
    kept = len(rows.inputs)
    for first in range(0, rows.inputs.shape[1], learner.chunk):
        places = slice(first, first + learner.chunk)
        going_on = 1 + np.flatnonzero(rows.is_scored[:, first])[-1]
        while keeps and kept // 2 >= going_on:
            kept //= 2
            learner.keep(kept)
        inputs = rows.inputs[:kept, : places.stop]
        if trial is not None:
            trial(learner, inputs)
        yield Chunk(places, learner.predict(inputs))
        if learns:
            learner.learn(rows.targets[:kept, places], rows.is_scored[:kept, places])


class Trials:
    """Tries whether distributions depend on text behind them: it is replaced, or is not there.

    `share` is that of the chunks that are tried. `compared` numbers of `places` were compared;
    `wrong` are the places of those that changed, and `difference` is by how much.
    """

    def __init__(self, candidate: Candidate, generator: np.random.Generator, share: float = 1.0):
        self.vocabulary = candidate.settings.vocab_size
        self.generator = generator
        self.share = share
        self.places = 0
        self.compared = 0
        self.wrong: list[int] = []
        self.difference = 0.0

    def __call__(self, learner: Learner, inputs: np.ndarray) -> None:
        """Predict with the whole chunk, and with another end of it."""
        generator = self.generator
        if generator.random() >= self.share:
            return
        first = inputs.shape[1] - learner.chunk
        point = int(generator.integers(0, max(1, learner.chunk - 1)))
        other = inputs.copy()
        later = other[:, first + point + 1 :]
        later[:] = 0
        if generator.random() < 0.5:
            later[:] = generator.integers(BOS_ID + 1, self.vocabulary, later.shape)
        # In any order: a script may tell the first call from others.
        texts = [inputs, other] if generator.random() < 0.5 else [other, inputs]
        one, two = (learner.predict(text)[:, : point + 1].copy() for text in texts)
        self.places += 1
        self.compared += one.size
        if not np.array_equal(one, two):
            self.wrong.append(first + point)
            self.difference = max(self.difference, float(np.abs(one - two).max()))


def nats_of(shares: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return -log of the share of each target: float64, the shape of the targets."""
    chosen = np.take_along_axis(shares, targets[..., None], -1)[..., 0]
    return -np.log(np.maximum(chosen.astype(np.float64), LEAST))


def off_by(shares: np.ndarray) -> float:
    """Return how far sums over the vocabulary are from 1, or shares from being none below 0."""
    if not shares.size:
        return 0.0
    if not np.isfinite(shares).all():
        return math.inf
    sums = shares.sum(-1, dtype=np.float64)
    return float(max(np.abs(sums - 1).max(), -shares.min(), 0.0))


class Reading(NamedTuple):
    """Nats of documents side by side, float64 (rows, length), 0 where nothing is scored.

    `off`: the largest distance of a sum over the vocabulary from 1, among `places` distributions.
    """

    nats: np.ndarray
    off: float
    places: int


def read_rows(
    candidate: Candidate,
    rows: Rows,
    learns: bool = True,
    trial: Trials | None = None,
    keeps: bool = False,
) -> Reading:
    """Score documents side by side, each chunk before the script learns from it."""
    nats = np.zeros(rows.inputs.shape)
    off = 0.0
    places = 0
    for chunk in predicted(candidate, rows, learns, trial, keeps):
        kept = len(chunk.shares)
        is_scored = rows.is_scored[:kept, chunk.places]
        found = nats_of(chunk.shares, rows.targets[:kept, chunk.places])
        nats[:kept, chunk.places] = np.where(is_scored, found, 0.0)
        off = max(off, off_by(chunk.shares[is_scored]))
        places += int(is_scored.sum())
    return Reading(nats, off, places)


def score_drawn(candidate: Candidate, tokens: np.ndarray, seed: int, is_late: Callable) -> dict:
    """Return the nats of documents in random order, in batches of the auditor's own composition.

    It ends when is_late(share of the targets that are done) says so. A row is first token, first
    target, end of targets, nats; `by_part` has the nats of each chunk of the same documents.
    """
    documents = drawn_documents(tokens, seed)
    count = candidate.documents
    trials = Trials(candidate, np.random.default_rng((seed, 9)), TRIED)
    rows = []
    by_part = []
    off = 0.0
    places = 0
    for at in range(0, len(documents), DRAWN_BATCHES * count):
        if at and is_late(places / (len(tokens) - 1)):
            break
        drawn = documents[at : at + DRAWN_BATCHES * count]
        # Those of like length side by side, the longest first.
        drawn = drawn[np.argsort(-chunks_of(drawn, candidate.chunk), kind="stable")]
        for first in range(0, len(drawn), count):
            batch = drawn[first : first + count]
            side = side_by_side(tokens, batch, count, candidate.chunk)
            read = read_rows(candidate, side, trial=trials, keeps=True)
            off = max(off, read.off)
            places += read.places
            for (start, end), nats in zip(batch.tolist(), read.nats, strict=False):
                rows.append([start, start, end, float(nats.sum())])
                parts = nats.reshape(-1, candidate.chunk).sum(1)
                by_part.append(parts[: -(-(end - start) // candidate.chunk)].tolist())
    return dict(
        windows=len(documents),
        rows=rows,
        by_part=by_part,
        off=off,
        places=places,
        tried=trials.places,
        wrong=trials.wrong,
        difference=trials.difference,
    )


# ---- Decompression
def encode_documents(job: dict) -> dict:
    """Code documents, side by side in batches, into CODED, and let the script score them."""
    tokens = take_validation(DATA)
    candidate = Candidate(job)
    documents = split_documents(tokens)
    intervals = []
    own = []
    fixed = 0.0
    for first in range(0, len(documents), candidate.documents):
        batch = documents[first : first + candidate.documents]
        rows = side_by_side(tokens, batch, candidate.documents, candidate.chunk)
        nats = np.zeros(len(batch))
        for chunk in predicted(candidate, rows):
            intervals += intervals_of(rows, chunk)
            found = nats_of(chunk.shares, rows.targets[:, chunk.places])
            nats += np.where(rows.is_scored[:, chunk.places], found, 0.0).sum(1)[: len(batch)]
        own += nats.tolist()
        fixed += float(read_rows(candidate, rows, learns=False).nats.sum())
    counts = (len(documents), int(chunks_of(documents, candidate.chunk).max()))
    head = b"".join(count.to_bytes(COUNT_BYTES, "big") for count in counts)
    CODED.write_bytes(head + encode(intervals))
    score = candidate.adaptive_score(tokens)
    fixed_bpb = score.val_bpb * fixed / (score.val_loss * score.targets)
    return dict(val_bpb=score.val_bpb, fixed_bpb=fixed_bpb, nats=own)


def intervals_of(rows: Rows, chunk: Chunk) -> list[tuple[int, int]]:
    """Return the coder's intervals of a chunk's targets: position after position, row after row."""
    found = []
    for place in range(chunk.shares.shape[1]):
        at = chunk.places.start + place
        for row in np.flatnonzero(rows.is_scored[:, at]):
            begins = begins_of(chunk.shares[row, place])
            symbol = rows.targets[row, at]
            found.append((int(begins[symbol]), int(begins[symbol + 1])))
    return found


def begins_of(shares: np.ndarray) -> np.ndarray:
    """Return where each symbol's part of the coder's interval begins. `shares`: (vocabulary,)."""
    return cumulative(np.log(np.maximum(shares.astype(np.float64), LEAST)))


def decode_documents(job: dict) -> dict:
    """Turn CODED into the documents again: DECODED, and the tokens.

    What the script learns from is what it has decoded.
    """
    candidate = Candidate(job)
    data = CODED.read_bytes()
    count = int.from_bytes(data[:COUNT_BYTES], "big")
    chunks = int.from_bytes(data[COUNT_BYTES : 2 * COUNT_BYTES], "big")
    decoder = Decoder(data[2 * COUNT_BYTES :])
    tokens: list[int] = []
    for first in range(0, count, candidate.documents):
        rows = min(candidate.documents, count - first)
        for document in decode_batch(candidate, decoder, rows, chunks):
            tokens += document
    # The BOS that ends the last document.
    tokens.append(BOS_ID)
    DECODED.write_bytes(Text(Path(job["tokenizer"])).decode(np.array(tokens)))
    return dict(tokens=tokens)


def decode_batch(
    candidate: Candidate, decoder: Decoder, count: int, chunks: int
) -> list[list[int]]:
    """Decode documents that stand side by side; each ends where a BOS follows.

    None has more than so many chunks.
    """
    learner = candidate.learner()
    documents = [[BOS_ID] for _ in range(count)]
    is_open = [True] * count
    inputs = np.zeros((learner.documents, 0), dtype=np.int64)
    for _ in range(chunks):
        if not any(is_open):
            break
        inputs = np.pad(inputs, ((0, 0), (0, learner.chunk)))
        targets = np.zeros((learner.documents, learner.chunk), dtype=np.int64)
        is_scored = np.zeros((learner.documents, learner.chunk), dtype=bool)
        begin = inputs.shape[1] - learner.chunk
        for place in range(learner.chunk):
            if not any(is_open):
                break
            for row in np.flatnonzero(is_open):
                inputs[row, begin + place] = documents[row][-1]
            # What is not known yet is 0.
            shares = learner.predict(inputs)[:, place]
            for row in np.flatnonzero(is_open):
                symbol = decoder.symbol(begins_of(shares[row]))
                targets[row, place] = symbol
                is_scored[row, place] = True
                if symbol == BOS_ID:
                    is_open[row] = False
                else:
                    documents[row].append(symbol)
        if any(is_open):
            # Once more with the whole chunk, as the encoder did.
            learner.predict(inputs)
            learner.learn(targets, is_scored)
    return documents


# ---- Decompression of single chunks
def encode_chunks(job: dict) -> dict:
    """Code a chunk of each document into CODED_PARTS, and return the nats of each chunk.

    A group of the job are documents side by side: how many targets of each are before its chunk,
    and how many are in it. The text is that of the documents up to the end of their chunks.
    """
    tokens = take_validation(DATA)
    candidate = Candidate(job)
    intervals = []
    nats = []
    for sizes in job["groups"]:
        ends = np.cumsum([known + count + 1 for known, count in sizes])
        documents = np.stack([np.append(0, ends[:-1]), ends - 1], axis=1)
        rows = side_by_side(tokens, documents, candidate.documents, candidate.chunk)
        tokens = tokens[ends[-1] :]
        # All have as many chunks before them.
        begin = sizes[0][0]
        chunk = next(each for each in predicted(candidate, rows) if each.places.start == begin)
        intervals += intervals_of(rows, chunk)
        found = nats_of(chunk.shares, rows.targets[:, chunk.places])
        found = np.where(rows.is_scored[:, chunk.places], found, 0.0)
        nats.append(found[: len(sizes)].sum(1).tolist())
    CODED_PARTS.write_bytes(encode(intervals))
    return dict(nats=nats)


def decode_chunks(job: dict) -> dict:
    """Turn CODED_PARTS into the tokens of each document's chunk again, behind BEFORE_PARTS."""
    candidate = Candidate(job)
    decoder = Decoder(CODED_PARTS.read_bytes())
    before = read_shard(BEFORE_PARTS)
    tokens = []
    for sizes in job["groups"]:
        size = sum(known + 1 for known, _ in sizes)
        told = before[:size].reshape(len(sizes), -1)
        tokens.append(decode_chunk(candidate, decoder, told))
        before = before[size:]
    return dict(tokens=tokens)


def decode_chunk(candidate: Candidate, decoder: Decoder, before: np.ndarray) -> list[list[int]]:
    """Decode a chunk of documents of which (documents, chunks * chunk + 1) tokens are known.

    A document ends where a BOS follows.
    """
    learner = candidate.learner()
    count = len(before)
    begin = before.shape[1] - 1
    # What is not known yet is 0.
    inputs = np.zeros((learner.documents, begin + learner.chunk + 1), dtype=np.int64)
    inputs[:count, : begin + 1] = before
    is_scored = np.zeros((learner.documents, learner.chunk), dtype=bool)
    is_scored[:count] = True
    for end in range(learner.chunk, begin + 1, learner.chunk):
        learner.predict(inputs[:, :end])
        learner.learn(inputs[:, end - learner.chunk + 1 : end + 1], is_scored)
    tokens: list[list[int]] = [[] for _ in range(count)]
    for place in range(begin, begin + learner.chunk):
        shares = learner.predict(inputs[:, :-1])[:, place - begin]
        for row, found in enumerate(tokens):
            if BOS_ID in found:
                continue
            symbol = decoder.symbol(begins_of(shares[row]))
            found.append(symbol)
            if symbol != BOS_ID:
                inputs[row, place + 1] = symbol
    return tokens


# ---- Time
def seconds_of_prediction(candidate: Candidate) -> list[float]:
    """Return how long it takes to predict the first chunk of all rows, and the third one."""
    learner = candidate.learner()
    found = []
    for chunks in (1, 3):
        inputs = np.full((learner.documents, chunks * learner.chunk), BOS_ID)
        learner.predict(inputs)
        started = time.perf_counter()
        learner.predict(inputs)
        found.append(time.perf_counter() - started)
    return found
