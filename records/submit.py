"""Make a record folder from finished runs, check one, rank all.

    python records/submit.py --track pocket --name "Default configuration" \\
        logs/a.json logs/b.json logs/c.json
    python records/submit.py --check records/track_pocket/2026-01-02_DefaultConfiguration
    python records/submit.py --leaderboard

A run is logs/<RUN_ID>.json with its .txt and .final_model.int6.ptz beside it, as train_gpt.py
leaves them. Every figure in the folder is taken from them. Runs that cannot be one record (other
settings, other code, a log that disagrees with its results, over the cap) are refused before
anything is written, and audit.py has the last word: it runs on the folder before that gets its
name. --check does what audit.py does, for a record folder of anybody. The exit status is 0, 1 if a
check fails (a new folder is then put aside as <folder>.refused), 2 after one line that says what to
mend, or 130 if it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# The commands share modules of data/.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data"))

from commands import BadInput, Parser, command, packages_from, say

with packages_from("requirements.txt"):
    from audit_command import run as run_audit
    from audit_judges import DEFAULT_MINUTES
    from audit_text import read_validation
    from challenge import CHALLENGE, foreign_to_challenge
    from field_record import FieldRecord
    from finished_runs import FinishedRun, read_run, refuse_mixtures
    from leaderboard import RECORDS, REFUSED, leaderboard, split_readme, update_leaderboard
    from manifest import ROOT, Data, digest_of_tokenizer
    from record_folder import (
        SCRIPT,
        artifact_name,
        data_of,
        log_name,
        log_paths,
        workspace,
    )
    from record_text import claim_text, readme_of, requirements_of, submission_of
    from run_logs import LABELS, Log
    from tokenizer import open_tokenizer


# ---- Data
def data_sentence(data: Data, log: Log) -> str:
    """Say what the score was computed on."""
    score = log.score(LABELS["sliding"])
    tokens = hashlib.sha256(read_validation(data.folder).tobytes()).hexdigest()
    pieces = log.settings.get("vocab_size")
    capitals = ", capitals as operators" if open_tokenizer(data.tokenizer).case_operators else ""
    return (
        f"Data set {data.folder.resolve().name}, {pieces:,} pieces{capitals}. Validation split: "
        f"{score.targets:,} targets, {score.bytes:,} bytes of text; sha256 of its tokens "
        f"`{tokens}`, of the tokenizer `{digest_of_tokenizer(data.tokenizer)}`."
    )


def locate_data(options: argparse.Namespace, log: Log) -> Data:
    """The data that the options or the log name, if it is here, else where train_gpt.py looks.

    BadInput if its tokenizer is not the log's.
    """
    data = data_of(log, options.data, options.tokenizer)
    wanted = "" if log.data is None else log.data.tokenizer_sha256
    if not digest_of_tokenizer(data.tokenizer).startswith(wanted):
        raise BadInput(
            f"{data.tokenizer} is not the tokenizer of {log.path}, whose sha256 begins with "
            f"{wanted}: name the data with --data and --tokenizer"
        )
    return data


# ---- Making a folder
def run_auditor(folder: Path, data: Data, minutes: float) -> int:
    """Run the auditor on a record folder, with so many minutes for each artifact; its exit status.

    Its processes end with it, and leave nothing behind.
    """
    arguments = [
        sys.executable,
        str(ROOT / "records/audit.py"),
        str(folder),
        "--data",
        str(data.folder),
        "--tokenizer",
        str(data.tokenizer),
        "--minutes",
        str(minutes),
    ]
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="submit-") as temporary:
        variables = {**os.environ, "TMPDIR": temporary}
        process = subprocess.Popen(arguments, start_new_session=True, env=variables)
        try:
            status = process.wait()
        except BaseException:
            end_group(process)
            raise
    if status not in (0, 1, 2):
        raise BadInput(f"the auditor ended with status {status} on {folder}")
    return status


def end_group(process: subprocess.Popen) -> None:
    """Kill a process with all that it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def target_of(options: argparse.Namespace) -> Path:
    """The folder to make; BadInput if the options name none, or if it is there already."""
    track = options.track or ""
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", track):
        raise BadInput(
            f"--track {options.track}: name one in a-z, 0-9 and _, such as pocket or {CHALLENGE}"
        )
    words = re.findall(r"[^\W_]+", options.name)
    if not words:
        raise BadInput(f"--name {options.name}: give the record a name with letters or digits")
    if not is_date(options.date):
        raise BadInput(f"--date {options.date} is not a date YYYY-MM-DD")
    if not options.author:
        raise BadInput("the record needs an author: --author NAME")
    if options.beats is not None and not 0 < options.beats < math.inf:
        raise BadInput(f"--beats {options.beats} must be bits per byte above 0")
    name = "".join(word[0].upper() + word[1:] for word in words)
    target = RECORDS / f"track_{track}" / f"{options.date}_{name}"
    for path in (target, put_aside(target)):
        if path.exists():
            raise BadInput(f"{path} exists already: remove it, or choose another --name or --date")
    return target


