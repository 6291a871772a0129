"""The report on an ablation, ablation.md, .json and .png, and how it is published."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import ablation_plot
from ablation_outcomes import FAILED, Outcome, Row, compare, of_one_text, read_outcome
from ablation_plan import Ablation, PlannedRun
from commands import BadInput, described
from files import write_atomically
from leaderboard import RECORDS, split_readme, update_leaderboard
from markdown_table import table
from record_folder import workspace

# Below this p an effect counts as sure in the report's summary; so does an interval without 0.
SURE = 0.05
SMALLEST_P = 1e-4


# ---- The table


def shown(number: float | None, form: str) -> str:
    """A number as text, or a dash where there is none."""
    return "-" if number is None else format(number, form)


def shown_p(p_value: float | None) -> str:
    """A p-value as text."""
    if p_value is not None and p_value < SMALLEST_P:
        return f"<{SMALLEST_P:.4f}"
    return shown(p_value, ".4f")


def shown_interval(low: float | None, high: float | None, form: str) -> str:
    """An interval as text."""
    if low is None:
        return "-"
    return f"[{low:{form}}, {high:{form}}]"


def results_table(rows: list[Row]) -> list[str]:
    """The rows in Markdown, and an empty line.

    The comparison by pairs leads. It has a digit more, since it sees smaller effects.
    """
    seeds = sorted({seed for row in rows for seed in row.status})
    head = ["change", "difference", "95% interval (paired)", "p (paired)", "p (Holm)"]
    head += ["95% interval (Welch)", "p (Welch)"]
    head += [f"seed {seed}" for seed in seeds]
    head += ["mean", "std", "bytes", "steps", "ms/step", "train s"]

    lines = []
    for row in rows:
        cells = [
            row.label,
            shown(row.difference, "+.5f"),
            shown_interval(row.paired_low, row.paired_high, "+.5f"),
            shown_p(row.p_paired),
            shown_p(row.p_paired_holm),
            shown_interval(row.low, row.high, "+.4f"),
            shown_p(row.p_welch),
        ]
        for seed in seeds:
            if seed in row.val_bpb:
                cells.append(f"{row.val_bpb[seed]:.4f}")
            else:
                cells.append(row.status.get(seed, "-"))
        cells += [
            shown(row.mean, ".4f"),
            shown(row.deviation, ".4f"),
            shown(row.bytes_total, ",.0f"),
            shown(row.steps, ",.0f"),
            shown(row.step_avg_ms, ".1f"),
            shown(row.train_seconds, ".1f"),
        ]
        lines.append(cells)
    return table(head, lines)


# ---- ablation.md and ablation.json


def circumstances(ablation: Ablation, outcomes: list[Outcome]) -> dict:
    """What the figures were made with, by the runs' own logs where these know it."""
    done = [outcome for outcome in outcomes if outcome.finished]
    data = set()
    validation = set()
    device = set()
    versions = set()
    for outcome in done:
        data.add(outcome.data)
        validation.add(f"{outcome.val_targets:,} targets, {outcome.val_bytes:,} bytes of text")
        device.add("; ".join(outcome.runtime[:3]))
        versions.add(", ".join(f"{name} {text}" for name, text in outcome.versions.items()))
    return dict(
        date=time.strftime("%Y-%m-%d"),
        script=str(ablation.script),
        script_sha256=ablation.sha256,
        equal=ablation.equal,
        base=ablation.base.variables,
        data=sorted(data),
        validation=sorted(validation),
        device=sorted(device),
        versions=sorted(versions),
    )


def report_text(
    name: str, command: str, about: dict, rows: list[Row], outcomes: list[Outcome]
) -> str:
    """The report: what was run, the table, what it means, what failed."""
    base = " ".join(f"{setting}={value}" for setting, value in about["base"].items())
    script = Path(about["script"]).name
    lines = [
        f"# Ablation: {name}",
        "",
        f"    {command}",
        "",
        f"- base: {base}; else {script}'s defaults. All runs have equal {about['equal']}.",
        f"- script: {about['script']}, sha256 {about['script_sha256']}",
    ]
    for key in ("data", "validation", "device", "versions"):
        lines += [f"- {key}: {text}" for text in about[key]]
    lines += [
        f"- date: {about['date']}",
        "",
        "Bits per byte of final_int6_sliding_window, of final_int6_ttt where TTT_ENABLED=1; a "
        "difference below 0 is better than the base.",
        "",
        *results_table(rows),
        *explanation(rows),
    ]
    if any(row.paired for row in rows):
        lines += ["", "![differences to the base](ablation.png)"]
    failed = [outcome for outcome in outcomes if outcome.status == FAILED]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- {outcome.name}: {outcome.error}" for outcome in failed]
    return "\n".join(lines) + "\n"


