"""Prove or refute the score of a record folder, or of one artifact, on a CPU.

    python records/audit.py records/<track>/<date>_<name>    # script, logs, submission.json, README.md, *.ptz
    python records/audit.py final_model.int6.ptz --log logs/<RUN_ID>.txt

It prints a table: check, PASS or FAIL, and what was found on how much. The exit status is 0 if everything
passes, 1 if anything fails, 2 after one line for input that cannot be audited. What it verifies it computes
by itself: bytes of text by decoding, log-probabilities from the model's logits, sliding windows, an
arithmetic coder. Samples are as large as `--minutes` allows, and the table says how large they were.

The audited script runs in processes of their own, in temporary folders that hold copies of no more than they
need; a hook stops and reports connections, other programs, reading files of the repository, the record, the
data and other workers, and changing anything elsewhere. That catches mistakes and ordinary tricks. A script
that is written to fool this auditor can reach round the hook and return any figure; against it only the proof
by decompression holds, in which a second process turns a short file back into validation text, and that only
where the text is not to be had: carry the folder that `--keep` leaves to a machine that never had it; `python
audit.py --worker decode` in it writes decoded.txt. (The demo corpus is the documentation of installed
packages, which any process can read: with it, that proof shows little about a script with bad intent.) So
read the script too. How the weights came to be is not audited: training on validation text, choosing among
runs, and times that a log states leave no trace in an artifact. Only fixed models (track A) can be audited.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib.util
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import numpy as np
import sentencepiece

ROOT = Path(__file__).resolve().parents[1]
CAP = 16_000_000  # bytes of script and artifact
TOLERANCE = 1e-4  # bits per byte between two ways to compute a score
BFLOAT16 = 2e-4  # the same, if one is a compiled run in bfloat16: it rounds elsewhere, by 0.00009 as measured
BOS, SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 1, 20240520, 1, 256
TOTAL = 1 << 32  # of the coder's frequencies
LABELS = dict(
    roundtrip="final_int6_roundtrip", sliding="final_int6_sliding_window"
)  # the log's last lines
BATCH = 8  # windows of a forward pass, wherever what is computed shall be what is scored
# Settings in which the seeds of one configuration may differ.
MACHINE = {
    "run_id",
    "resume",
    "checkpoint_every",
    "artifact",
    "sample",
    "sample_tokens",
    "sample_temperature",
    "data_path",
    "tokenizer_path",
    "device",
    "attention",
    "compile",
    "micro_batch_tokens",
    "eval_batch_seqs",
    "train_log_every",
}
CHECKS = (
    "size",
    "alone",
    "bytes",
    "targets",
    "causality",
    "normalization",
    "score",
    "decompression",
    "log",
    "submission",
)
Check = collections.namedtuple(
    "Check", "name passed figure"
)  # passed: True, False, or None: not checked
Entry = collections.namedtuple(
    "Entry", "script artifact log record"
)  # paths; log and record may be None


class BadInput(Exception):
    """What cannot be audited: one line says what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """One line for wrong options, as for everything else that is wrong."""

    def error(self, message: str):
        raise BadInput(f"{message}; --help lists the options")


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


# ---- Tokens and their text
def read_shard(path: Path) -> np.ndarray:
    """A shard's tokens, uint16 (tokens,): behind 256 int32 with magic, version and their number."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if len(header) < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise BadInput(f"{path} is no token shard of version {SHARD_VERSION}: check --data")
    tokens = np.fromfile(path, dtype="<u2", offset=4 * SHARD_HEADER_INTS)
    if len(tokens) != header[2]:
        raise BadInput(f"{path} is damaged: {len(tokens)} tokens, but its header says {header[2]}")
    return tokens


def take_validation(folder: Path) -> np.ndarray:
    """The validation split, of which no file is left: no script that runs later can read it."""
    tokens = read_validation(folder)
    for path in folder.glob("*_val_*.bin"):
        path.unlink()
    return tokens


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """What read_shard reads."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def read_validation(folder: Path) -> np.ndarray:
    """The whole validation split in order of the files' names, uint16 (tokens,)."""
    return np.concatenate([read_shard(path) for path in sorted(folder.glob("*_val_*.bin"))])


