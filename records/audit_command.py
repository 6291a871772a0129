"""The command records/audit.py: its options, and what is audited in which order."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from audit_judges import DEFAULT_MINUTES
from audit_log import check_log
from audit_submission import check_submission
from audit_verdicts import ArtifactAudit, Wishes
from checks import CHECKS, Check, guarded, print_table
from commands import BadInput, Parser, say
from field_claims import submission_of
from field_record import FieldRecord
from files import write_atomically
from leaderboard import REFUSED
from manifest import Data
from record_check import check_record
from record_folder import ARTIFACTS, SCRIPT, Entry, data_of, find_entries, logs_by_seed
from review import (
    SORTING,
    Review,
    against_text,
    beats_text,
    print_review,
    review,
    sorting_key,
    table_of,
)
from run_logs import Log

# Checks of our own records that only say something.
SAID = ("pytorch_version",)


def audit_record(folder: Path, script: Path, audited: set[Path]) -> list[Check]:
    """Check submission.json, and the logs that are not in `audited`.

    Their artifacts are not in the folder, so nobody can check their scores.
    """
    logs = logs_by_seed(folder)
    code = script.read_bytes()
    checks = []
    for seed, log in logs.items():
        if log.path in audited:
            continue
        name = f"log of seed {seed}"
        checks.append(guarded(name, check_log, name, log, code, None, None, True))
        figure = "its artifact is not in the folder"
        checks.append(Check(f"score of seed {seed}", None, figure))
    checks.append(guarded("submission", check_submission, folder, code, logs))
    return checks


def find_text(entries: list[Entry], options: argparse.Namespace) -> Data:
    """The validation text and the tokenizer, for all entries.

    A record comes from others, so its log does not choose the text that it is checked on.
    """
    first = entries[0]
    trusted = None
    if first.log is not None and first.record is None:
        trusted = Log(first.log)
    return data_of(trusted, options.data, options.tokenizer)


def audit_artifacts(entries: list[Entry], options: argparse.Namespace) -> list[Check]:
    """Run all checks that are asked for on artifacts, with so many minutes for each."""
    data = find_text(entries, options)
    wishes = Wishes(
        only=options.only,
        minutes=options.minutes,
        seed=options.seed,
        margin=options.margin,
        keep=options.keep,
    )
    checks = []
    for entry in entries:
        with tempfile.TemporaryDirectory(prefix="audit-") as folder:
            found = ArtifactAudit(entry, data, wishes, Path(folder).resolve()).run()
        if len(entries) > 1:
            found = [each._replace(name=f"{entry.artifact.name}: {each.name}") for each in found]
        checks += found
    return checks


def audit_one_artifact(path: Path, options: argparse.Namespace) -> list[Check]:
    """Audit an artifact that is not in a record folder, or is named alone."""
    if options.only == ("submission",):
        raise BadInput(f"--only submission: {path} is not a record folder")
    say(f"samples are drawn with --seed {options.seed}")
    return audit_artifacts(find_entries(path, options.script, options.log), options)


def audit_own(folder: Path, options: argparse.Namespace) -> list[Check]:
    """Audit a record of our script: its files and figures, and its artifacts.

    Nothing may be missing in it. What is not proven within the time is said as that.
    """
    checks = []
    if "record" in options.only:
        checks += check_record(folder)
    script = options.script or folder / SCRIPT
    audited: set[Path] = set()
    if script.is_file() and list(folder.glob(ARTIFACTS)):
        say(f"samples are drawn with --seed {options.seed}")
        entries = find_entries(folder, options.script, options.log)
        checks += audit_artifacts(entries, options)
        audited = {entry.log for entry in entries if entry.log is not None}
    if script.is_file() and "submission" in options.only:
        checks += audit_record(folder, script, audited)
    return [strict(check) for check in checks]


def strict(check: Check) -> Check:
    """A check in one of our own records, where what could not be checked fails."""
    if check.unproven or check.name in SAID:
        return check
    return check._replace(passed=bool(check.passed))


def names_of_checks(text: str) -> tuple[str, ...]:
    """The value of --only; BadInput for a check that is not there."""
    names = tuple(text.split(","))
    unknown = sorted(set(names) - set(CHECKS))
    if unknown:
        raise BadInput(f"--only {','.join(unknown)}: the checks are {', '.join(CHECKS)}")
    return names


def parse(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """Read the options; BadInput for what makes no sense."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="record folders of anybody, folders of such, or an artifact",
    )
    parser.add_argument(
        "--beats", type=float, metavar="BPB", help="a score that the folder's seeds should beat"
    )
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="a record that they should beat"
    )
    parser.add_argument(
        "--sort", choices=SORTING, default="folder", help="column of the table of several folders"
    )
    parser.add_argument(
        "--script",
        type=Path,
        help="the script, else the train_gpt.py beside the artifact, above its logs/, or of this "
        "repository",
    )
    parser.add_argument(
        "--log",
        type=Path,
        help="the log, else that beside the artifact or in logs/ which names the artifact's sha256",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of shards, else the log's (not a record's), FineWeb's or data/demo",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="SentencePiece model, else the log's, the data's or FineWeb's",
    )
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument(
        "--keep", type=Path, help="leave the folder there in which the decoder runs"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        help="about how long an artifact may take on two cores; if all windows take less than "
        "ten minutes, and no less was asked for, they are taken",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=int.from_bytes(os.urandom(8), "big"),
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
        type=names_of_checks,
        default=CHECKS,
        metavar="CHECK,...",
        help=f"only these of {', '.join(CHECKS)}",
    )
    options = parser.parse_args(arguments)
    for name in ("script", "log"):
        given = getattr(options, name)
        if given is not None and not given.is_file():
            raise BadInput(f"--{name} {given} is not a file")
    if options.against is not None and not options.against.is_dir():
        raise BadInput(f"--against {options.against} is not a folder: name a record folder")
    if options.json and not options.json.resolve().parent.is_dir():
        raise BadInput(f"--json {options.json}: its folder does not exist")
    if options.beats is not None and not 0 < options.beats < 100:
        raise BadInput(f"--beats {options.beats} must be bits per byte above 0")
    if not options.minutes > 0:
        raise BadInput(f"--minutes {options.minutes} must be above 0")
    return options