def explanation(rows: list[Row]) -> list[str]:
    """What the table's statistics mean, and how many effects are sure by them."""
    lines = [
        "The difference is the mean over the seeds that a change and the base both have. The "
        "interval and p (paired) take the runs of a seed as a pair, since they share the data and "
        "its order (Student's t on the pairs). Those by Welch take all runs as independent, so "
        "that what a seed does to both of its runs hides small effects from them."
    ]
    compared = [row for row in rows if row.p_paired is not None]
    if len(compared) > 1:
        count = len(compared)
        by_holm = sum(row.p_paired_holm < SURE for row in compared)
        by_pairs = sum(row.p_paired < SURE for row in compared)
        by_welch = sum(row.p_welch < SURE for row in compared if row.p_welch is not None)
        lines += [
            f"{count} changes are compared: of as many that do nothing, one has p (paired) below "
            f"{1 / count:.2g} by chance. p (Holm) is p (paired), adjusted for that.",
            f"Sure at 95%: by pairs {by_pairs} of {count}, by pairs and Holm {by_holm}, by Welch "
            f"{by_welch}.",
        ]
    if not any(row.deviation for row in rows):
        lines.append("One seed shows no spread: no claim can rest on it.")
    return lines


def write_report(
    ablation: Ablation, name: str, command: str, asked: list[PlannedRun]
) -> list[Outcome]:
    """Read every run and write the report anew; what came of all runs.

    `command` is the command line that asked for it. Raises BadInput or OSError for what cannot be
    written.
    """
    outcomes = [read_outcome(run, ablation) for run in ablation.all_runs(asked)]
    outcomes = of_one_text(outcomes)
    rows = compare(outcomes)
    about = circumstances(ablation, outcomes)
    content = dict(
        name=name,
        command=command,
        **about,
        rows=[dataclasses.asdict(row) for row in rows],
        runs=[dataclasses.asdict(outcome) for outcome in outcomes],
    )
    write_text(ablation, ".json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_text(ablation, ".md", report_text(name, command, about, rows, outcomes))
    if any(row.paired for row in rows):
        try:
            picture = ablation_plot.draw(rows, outcomes)
        except Exception as error:
            raise BadInput(f"the plot cannot be drawn: {described(error)}") from error
        write_atomically(ablation.folder / "ablation.png", picture)
    return outcomes


def read_report(folder: Path) -> list[Outcome]:
    """The outcomes in a folder's ablation.json; BadInput if they are not there."""
    path = folder / "ablation.json"
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return [Outcome(**run) for run in runs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is no ablation's report: {described(error)}") from None


def write_text(ablation: Ablation, ending: str, text: str) -> None:
    """Write a file of the report, without names of private folders."""
    write_atomically(ablation.folder / f"ablation{ending}", ablation.public(text).encode())


# ---- Publishing


def check_target(folder: Path) -> None:
    """BadInput unless an ablation can be published there."""
    if folder.exists():
        raise BadInput(f"--publish {folder} exists already: name a new folder")
    if RECORDS in folder.absolute().parents:
        split_readme(RECORDS)


def publish(ablation: Ablation, folder: Path) -> None:
    """Make a folder of the report and the script as it ran, all at once.

    The leaderboard links a folder in records/.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with workspace(folder.parent) as made:
        for path in sorted(ablation.folder.glob("ablation.*")):
            name = "README.md" if path.suffix == ".md" else path.name
            shutil.copyfile(path, made / name)
        (made / "train_gpt.py").write_bytes(ablation.code)
        check_target(folder)
        made.rename(folder)
    if RECORDS in folder.absolute().parents:
        update_leaderboard(RECORDS)
