"""The command records/audit.py: its options, and what is audited in which order."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from audit_log import check_log
from audit_submission import check_submission
from audit_verdicts import ArtifactAudit, Wishes
from checks import CHECKS, Check, guarded, print_table
from commands import BadInput, Parser, say
from files import write_atomically
from manifest import Data
from record_folder import Entry, data_of, find_entries, logs_by_seed
from run_logs import Log


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


def refuse_learners(entries: list[Entry]) -> None:
    """BadInput if a log says that its model learns while it scores: only fixed ones are audited."""
    for entry in entries:
        if entry.log is None:
            continue
        try:
            stated = Log(entry.log).compliance or {}
        except ValueError:
            # The check of the log says what is wrong with that line.
            continue
        if str(stated.get("track")).startswith("B"):
            raise BadInput(
                f"{entry.log}: track B learns while it scores; only fixed models can be audited"
            )


def find_text(entries: list[Entry], options: argparse.Namespace) -> Data:
    """The validation text and the tokenizer, for all entries.

    A record comes from others, so its log does not choose the text that it is checked on.
    """
    first = entries[0]
    trusted = None
    if first.log is not None and first.record is None:
        trusted = Log(first.log)
    return data_of(trusted, options.data, options.tokenizer)


def audit(options: argparse.Namespace) -> list[Check]:
    """Run all checks that are asked for on all artifacts."""
    entries = find_entries(options.path, options.script, options.log)
    record = entries[0].record
    data = find_text(entries, options)
    if options.only == ("submission",) and record is None:
        raise BadInput(f"--only submission: {options.path} is not a record folder")
    refuse_learners(entries)
    wishes = Wishes(
        only=options.only,
        minutes=options.minutes / len(entries),
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
    if record is None:
        return checks
    if wishes.include("submission"):
        checks += audit_record(record, entries[0].script, {entry.log for entry in entries})
    # In a record nothing may be missing.
    return [check._replace(passed=bool(check.passed)) for check in checks]


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
    parser.add_argument("path", type=Path, help="a record folder, or an artifact")
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
        type=names_of_checks,
        default=CHECKS,
        metavar="CHECK,...",
        help=f"only these of {', '.join(CHECKS)}",
    )
    options = parser.parse_args(arguments)
    if options.json and not options.json.resolve().parent.is_dir():
        raise BadInput(f"--json {options.json}: its folder does not exist")
    if not options.minutes > 0:
        raise BadInput(f"--minutes {options.minutes} must be above 0")
    return options


def run(arguments: list[str] | None, description: str) -> int:
    """Audit what the arguments name and print the table; the exit status."""
    options = parse(arguments, description)
    say(f"samples are drawn with --seed {options.seed}")
    checks = audit(options)
    print_table(checks)
    if options.json:
        rows = [check._asdict() for check in checks]
        write_atomically(options.json, f"{json.dumps(rows, indent=1)}\n".encode())
    failed = any(check.passed is False for check in checks)
    return int(failed)
