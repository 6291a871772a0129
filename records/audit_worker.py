"""What the auditor runs in processes of their own, each in a folder with the audited script.

`python audit.py --worker NAME`, started in such a folder, reads job.json and writes result.json.
The folder holds copies of all that the process needs, so it can be carried to another machine.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from arithmetic_coder import Decoder, cumulative, encode
from audit_adaptation import ADAPTIVE_PROBES
from audit_candidate import Candidate, own_losses
from audit_documents import (
    BEFORE_PARTS,
    CODED_PARTS,
    decode_chunks,
    decode_documents,
    encode_chunks,
    encode_documents,
    score_drawn,
    seconds_of_prediction,
)
from audit_guard import Guard
from audit_probes import PROBES
from audit_text import BATCH, PART, Text, drawn_windows, sliding_windows, take_validation
from commands import described
from shards import BOS_ID, read_shard

DATA = Path("data")
CODED = Path("coded.bin")
DECODED = Path("decoded.txt")
# Bytes at the beginning of the coded file that say how many targets follow.
COUNT_BYTES = 2
# The rows of the probes may take about this share of the time, in at most so many batches.
PROBE_SHARE = 0.02
MOST_BATCHES = 8


def inspect_parts(job: dict) -> dict:
    """Run the probes that the job names. An error in one of them is its result."""
    tokens = take_validation(DATA)
    candidate = Candidate(job)
    seconds = seconds_per_window(candidate)
    results = dict(settings=candidate.stored, adapts=candidate.adapts, seconds_per_window=seconds)
    batches = np.clip(PROBE_SHARE * job["seconds"] / seconds / BATCH, 1, MOST_BATCHES)
    rows = BATCH * int(batches)
    run_probes(PROBES, candidate, tokens, rows, job, results)
    if candidate.adapts:
        results["seconds_of_prediction"] = seconds_of_prediction(candidate)
        # In bfloat16 a document would have other numbers with other rows beside it.
        environment = {**job["environment"], "DTYPE": "float32"}
        exact = Candidate({**job, "environment": environment})
        run_probes(ADAPTIVE_PROBES, exact, tokens, rows, job, results)
    return results


def run_probes(
    probes: dict, candidate: Candidate, tokens: np.ndarray, rows: int, job: dict, results: dict
) -> None:
    """Run those of the probes that the job names, and write what they return into the results."""
    for name in job["probes"]:
        if name not in probes:
            continue
        # The draws of a probe are the same, whichever others run.
        generator = np.random.default_rng((job["seed"], len(name)))
        try:
            results[name] = probes[name](candidate, tokens, rows, generator)
        except Exception as error:
            results[name] = dict(error=described(error))


def seconds_per_window(candidate: Candidate) -> float:
    """Return how long a forward pass over one window takes, once all is warm."""
    window = np.full((1, candidate.window), BOS_ID)
    candidate.logits(window)
    started = time.perf_counter()
    for _ in range(3):
        candidate.logits(window)
    return (time.perf_counter() - started) / 3


def is_time(elapsed: float, share: float, job: dict) -> bool:
    """Whether to stop after so many seconds and this share of all windows.

    It is not if the rest is soon done: all windows within `whole_seconds`, if the job has that.
    """
    late = elapsed > job["seconds"]
    return late and elapsed / share > job.get("whole_seconds", 0.0)


def score_windows(job: dict) -> dict:
    """Score windows of the sliding evaluation, in random order, until it is time."""
    tokens = take_validation(DATA)
    return scored_windows(Candidate(job), tokens, job)


def scored_windows(candidate: Candidate, tokens: np.ndarray, job: dict) -> dict:
    """Return the nats of windows of the sliding evaluation, in random order, until it is time.

    It goes on as long as all of them take less than `whole_seconds` of the job, if it has that.
    A row is first token, first target, end of targets, nats; `by_part` has the nats of each PART
    of the same windows' targets. At least two batches are scored.
    """
    shape = (candidate.window, candidate.stride)
    windows = drawn_windows(len(tokens) - 1, *shape, job["seed"])
    padded = np.pad(tokens, (0, candidate.window))
    rows = []
    by_part = []
    started = time.perf_counter()
    for at in range(0, len(windows), BATCH):
        if at > BATCH and is_time(time.perf_counter() - started, at / len(windows), job):
            break
        batch = windows[at : at + BATCH]
        inputs = padded[batch[:, :1] + np.arange(candidate.window)]
        for (start, first, end), logits in zip(batch, candidate.logits(inputs), strict=True):
            targets = padded[first + 1 : end + 1]
            nats = own_losses(logits[first - start : end - start], targets)
            rows.append([int(start), int(first), int(end), float(nats.sum())])
            by_part.append(np.add.reduceat(nats, np.arange(0, len(nats), PART)).tolist())
    return dict(windows=len(windows), shape=shape, rows=rows, by_part=by_part)


def score_documents(job: dict) -> dict:
    """Score documents that the script learns from, in random order, until it is time."""
    tokens = take_validation(DATA)
    return scored_documents(Candidate(job), tokens, job)


def scored_documents(candidate: Candidate, tokens: np.ndarray, job: dict) -> dict:
    """Return the nats of documents that the script learns from once they are scored.

    Rows and time are those of scored_windows.
    """
    started = time.perf_counter()

    def is_late(share: float) -> bool:
        return is_time(time.perf_counter() - started, share, job)

    return score_drawn(candidate, tokens, job["seed"], is_late)


def encode_stretch(job: dict) -> dict:
    """Code a stretch of text after its BOS into coded.bin, and let the script score it."""
    tokens = take_validation(DATA)
    candidate = Candidate(job)
    targets = len(tokens) - 1
    padded = np.pad(tokens, (0, candidate.window))
    intervals = []
    for start, first, end in sliding_windows(targets, candidate.window, candidate.stride):
        logits = candidate.logits(padded[None, start : start + candidate.window])[0]
        for target in range(first, end):
            begins = cumulative(logits[target - start])
            symbol = padded[target + 1]
            intervals.append((int(begins[symbol]), int(begins[symbol + 1])))
    CODED.write_bytes(targets.to_bytes(COUNT_BYTES, "big") + encode(intervals))
    return dict(val_bpb=candidate.evaluator.score(candidate.model, tokens, "sliding").val_bpb)


def decode_stretch(job: dict) -> dict:
    """Turn coded.bin into the text again, token after token: decoded.txt, and the tokens."""
    candidate = Candidate(job)
    data = CODED.read_bytes()
    targets = int.from_bytes(data[:COUNT_BYTES], "big")
    decoder = Decoder(data[COUNT_BYTES:])
    # What is not known yet is 0.
    tokens = np.zeros(targets + candidate.window + 1, dtype=np.int64)
    tokens[0] = BOS_ID
    for start, first, end in sliding_windows(targets, candidate.window, candidate.stride):
        for target in range(first, end):
            logits = candidate.logits(tokens[None, start : start + candidate.window])[0]
            tokens[target + 1] = decoder.symbol(cumulative(logits[target - start]))
    tokens = tokens[: targets + 1]
    DECODED.write_bytes(Text(Path(job["tokenizer"])).decode(tokens))
    return dict(tokens=tokens.tolist())


# ---- Decompression of parts of windows
def encode_windows(job: dict) -> dict:
    """Code a part of each window's targets into CODED_PARTS, and return the nats of each part.

    The text is that of the windows up to the end of their parts.
    """
    tokens = take_validation(DATA)
    candidate = Candidate(job)
    intervals = []
    nats = []
    for side, sizes in windows_side_by_side(job["groups"], tokens, candidate.window, True):
        logits = candidate.logits(side[:, :-1])
        for places in places_in_turn(sizes):
            for row, place in places:
                begins = cumulative(logits[row, place])
                symbol = side[row, place + 1]
                intervals.append((int(begins[symbol]), int(begins[symbol + 1])))
        found = []
        for row, (known, count) in enumerate(sizes):
            part = np.arange(known, known + count)
            found.append(float(own_losses(logits[row, part], side[row, part + 1]).sum()))
        nats.append(found)
    CODED_PARTS.write_bytes(encode(intervals))
    return dict(nats=nats)


def decode_windows(job: dict) -> dict:
    """Turn CODED_PARTS into the tokens of each window's part again, behind BEFORE_PARTS."""
    candidate = Candidate(job)
    decoder = Decoder(CODED_PARTS.read_bytes())
    before = read_shard(BEFORE_PARTS)
    tokens = []
    for side, sizes in windows_side_by_side(job["groups"], before, candidate.window, False):
        for places in places_in_turn(sizes):
            # A pass for the next target of all windows. What is not known yet is 0.
            logits = candidate.logits(side[:, :-1])
            for row, place in places:
                side[row, place + 1] = decoder.symbol(cumulative(logits[row, place]))
        found = []
        for row, (known, count) in enumerate(sizes):
            found.append(side[row, known + 1 : known + count + 1].tolist())
        tokens.append(found)
    return dict(tokens=tokens)


