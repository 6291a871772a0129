"""Starts the auditor's processes, in which the audited script runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audit_text import remove_validation
from commands import say
from cores import usable_cores
from manifest import ROOT, Data
from record_folder import Entry
from shards import header
from tokenizer import BYTE_TOKENIZER

# What a process needs of this repository; its folder holds copies.
MODULES = (
    "records/audit.py",
    "records/audit_worker.py",
    "records/audit_candidate.py",
    "records/audit_documents.py",
    "records/audit_adaptation.py",
    "records/audit_guard.py",
    "records/audit_confinement.py",
    "records/audit_probes.py",
    "records/audit_text.py",
    "records/arithmetic_coder.py",
    "data/case_operators.py",
    "data/commands.py",
    "data/shards.py",
    "data/tokenizer.py",
)
ARTIFACT = "final_model.int6.ptz"
# Of the environment a process gets these and no more: variables are settings of the script.
# The last two are those without which nothing starts on Windows.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT", "USERPROFILE")


def shard_of(tokens: np.ndarray) -> bytes:
    """The bytes of a shard with these tokens."""
    return header(len(tokens)) + tokens.astype("<u2").tobytes()


class Result(NamedTuple):
    """What a process returned, its folder, what it printed, and how long it took."""

    values: dict
    folder: Path
    output: str
    seconds: float

    @property
    def error(self) -> str | None:
        """The error that ended it, in one line."""
        return self.values.get("error")


class Processes:
    """The processes that audit one artifact. `stopped` lists what the script tried and must not do.

    `variables` are settings for the script, `seconds` how long the whole audit may take.
    """

    def __init__(
        self,
        entry: Entry,
        data: Data,
        variables: dict[str, str],
        seconds: float,
        seed: int,
        folder: Path,
    ):
        self.entry = entry
        self.data = data
        self.variables = variables
        self.seconds = seconds
        self.seed = seed
        self.folder = folder
        # Two processes run side by side.
        self.threads = max(1, len(usable_cores()) // 2)
        self.stopped: list[str] = []
        self.running: list[subprocess.Popen] = []
        self.ends = False

    def forbidden(self) -> list[str]:
        """Folders that the script must not read: repository, data, record, and other processes'."""
        files = (self.data.tokenizer, self.entry.script, self.entry.artifact)
        folders = [ROOT, self.data.folder, self.folder, *(path.parent for path in files)]
        hidden = {folder.resolve() for folder in folders}
        # A process must be able to reach its own folder.
        return [str(path) for path in hidden if path not in self.folder.parents]

    def furnish(
        self,
        name: str,
        validation: np.ndarray | None = None,
        extra: tuple[Path, ...] = (),
        forbidden: tuple[str, ...] | list[str] = (),
        **job: object,
    ) -> Path:
        """Make a process's folder: copies of all that it needs, and its job.

        Of the validation text it has only what is handed over; `extra` are further files.
        """
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
        (folder / "data").mkdir()
        for path in MODULES:
            shutil.copyfile(ROOT / path, folder / Path(path).name)
        shutil.copyfile(self.entry.script, folder / "train_gpt.py")
        shutil.copyfile(self.entry.artifact, folder / ARTIFACT)
        tokenizer = self.data.tokenizer
        if tokenizer != BYTE_TOKENIZER:
            tokenizer = Path("data/tokenizer.model")
            shutil.copyfile(self.data.tokenizer, folder / tokenizer)
        for path in extra:
            shutil.copyfile(path, folder / path.name)
        if validation is not None:
            (folder / "data/text_val_000000.bin").write_bytes(shard_of(validation))
        whole_job = dict(
            artifact=ARTIFACT,
            tokenizer=str(tokenizer),
            environment=self.variables,
            threads=self.threads,
            forbidden=list(forbidden),
            seed=self.seed,
            **job,
        )
        (folder / "job.json").write_text(json.dumps(whole_job), encoding="utf-8")
        return folder

    def run(
        self,
        name: str,
        validation: np.ndarray | None = None,
        extra: tuple[Path, ...] = (),
        **job: object,
    ) -> Result:
        """Run one of audit_worker.WORKERS in a new folder and return its result."""
        folder = self.furnish(name, validation, extra, self.forbidden(), **job)
        started = time.perf_counter()
        self.wait_for(name, folder)
        seconds = time.perf_counter() - started
        # A process that ended early has left the text there.
        remove_validation(folder / "data")
        output = (folder / "out.txt").read_text(encoding="utf-8", errors="replace")
        try:
            values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            last_words = output.strip()[-200:]
            values = dict(error=f"the process ended without a result: {last_words}")
        self.stopped += values.get("stopped", [])
        say(f"{name}: {seconds:.1f} s {values.get('error', '')}")
        return Result(values, folder, output, seconds)

    def wait_for(self, name: str, folder: Path) -> None:
        """Start a process in its folder, with its output in out.txt, and wait until it ends."""
        variables = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ}
        variables.update(OMP_NUM_THREADS=str(self.threads), PYTHONDONTWRITEBYTECODE="1")
        with open(folder / "out.txt", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "audit.py", "--worker", name],
                cwd=folder,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            self.running.append(process)
            if self.ends:
                # stop() came between its start and now.
                process.kill()
            try:
                process.wait(timeout=300 + 4 * self.seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def stop(self) -> None:
        """End all processes that still run, and those that another thread is about to start."""
        self.ends = True
        for process in self.running:
            process.kill()

    def keep(self, coded: Path, target: Path) -> None:
        """Leave a folder in which a reader can decode the coded text, on any machine."""
        shutil.copytree(self.furnish("kept", extra=(coded,)), target, dirs_exist_ok=True)
