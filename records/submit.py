"""Make a record folder from finished runs, check one, rank all.

    python records/submit.py --track pocket --name "Default configuration" logs/a.json logs/b.json logs/c.json
    python records/submit.py --check records/track_pocket/2026-01-02_DefaultConfiguration
    python records/submit.py --leaderboard

A run is logs/<RUN_ID>.json with its .txt and .final_model.int6.ptz beside it, as train_gpt.py leaves them.
Every figure in the folder is taken from them. Runs that cannot be one record (other settings, other code, a
log that disagrees with its results, over the cap) are refused before anything is written, and audit.py has
the last word: it runs on the folder before that gets its name. The exit status is 0, 1 if a check fails (a
new folder is then put aside as <folder>.refused), or 2 after one line that says what to mend.
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
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import audit
from audit import CAP, FIELDS, LABELS, ROOT, BadInput, Check, Log, Parser, Tally, print_table
from finished_runs import (
    CHALLENGE,
    ROUNDED,
    Run,
    foreign_to_challenge,
    logged_figures,
    machines,
    read_run,
    refuse_mixtures,
)
from record_text import (
    claim_text,
    compare_with,
    compliance_of,
    names_of,
    readme_of,
    requirements_of,
    submission_of,
    table,
)
from shards import digest, write_atomically  # of data/, where finished_runs looks

RECORDS = ROOT / "records"
MARKERS = "<!-- leaderboard -->", "<!-- /leaderboard -->"
SURVEYED = (
    *FIELDS,
    "github_id",
    "blurb",
    "track",
    "val_loss",
    "val_bpb_std",
    "pre_quant_val_bpb",
    "hardware",
    "pytorch_version",
    "technique_summary",
    "compliance",
)


# ---- Data
class Data(NamedTuple):
    """Where the validation shards and the tokenizer are."""

    folder: Path
    tokenizer: Path

    def sentence(self, log: Log) -> str:
        """What the score was computed on."""
        score, tokens = log.score(LABELS["sliding"]), audit.read_validation(self.folder)
        return (
            f"Validation split: {score['targets']:,} targets, {score['bytes']:,} bytes of text; sha256 "
            f"of its tokens `{hashlib.sha256(tokens.tobytes()).hexdigest()}`, of the tokenizer "
            f"`{digest(self.tokenizer)}`."
        )


def locate_data(options: argparse.Namespace, log: Log) -> Data:
    """The data that --data or the log names, if it is here, else where train_gpt.py looks for it."""
    found, sign = (
        Data(*audit.find_data(options, log)),
        log.last(r"data:.* tokenizer:.* sha256:(\w+)", ""),
    )
    if not digest(found.tokenizer).startswith(sign):
        raise BadInput(
            f"{found.tokenizer} is not the tokenizer of {log.path}, whose sha256 begins with "
            f"{sign}: name the data with --data and --tokenizer"
        )
    return found


# ---- Making a folder
@contextlib.contextmanager
def workspace(records: Path) -> Iterator[Path]:
    """A folder that takes its final name by renaming it, and is removed if it does not."""
    folder = Path(tempfile.mkdtemp(prefix=".record-", suffix=".partial", dir=records))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_auditor(folder: Path, data: Data, minutes: float) -> int:
    """The auditor's exit status on a record folder, with so many minutes for each artifact. Its workers end
    with it, and leave nothing behind."""
    minutes *= len(list(folder.glob("*.ptz")))
    command = [
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
        process = subprocess.Popen(
            command, start_new_session=True, env={**os.environ, "TMPDIR": temporary}
        )
        try:
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if status not in (0, 1, 2):
        raise BadInput(f"the auditor ended with status {status} on {folder}")
    return status


def target_of(options: argparse.Namespace) -> Path:
    """The folder to make; BadInput if name, date or track give none, or if it is there already."""
    words = re.findall(r"[^\W_]+", options.name or "")
    if not options.track or not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", options.track):
        raise BadInput(
            f"--track {options.track}: name one in a-z, 0-9 and _, such as pocket or {CHALLENGE}"
        )
    if not words:
        raise BadInput(f"--name {options.name}: give the record a name with letters or digits")
    try:
        if datetime.date.fromisoformat(options.date).isoformat() != options.date:
            raise ValueError
    except ValueError:
        raise BadInput(f"--date {options.date} is not a date YYYY-MM-DD") from None
    if not options.author:
        raise BadInput("the record needs an author: --author NAME")
    if options.beats is not None and not 0 < options.beats < math.inf:
        raise BadInput(f"--beats {options.beats} must be bits per byte above 0")
    slug = "".join(word[0].upper() + word[1:] for word in words)
    target = RECORDS / f"track_{options.track}" / f"{options.date}_{slug}"
    for path in (target, put_aside(target)):
        if path.exists():
            raise BadInput(f"{path} exists already: remove it, or choose another --name or --date")
    return target


def put_aside(target: Path) -> Path:
    """The name of a folder that the auditor refuses."""
    return target.with_name(f"{target.name}.refused")


def fill(folder: Path, runs: list[Run], submission: dict, readme: str) -> None:
    """Write the files of a record into an empty folder."""
    for run in runs:
        for path, name in zip((run.log.path, run.artifact), names_of(run)):
            shutil.copyfile(path, folder / name)
    (folder / "train_gpt.py").write_bytes(runs[0].source)
    for name, text in {
        "README.md": readme,
        "submission.json": json.dumps(submission, indent=2) + "\n",
        "requirements.txt": requirements_of(runs[0].results["versions"]),
    }.items():
        (folder / name).write_text(text, encoding="utf-8")


def submit(options: argparse.Namespace) -> int:
    """Make the record folder of these runs, have it audited, and give it its name."""
    target, _, _ = (
        target_of(options),
        split_readme(RECORDS),
        leaderboard(RECORDS),
    )  # both fail early
    runs = sorted(map(read_run, options.results), key=lambda run: run.seed)
    refuse_mixtures(runs)
    for run in runs:
        if options.track == CHALLENGE and (reasons := foreign_to_challenge(run.log)):
            raise BadInput(
                f"{run.path} is none for track {CHALLENGE}: {reasons[0]}; choose another --track"
            )
    data, submission = locate_data(options, runs[0].log), submission_of(options, runs)
    readme = readme_of(submission, runs, data.sentence(runs[0].log))
    made = target
    try:
        with workspace(RECORDS) as folder:
            fill(folder, runs, submission, readme)
            status = run_auditor(folder, data, options.minutes)
            if status == 2:
                return 2
            made = put_aside(target) if status else target
            made.parent.mkdir(exist_ok=True)
            folder.rename(made)
        if status:
            print(
                f"error: the audit failed (its table says where; a score not known well enough takes more "
                f"--minutes): the folder is put aside as {made}",
                file=sys.stderr,
            )
            return 1
        update_leaderboard(RECORDS)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{made} is there; --leaderboard makes the tables"
            if made.exists()
            else "no folder was made"
        ) from None
    print(f"{made}: val_bpb {submission['val_bpb']:.6f}, {submission['bytes_total']:,} bytes")
    print(claim_text(submission))
    return 0


# ---- Checking a folder
def check_files(folder: Path) -> list[Check]:
    """What a record folder should hold, a line for each thing that is missing."""
    needed = [
        ("train_gpt.py",) * 2,
        ("submission.json",) * 2,
        ("README.md",) * 2,
        ("train_seed<N>.log", "train_seed*.log"),
        ("an artifact", "*.ptz"),
    ]
    missing = [
        Check(name, False, f"missing from {folder}")
        for name, pattern in needed
        if not list(folder.glob(pattern))
    ]
    return missing or [
        Check("files", True, f"{len(list(folder.iterdir()))}, with all that a record needs")
    ]


def check_fields(stated: dict) -> Check:
    """The fields that the records of this field have; only those of FIELDS must be there."""
    absent = [name for name in SURVEYED if name not in stated]
    figure = f"no {', '.join(absent)}" if absent else f"all {len(SURVEYED)}"
    return Check("fields", not set(absent) & set(FIELDS), figure)


def check_seeds(stated: dict, logs: list[Log]) -> Check:
    """What seed_results and the means say beside what the auditor compares, against the logs, as far as both
    state it; to the decimals that are stated."""
    tally, found = (
        Tally(),
        {log.settings["seed"]: logged_figures(log) for log in logs if "seed" in log.settings},
    )
    results = {int(seed): each for seed, each in stated["seed_results"].items()}
    before = "pre_quant_val_bpb"
    pairs = [
        (f"{name} of seed {seed}", name, results[seed][name], found[seed][name])
        for seed in set(found) & set(results)
        for name in {*found[seed]} & {*results[seed]}
    ]
    if found and all(each[before] for each in found.values()):
        pairs += [
            (before, before, stated.get(before), statistics.mean(x[before] for x in found.values()))
        ]
    for what, name, value, logged in pairs:
        if isinstance(logged, str):
            tally.expect(value == logged, f"{what} is not the log's")
        elif None not in (value, logged):
            decimals = len(str(value).partition(".")[2])
            tally.equal(what, value, logged, max(ROUNDED.get(name, 0.0), 0.51 * 10.0**-decimals))
    return (
        tally.check("seeds") if tally.made else Check("seeds", None, "the logs do not state them")
    )


def check_statistics(stated: dict, logs: list[Log]) -> Check:
    """What follows from seed_results and the logs: mean loss, deviation, the claim, flags, machine, track."""
    tally, results = Tally(), list(stated["seed_results"].values())
    bpbs, losses = ([float(each[name]) for each in results] for name in ("val_bpb", "val_loss"))
    if "val_loss" in stated:
        tally.equal("val_loss", stated["val_loss"], statistics.mean(losses), 0.51e-4)
    if stated.get("val_bpb_std") is not None and len(bpbs) > 1:  # some divide by n, some by n - 1
        found = min(
            (statistics.stdev(bpbs), statistics.pstdev(bpbs)),
            key=lambda value: abs(value - stated["val_bpb_std"]),
        )
        tally.equal("val_bpb_std", stated["val_bpb_std"], found, 0.51e-4)
    if stated.get("beats"):
        claim = compare_with(stated["beats"]["claimed"], bpbs, losses)
        tally.equal("nats of the claim", stated["beats"]["nats"], claim.nats, 1e-6)
        tally.expect(stated["beats"]["holds"] is claim.holds, "the claim's holds is wrong")
        if claim.p_value is not None:
            tally.equal(
                "p of the claim", stated["beats"]["p_value"], claim.p_value, 1e-3 * claim.p_value
            )
    flags, derived = stated.get("compliance") or {}, compliance_of(logs)
    if not all(log.last(r"compliance:(.*)") for log in logs):
        derived = dict(
            three_seeds=len(results) >= 3, artifact_under_16mb=stated["bytes_total"] <= CAP
        )
    for name in set(flags) & set(derived):
        tally.expect(flags[name] is derived[name], f"compliance {name} is wrong")
    if "hardware" in stated and all(log.last(r"device:(.*)") for log in logs):
        tally.expect(
            stated["hardware"] == machines(logs), f"hardware is {machines(logs)} in the logs"
        )
    for reason in {reason for log in logs for reason in foreign_to_challenge(log)}:
        tally.expect(stated.get("track") != CHALLENGE, f"track {CHALLENGE}, but {reason}")
    return tally.check("statistics")


def check(options: argparse.Namespace) -> int:
    """Files, fields and figures of any record folder, then the auditor."""
    folder = options.check
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder: name a record folder")
    checks, logs = (
        check_files(folder),
        [Log(path) for path in sorted(folder.glob("train_seed*.log"))],
    )
    with contextlib.suppress(
        OSError, ValueError, TypeError
    ):  # else the auditor says what is wrong with it
        stated = dict(json.loads((folder / "submission.json").read_text(encoding="utf-8")))
        checks += [
            check_fields(stated),
            audit.guarded("seeds", check_seeds, stated, logs),
            audit.guarded("statistics", check_statistics, stated, logs),
            Check("pytorch_version", None, f"{stated.get('pytorch_version')}: no log names it"),
        ]
    script, can_run = folder / "train_gpt.py", list(folder.glob("*.ptz")) and logs
    if script.is_file() and not can_run:
        checks += audit.audit_record(folder, script, set())
    print_table(checks)
    failed = any(each.passed is False for each in checks)
    if not (script.is_file() and can_run):
        return 1
    return run_auditor(folder, locate_data(options, logs[0]), options.minutes) or int(failed)


# ---- The leaderboard
def leaderboard(records: Path) -> str:
    """The tables of all record folders, a track each, the challenge's first; below each its ablations."""
    tracks: dict[str, tuple[list, list[str]]] = {}
    for path in sorted(records.glob("track_*/*/*.json")):
        if path.name not in ("submission.json", "ablation.json") or path.parent.name.endswith(
            ".refused"
        ):
            continue
        ranked, ablations = tracks.setdefault(path.parts[-3].removeprefix("track_"), ([], []))
        ranked.append(standing(path)) if path.name == "submission.json" else ablations.append(
            link(path)
        )
    lines = [] if tracks else ["No record yet.", ""]
    for track in sorted(tracks, key=lambda name: (name != CHALLENGE, name)):
        ranked, ablations = tracks[track]
        rows = [[str(rank), *row] for rank, (_, row) in enumerate(sorted(ranked), 1)]
        head = ["", "val_bpb", "record", "author", "date", "seeds", "bytes", "hardware", "p"]
        lines += [
            f"### Track {track}",
            "",
            *(table(head, rows) if rows else ["No record yet.", ""]),
            *(f"- ablation: {each}" for each in ablations),
            *[""] * bool(ablations),
        ]
    return "\n".join(lines)