def is_date(text: str) -> bool:
    """Whether a text is a date as YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def put_aside(target: Path) -> Path:
    """The name of a folder that the auditor refuses."""
    return target.with_name(target.name + REFUSED)


def fill(folder: Path, runs: list[FinishedRun], submission: dict, readme: str) -> None:
    """Write the files of a record into an empty folder."""
    for run in runs:
        shutil.copyfile(run.log.path, folder / log_name(run.seed))
        shutil.copyfile(run.artifact, folder / artifact_name(run.seed))
    (folder / SCRIPT).write_bytes(runs[0].source)
    texts = {
        "README.md": readme,
        "submission.json": json.dumps(submission, indent=2) + "\n",
        "requirements.txt": requirements_of(runs[0].results["versions"]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def refuse_challenge(runs: list[FinishedRun]) -> None:
    """BadInput if a run's score is none of the challenge's."""
    for run in runs:
        reasons = foreign_to_challenge(run.log)
        if reasons:
            raise BadInput(
                f"{run.path} is none for track {CHALLENGE}: {reasons[0]}; choose another --track"
            )


def submit(options: argparse.Namespace) -> int:
    """Make the record folder of these runs, have it audited, and give it its name."""
    target = target_of(options)
    # If the tables cannot be written, that is found out before any work.
    split_readme(RECORDS)
    leaderboard(RECORDS)
    runs = sorted((read_run(path) for path in options.results), key=lambda run: run.seed)
    refuse_mixtures(runs)
    if options.track == CHALLENGE:
        refuse_challenge(runs)
    data = locate_data(options, runs[0].log)
    submission = submission_of(options, runs)
    readme = readme_of(submission, runs, data_sentence(data, runs[0].log))
    try:
        with workspace(RECORDS) as folder:
            fill(folder, runs, submission, readme)
            status = run_auditor(folder, data, options.minutes)
            if status == 2:
                return 2
            if status == 1:
                target = put_aside(target)
            target.parent.mkdir(exist_ok=True)
            folder.rename(target)
        if status == 0:
            update_leaderboard(RECORDS)
    except KeyboardInterrupt:
        if target.exists():
            say(f"{target} is there; --leaderboard makes the tables")
        raise
    if status == 1:
        say(
            "error: the audit failed (its table says where; a score not known well enough takes "
            f"more --minutes): the folder is put aside as {target}"
        )
        return 1
    print(f"{target}: val_bpb {submission['val_bpb']:.6f}, {submission['bytes_total']:,} bytes")
    print(claim_text(submission))
    return 0


# ---- Checking a folder
def check(options: argparse.Namespace) -> int:
    """Do what records/audit.py does for a record folder of anybody."""
    folder = options.check
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder: name a record folder")
    logs = log_paths(folder)
    if FieldRecord(folder).can_be_proven:
        if logs:
            data = locate_data(options, Log(logs[0]))
        else:
            data = data_of(None, options.data, options.tokenizer)
        return run_auditor(folder, data, options.minutes)
    arguments = [str(folder)]
    if options.beats is not None:
        arguments += ["--beats", str(options.beats)]
    return run_audit(arguments, __doc__)


# ---- The command
def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the options; BadInput unless one thing is asked for."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="logs/<RUN_ID>.json of each seed")
    parser.add_argument("--track", help=f"{CHALLENGE}, or a track of your own")
    parser.add_argument("--name", default="", help="of the record, as people should read it")
    parser.add_argument("--author", help="else the name that git knows")
    parser.add_argument("--github-id", help="GitHub's name of the author, for submission.json")
    today = datetime.date.today().isoformat()
    parser.add_argument("--date", default=today, help="YYYY-MM-DD, else today")
    parser.add_argument(
        "--blurb", default="", help="a sentence on what is new, else what is switched on"
    )
    parser.add_argument(
        "--beats", type=float, metavar="BPB", help="the record to beat, in bits per byte"
    )
    parser.add_argument(
        "--check", type=Path, metavar="FOLDER", help="check a record folder instead"
    )
    parser.add_argument(
        "--leaderboard", action="store_true", help="only write records/README.md's tables"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        help="for the auditor, on two cores, for each artifact [%(default)s]",
    )
    parser.add_argument("--data", type=Path, help="the shards, if they are not where the log says")
    parser.add_argument(
        "--tokenizer", type=Path, help="the tokenizer, if it is not where the log says"
    )
    options = parser.parse_args(arguments)
    asked = [bool(options.results), options.check is not None, options.leaderboard]
    if asked.count(True) != 1:
        raise BadInput(
            "name the results of runs (logs/<RUN_ID>.json), or --check FOLDER, or --leaderboard"
        )
    if options.author is None:
        options.author = git_name() if options.results else ""
    # One line each.
    for name in ("name", "author", "blurb"):
        setattr(options, name, " ".join(getattr(options, name).split()))
    return options


def git_name() -> str:
    """The name that git knows, empty if there is none or no git."""
    asked = ["git", "config", "user.name"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout
    return ""


@command(stopped="error: stopped; an unfinished folder is removed", stopped_status=130)
def main(arguments: list[str] | None = None) -> int:
    """Do what the arguments ask for; the exit status."""
    options = parse(arguments)
    if options.leaderboard:
        update_leaderboard(RECORDS)
        return 0
    if options.check:
        return check(options)
    return submit(options)


if __name__ == "__main__":
    sys.exit(main())
