"""Tiny runs of the script, and what tests read of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import train_gpt
from conftest import ROOT, VOCAB_SIZE

SCRIPT = ROOT / "train_gpt.py"
SIGNALLED_RUN = ROOT / "tests/signalled_run.py"
# Seconds after which a process has failed. A busy machine needs many of them.
PATIENCE = 900.0

# Where a run computes, so that all runs of a test give the same bits.
MACHINE = dict(DEVICE="cpu", DTYPE="float32", COMPILE="0")
# A run of 30 steps on the data of the fixture data_folder.
TINY_RUN = dict(
    MACHINE,
    PRESET="pocket",
    VOCAB_SIZE=str(VOCAB_SIZE),
    NUM_LAYERS="3",
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    ROPE_DIMS="4",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    MEMORY_TOKENS="4",
    DOCUMENT_ATTENTION="0",
    TRAIN_SEQ_LEN="64",
    EVAL_SEQ_LEN="64",
    EVAL_STRIDE="32",
    TRAIN_BATCH_TOKENS="256",
    MICRO_BATCH_TOKENS="128",
    ITERATIONS="30",
    MAX_WALLCLOCK_SECONDS="0",
    WARMDOWN_ITERS="15",
    WARMUP_STEPS="1",
    SWA_ENABLED="1",
    SWA_EVERY="2",
    SWA_START_SCALE="0.5",
    LATE_QAT_THRESHOLD="0.3",
    ARTIFACT_MAX_BYTES="16000000",
    TRAIN_LOG_EVERY="10",
)


def environment_with(**changes: str) -> dict[str, str]:
    """This process's environment without any setting, but with these changes."""
    names = {field.name.upper() for field in train_gpt.fields_of()}
    environment = {name: text for name, text in os.environ.items() if name not in names}
    environment.update(OMP_NUM_THREADS="1", PYTHONPATH="", PYTHONDONTWRITEBYTECODE="1")
    environment.update(changes)
    return environment


@dataclasses.dataclass
class Done:
    """A run that has ended: where, how, and what it said."""

    folder: Path
    status: int
    out: str
    err: str

    def results(self, run_id: str = "*") -> dict:
        """The results that the run wrote for programs."""
        path = next((self.folder / "logs").glob(f"{run_id}.json"))
        return json.loads(path.read_text(encoding="utf-8"))

    def log(self) -> str:
        """The run's log."""
        path = next((self.folder / "logs").glob("*.txt"))
        return path.read_text(encoding="utf-8")

    def score_lines(self) -> list[str]:
        """All lines that show a score of the artifact."""
        return [line for line in self.out.splitlines() if line.startswith("final_")]

    def final_lines(self) -> list[str]:
        """The lines with exact scores."""
        return [line for line in self.out.splitlines() if re.match(r"final_int6_\w+_exact ", line)]

    def scores(self) -> list[str]:
        """The exact scores of a run that must have ended well: two lines."""
        assert self.status == 0, self.err
        lines = self.final_lines()
        assert len(lines) == 2
        return lines

    def checkpoints(self) -> list[Path]:
        """The checkpoints that are left, oldest first."""
        return sorted((self.folder / "logs").glob("*.checkpoint"))


def is_one_error(text: str, pattern: str) -> bool:
    """Whether a text is one line that tells of an error, in these words."""
    return re.fullmatch(rf"error: .*{pattern}.*\n", text) is not None


def run_program(folder: Path, program: list[str], ranks: int = 0, **changes: str) -> Done:
    """Run a Python program in a folder: alone, or with this many ranks under torchrun."""
    launcher = []
    if ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launcher, *program],
        cwd=folder,
        timeout=PATIENCE,
        env=environment_with(**changes),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return Done(folder, done.returncode, done.stdout, done.stderr)


def run(folder: Path, *, ranks: int = 0, **changes: str) -> Done:
    """Run the script in a folder as a user does, with these settings."""
    return run_program(folder, [str(SCRIPT)], ranks, **changes)


def run_signalled(
    folder: Path,
    line: str,
    name: str,
    *,
    rank: int = 0,
    target: str = "itself",
    ranks: int = 0,
    **changes: str,
) -> Done:
    """Run the script; once this rank has logged a line that begins so, it sends a signal.

    To itself, or to the launcher, which passes it on.
    """
    program = [str(SIGNALLED_RUN), str(rank), line, name, target]
    return run_program(folder, program, ranks, PYTHONPATH=str(ROOT), **changes)


def send_together(*signals: signal.Signals) -> None:
    """Send signals to this thread, which receives none of them before all are sent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for number in signals:
        signal.pthread_kill(threading.get_ident(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


@contextlib.contextmanager
def signals_at(beginning: str, *signals: signal.Signals) -> Iterator[None]:
    """A run in this process gets these signals, all at once, when it logs a line that begins so."""
    log = train_gpt.Logger.__call__

    def log_and_signal(logger: train_gpt.Logger, line: str, console: bool = True) -> None:
        log(logger, line, console)
        if line.startswith(beginning):
            send_together(*signals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Logger, "__call__", log_and_signal)
        yield
