"""What a reviewer gets of record folders of the field: verdicts, one table, comparisons."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import field_checks
import field_sizes
import field_tables
import field_times
from challenge import NATS, P_VALUE
from checks import FAILS, STATES, UNCHECKED, Verdict
from commands import BadInput, described
from field_record import FieldRecord
from record_text import compare_with
from significance import p_below

# The checks of claims against logs, in the order of the table.
CLAIM_CHECKS = (
    field_checks.check_score,
    field_checks.check_mean,
    field_checks.check_seed_scores,
    field_checks.check_deviation,
    field_checks.check_loss,
    field_checks.check_before_packing,
    field_checks.check_seeds,
    field_checks.check_parameters,
    field_checks.check_steps,
    field_times.check_training_time,
    field_times.check_evaluation_time,
    field_checks.check_hardware,
    field_checks.check_shards,
    field_checks.check_split,
    field_checks.check_text_bytes,
    field_checks.check_readme,
)
# Those that read the script, too.
CODE_CHECKS = (
    field_sizes.check_total,
    field_sizes.check_cap,
    field_sizes.check_code_size,
    field_sizes.check_code_claim,
    field_sizes.check_source,
    field_sizes.check_files,
    field_tables.check_tables,
    field_sizes.check_track,
)
MOST_PLACES = 12
# The columns by which a table of folders can be sorted.
SORTING = ("folder", "track", "val_bpb", "seeds", "bytes", "fails")
HEAD = ("folder", "track", "val_bpb", "seeds", "bytes", *STATES, "what does not hold")


class Review(NamedTuple):
    """The verdicts on a folder, and what a table of many folders says of it."""

    folder: str
    track: str
    val_bpb: float | None
    seeds: int
    bytes_total: int | None
    verdicts: list[Verdict]
    places: list[str]

    @property
    def failures(self) -> list[Verdict]:
        """What does not hold."""
        return [verdict for verdict in self.verdicts if verdict.state == FAILS]

    def counts(self) -> dict[str, int]:
        """How many verdicts there are of each kind."""
        states = [verdict.state for verdict in self.verdicts]
        return {state: states.count(state) for state in STATES}

    def as_dict(self) -> dict:
        """For JSON."""
        verdicts = [verdict._asdict() for verdict in self.verdicts]
        return {**self._asdict(), "verdicts": verdicts, "counts": self.counts()}


def guarded_verdict(check: Callable[..., Verdict], *arguments: object) -> Verdict:
    """A check's verdict; what it cannot make sense of cannot be checked."""
    try:
        return check(*arguments)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return Verdict(name, UNCHECKED, f"its files are not understood: {described(error)}")


def review(record: FieldRecord) -> Review:
    """Check a folder of the field; BadInput if it is no record folder."""
    if not record.is_record:
        raise BadInput(
            f"{record.folder} is no record folder: it has no submission.json, and no log beside a "
            "script"
        )
    code = field_sizes.Code(record)
    verdicts = []
    if record.claims.problem:
        text = f"{record.claims.name} cannot be read: {record.claims.problem}"
        verdicts.append(Verdict("submission.json", UNCHECKED, text))
    verdicts += [guarded_verdict(check, record) for check in CLAIM_CHECKS]
    verdicts += [guarded_verdict(check, record, code) for check in CODE_CHECKS]
    verdicts.append(field_sizes.check_artifact(record))
    track = next(verdict.text for verdict in verdicts if verdict.check == "track")
    totals = [run.log.total_bytes[0] for run in record.runs if run.log.total_bytes]
    return Review(
        folder=str(record.folder),
        track=track[:1] if track[:2] in ("A:", "B:") else "",
        val_bpb=record.bpb,
        seeds=len(record.runs),
        bytes_total=max(totals, default=None),
        verdicts=verdicts,
        places=field_sizes.places_to_look_at(record, code),
    )