def windows_side_by_side(
    groups: list, tokens: np.ndarray, window: int, with_parts: bool
) -> Iterator[tuple[np.ndarray, list]]:
    """Yield the tokens of each group's windows, int64 (windows, window + 1), and its sizes.

    Sizes of a window are how many targets of it are known, and how many are in its part. `tokens`
    are the known ones of all windows, or those of the parts, too. What is behind them is 0.
    """
    for sizes in groups:
        side = np.zeros((len(sizes), window + 1), dtype=np.int64)
        for row, (known, count) in enumerate(sizes):
            told = known + 1
            if with_parts:
                told += count
            side[row, :told] = tokens[:told]
            tokens = tokens[told:]
        yield side, sizes


def places_in_turn(sizes: list) -> Iterator[list[tuple[int, int]]]:
    """Yield row and place of the first target of each part, then of each second one, and so on."""
    for step in range(max(count for _, count in sizes)):
        yield [(row, known + step) for row, (known, count) in enumerate(sizes) if step < count]


# ---- The script as a program
def run_program(job: dict) -> dict:
    """Run the script as a program; if it ends well, score the same text as the auditor does."""
    os.environ.update(job["environment"])
    os.environ.update(ARTIFACT=job["artifact"], DATA_PATH=str(DATA), RUN_ID="audit")
    os.environ.update(TOKENIZER_PATH=job["tokenizer"])
    sys.argv = ["train_gpt.py"]
    status = 0
    try:
        runpy.run_path("train_gpt.py", run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    if status != 0:
        return dict(status=status)
    tokens = take_validation(DATA)
    candidate = Candidate(job)
    endless = {**job, "seconds": math.inf}
    found = dict(scored_windows(candidate, tokens, endless), status=status)
    if candidate.adapts:
        found["documents"] = scored_documents(candidate, tokens, endless)
    return found


WORKERS: dict[str, Callable[[dict], dict]] = {
    "inspect": inspect_parts,
    "program": run_program,
    "score": score_windows,
    "score_documents": score_documents,
    "encode": encode_stretch,
    "encode_documents": encode_documents,
    "decode": decode_stretch,
    "decode_documents": decode_documents,
    "encode_chunks": encode_chunks,
    "decode_chunks": decode_chunks,
    "encode_windows": encode_windows,
    "decode_windows": decode_windows,
}


def answer(name: str, job: dict) -> dict:
    """Return what one of WORKERS returns in the current folder, or the error that ended it."""
    try:
        return WORKERS[name](job)
    except BaseException as error:
        traceback.print_exc()
        return dict(error=described(error), refused=type(error).__name__ == "UserError")


def run_worker(name: str, held: bool) -> int:
    """Be one of WORKERS in the current folder: job.json in, result.json out.

    `held`: whether the kernel holds this process there.
    """
    path = Path("job.json")
    job = json.loads(path.read_text(encoding="utf-8"))
    if job["forbidden"]:
        # The job names folders that the script shall not read, so the script must not see it.
        path.unlink()
    # torch asks for a folder for temporary files.
    os.environ["TMPDIR"] = os.getcwd()
    tempfile.tempdir = os.getcwd()
    guard = Guard(job["forbidden"])
    guard.install()
    result = answer(name, job)
    result.update(stopped=guard.stopped, held=held)
    Path("result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0