def run(arguments: list[str] | None, description: str) -> int:
    """Audit what the arguments name and print what was found; the exit status."""
    options = parse(arguments, description)
    folders = record_folders(options.paths)
    if folders is None:
        [path] = options.paths
        checks = audit_one_artifact(path, options)
        print_table(checks)
        write_json(options.json, [check._asdict() for check in checks])
        return status_of(checks)
    if len(folders) == 1 and folders == options.paths:
        found = examine(folders[0], options)
        show(found)
        write_json(options.json, found.as_json())
        return found.status
    return print_all(folders, options)


def record_folders(paths: list[Path]) -> list[Path] | None:
    """The record folders that paths name, or that are in them; None for one artifact.

    BadInput for a path that is not there, and for several of which one is an artifact.
    """
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path} does not exist: name a record folder or an artifact")
    if any(path.is_file() for path in paths):
        if len(paths) > 1:
            raise BadInput("name one artifact, or record folders")
        return None
    found = []
    for path in paths:
        found += folders_in(path)
    return found


def folders_in(path: Path) -> list[Path]:
    """A record folder itself, or else the record folders below it."""
    if submission_of(path) is not None:
        return [path]
    parents = {each.parent for each in path.rglob("*.json") if not hidden(each, path)}
    below = sorted(each for each in parents if submission_of(each) is not None)
    if below:
        return below
    if (path / SCRIPT).is_file():
        return [path]
    folders = sorted(each for each in path.iterdir() if each.is_dir() and each.name[0] != ".")
    inner = [each for each in folders if FieldRecord(each).is_record]
    return inner if len(inner) > 1 else [path]


def hidden(path: Path, above: Path) -> bool:
    """Whether a path below a folder is in a hidden one, or was put aside."""
    parts = path.relative_to(above).parts
    return any(part[0] == "." or part.endswith(REFUSED) for part in parts)


class Examined(NamedTuple):
    """What was found of a folder: the checks of one of our own records, or else a review.

    `compared` are the lines of comparisons.
    """

    record: FieldRecord
    checks: list[Check]
    review: Review | None
    compared: list[str]

    @property
    def status(self) -> int:
        """0 if nothing is wrong; in our own records nothing may be unproven either."""
        if self.review is None:
            return status_of(self.checks)
        return int(bool(self.review.failures))

    def row(self) -> Review:
        """What a table of many folders says: of our records, with the audit's verdicts."""
        if self.review is not None:
            return self.review
        verdicts = [check.as_verdict() for check in self.checks]
        return review(self.record)._replace(verdicts=verdicts)

    def as_json(self) -> list | dict:
        """The checks of one of our records, or the review of another folder."""
        if self.review is None:
            return [check._asdict() for check in self.checks]
        return {**self.review.as_dict(), "comparisons": self.compared}


def examine(folder: Path, options: argparse.Namespace) -> Examined:
    """Audit one of our records, or review a folder of the field; BadInput for what is neither."""
    checks = []
    found = None
    record = FieldRecord(folder)
    if record.is_own:
        checks = audit_own(folder, options)
    else:
        found = review(record)
    compared = []
    if options.beats is not None:
        compared.append(beats_text(record, options.beats))
    if options.against is not None:
        compared.append(against_text(record, FieldRecord(options.against)))
    return Examined(record, checks, found, compared)


def show(found: Examined) -> None:
    """Print what was found of one folder."""
    if found.review is None:
        print_table(found.checks)
    else:
        print_review(found.review)
    for line in found.compared:
        print(line)


def print_all(folders: list[Path], options: argparse.Namespace) -> int:
    """Examine many folders, one of which never stops the others, and print one table."""
    rows = []
    status = 0
    bad = []
    for folder in folders:
        try:
            found = examine(folder, options)
            rows.append((found.row(), found.compared))
        except BadInput as error:
            bad.append(str(error))
            continue
        status = max(status, found.status)
        for line in found.compared:
            print(f"{folder.name} {line}")
    rows.sort(key=lambda row: sorting_key(row[0], options.sort))
    for line in table_of([found for found, _ in rows]):
        print(line)
    for line in bad:
        say(f"error: {line}")
    content = [{**found.as_dict(), "comparisons": compared} for found, compared in rows]
    write_json(options.json, content)
    if status == 0 and bad:
        return 2
    return status


def status_of(checks: list[Check]) -> int:
    """1 if a check failed or is not proven; what could not be checked elsewhere fails nothing."""
    return int(any(check.passed is False or check.unproven for check in checks))


def write_json(path: Path | None, content: list | dict) -> None:
    """Write what was found, if it was asked for."""
    if path is not None:
        write_atomically(path, f"{json.dumps(content, indent=1)}\n".encode())
