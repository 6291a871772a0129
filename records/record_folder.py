"""What is where in a record folder: script, logs, artifacts; and the data that a log names."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from commands import BadInput
from manifest import ROOT, Data, default_bases, find_data
from run_logs import Log, statements
from tokenizer import BYTE_TOKENIZER

SCRIPT = "train_gpt.py"
LOGS = "train_seed*.log"
ARTIFACTS = "*.ptz"


class Entry(NamedTuple):
    """What is audited together: the paths of script, artifact and log, and of the record folder.

    `log` is None if none is known, `record` if the artifact is not in a record folder.
    """

    script: Path
    artifact: Path
    log: Path | None
    record: Path | None


def log_paths(folder: Path) -> list[Path]:
    """The logs of a record folder."""
    return sorted(folder.glob(LOGS))


def logs_by_seed(folder: Path) -> dict[int, Log]:
    """The logs of a record folder by the seeds in their names; BadInput for a name without one."""
    logs: dict[int, Log] = {}
    for path in log_paths(folder):
        named = re.fullmatch(r"train_seed(\d+)\.log", path.name)
        if named is None or int(named[1]) in logs:
            raise BadInput(
                f"{path} is no train_seed<N>.log, or a second one of its seed: rename it"
            )
        logs[int(named[1])] = Log(path)
    return logs


def log_name(seed: int) -> str:
    """The name of a seed's log in a record folder."""
    return f"train_seed{seed}.log"


def artifact_name(seed: int) -> str:
    """The name of a seed's artifact in a record folder."""
    return f"final_model_seed{seed}.int6.ptz"


# ---- What to audit
def find_entries(path: Path, script: Path | None, log: Path | None) -> list[Entry]:
    """The artifacts of a record folder, or one artifact, each with its script and log.

    `script` and `log` are what people ask for. BadInput if something that is needed is not there.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist: name a record folder or an artifact")
    if path.is_file():
        return [single_entry(path, script, log)]
    return record_entries(path, script, log)


def single_entry(artifact: Path, script: Path | None, log: Path | None) -> Entry:
    """One artifact, with the script and the log that are beside it or near."""
    if script is None:
        script = script_near(artifact)
    if log is None:
        folder = artifact.parent
        beside = sorted([*folder.glob("*.txt"), *folder.glob("logs/*.txt")])
        log = log_that_names(artifact, beside)
    return Entry(script, artifact, log, None)


def script_near(artifact: Path) -> Path:
    """The script beside an artifact, above its logs/, or of this repository."""
    folders = [artifact.parent]
    if artifact.resolve().parent.name == "logs":
        folders.append(artifact.parent.parent)
    for folder in (*folders, ROOT):
        if (folder / SCRIPT).is_file():
            return folder / SCRIPT
    raise BadInput(f"no {SCRIPT} beside {artifact}: name the script with --script")


def record_entries(folder: Path, script: Path | None, log: Path | None) -> list[Entry]:
    """The artifacts of a record folder, each with its log."""
    if script is None:
        script = folder / SCRIPT
    artifacts = sorted(folder.glob(ARTIFACTS))
    if not script.is_file():
        raise BadInput(f"{folder} has no {SCRIPT}: name a record folder or an artifact")
    if not artifacts:
        missing = f"artifact ({ARTIFACTS})"
        raise BadInput(f"{folder} has no {missing}: name a record folder or an artifact")
    entries = []
    for artifact in artifacts:
        own = log
        if own is None:
            own = log_that_names(artifact, log_paths(folder), by_size=True)
        entries.append(Entry(script, artifact, own, folder))
    return entries


def log_that_names(artifact: Path, logs: list[Path], by_size: bool = False) -> Path | None:
    """The log that names an artifact's SHA-256, or else, if asked for, its size.

    A log whose beginning is lost is found, too: the audit says what is wrong with it.
    """
    data = artifact.read_bytes()
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in logs}
    digest = dict(sha256=hashlib.sha256(data).hexdigest())
    for path, text in texts.items():
        if digest in statements("artifact", text):
            return path
    if by_size:
        size = dict(bytes=str(len(data)))
        for path, text in texts.items():
            if size in statements("model_bytes", text):
                return path
    return None


def data_of(log: Log | None, folder: Path | None, tokenizer: Path | None) -> Data:
    """Where shards and tokenizer are: as asked for, else as a log says, else where a run looks.

    BadInput if they are not there. Without a log, paths are looked for below the working folder
    and the repository; with one, first below the folder of its logs/.
    """
    if tokenizer not in (None, BYTE_TOKENIZER) and not tokenizer.is_file():
        raise BadInput(f"--tokenizer {tokenizer} is not a file")
    if log is None or log.data is None:
        return find_data(folder, tokenizer)
    bases = (log.path.resolve().parent.parent, *default_bases())
    return find_data(folder, tokenizer, (log.data.folder, log.data.tokenizer), bases)


# ---- Making a folder
@contextlib.contextmanager
def workspace(records: Path) -> Iterator[Path]:
    """A new folder in `records`, which is removed at the end unless it was renamed."""
    folder = Path(tempfile.mkdtemp(prefix=".record-", suffix=".partial", dir=records))
    # mkdtemp makes folders that nobody but their owner can read.
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
