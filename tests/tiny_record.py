"""A tiny training run and the record that it makes, for the tests of the commands in records/."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import audit
import runs
from conftest import ROOT
from run_logs import LABELS, Log
from tiny_runs import PATIENCE

COMMITTED = ROOT / "records/track_pocket/2026-11-22_DefaultConfiguration"
ARTIFACT = "final_model.int6.ptz"
LOG = "train_seed1337.log"
# The smallest samples, the same each time. Without --margin a busy machine would leave the
# score known too little.
QUICK = ("--minutes", "0.01", "--seed", "1", "--margin", "100")
# A weight decay that is not the preset's, so that README.md has something to say. The vocabulary is
# that of the data.
TINY_RUN = dict(runs.TINY_RUN, MUON_WD="0.05", VOCAB_SIZE="0")
# What a run of track B has beside it: few documents side by side, of more chunks than a window.
ADAPTS = dict(
    NUM_LAYERS="2",
    EVAL_SEQ_LEN="36",
    TTT_ENABLED="1",
    TTT_CHUNK_SIZE="16",
    TTT_BATCH_SIZE="3",
    TTT_NGRAM_ORDER="3",
)


def finished_run(data: Path, adapts: bool = False) -> Path:
    """The logs/ of a real run with RUN_ID first and seed 1337, beside the test's data.

    It is made once in a process of the tests. With `adapts` it is of track B.
    """
    return make_run(data, adapts)


@functools.cache
def make_run(data: Path, adapts: bool) -> Path:
    """Train the model of finished_run."""
    folder = data.with_name(f"{data.name}_adaptive_run" if adapts else f"{data.name}_run")
    folder.mkdir()
    settings = TINY_RUN | ADAPTS if adapts else TINY_RUN
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        cwd=folder,
        timeout=PATIENCE,
        env=runs.environment_with(**settings, DATA_PATH=str(data), RUN_ID="first"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "logs"


def honest_record(data: Path, adapts: bool = False) -> Record:
    """The record of that run; tests doctor copies of it."""
    return make_record(data, adapts)


@functools.cache
def make_record(data: Path, adapts: bool) -> Record:
    """Put the files of that run into a folder."""
    logs = finished_run(data, adapts)
    record = Record(logs.parent.with_name(f"{logs.parent.name}_record"), data)
    record.folder.mkdir()
    shutil.copy(ROOT / "train_gpt.py", record.script)
    shutil.copy(logs / f"first.{ARTIFACT}", record.folder / ARTIFACT)
    shutil.copy(logs / "first.txt", record.log)
    record.write()
    return record


@dataclasses.dataclass(frozen=True)
class Record:
    """A record folder and the data that it was scored on."""

    folder: Path
    data: Path

    @property
    def script(self) -> Path:
        return self.folder / "train_gpt.py"

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def read(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def total(self) -> int:
        """Bytes of script and artifact."""
        return self.script.stat().st_size + (self.folder / ARTIFACT).stat().st_size

    def lines(self) -> str:
        """The log without the script's source."""
        return Log(self.log).lines

    def write_log(self, lines: str) -> None:
        """Write the log of a run of this script that wrote these lines."""
        source = self.script.read_text(encoding="utf-8")
        self.log.write_text(f"{source}{'=' * 100}\n{lines}", encoding="utf-8")

    def write(self) -> None:
        """Write submission.json and README.md as the log says."""
        log = Log(self.log)
        score = log.final_score
        code = self.script.stat().st_size
        result = dict(
            val_bpb=score.val_bpb,
            val_loss=score.val_loss,
            artifact_bytes=self.total() - code,
            steps=30,
        )
        submission = dict(
            name="tiny",
            author="a",
            date="2026-01-02",
            val_bpb=score.val_bpb,
            bytes_total=self.total(),
            bytes_code=code,
            seeds=[1337],
            seed_results={"1337": result},
            evaluation_track=log.track,
        )
        if log.track == "B":
            sliding = log.score(LABELS["sliding"])
            beside = dict(sliding_val_bpb=sliding.val_bpb, sliding_val_loss=sliding.val_loss)
            result.update(beside)
            submission.update(beside, adaptation=log.compliance["adaptation"])
        (self.folder / "submission.json").write_text(json.dumps(submission))
        text = f"# tiny\n\nval_bpb {score.val_bpb:.4f}, {self.total():,} bytes, seed 1337\n"
        (self.folder / "README.md").write_text(text, encoding="utf-8")

    def audit(self, *arguments: str, path: Path | None = None) -> Audited:
        """Call the auditor's command in this process, with samples that are always the same."""
        words = [str(path or self.folder), *QUICK, *map(str, arguments)]
        if "--data" not in words:
            words += ["--data", str(self.data)]
        out = io.StringIO()
        err = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = audit.main(words)
        return Audited(status, out.getvalue(), err.getvalue())

    def failed(self, *checks: str, more: int = 0, whole: bool = False) -> set[str]:
        """The rows that fail when these checks are asked for; `more` rows than checks are there.

        With `whole` there is time for all windows on a busy machine too.
        """
        time = ["--minutes", "60"] if whole else []
        found = self.audit("--only", ",".join(checks), *time)
        failed = {name for name, verdict in found.verdicts.items() if verdict == "FAIL"}
        assert found.status == (1 if failed else 0), found
        assert "-" not in found.verdicts.values(), found
        assert len(found.verdicts) == len(checks) + more, found
        return failed


@dataclasses.dataclass(frozen=True)
class Audited:
    """The exit status of the auditor and what it printed."""

    status: int
    out: str
    err: str

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict of each row, by its name."""
        return dict(re.findall(r"^(.+?) +(PASS|FAIL|-)  ", self.out, re.M))

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]