def link(path: Path) -> str:
    """The name in an ablation.json, with a link to its folder."""
    try:
        name = str(json.loads(path.read_text(encoding="utf-8"))["name"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be linked: {audit.described(error)}") from None
    return f"[{name}]({'/'.join(path.parts[-3:-1])}/)"


def standing(path: Path) -> tuple[float, list[str]]:
    """The score in a submission.json, and its row of the leaderboard without the rank."""
    try:
        stated = dict(json.loads(path.read_text(encoding="utf-8")))
        score, spread, beats = (
            float(stated["val_bpb"]),
            stated.get("val_bpb_std"),
            stated.get("beats"),
        )
        folder = "/".join(path.parts[-3:-1])
        known = beats and beats["p_value"] is not None
        row = [
            f"{score:.4f}" + (f" ± {spread:.4f}" if spread is not None else ""),
            f"[{stated['name']}]({folder}/)",
            str(stated["author"]),
            str(stated["date"]),
            str(len(stated["seeds"])),
            f"{stated['bytes_total']:,}",
            str(stated.get("hardware", "-")),
            f"{beats['p_value']:.3g} against {beats['claimed']}" if known else "-",
        ]
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be ranked: {audit.described(error)}") from None
    return score, [cell.replace("|", "\\|") for cell in row]


def split_readme(records: Path) -> tuple[str, str]:
    """records/README.md before and after the tables, markers included."""
    path = records / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    parts = re.fullmatch(rf"(.*{MARKERS[0]}\n).*({MARKERS[1]}.*)", text, re.S)
    if not parts:
        raise BadInput(
            f"{path} has no lines {MARKERS[0]} and {MARKERS[1]}: put them where the tables belong"
        )
    return parts[1], parts[2]


def update_leaderboard(records: Path) -> None:
    """Write the tables into records/README.md, between the markers."""
    before, after = split_readme(records)
    write_atomically(records / "README.md", f"{before}\n{leaderboard(records)}\n{after}".encode())


# ---- The command
def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="logs/<RUN_ID>.json of each seed")
    parser.add_argument("--track", help=f"{CHALLENGE}, or a track of your own")
    parser.add_argument("--name", help="of the record, as people should read it")
    parser.add_argument("--author", help="else the name that git knows")
    parser.add_argument("--github-id")
    parser.add_argument(
        "--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD, else today"
    )
    parser.add_argument("--blurb", help="a sentence on what is new, else what is switched on")
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
        default=3.0,
        help="for the auditor, on two cores, for each artifact [%(default)s]",
    )
    parser.add_argument("--data", type=Path, help="the shards, if they are not where the log says")
    parser.add_argument("--tokenizer", type=Path, help="likewise")
    options = parser.parse_args(arguments)
    if (bool(options.results) + bool(options.check) + options.leaderboard) != 1:
        raise BadInput(
            "name the results of runs (logs/<RUN_ID>.json), or --check FOLDER, or --leaderboard"
        )
    if options.results and options.author is None:
        asked = subprocess.run(
            ["git", "config", "user.name"], cwd=ROOT, capture_output=True, text=True
        )
        options.author = asked.stdout
    for name in ("name", "author", "blurb"):  # one line each
        setattr(options, name, " ".join((getattr(options, name) or "").split()))
    return options


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        if options.leaderboard:
            update_leaderboard(RECORDS)
            return 0
        return check(options) if options.check else submit(options)
    except KeyboardInterrupt as stop:
        print(f"error: stopped{f'; {stop}' * bool(str(stop))}", file=sys.stderr)
        return 130
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # the auditor is a process group of its own
    sys.exit(main())
