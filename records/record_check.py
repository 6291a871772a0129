"""What can be checked of a record folder without running its script: files, fields, figures."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from audit_submission import FIELDS
from challenge import CAP, CHALLENGE, foreign_to_challenge, machines
from checks import Check, Tally, guarded
from finished_runs import ROUNDED, logged_figures
from record_folder import ARTIFACTS, LOGS, SCRIPT, log_paths
from record_text import adaptation_of, compare_with, compliance_of
from run_logs import Log

# What the records of this field state in submission.json; only FIELDS must be there.
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
# What a record folder holds, by name and pattern.
NEEDED = {
    SCRIPT: SCRIPT,
    "submission.json": "submission.json",
    "README.md": "README.md",
    "train_seed<N>.log": LOGS,
    "an artifact": ARTIFACTS,
}
# What rounding to four decimals may take off a mean or a deviation.
FOUR_DECIMALS = 0.51e-4
PRE_QUANTIZATION = "pre_quant_val_bpb"


def check_record(folder: Path) -> list[Check]:
    """All of these checks. Without a submission.json that can be read only that of the files."""
    checks = check_files(folder)
    try:
        text = (folder / "submission.json").read_text(encoding="utf-8")
        stated = dict(json.loads(text))
    except (OSError, ValueError, TypeError):
        # The auditor says what is wrong with it.
        return checks
    logs = [Log(path) for path in log_paths(folder)]
    version = f"{stated.get('pytorch_version')}: no log names it"
    return [
        *checks,
        check_fields(stated),
        guarded("seeds", check_seeds, stated, logs),
        guarded("statistics", check_statistics, stated, logs),
        Check("pytorch_version", None, version),
    ]


def check_files(folder: Path) -> list[Check]:
    """What a record folder should hold: a line for each thing that is missing."""
    checks = []
    for name, pattern in NEEDED.items():
        if not list(folder.glob(pattern)):
            checks.append(Check(name, False, f"missing from {folder}"))
    if not checks:
        count = len(list(folder.iterdir()))
        checks.append(Check("files", True, f"{count}, with all that a record needs"))
    return checks


def check_fields(stated: dict) -> Check:
    """The fields that the records of this field have."""
    absent = [name for name in SURVEYED if name not in stated]
    figure = f"all {len(SURVEYED)}"
    if absent:
        figure = f"no {', '.join(absent)}"
    return Check("fields", not set(absent) & set(FIELDS), figure)


def check_seeds(stated: dict, logs: list[Log]) -> Check:
    """What is stated of each seed, beside what the auditor compares, against its log.

    Compared is what both state, to the decimals that are stated.
    """
    tally = Tally()
    found = {}
    for log in logs:
        if "seed" in log.settings:
            found[log.settings["seed"]] = logged_figures(log)
    results = {int(seed): result for seed, result in stated["seed_results"].items()}
    for seed in sorted(set(found) & set(results)):
        for name in found[seed]:
            if name in results[seed]:
                what = f"{name} of seed {seed}"
                compare_figure(tally, what, name, results[seed][name], found[seed][name])
    before = [figures[PRE_QUANTIZATION] for figures in found.values()]
    if before and all(before):
        value = stated.get(PRE_QUANTIZATION)
        mean = statistics.mean(before)
        compare_figure(tally, PRE_QUANTIZATION, PRE_QUANTIZATION, value, mean)
    if not tally.made:
        return Check("seeds", None, "the logs do not state them")
    return tally.check("seeds")


def compare_figure(tally: Tally, what: str, name: str, value, logged) -> None:
    """One figure with a log's, if both are stated."""
    if isinstance(logged, str):
        tally.expect(value == logged, f"{what} is not the log's")
    elif value is not None and logged is not None:
        decimals = len(str(value).partition(".")[2])
        tolerance = max(ROUNDED.get(name, 0.0), 0.51 * 10.0**-decimals)
        tally.equal(what, value, logged, tolerance)


def check_statistics(stated: dict, logs: list[Log]) -> Check:
    """What follows from seed_results and logs: mean, deviation, claim, flags, machine, track."""
    tally = Tally()
    results = list(stated["seed_results"].values())
    bpbs = [float(result["val_bpb"]) for result in results]
    losses = [float(result["val_loss"]) for result in results]
    if "val_loss" in stated:
        tally.equal("val_loss", stated["val_loss"], statistics.mean(losses), FOUR_DECIMALS)
    if stated.get("val_bpb_std") is not None and len(bpbs) > 1:
        compare_deviation(tally, stated["val_bpb_std"], bpbs)
    if stated.get("beats"):
        compare_claim(tally, stated["beats"], bpbs, losses)
    compare_flags(tally, stated, logs)
    compare_track(tally, stated, logs)
    if "hardware" in stated and all(log.device for log in logs):
        named = machines(logs)
        tally.expect(stated["hardware"] == named, f"hardware is {named} in the logs")
    reasons = set()
    for log in logs:
        reasons.update(foreign_to_challenge(log))
    for reason in sorted(reasons):
        tally.expect(stated.get("track") != CHALLENGE, f"track {CHALLENGE}, but {reason}")
    return tally.check("statistics")


def compare_deviation(tally: Tally, stated: float, bpbs: list[float]) -> None:
    """The standard deviation over the seeds; some divide by n, some by n - 1."""
    deviations = (statistics.stdev(bpbs), statistics.pstdev(bpbs))
    nearest = min(deviations, key=lambda found: abs(found - stated))
    tally.equal("val_bpb_std", stated, nearest, FOUR_DECIMALS)


def compare_claim(tally: Tally, beats: dict, bpbs: list[float], losses: list[float]) -> None:
    """The claim against another record, computed again."""
    claim = compare_with(beats["claimed"], bpbs, losses)
    tally.equal("nats of the claim", beats["nats"], claim.nats, 1e-6)
    tally.expect(beats["holds"] is claim.holds, "the claim's holds is wrong")
    if claim.p_value is not None:
        tolerance = 1e-3 * claim.p_value
        tally.equal("p of the claim", beats["p_value"], claim.p_value, tolerance)


def compare_track(tally: Tally, stated: dict, logs: list[Log]) -> None:
    """Whether the record says of what track it is, and what adapts; an older one is of track A.

    Of track B it has the scores of track A beside it.
    """
    for log in logs:
        found = adaptation_of(log)
        track = found["evaluation_track"]
        said = stated.get("evaluation_track", "A")
        tally.expect(said == track, f"evaluation_track {said}, but the logs are of track {track}")
        same = stated.get("adaptation") == found.get("adaptation")
        tally.expect(same, "adaptation is not what the logs state")
    for name in ("sliding_val_bpb", "sliding_val_loss"):
        figures = [result.get(name) for result in stated["seed_results"].values()]
        if None not in figures:
            tally.equal(name, stated.get(name), statistics.mean(figures), FOUR_DECIMALS)
        elif any(log.track == "B" for log in logs):
            tally.expect(False, f"no {name} of each seed, of track A")


def compare_flags(tally: Tally, stated: dict, logs: list[Log]) -> None:
    """The rules of the field, as far as logs or else submission.json say whether they hold."""
    if all(log.compliance for log in logs):
        derived = compliance_of(logs)
    else:
        derived = dict(
            three_seeds=len(stated["seed_results"]) >= 3,
            artifact_under_16mb=stated["bytes_total"] <= CAP,
        )
    flags = stated.get("compliance") or {}
    for name in sorted(set(flags) & set(derived)):
        tally.expect(flags[name] is derived[name], f"compliance {name} is wrong")
