"""submission.json against the logs of a record, and README.md against it."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from pathlib import Path

import numpy as np

from checks import Check, Tally
from commands import described
from run_logs import Log, differing_settings

# What submission.json must have.
FIELDS = ("name", "author", "date", "val_bpb", "bytes_total", "bytes_code", "seeds", "seed_results")


def check_submission(folder: Path, script: bytes, logs: dict[int, Log]) -> Check:
    """Compare submission.json with the logs, by their seeds, and README.md with it."""
    path = folder / "submission.json"
    try:
        stated = dict(json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal))
        seeds = [int(seed) for seed in stated["seeds"]]
        results = {int(seed): result for seed, result in stated["seed_results"].items()}
        mean = Decimal(stated["val_bpb"])
        total = int(stated["bytes_total"])
    except (OSError, AttributeError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        return Check("submission", False, f"submission.json: {described(error)}")
    tally = Tally()
    for name in FIELDS:
        tally.expect(stated.get(name), f"no {name}")
    is_date = re.fullmatch(r"\d{4}-\d\d-\d\d.*", str(stated.get("date")))
    tally.expect(is_date, "date is not YYYY-MM-DD")
    same = set(seeds) == set(results) == set(logs)
    tally.expect(same, "seeds, seed_results and logs differ")
    for seed in seeds:
        compare_seed(tally, seed, results.get(seed), logs.get(seed))
    compare_runs(tally, list(logs.values()))
    compare_means(tally, mean, total, list(logs.values()))
    tally.equal("bytes_code", stated.get("bytes_code"), len(script))
    compare_readme(tally, folder / "README.md", mean, total, seeds)
    return tally.check("submission")


def compare_seed(tally: Tally, seed: int, stated: dict | None, log: Log | None) -> None:
    """One seed's results against the last lines of its log."""
    if log is None or not isinstance(stated, dict):
        tally.expect(False, f"no train_seed{seed}.log or no seed_results of {seed}")
        return
    tally.equal(f"the seed of train_seed{seed}.log", log.settings.get("seed"), seed)
    score = log.final_score
    found = dict(
        val_bpb=None if score is None else score.val_bpb,
        val_loss=None if score is None else score.val_loss,
        artifact_bytes=log.model_bytes,
        steps=None if log.last_step is None else log.last_step.step,
    )
    for name, figure in found.items():
        value = stated.get(name)
        number = None if value is None else float(value)
        tally.equal(f"{name} of seed {seed}", number, figure, rounding(value))


def rounding(number: Decimal | int | None) -> float:
    """What rounding to the decimals that are stated may have taken off a number.

    A score needs no more than four decimals; a log has eight.
    """
    if not isinstance(number, Decimal):
        return 0.0
    decimals = -number.as_tuple().exponent
    if decimals == 0:
        return 0.0
    return 0.51 * 10.0 ** -min(max(decimals, 4), 8)


def compare_runs(tally: Tally, logs: list[Log]) -> None:
    """Whether the runs are the seeds of one configuration, each with an artifact of its own."""
    differing = set()
    for log in logs[1:]:
        differing.update(differing_settings(logs[0], log))
    told = ", ".join(sorted(differing))
    tally.expect(not differing, f"the seeds' configurations differ in {told}")
    digests = {log.artifact_sha256 for log in logs}
    tally.expect(len(digests) == len(logs), "logs of different seeds name one artifact")


def compare_means(tally: Tally, mean: Decimal, total: int, logs: list[Log]) -> None:
    """The score of the record, and its bytes: those of its largest seed."""
    scores = [log.final_score for log in logs]
    if scores and None not in scores:
        found = float(np.mean([score.val_bpb for score in scores]))
        tally.equal("val_bpb", float(mean), found, max(1e-6, rounding(mean)))
    sizes = [math.inf if log.total_bytes is None else log.total_bytes for log in logs]
    tally.equal("bytes_total", total, max(sizes, default=None))


def compare_readme(tally: Tally, path: Path, mean: Decimal, total: int, seeds: list[int]) -> None:
    """Whether README.md says score, bytes and seeds."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    score = f"{mean:.4f}"
    # The score may have further decimals.
    tally.expect(has_number(text, score, whole=False), f"README.md does not say {score}")
    with_commas = f"{total:,}"
    said = has_number(text, with_commas) or has_number(text, str(total))
    tally.expect(said, f"README.md does not say {with_commas}")
    for seed in seeds:
        tally.expect(has_number(text, str(seed)), f"README.md does not say {seed}")


def has_number(text: str, number: str, whole: bool = True) -> bool:
    """Whether a number stands in a text, no digits before it and, if `whole`, none behind it."""
    end = r"(?!\d|[.,]\d)" if whole else ""
    return re.search(rf"(?<![\d.,]){re.escape(number)}{end}", text) is not None