def print_review(found: Review) -> None:
    """Print a line for each verdict, and the places to look at."""
    width = max(len(verdict.check) for verdict in found.verdicts)
    for verdict in found.verdicts:
        print(f"{verdict.check:{width}}  {verdict.state:{len(UNCHECKED)}}  {verdict.text}")
    if found.places:
        print("places to look at, where the script scores:")
        for place in found.places[:MOST_PLACES]:
            print(f"  {place}")
        more = len(found.places) - MOST_PLACES
        if more > 0:
            print(f"  and {more} more (--json has all)")


# ---- Many folders
def sorting_key(found: Review, column: str) -> tuple:
    """What a row of the table is sorted by: the best first, what is not stated last."""
    keys = dict(
        track=(found.track,),
        val_bpb=(found.val_bpb is None, found.val_bpb),
        seeds=(-found.seeds,),
        bytes=(found.bytes_total is None, found.bytes_total),
        fails=(-len(found.failures),),
    )
    return (*keys.get(column, ()), found.folder)


def table_of(reviews: list[Review]) -> list[str]:
    """The lines of one table of all folders."""
    rows = [HEAD, *(row_of(found) for found in reviews)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    lines = []
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines


def row_of(found: Review) -> tuple[str, ...]:
    """A folder's row."""
    score = "-" if found.val_bpb is None else f"{found.val_bpb:.5f}"
    size = "-" if found.bytes_total is None else f"{found.bytes_total:,}"
    counts = [str(count) for count in found.counts().values()]
    failures = ", ".join(verdict.check for verdict in found.failures)
    name = Path(found.folder).name
    return (name, found.track or "-", score, str(found.seeds), size, *counts, failures)


# ---- Comparisons
def values_of(record: FieldRecord) -> tuple[list[float], list[float]]:
    """Bits a byte and nats a token of a folder's seeds; BadInput if its logs state no score."""
    bpbs, losses = record.values()
    if not bpbs:
        raise BadInput(f"{record.folder}: no log states a last score, so it cannot be compared")
    return bpbs, losses


def beats_text(record: FieldRecord, claimed: float) -> str:
    """A folder's seeds against a score, by the rule of the field."""
    bpbs, losses = values_of(record)
    claim = compare_with(claimed, bpbs, losses)
    return rule_text(f"against {claimed} bpb", claim.nats, claim.p_value, len(bpbs), "Student")


def against_text(record: FieldRecord, other: FieldRecord) -> str:
    """A folder's seeds against another's, by Welch's test.

    Nats are those of the first folder's tokens: the other's bits a byte become nats with its ratio.
    """
    bpbs, losses = values_of(record)
    others, _ = values_of(other)
    ratio = statistics.mean(losses) / statistics.mean(bpbs)
    theirs = [bpb * ratio for bpb in others]
    lead = statistics.mean(theirs) - statistics.mean(losses)
    p_value = p_of_lead(losses, theirs)
    where = f"against {other.folder.name}, {statistics.mean(others):.5f} bpb over {len(others)}"
    return rule_text(where, lead, p_value, len(bpbs), "Welch")


def p_of_lead(losses: list[float], others: list[float]) -> float | None:
    """One-sided p that losses are not below others by NATS; None if it cannot be computed."""
    if len(others) == 1:
        return p_below(losses, others[0] - NATS)
    no_spread = len(set(losses)) == 1 and len(set(others)) == 1
    if len(losses) < 2 or no_spread:
        return None

    from scipy import stats

    bounds = [value - NATS for value in others]
    return float(stats.ttest_ind(losses, bounds, equal_var=False, alternative="less").pvalue)


def rule_text(where: str, nats: float, p_value: float | None, seeds: int, test: str) -> str:
    """The rule of the field with its numbers."""
    told = "p cannot be computed: it takes two seeds or more"
    if p_value is not None:
        told = f"p = {p_value:.3g} that it is no more than {NATS} ({test}, one-sided)"
    verdict = "beats" if p_value is not None and p_value < P_VALUE else "does not beat"
    return (
        f"{where}: {nats:+.4f} nats a token better over {seeds} seeds; {told}. The rule is "
        f"{NATS} nats at p < {P_VALUE}: it {verdict} it"
    )