class Text:
    """Text behind tokens, as SentencePiece decodes it document by document, and its bytes."""

    def __init__(self, path: Path):
        self.tokenizer = t = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.size = t.vocab_size()
        ids = range(self.size)
        self.silent = np.array([t.is_control(i) or t.is_unknown(i) or t.is_unused(i) for i in ids])
        anchor = next(i for i in ids if len(t.decode([i])) == 1 and t.decode([i]).isalnum())

        def bytes_after(before: list[int]) -> np.ndarray:
            return np.array(
                [
                    0
                    if self.silent[i]
                    else 1
                    if t.is_byte(i)
                    else len(t.decode([*before, i]).encode()) - len(before)
                    for i in ids
                ]
            )

        # behind another piece or not: decoding may drop a space that begins a document
        self.first, self.inside = bytes_after([]), bytes_after([anchor])

    def bytes_of_targets(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of the text behind each of tokens[1:], int64: what decoding says of each piece."""
        before, targets = tokens[:-1], tokens[1:]
        return np.where(self.silent[before], self.first[targets], self.inside[targets])

    def documents(self, tokens: np.ndarray):
        """The tokens of each document, without those that stand for no text; yields a thousand at once."""
        starts = np.flatnonzero(tokens == BOS).tolist() + [len(tokens)]
        for at in range(0, len(starts) - 1, 1000):
            pairs = zip(starts[at : at + 1000], starts[at + 1 : at + 1001])
            parts = [tokens[start:end] for start, end in pairs]
            yield [part[~self.silent[part]].tolist() for part in parts]

    def decode(self, tokens: np.ndarray) -> bytes:
        """The text of all documents, one after the other, UTF-8."""
        parts = (self.tokenizer.decode(documents) for documents in self.documents(tokens))
        return b"".join(text.encode() for texts in parts for text in texts)

    def count(self, tokens: np.ndarray) -> int:
        """Bytes of the decoded text. Byte pieces that are no UTF-8 decode to U+FFFD, three bytes each: a
        document with such is counted by its pieces, one byte for a byte piece."""
        total = 0
        for documents in self.documents(tokens):
            for ids, text in zip(documents, self.tokenizer.decode(documents)):
                by_piece = (
                    int(self.bytes_of_targets(np.array([BOS, *ids])).sum())
                    if "\ufffd" in text
                    else 0
                )
                total += by_piece or len(text.encode())
        return total


def plan(targets: int, window: int, stride: int) -> np.ndarray:
    """Windows of the sliding evaluation, int64 (windows, 3): first token, first target and end of the targets
    that it scores. Target i is token i + 1. The first window scores all of its targets, each later one adds
    `stride` and ends with its last target, the last one with the text."""
    later = np.arange(window + stride, targets + stride, stride)
    ends = np.append(min(window, targets), later.clip(max=targets))
    return np.stack([np.maximum(ends - window, 0), np.append(0, ends[:-1]), ends], axis=1)


# ---- Arithmetic coding (Rissanen 1976) in exact integers
def cumulative(logits: np.ndarray) -> np.ndarray:
    """Where each symbol's frequency begins and, last, TOTAL: int64 (symbols + 1,). No frequency is 0."""
    shares = np.exp(logits.astype(np.float64) - float(logits.max()))
    counts = 1 + np.floor(shares / shares.sum() * (TOTAL - len(shares))).astype(np.int64)
    counts[shares.argmax()] += TOTAL - counts.sum()
    return np.append(0, counts.cumsum())


def encode(intervals) -> bytes:
    """The shortest bytes, as a binary fraction, inside of nested intervals (begin, end) of TOTAL."""
    low, width, symbols = 0, 1, 0
    for begin, end in intervals:
        low, width, symbols = low * TOTAL + width * begin, width * (end - begin), symbols + 1
    whole, size = TOTAL**symbols, 0
    size = max(0, (whole.bit_length() - width.bit_length() - 1) // 8)
    while True:
        number = -(-(low << 8 * size) // whole)
        if number * whole < (low + width) << 8 * size:
            return number.to_bytes(size, "big")
        size += 1


class Decoder:
    """Symbols from what encode() wrote, given the same frequencies in the same order."""

    def __init__(self, data: bytes):
        self.place, self.whole = int.from_bytes(data, "big"), 1 << 8 * len(data)

    def symbol(self, begins: np.ndarray) -> int:
        """The symbol in whose interval the fraction lies, which then becomes the whole."""
        found = int(np.searchsorted(begins, self.place * TOTAL // self.whole, side="right")) - 1
        begin, end = int(begins[found]), int(begins[found + 1])
        self.place, self.whole = self.place * TOTAL - begin * self.whole, self.whole * (end - begin)
        return found


# ---- Workers: processes in which the audited script runs
CONNECTIONS = {
    f"socket.{name}"
    for name in (
        "connect",
        "bind",
        "getaddrinfo",
        "gethostbyname",
        "gethostbyaddr",
        "getnameinfo",
        "sendto",
        "sendmsg",
    )
}
CHANGES = {
    f"os.{name}"
    for name in (
        "link",
        "symlink",
        "rename",
        "remove",
        "rmdir",
        "mkdir",
        "truncate",
        "chmod",
        "chown",
        "utime",
    )
}
PROGRAMS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
}


def install_guard(forbidden: list[str], stopped: list[str]) -> None:
    """From now on stop, and note in `stopped`, connections, programs, reading below forbidden folders, and
    changing anything outside of this folder. To read Python is allowed, though it may lie in a repository."""
    here, *python = (os.path.realpath(path) + os.sep for path in (".", sys.prefix, sys.base_prefix))
    forbidden = tuple(os.path.realpath(path) + os.sep for path in forbidden)
    opens, writing = ("open", "os.listdir", "os.scandir"), os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def guard(event: str, arguments: tuple) -> None:
        if event in CONNECTIONS or event in PROGRAMS:
            what = f"{event} {arguments[-1] if event in CONNECTIONS else arguments[0]}"
        elif event in CHANGES:
            paths = [os.fsdecode(x) for x in arguments if isinstance(x, (str, bytes, os.PathLike))]
            away = [x for x in paths if not (os.path.realpath(x) + os.sep).startswith(here)]
            if not away:
                return
            what = f"{event} {away[0]}"
        elif event in opens and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(arguments[0])) + os.sep
            writes = event == "open" and arguments[2] & writing and not path.startswith("/dev/")
            reads = path.startswith(forbidden) and not path.startswith(tuple(python))
            if path.startswith(here) or not (reads or writes):
                return
            what = f"{event} {path.rstrip(os.sep)}"
        else:
            return
        stopped.append(what[:160])
        raise PermissionError(f"the auditor stopped {what[:160]}")

    sys.addaudithook(guard)


class Candidate:
    """The audited script as a module, with the artifact's model in it, on a CPU and not compiled. This is all
    that the auditor asks of a script."""

    def __init__(self, job: dict):
        import torch

        specification = importlib.util.spec_from_file_location("candidate", "train_gpt.py")
        self.script = sys.modules["candidate"] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(self.script)
        manifest, weights = self.script.read_artifact(
            Path(job["artifact"]).read_bytes(), job["artifact"]
        )
        self.stored = manifest["settings"]
        environment = {**job["environment"], "ARTIFACT": job["artifact"]}
        self.settings, _ = self.script.settings_from(environment, self.stored)
        runtime = self.script.start_runtime(self.settings)
        torch.set_num_threads(job["threads"])
        torch.set_grad_enabled(False)
        self.model = self.script.build_model(self.settings, runtime)
        self.model.load_state_dict(weights, strict=False)
        tokenizer = self.script.load_tokenizer(
            Path("data/tokenizer.model"), self.settings.vocab_size
        )
        self.table = self.script.ByteTable(tokenizer)
        self.evaluator = self.script.Evaluator(
            self.settings, runtime, self.table, lambda *_, **__: None
        )
        self.window = self.settings.eval_seq_len - self.settings.memory_tokens
        self.stride = self.settings.eval_stride

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Scores of what follows each token, float32 (batch, length, vocabulary); tokens (batch, length)."""
        import torch

        return self.model.logits(torch.from_numpy(tokens.astype(np.int64))).numpy()

    def losses(self, tokens: np.ndarray, targets: np.ndarray):
        """What the script's own evaluation counts, nats, for targets after all tokens: (batch, length)."""
        import torch

        tokens, targets = (torch.from_numpy(x.astype(np.int64)) for x in (tokens, targets))
        places = torch.arange(tokens.size(1)).expand(tokens.shape).contiguous()
        return self.evaluator.token_losses(self.model, tokens, targets, places)


def own_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Nats of targets (...,) under logits (..., vocabulary), float64."""
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, targets.astype(np.int64)[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


def drawn_windows(candidate: Candidate, tokens: np.ndarray, rows: int, generator) -> np.ndarray:
    """Random pieces of text one token longer than a window, int64 (rows, window + 1)."""
    length = min(candidate.window, len(tokens) - 1) + 1
    starts = generator.integers(0, len(tokens) - length + 1, rows)
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)


def check_causality(candidate: Candidate, tokens: np.ndarray, rows: int, generator) -> dict:
    """Change text after place t, in every second row all of it, in the others one token: no loss of a target
    up to token t and no logits up to place t may change by a bit."""
    import torch

    text, memory = (
        drawn_windows(candidate, tokens, rows, generator),
        candidate.settings.memory_tokens,
    )
    last = text.shape[1] - 2
    points = [last // 2, 1, last, memory, 0, memory + 1, last - 1, memory - 1]  # then anywhere
    points = np.clip([*points, *generator.integers(0, last + 1, rows)][:rows], 0, last)
    changed = text.copy()
    for row, point in enumerate(points):
        later = (
            np.arange(point + 1, last + 2)
            if row % 2 == 0
            else generator.integers(point + 1, last + 2, 1)
        )
        other = generator.integers(1, candidate.settings.vocab_size, len(later))
        changed[row, later] = (text[row, later] + other) % candidate.settings.vocab_size
    before, after = (
        torch.cat(
            [
                candidate.losses(x[at : at + BATCH, :-1], x[at : at + BATCH, 1:])
                for at in range(0, rows, BATCH)
            ]
        )
        for x in (text, changed)
    )
    scores_before, scores_after = (
        torch.cat(
            [
                torch.from_numpy(candidate.logits(x[at : at + BATCH, :-1]))
                for at in range(0, rows, BATCH)
            ]
        )
        for x in (text, changed)
    )
    compared, wrong, difference, moved = 0, [], 0.0, 0
    for row, point in enumerate(points.tolist()):
        pairs = (
            (before[row, :point], after[row, :point]),
            (scores_before[row, : point + 1], scores_after[row, : point + 1]),
        )
        compared += 2 * point + 1
        if not all(torch.equal(x, y) for x, y in pairs):
            wrong.append(point)
            difference = max(
                [difference] + [float((x - y).abs().max()) for x, y in pairs if len(x)]
            )
        moved += (
            row % 2
            or point == last
            or not torch.equal(before[row, point + 1 :], after[row, point + 1 :])
        )
    return dict(
        compared=compared, places=rows, wrong=wrong, difference=difference, moved=moved == rows
    )


def check_normalization(candidate: Candidate, tokens: np.ndarray, rows: int, generator) -> dict:
    """(a) The losses that are counted against the auditor's log-softmax, at every place of full windows.
    (b) The probabilities of every piece in turn as the target, summed at each place of a short text."""
    vocabulary = candidate.settings.vocab_size
    text = drawn_windows(candidate, tokens, max(1, rows // 2), generator)
    counted = candidate.losses(text[:, :-1], text[:, 1:]).double().numpy()
    own = own_losses(candidate.logits(text[:, :-1]), text[:, 1:])
    short, sums = text[0, :16], 0.0
    for first in range(0, vocabulary, 128):
        targets = np.arange(first, min(first + 128, vocabulary))[:, None] + np.zeros_like(short)
        losses = (
            candidate.losses(np.broadcast_to(short, targets.shape).copy(), targets).double().numpy()
        )
        sums = sums + np.exp(-losses).sum(0)
    return dict(
        places=own.size,
        difference=float(np.abs(counted - own).max()),
        brute_places=len(short),
        brute=float(np.abs(sums - 1).max()),
    )


DIGITS = 12  # octal digits of a sum of nats: below 2 ** 36, so that float64 keeps a mean times a count whole


def unique_pairs(length: int) -> tuple[np.ndarray, int]:
    """Numbers in which no two neighbours follow each other twice, int64 (length,), and how many different
    ones: the start of the de Bruijn sequence of order 2."""
    kinds = math.isqrt(length) + 1
    parts = [[i] + [x for j in range(i + 1, kinds) for x in (i, j)] for i in range(kinds)]
    return np.concatenate(parts)[:length], kinds


def counts_of_targets(candidate: Candidate, name: str, length: int) -> np.ndarray:
    """How often the script's own Evaluator.score counts each target of a text of `length` tokens. In the text
    a token and the one before it tell the place, and a loss of 8 ** d puts the count into the sum's octal
    digit d."""
    import torch

    numbers, kinds = unique_pairs(length)
    offset, group, evaluator = BOS + 1, 0, candidate.evaluator
    text, size = (numbers + offset).astype(np.uint16), offset + kinds
    places_of = torch.full(
        (candidate.settings.vocab_size, size), -1
    )  # of pairs; padding and the like: none
    places_of[numbers[:-1] + offset, numbers[1:] + offset] = torch.arange(length - 1)
    powers = torch.tensor([8.0**d for d in range(DIGITS)], dtype=torch.float64)

    def losses(model, inputs, wanted, places=None):
        before = inputs if places is None else torch.take_along_dim(inputs, places, 1)
        digit = places_of[before, wanted] - group
        return torch.where((digit >= 0) & (digit < DIGITS), powers[digit.clamp(0, DIGITS - 1)], 0.0)

    kept, counts = evaluator.token_losses, []
    evaluator.token_losses = losses
    try:
        for group in range(0, length - 1, DIGITS):
            score = evaluator.score(candidate.model, text, name)
            total = round(score.val_loss * score.targets)
            counts += [total >> 3 * d & 7 for d in range(DIGITS)]
    finally:
        evaluator.token_losses = kept
    return np.array(counts[: length - 1])


def check_targets(candidate: Candidate, *_) -> dict:
    """Both passes over texts shorter and longer than a window, no multiples of window or stride."""
    settings, stride = candidate.settings, candidate.stride
    longest = max(candidate.window, settings.train_seq_len - settings.memory_tokens)
    lengths = {
        min(length, (settings.vocab_size - 4) ** 2)
        for length in (  # so many pairs are there
            longest // 2 + 2,
            longest + stride // 2 + 2,
            3 * longest + stride // 3 + 2,
            4 * longest + stride + 3,
        )
    }
    counted, wrong = 0, []
    for name in ("plain", "sliding"):
        for length in sorted(lengths):
            counts = counts_of_targets(candidate, name, length)
            counted += len(counts)
            if bad := np.flatnonzero(counts != 1).tolist():
                wrong.append(
                    f"{name}: {len(bad)} of {length - 1} targets, "
                    f"such as {bad[0]}, counted {counts[bad[0]]} times"
                )
    return dict(counted=counted, lengths=sorted(lengths), wrong=wrong)


def check_table(candidate: Candidate, tokens: np.ndarray, *_) -> dict:
    """The sum of the script's byte table over the whole split."""
    chunks = (
        tokens[at : at + 1_000_001].astype(np.int64) for at in range(0, len(tokens) - 1, 1_000_000)
    )
    return dict(
        bytes=sum(int(np.sum(candidate.table.count(chunk[:-1], chunk[1:]))) for chunk in chunks)
    )


def work_inspect(job: dict) -> dict:
    """What the script's parts do. An error in one of them is its result."""
    tokens = take_validation(Path("data"))
    candidate = Candidate(job)
    results, window = dict(settings=candidate.stored), np.full((1, candidate.window), BOS)
    candidate.logits(window)
    started = time.perf_counter()
    for _ in range(3):
        candidate.logits(window)
    results["seconds_per_window"] = seconds = (time.perf_counter() - started) / 3
    rows = BATCH * int(np.clip(0.02 * job["seconds"] / seconds / BATCH, 1, 8))
    for name, function in job["parts"].items():
        try:
            generator = np.random.default_rng((job["seed"], len(name)))
            results[name] = globals()[function](candidate, tokens, rows, generator)
        except Exception as error:
            results[name] = dict(error=described(error))
    return results


def work_score(job: dict) -> dict:
    """Nats of the sliding evaluation, window by window in random order, until all are done or it is time."""
    tokens = take_validation(Path("data"))
    candidate = Candidate(job)
    windows = plan(len(tokens) - 1, candidate.window, candidate.stride)
    order = np.random.default_rng((job["seed"], 7)).permutation(len(windows))
    tokens, nats, started, batch = (
        np.pad(tokens, (0, candidate.window)),
        [],
        time.perf_counter(),
        BATCH,
    )
    for at in range(0, len(order), batch):
        if at > batch and time.perf_counter() - started > job["seconds"]:
            break
        starts, firsts, ends = windows[order[at : at + batch]].T
        logits = candidate.logits(tokens[starts[:, None] + np.arange(candidate.window)])
        for start, first, end, each in zip(starts, firsts, ends, logits):
            nats.append(
                float(
                    own_losses(each[first - start : end - start], tokens[first + 1 : end + 1]).sum()
                )
            )
    rows = [[*windows[row].tolist(), x] for row, x in zip(order.tolist(), nats)]
    return dict(windows=len(windows), rows=rows)


def work_encode(job: dict) -> dict:
    """Code a stretch of text after its BOS into coded.bin, and let the script score it."""
    tokens = take_validation(Path("data"))
    candidate = Candidate(job)
    padded, intervals = np.pad(tokens, (0, candidate.window)), []
    for start, first, end in plan(len(tokens) - 1, candidate.window, candidate.stride):
        logits = candidate.logits(padded[None, start : start + candidate.window])[0]
        for target in range(first, end):
            begins = cumulative(logits[target - start])
            intervals.append((int(begins[padded[target + 1]]), int(begins[padded[target + 1] + 1])))
    Path("coded.bin").write_bytes((len(tokens) - 1).to_bytes(2, "big") + encode(intervals))
    return dict(val_bpb=candidate.evaluator.score(candidate.model, tokens, "sliding").val_bpb)


def work_decode(job: dict) -> dict:
    """The text again, token after token, from coded.bin and the model: decoded.txt, and the tokens."""
    candidate, data = Candidate(job), Path("coded.bin").read_bytes()
    targets, decoder = int.from_bytes(data[:2], "big"), Decoder(data[2:])
    tokens = np.zeros(targets + candidate.window + 1, dtype=np.int64)
    tokens[0] = BOS
    for start, first, end in plan(targets, candidate.window, candidate.stride):
        for target in range(first, end):
            logits = candidate.logits(tokens[None, start : start + candidate.window])[
                0, target - start
            ]
            tokens[target + 1] = decoder.symbol(cumulative(logits))
    tokens = tokens[: targets + 1]
    Path("decoded.txt").write_bytes(Text(Path("data/tokenizer.model")).decode(tokens))
    return dict(tokens=tokens.tolist())


def work_program(job: dict) -> dict:
    """The script as a program: its exit status. And the auditor's own score of the same text."""
    os.environ.update(
        job["environment"], ARTIFACT=job["artifact"], DATA_PATH="data", RUN_ID="audit"
    )
    sys.argv = ["train_gpt.py"]
    try:
        runpy.run_path("train_gpt.py", run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    return dict(work_score({**job, "seconds": math.inf}) if status == 0 else {}, status=status)


WORKERS = dict(
    inspect=work_inspect,
    program=work_program,
    score=work_score,
    encode=work_encode,
    decode=work_decode,
)


def described(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def run_worker(name: str) -> int:
    """One worker in its folder: job.json in, result.json out. The job names folders that the script shall not
    read, so it is gone before the script is there."""
    job, stopped = json.loads(Path("job.json").read_text()), []
    if job["forbidden"]:
        Path("job.json").unlink()
    tempfile.tempdir = os.environ["TMPDIR"] = os.getcwd()  # torch asks for one
    install_guard(job["forbidden"], stopped)
    try:
        result = WORKERS[name](job)
    except BaseException as error:
        traceback.print_exc()
        result = dict(error=described(error), refused=type(error).__name__ == "UserError")
    Path("result.json").write_text(json.dumps(dict(result, stopped=stopped)))
    return 0


# ---- The log of a run
class Log:
    """What a run wrote: the script's source, a line of 100 '=', then lines. A run that was resumed has such a
    line again, and what follows it counts for more than what was before."""

    def __init__(self, path: Path, source: bool = True):
        text = path.read_text(encoding="utf-8", errors="replace")
        self.path, parts = path, re.split(r"^={100}\n", text, flags=re.M)
        self.source, self.parts = (parts[0], parts[1:]) if source else ("", parts)
        self.lines = "".join(self.parts)
        try:
            self.settings = json.loads(self.last(r"settings:(\{.*\})", "{}"))
        except ValueError:
            self.settings = {}
        self.dtype = self.last(r"dtype:(bfloat16|float32)\b.*", "auto")

    def last(self, pattern: str, default=None):
        """The groups of the last line that is all of this pattern (the group, where there is but one)."""
        found = re.findall(rf"^{pattern}$", self.lines, re.M)
        return found[-1] if found else default

    def numbers(self, pattern: str) -> tuple[float, ...] | None:
        """The groups of the last such line as numbers; None where there is no such line, or no number."""
        found = self.last(pattern)
        try:
            return found and tuple(
                float(x) for x in ((found,) if isinstance(found, str) else found)
            )
        except ValueError:
            return None

    def score(self, label: str) -> dict | None:
        """val_loss, val_bpb (8 decimals), targets, bytes and seconds of a final line and its exact one."""
        rounded = self.numbers(
            rf"{label} val_loss:(\S+) val_bpb:(\S+) eval_time:(\d+)ms targets:(\d+) bytes:(\d+)"
        )
        exact = self.numbers(rf"{label}_exact val_loss:(\S+) val_bpb:(\S+)")
        if not rounded or not exact:
            return None
        return dict(
            val_loss=exact[0],
            val_bpb=exact[1],
            rounded=rounded[:2],
            seconds=rounded[2] / 1000,
            targets=int(rounded[3]),
            bytes=int(rounded[4]),
        )

    def steps(self) -> list[list[tuple[float, ...]]]:
        """Of each part of the run, in order, the step lines: step, of how many, ms, mean ms a step."""
        line = r"^step:(\d+)/(\d+) .*train_time:(\d+)ms step_avg:([\d.]+)ms$"
        return [
            [tuple(map(float, found)) for found in re.findall(line, part, re.M)]
            for part in self.parts
        ]


class Tally:
    """Comparisons made, and what was wrong."""

    def __init__(self):
        self.made, self.problems = 0, []

    def expect(self, holds, problem: str) -> None:
        self.made += 1
        if not holds:
            self.problems.append(problem)

    def equal(self, what: str, stated, found, tolerance: float = 0.0) -> None:
        """Two statements of one number, which rounding may keep apart by `tolerance`."""
        if stated is None or found is None:
            self.expect(False, f"{what} is not stated")
        else:
            self.expect(
                abs(stated - found) <= tolerance, f"{what} is {stated:.10g} but also {found:.10g}"
            )

    def check(self, name: str) -> Check:
        return Check(
            name, not self.problems, "; ".join(self.problems) or f"{self.made} comparisons hold"
        )


def compare_sizes(
    tally: Tally, log: Log, script: bytes, artifact: bytes | None, required: bool
) -> None:
    """Bytes and digest of the shipped files. Only logs of training runs name a digest: a record's must."""
    model, code, total = (
        log.numbers(rf"{name}: (\d+) bytes") or (None,)
        for name in (
            r"Serialized model int6\+zstd",
            "Code size",
            r"Total submission size int6\+zstd",
        )
    )
    tally.expect(log.source.encode() == script, "its source is not the shipped script")
    tally.equal("code size", code[0], len(script))
    tally.equal("total size", total[0], (model[0] or math.nan) + (code[0] or math.nan))
    tally.expect(
        (total[0] or 0) <= log.settings.get("artifact_max_bytes", CAP), "the total is over the cap"
    )
    digest = log.last(r"artifact:\S+ .*?sha256:([0-9a-f]{64})\b.*")
    tally.expect(digest or not required, "no line artifact:... sha256:...")
    if artifact is not None:
        tally.equal("size of the artifact", model[0], len(artifact))
    if artifact is not None and digest:
        tally.expect(
            digest == hashlib.sha256(artifact).hexdigest(), "its sha256 is not the artifact's"
        )


def compare_scores(tally: Tally, log: Log) -> None:
    """The final lines, rounded and exact, and the clock of evaluation."""
    scores = [log.score(label) for label in LABELS.values()]
    for label, score in zip(LABELS.values(), scores):
        if not score:
            tally.expect(False, f"no lines {label}")
            continue
        for name, rounded in zip(("val_loss", "val_bpb"), score["rounded"]):
            tally.equal(f"{label} {name}", rounded, score[name], 0.500001e-4)
        tally.equal(
            f"{label} val_bpb",
            score["val_bpb"],
            score["val_loss"] / math.log(2) * score["targets"] / max(score["bytes"], 1),
            1e-7,
        )
    if all(scores):
        for name in ("targets", "bytes"):
            tally.equal(f"{name} of both passes", *(score[name] for score in scores))
        clock = log.numbers(r"eval_seconds:(\S+) .*")
        tally.expect(
            clock and clock[0] >= sum(score["seconds"] for score in scores) - 0.06,
            "eval_seconds is less than its passes",
        )


def compare_steps(tally: Tally, log: Log) -> None:
    """Step lines, tokens, rate and clock of training."""
    settings, parts = log.settings, log.steps()
    for part in parts:
        for before, line in zip([(0, 0, 0, 0), *part], part):
            step, milliseconds, mean = max(line[0], 1), *line[2:]
            tally.expect(
                before[0] <= step and before[2] <= milliseconds, f"step {step:.0f} goes back"
            )
            tally.equal(
                f"step_avg of step {step:.0f}", mean, milliseconds / step, 0.51 / step + 0.0051
            )
    last, rate = (
        next((part[-1] for part in reversed(parts) if part), None),
        log.numbers(r"late_qat_steps:\d+ tokens:(\d+) tokens_per_second:(\d+)\b.*"),
    )
    if not last or not rate:
        return tally.expect(False, "no step lines, or no line on tokens")
    seconds, stages = (
        last[2] / 1000,
        [log.numbers(rf"stage:{x} ([\d.]+)s") for x in ("training", "opening")],
    )
    tally.equal("tokens", rate[0], last[0] * settings.get("train_batch_tokens", math.nan))
    tally.equal(
        "tokens / tokens_per_second",
        rate[0] / max(rate[1], 1),
        seconds,
        0.0006 + 0.6 * seconds / max(rate[1], 1),
    )
    tally.equal("iterations", last[1], settings.get("iterations"))
    limit = settings.get("max_wallclock_seconds", 0.0)
    tally.expect(
        not limit or seconds <= limit + 0.0005, f"train_time {seconds} s is over {limit} s"
    )
    if len(log.parts) == 1:  # else the stage was only the last part of the training
        tally.expect(
            stages[0] and sum(x[0] for x in stages if x) >= seconds - 0.11,
            f"the training stage is shorter than train_time, {seconds} s",
        )


def compare_compliance(tally: Tally, log: Log, required: bool) -> None:
    """The line compliance:{...}, where a log has one, against the other lines. A record's must, with training
    and evaluation under 600 s each."""
    text = log.last(r"compliance:(.*)")
    if text is None:
        return tally.expect(not required, "no line compliance:{...}")
    try:
        stated = dict(json.loads(text))
    except (ValueError, TypeError):
        return tally.expect(False, "its compliance line is no JSON")
    scores = [log.score(label) or {} for label in LABELS.values()]
    steps = [line for part in log.steps() for line in part]
    clocks = dict(
        train_seconds=steps[-1][2] / 1000 if steps else None,
        eval_seconds=(log.numbers(r"eval_seconds:(\S+) .*") or (None,))[0],
    )
    for (name, found), tolerance in zip(clocks.items(), (0.0006, 0.0501)):
        tally.equal(f"compliance {name}", stated.get(name), found, tolerance)
        flag = f"{name.removesuffix('_seconds')}_under_600s"
        tally.expect(
            stated.get(flag) is ((stated.get(name) or math.inf) <= 600), f"{flag} is wrong"
        )
        tally.expect(stated.get(flag) or not required, f"{flag} does not hold")
    total = (log.numbers(r"Total submission size int6\+zstd: (\d+) bytes") or (math.inf,))[0]
    tally.expect(
        stated.get("artifact_under_16mb") is (total <= CAP), "artifact_under_16mb is wrong"
    )
    for name in ("targets", "bytes"):
        every = stated[name] if isinstance(stated.get(name), list) else [stated.get(name)]
        tally.expect(
            set(every) == {score.get(name) for score in scores}, f"compliance {name} are others"
        )
    tally.expect(
        stated.get("artifact_sha256") == log.last(r"artifact:\S+ .*?sha256:([0-9a-f]{64})\b.*"),
        "compliance artifact_sha256 is another",
    )
    resumed = [int(x) for x in re.findall(r"^resumed at step:(\d+)", log.lines, re.M)]
    tally.expect((stated.get("resumed_at") or []) == resumed, "compliance resumed_at is wrong")
    tally.expect(
        log.settings.get("val_loss_every") or "during" not in str(stated.get("validation_opened")),
        "validation was opened during training",
    )


def check_log(
    name: str,
    log: Log | None,
    script: bytes,
    artifact: bytes | None,
    stored: dict | None,
    required: bool,
) -> Check:
    """A log against the shipped files and against itself; `stored`: the settings in the artifact; `required`:
    it must be that of a training run, with all its lines."""
    if log is None:
        return Check(name, None, "there is no log; name it with --log")
    tally = Tally()
    tally.expect(log.settings, "no line settings:{...}")
    compare_sizes(tally, log, script, artifact, required)
    compare_scores(tally, log)
    if required or any(log.steps()):
        compare_steps(tally, log)
    compare_compliance(tally, log, required)
    for key, value in (stored or {}).items():
        mine = log.settings.get(key)
        tally.expect(mine == value, f"{key} is {mine}, but {value} in the artifact")
    return tally.check(name)


# ---- submission.json and README.md
FIELDS = ("name", "author", "date", "val_bpb", "bytes_total", "bytes_code", "seeds", "seed_results")


def compare_seed(tally: Tally, seed: int, stated: dict, log: Log | None) -> None:
    """One seed's results against the last lines of its log."""
    if log is None or not isinstance(stated, dict):
        return tally.expect(False, f"no train_seed{seed}.log or no seed_results of {seed}")
    tally.equal(f"the seed of train_seed{seed}.log", log.settings.get("seed"), seed)
    score, steps = (
        log.score(LABELS["sliding"]) or {},
        [x for part in log.steps() for x in part] or [(None,)],
    )
    size = log.numbers(r"Serialized model int6\+zstd: (\d+) bytes") or (None,)
    for name, found in dict(
        val_bpb=score.get("val_bpb"),
        val_loss=score.get("val_loss"),
        artifact_bytes=size[0],
        steps=steps[-1][0],
    ).items():
        value = stated.get(name)
        tally.equal(
            f"{name} of seed {seed}",
            None if value is None else float(value),
            found,
            rounding(value),
        )


def rounding(number) -> float:
    """What rounding to the decimals that are stated, four to the log's eight, may take off a number."""
    decimals = -number.as_tuple().exponent if isinstance(number, Decimal) else 0
    return 0.51 * 10.0 ** -min(max(decimals, 4), 8) if decimals else 0.0


def check_submission(folder: Path, script: bytes, logs: dict[int, Log]) -> Check:
    """submission.json against the logs, and README.md against it."""
    tally, path = Tally(), folder / "submission.json"
    try:
        stated = dict(json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal))
        seeds, results = [int(x) for x in stated["seeds"]], dict(stated["seed_results"])
        mean, total = Decimal(stated["val_bpb"]), int(stated["bytes_total"])
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        return Check("submission", False, f"submission.json: {described(error)}")
    for name in FIELDS:
        tally.expect(stated.get(name), f"no {name}")
    tally.expect(
        re.fullmatch(r"\d{4}-\d\d-\d\d.*", str(stated.get("date"))), "date is not YYYY-MM-DD"
    )
    tally.expect(
        set(seeds) == set(map(int, results)) == set(logs), "seeds, seed_results and logs differ"
    )
    for seed in seeds:
        compare_seed(tally, seed, results.get(str(seed)), logs.get(seed))
    first, *others = [log.settings for log in logs.values()] or [{}]
    differ = {
        key
        for settings in others
        for key in {*first, *settings} - MACHINE - {"seed"}
        if settings.get(key) != first.get(key)
    }
    tally.expect(not differ, f"the seeds' configurations differ in {', '.join(sorted(differ))}")
    digests = [log.last(r"artifact:\S+ .*?sha256:([0-9a-f]{64})\b.*") for log in logs.values()]
    tally.expect(len(set(digests)) == len(digests), "logs of different seeds name one artifact")
    scores = [log.score(LABELS["sliding"]) for log in logs.values()]
    if scores and all(scores):
        tally.equal(
            "val_bpb",
            float(mean),
            float(np.mean([score["val_bpb"] for score in scores])),
            max(1e-6, rounding(mean)),
        )
    sizes = [log.numbers(r"Total submission size int6\+zstd: (\d+) bytes") for log in logs.values()]
    tally.equal(
        "bytes_total", total, max((size[0] if size else math.inf for size in sizes), default=None)
    )
    tally.equal("bytes_code", stated.get("bytes_code"), len(script))
    readme = (
        (folder / "README.md").read_text(encoding="utf-8")
        if (folder / "README.md").is_file()
        else ""
    )
    for words in ([f"{mean:.4f}"], [str(total), f"{total:,}"], *([str(seed)] for seed in seeds)):
        more = "" if "." in words[0] else r"(?!\d|[.,]\d)"  # a score may have further decimals
        tally.expect(
            any(re.search(rf"(?<![\d.,]){re.escape(word)}{more}", readme) for word in words),
            f"README.md does not say {words[-1]}",
        )
    return tally.check("submission")


# ---- The audit of one artifact
def guarded(name: str, check, *arguments) -> Check:
    """A check's verdict. What it cannot make sense of (a log that states a list for a number) fails."""
    try:
        return check(*arguments)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return Check(name, False, f"cannot be made sense of: {described(error)}")


class Audit:
    """One artifact with its script and log: starts the workers and judges what they return."""

    def __init__(
        self, entry: Entry, data: Path, tokenizer: Path, options: argparse.Namespace, folder: Path
    ):
        self.entry, self.data, self.options, self.folder = entry, data, options, folder
        self.tokenizer, self.generator = tokenizer, np.random.default_rng(options.seed)
        self.log = Log(entry.log) if entry.log else None
        self.script, self.artifact = entry.script.read_bytes(), entry.artifact.read_bytes()
        self.tokens, self.text = read_validation(data), Text(tokenizer)
        if len(self.tokens) < 2 or self.tokens[0] != BOS or self.tokens.max() >= self.text.size:
            raise BadInput(
                f"{data}: the validation split does not begin with token {BOS}, or has "
                f"tokens beyond {self.text.size} of {tokenizer}: check --data and --tokenizer"
            )
        self.bytes = self.text.bytes_of_targets(self.tokens)
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        self.threads, self.seconds = max(1, cores // 2), 60 * options.minutes * min(1, cores / 2)
        self.environment = dict(
            COMPILE="0",
            DEVICE="cpu",
            EVAL_BATCH_SEQS="4",
            DTYPE=self.log.dtype if self.log else "auto",
        )
        self.stopped, self.began = [], time.perf_counter()

    def wants(self, *names: str) -> bool:
        return bool(set(names) & set(self.options.only))

    def furnish(self, name: str, validation: np.ndarray | None, extra: tuple, job: dict) -> Path:
        """A worker's folder: copies of script, artifact, tokenizer and this file; of the validation text only
        what is handed over; its job."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
        (folder / "data").mkdir()
        for path, copy in (
            (self.entry.script, "train_gpt.py"),
            (self.entry.artifact, "final_model.int6.ptz"),
            (Path(__file__), "audit.py"),
            (self.tokenizer, "data/tokenizer.model"),
            *((path, path.name) for path in extra),
        ):
            shutil.copyfile(path, folder / copy)
        if validation is not None:
            write_shard(folder / "data/text_val_000000.bin", validation)
        files = self.tokenizer, self.entry.script, self.entry.artifact
        hidden = {
            path.resolve()
            for path in (ROOT, self.data, self.folder, *(path.parent for path in files))
        }
        (folder / "job.json").write_text(
            json.dumps(
                dict(
                    artifact="final_model.int6.ptz",
                    environment=self.environment,
                    threads=self.threads,
                    forbidden=[]
                    if name == "kept"
                    else [str(x) for x in hidden if x not in self.folder.parents],
                    seed=self.options.seed,
                    **job,
                )
            )
        )
        return folder

    def work(
        self, name: str, validation: np.ndarray | None = None, extra: tuple = (), **job
    ) -> dict:
        """Run a worker. What it returns, with its `folder`, and what was printed as `out`."""
        folder, started = self.furnish(name, validation, extra, job), time.perf_counter()
        kept = {
            key: os.environ[key]
            for key in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")
            if key in os.environ
        }
        kept.update(OMP_NUM_THREADS=str(self.threads), PYTHONDONTWRITEBYTECODE="1")
        with open(folder / "out.txt", "wb") as out:
            process = subprocess.Popen(
                [sys.executable, "audit.py", "--worker", name],
                cwd=folder,
                env=kept,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                process.wait(timeout=300 + 4 * self.seconds)
            except subprocess.TimeoutExpired:
                process.kill()
        for path in folder.glob("data/*_val_*.bin"):
            path.unlink()
        said = (folder / "out.txt").read_text(encoding="utf-8", errors="replace")
        try:
            result = json.loads((folder / "result.json").read_text())
        except (OSError, ValueError):
            result = dict(error=f"the process ended without a result: {said.strip()[-200:]}")
        self.stopped += result.get("stopped", [])
        say(f"{name}: {time.perf_counter() - started:.1f} s {result.get('error', '')}")
        return dict(result, folder=folder, out=said)

    def run(self) -> list[Check]:
        """All checks; the score is computed beside the others."""
        with ThreadPoolExecutor(1) as beside:
            later = (
                beside.submit(self.work, "score", self.tokens, seconds=0.8 * self.seconds)
                if self.wants("score")
                else None
            )
            parts = dict(
                bytes="check_table",
                targets="check_targets",
                causality="check_causality",
                normalization="check_normalization",
            )
            self.inspected = (
                self.work(
                    "inspect",
                    self.tokens,
                    seconds=self.seconds,
                    parts={name: function for name, function in parts.items() if self.wants(name)},
                )
                if self.wants("decompression", *parts)
                else {}
            )
            if self.inspected.get("refused") and not self.entry.record:
                raise BadInput(
                    f"{self.entry.script} refuses the artifact: {self.inspected['error']}"
                )
            made = {
                name: guarded(name, getattr(self, f"check_{name}"))
                for name in CHECKS[:8]
                if self.wants(name) and name != "score"
            }
            if later:
                made["score"] = guarded("score", self.check_score, later.result())
        if self.stopped:
            figure = f"was stopped {len(self.stopped)} times: {self.stopped[0]}"
            made["alone"] = Check("runs alone", False, figure)
        if self.wants("log"):
            made["log"] = guarded(
                "log",
                check_log,
                "log",
                self.log,
                self.script,
                self.artifact,
                self.inspected.get("settings"),
                self.entry.record is not None,
            )
        return [made[name] for name in CHECKS if name in made]

    def judged(self, name: str, part: str, judge) -> Check:
        """The verdict of judge(result) -> (holds, figure) on a part of the inspection, or its error."""
        result = self.inspected.get(part) or dict(
            error=self.inspected.get("error", "there is no result")
        )
        return (
            Check(name, False, result["error"])
            if "error" in result
            else Check(name, *judge(result))
        )

    def check_size(self) -> Check:
        """The shipped files against the cap, which a log may only lower."""
        stated = self.log.settings.get("artifact_max_bytes", CAP) if self.log else CAP
        size, cap = len(self.script) + len(self.artifact), min(CAP, stated)
        figure = f"{len(self.script):,} + {len(self.artifact):,} = {size:,} bytes of {cap:,}"
        return Check("size", size <= cap, figure)

    def check_alone(self) -> Check:
        """The script as a program on a sample, in a folder with nothing else, against the auditor's score."""
        windows = int(
            np.clip(0.04 * self.seconds / self.inspected.get("seconds_per_window", 1.0), 8, 100)
        )
        sample = self.stretch(windows * self.inspected.get("settings", {}).get("eval_stride", 64))
        done = self.work("program", sample)
        if "error" in done or done["status"] != 0:
            said = " ".join(done["out"].split())[-200:]
            return Check(
                "runs alone", False, done.get("error") or f"status {done['status']}: {said}"
            )
        said, (bits, size) = (
            Log(done["folder"] / "out.txt", source=False),
            self.bits_and_bytes(done, sample),
        )
        scores = [said.score(label) for label in LABELS.values()]
        if not all(scores):
            return Check("runs alone", False, "it ends without the final_int6_*_exact lines")
        found, expected = scores[1]["val_bpb"], bits.sum() / size.sum()
        holds = abs(found - expected) <= TOLERANCE and all(
            (score["targets"], score["bytes"]) == (len(sample) - 1, size.sum()) for score in scores
        )
        return Check(
            "runs alone",
            holds,
            f"{found:.6f} bpb, {scores[1]['targets']:,} targets, "
            f"{scores[1]['bytes']:,} bytes; own {expected:.6f}, {len(sample) - 1:,}, {size.sum():,}",
        )

    def stretch(self, targets: int) -> np.ndarray:
        """Text from the beginning of a random document on, with so many targets if there are so many."""
        starts = np.flatnonzero(self.tokens == BOS)
        starts = starts[starts + targets < len(self.tokens)]
        start = int(self.generator.choice(starts)) if len(starts) else 0
        return self.tokens[start : start + targets + 1]

    def bits_and_bytes(self, scored: dict, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bits, and bytes of text, of each window that the score worker returned, (windows,) each."""
        rows = np.array(scored["rows"])
        total = np.append(0, self.text.bytes_of_targets(tokens).cumsum())
        return rows[:, 3] / math.log(2), total[rows[:, 2].astype(int)] - total[
            rows[:, 1].astype(int)
        ]

    def check_bytes(self) -> Check:
        """The script's byte table over the whole split, the log's bytes, and the decoded text."""
        own = self.text.count(self.tokens)
        score = self.log and self.log.score(LABELS["sliding"])
        noted = dict(manifest_of(self.data).get("val") or {}).get(
            "bytes"
        )  # with the text's own tokenizer

        def judge(result: dict):
            stated = f", log {score['bytes']:,}" if score else ""
            stated += f", manifest {noted:,}" if noted else ""
            found = {own, int(self.bytes.sum()), result["bytes"], noted or own}
            holds = found == {score["bytes"] if score else own}
            return holds, f"script {result['bytes']:,}{stated}, decoded text {own:,} bytes"

        return self.judged("byte count", "bytes", judge)

    def check_targets(self) -> Check:
        """A counter for each target of texts made for it, and the log's number of targets."""
        targets, score = len(self.tokens) - 1, self.log and self.log.score(LABELS["sliding"])

        def judge(result: dict):
            wrong = result["wrong"] + (
                [f"the log has {score['targets']:,} targets, the text {targets:,}"]
                if score and score["targets"] != targets
                else []
            )
            return (
                not wrong,
                "; ".join(wrong)
                or f"{result['counted']:,} counters are 1, both passes over "
                f"{result['lengths']} tokens"
                + (f"; log: {targets:,} of {targets:,}" if score else ""),
            )

        return self.judged("every target once", "targets", judge)

    def check_causality(self) -> Check:
        def judge(result: dict):
            figure = (
                f"{result['places']} places with other text behind them, {result['compared']:,} "
                f"numbers up to them, largest difference {result['difference']:.3g}"
            )
            figure += (
                f", after changes behind tokens {result['wrong'][:5]}" if result["wrong"] else ""
            )
            figure += "" if result["moved"] else "; later losses did not change either"
            return not result["wrong"] and result["moved"], figure

        return self.judged("causality", "causality", judge)

    def check_normalization(self) -> Check:
        return self.judged(
            "normalization",
            "normalization",
            lambda result: (
                result["difference"] <= 1e-3 and result["brute"] <= 1e-4,
                f"losses {result['difference']:.2g} nats from log-softmax at {result['places']:,} places; "
                f"sums over the vocabulary {result['brute']:.2g} from 1 at {result['brute_places']} places",
            ),
        )

    def claimed(self) -> float | None:
        """The score that the log claims; without a log nothing is claimed."""
        score = self.log and self.log.score(LABELS["sliding"])
        return score["val_bpb"] if score else None

    def check_score(self, scored: dict) -> Check:
        """The claim against the auditor's sliding evaluation: of everything, or an estimate from drawn
        windows, the ratio of their bits and bytes with four standard errors (of a finite population)."""
        if "error" in scored:
            return Check("score", False, scored["error"])
        bits, size = self.bits_and_bytes(scored, self.tokens)
        found, n, whole = bits.sum() / size.sum(), len(bits), scored["windows"]
        claimed, margin = (
            self.claimed(),
            BFLOAT16 if self.log and self.log.dtype == "bfloat16" else TOLERANCE,
        )
        figure = f"own {found:.6f} bpb on all {whole:,} windows"
        if n < whole:
            residuals = bits - found * size
            margin += 4 * math.sqrt(residuals.var(ddof=1) / n * (1 - n / whole)) / size.mean()
            figure = f"own {found:.4f} ± {margin:.4f} bpb on {n:,} of {whole:,} windows"
        if claimed is None:
            return Check("score", None, f"{figure}; no claim")
        if abs(found - claimed) <= margin and margin > self.options.margin:
            return Check(
                "score",
                None,
                f"claimed {claimed:.6f}, {figure}: not known to "
                f"{self.options.margin}, so give it more --minutes, or accept less with --margin",
            )
        return Check("score", abs(found - claimed) <= margin, f"claimed {claimed:.6f}, {figure}")

    def check_decompression(self) -> Check:
        """Code a stretch, decode it where nothing else is, compare text with text, and size with score."""
        left = max(self.seconds - (time.perf_counter() - self.began), 0.2 * self.seconds)
        targets = int(0.6 * left / self.inspected.get("seconds_per_window", 1.0))
        stretch = self.stretch(min(max(targets, 64), 65535, len(self.tokens) - 1))
        coded = self.work("encode", stretch)
        if "error" in coded:
            return Check("decompression", False, coded["error"])
        if self.options.keep:
            file = coded["folder"] / "coded.bin"
            shutil.copytree(
                self.furnish("kept", None, (file,), {}), self.options.keep, dirs_exist_ok=True
            )
        decoded = self.work("decode", extra=(coded["folder"] / "coded.bin",))
        if "error" in decoded:
            return Check("decompression", False, decoded["error"])
        size, text = (coded["folder"] / "coded.bin").stat().st_size, self.text.decode(stretch)
        written = (decoded["folder"] / "decoded.txt").read_bytes()
        same = decoded["tokens"] == stretch.tolist() and written == text
        count = int(self.text.bytes_of_targets(stretch).sum())
        rate, stated = 8 * (size - 2) / count, coded["val_bpb"]
        allowed = 0.005 * stated + 8 / count  # the last byte is not full
        close = abs(rate - stated) <= allowed
        which = "the" if same else "ANOTHER"
        return Check(
            "decompression",
            same and close,
            f"{len(stretch) - 1:,} tokens, {count:,} bytes of "
            f"{which} text from {size:,}: {rate:.4f} bpb, scored {stated:.4f} ± {allowed:.4f}",
        )


# ---- What to audit
def find_log(artifact: bytes, candidates: list[Path], by_size: bool = False) -> Path | None:
    """The log that names the artifact's sha256, or else its size."""
    signs = f"sha256:{hashlib.sha256(artifact).hexdigest()}", f"int6+zstd: {len(artifact)} bytes"
    for sign in signs[: 1 + by_size]:
        for path in candidates:
            if sign in path.read_text(encoding="utf-8", errors="replace"):
                return path
    return None


def find_entries(options: argparse.Namespace) -> list[Entry]:
    """The artifacts of a record folder, or one artifact, with script and log."""
    path = options.path
    if not path.exists():
        raise BadInput(f"{path} does not exist: name a record folder or an artifact")
    for name in ("script", "log", "tokenizer"):
        given = getattr(options, name)
        if given and not given.is_file():
            raise BadInput(f"--{name} {given} is not a file")
    if path.is_file():
        folders = (
            [path.parent] + [path.parent.parent] * (path.resolve().parent.name == "logs") + [ROOT]
        )
        scripts = (
            [options.script] if options.script else [folder / "train_gpt.py" for folder in folders]
        )
        script = next(filter(Path.is_file, scripts), None)
        if not script:
            raise BadInput(f"no train_gpt.py beside {path}: name the script with --script")
        logs = sorted([*path.parent.glob("*.txt"), *path.parent.glob("logs/*.txt")])
        return [Entry(script, path, options.log or find_log(path.read_bytes(), logs), None)]
    script, artifacts = options.script or path / "train_gpt.py", sorted(path.glob("*.ptz"))
    if not script.is_file() or not artifacts:
        missing = "artifact (*.ptz)" if script.is_file() else "train_gpt.py"
        raise BadInput(f"{path} has no {missing}: name a record folder or an artifact")
    logs = sorted(path.glob("train_seed*.log"))
    return [
        Entry(script, artifact, options.log or find_log(artifact.read_bytes(), logs, True), path)
        for artifact in artifacts
    ]


def manifest_of(folder: Path) -> dict:
    """What data/prepare.py noted of the shards in a folder; empty where there is no such file."""
    for name in ("manifest.json", "meta.json"):
        if (folder / name).is_file():
            try:
                return dict(json.loads((folder / name).read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                raise BadInput(f"{folder / name} is damaged: make or get the data again") from None
    return {}


def find_data(options: argparse.Namespace, log: Log | None = None) -> tuple[Path, Path]:
    """The folder of the shards and the tokenizer: as asked for, else as `log` says, else by the choice that
    train_gpt.py makes; nothing is built."""
    fineweb, tokenizer = "data/datasets/fineweb10B_sp1024", "data/tokenizers/fineweb_1024_bpe.model"
    stated, model = log and log.last(r"data:(.*) tokenizer:(.*) sha256:\w+") or ("", "")
    bases = ([log.path.resolve().parent.parent] if stated else []) + [Path.cwd(), ROOT]
    names = [stated] * bool(stated) + [fineweb, "data/demo"]
    choices = [base / name for name in names for base in bases]
    folder = options.data or next(filter(Path.is_dir, choices), None)
    if folder is None:
        raise BadInput(
            f"no data: neither {fineweb} nor data/demo is here; name a folder of shards with "
            "--data, or run train_gpt.py once, which builds data/demo"
        )
    if not folder.is_dir() or not list(folder.glob("*_val_*.bin")):
        raise BadInput(
            f"{folder} is not a folder with validation shards (*_val_*.bin): check --data"
        )
    noted = dict(manifest_of(folder).get("tokenizer") or {}).get("file", "tokenizer.model")
    choices = (
        [options.tokenizer]
        if options.tokenizer
        else [
            *(base / model for base in bases),
            folder / "tokenizer.model",
            folder / noted,
            *(base / tokenizer for base in bases),
        ]
    )
    found = next(filter(Path.is_file, choices), None)
    if found is None:
        raise BadInput(f"no tokenizer.model in {folder}: name the tokenizer with --tokenizer")
    return folder, found


def audit_record(folder: Path, script: Path, audited: set[Path]) -> list[Check]:
    """The logs whose artifacts are not in the folder, whose scores nobody can check; submission.json."""
    logs: dict[int, Log] = {}
    for path in sorted(folder.glob("train_seed*.log")):
        seed = re.fullmatch(r"train_seed(\d+)\.log", path.name)
        if not seed or int(seed[1]) in logs:
            raise BadInput(
                f"{path} is no train_seed<N>.log, or a second one of its seed: rename it"
            )
        logs[int(seed[1])] = Log(path)
    code, checks = script.read_bytes(), []
    for seed, log in logs.items():
        if log.path not in audited:
            name = f"log of seed {seed}"
            checks += [
                guarded(name, check_log, name, log, code, None, None, True),
                Check(f"score of seed {seed}", None, "its artifact is not in the folder"),
            ]
    return checks + [guarded("submission", check_submission, folder, code, logs)]


def audit(options: argparse.Namespace) -> list[Check]:
    """All checks of all artifacts."""
    entries, checks = find_entries(options), []
    # of a record, which comes from others, the log does not choose the text that it is checked on
    trusted = Log(entries[0].log) if entries[0].log and not entries[0].record else None
    data, tokenizer = find_data(options, trusted)
    if options.only == ["submission"] and not entries[0].record:
        raise BadInput(f"--only submission: {options.path} is not a record folder")
    for entry in entries:
        if entry.log and '"track": "B' in (Log(entry.log).last(r"compliance:(.*)") or ""):
            raise BadInput(
                f"{entry.log}: track B learns while it scores; only fixed models can be audited"
            )
    options.minutes /= len(entries)
    for entry in entries:
        with tempfile.TemporaryDirectory(prefix="audit-") as folder:
            found = Audit(entry, data, tokenizer, options, Path(folder).resolve()).run()
        prefix = f"{entry.artifact.name}: " if len(entries) > 1 else ""
        checks += [check._replace(name=prefix + check.name) for check in found]
    record = entries[0].record
    if record and "submission" in options.only:
        checks += audit_record(record, entries[0].script, {entry.log for entry in entries})
    # in a record nothing may be missing
    return [
        check._replace(passed=None if check.passed is None and not record else bool(check.passed))
        for check in checks
    ]


def print_table(checks: list[Check]) -> None:
    """A line for each check, with PASS, FAIL or -."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(
            f"{check.name:{width}}  {'-' if check.passed is None else 'PASS' if check.passed else 'FAIL'}  "
            + ("not checked: " if check.passed is None else "")
            + check.figure
        )


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a record folder, or an artifact")
    for name, what in dict(
        script="the script, else the train_gpt.py beside it, above its logs/, or of this repository",
        log="the log, else that beside it or in logs/ which names the artifact's sha256",
        data="folder of shards, else the log's (not a record's), FineWeb's or data/demo",
        tokenizer="SentencePiece model, else the log's, the data's or FineWeb's",
        json="write the table there",
        keep="leave the folder there in which the decoder runs",
    ).items():
        parser.add_argument(f"--{name}", type=Path, help=what)
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="about how long it may take on two cores"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=int.from_bytes(os.urandom(4), "big"),
        help="draws the samples; without it nobody knows them in advance",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.003,
        help="bits per byte: a score that is known less well than this is not proven",
    )
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(CHECKS),
        metavar="CHECK,...",
        help=f"only these of {', '.join(CHECKS)}",
    )
    return parser.parse_args()


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return run_worker(sys.argv[2])
    try:
        options = parse()
        if unknown := set(options.only) - set(CHECKS):
            raise BadInput(
                f"--only {','.join(sorted(unknown))}: the checks are {', '.join(CHECKS)}"
            )
        if options.json and not options.json.resolve().parent.is_dir():
            raise BadInput(f"--json {options.json}: its folder does not exist")
        say(f"samples are drawn with --seed {options.seed}")
        if not options.minutes > 0:
            raise BadInput(f"--minutes {options.minutes} must be above 0")
        checks = audit(options)
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(checks)
    if options.json:
        options.json.write_text(json.dumps([check._asdict() for check in checks], indent=1) + "\n")
    return int(any(check.passed is False for check in checks))


if __name__ == "__main__":
    sys.exit(main())
