"""Results in tables of README.md, by seed or of an only run, against logs and submission.json."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from typing import NamedTuple

from checks import FAILS, HOLDS, UNCHECKED, UNSTATED, Verdict
from field_checks import quoted
from field_claims import SEED_STEPS, TOTALS, Claim, SeedClaims, StatedTime, agree, rounded_to
from field_logs import FieldLog, Scored
from field_record import FieldRecord, Run
from field_sizes import LARGEST_CODE, Code, totals_of
from field_times import SAME_SECONDS, claimed_pass, shorter_than_logs
from readme_tables import Cell, cells_by_seed, cells_of_metrics, quantity_of

# Words of a heading that say of which pass a score is.
AVERAGED = re.compile(r"ema\b|swa\b|lawa\b|averag", re.I)
BEFORE = re.compile(r"pre.?(?:quant|gptq|export)|fp32|bf16|fp16|float|unquant|\braw\b|before", re.I)
ADAPTED = re.compile(r"ttt|slot|n.?gram|ppm|mix|cache|adapt|lora", re.I)
NOT_ADAPTED = re.compile(r"(?:pre|no|without|w/o).?(?:ttt|slot|n.?gram|ppm)", re.I)
SLIDING = re.compile(r"slid|stride|window|\bs64\b|\bsw\b", re.I)
PACKED = re.compile(r"round.?trip|quant|int\d|gptq", re.I)
PLAIN = re.compile(r"(?:final |exact )?(?:val[_ ])?(?:bp[bp]|loss)(?: \((?:final|exact)\))?", re.I)
# A pace is another from this share on: some print that of the last steps alone.
OTHER_PACE = 0.05
SMALLEST_TOTAL = 1_000_000
MOST_TOLD = 4


class Sources(NamedTuple):
    """What README.md's figures of one run are compared with: the run, its logs and claims."""

    record: FieldRecord
    code: Code
    run: Run | None
    logs: list[FieldLog]
    claims: SeedClaims | None

    def claim(self, names: tuple[str, ...]) -> Claim | None:
        """What submission.json has of a seed whose log is not here."""
        return None if self.run is not None or self.claims is None else self.claims.first(names)


def sources_of(record: FieldRecord, code: Code, seed: int) -> Sources:
    """What there is of a seed; a log that names none may be of any."""
    logs = []
    for log in record.logs:
        seeds = (log.seed, log.named_seed, *log.seeds)
        if seed in seeds or not any(each is not None for each in seeds):
            logs.append(log)
    return Sources(record, code, record.run_of(seed), logs, record.claims.seeds.get(seed))


def compare_score(cell: Cell, sources: Sources) -> str | None:
    """Bits a byte against all that the seed's logs say of them.

    As with all these comparisons: empty if they agree, None if nothing here is the same thing.
    """
    claim = cell.figure
    if sources.run is None:
        score = None if sources.claims is None else sources.claims.score
        if score is None or not PLAIN.fullmatch(cell.heading):
            return None
        same = agree(claim.value, claim.decimals, score.value, score.decimals)
        return "" if same else f"{score} ({score.where})"
    figures = [figure for log in sources.logs for figure in log.figures_on("bpb")]
    if any(agree(claim.value, claim.decimals, *figure) for figure in figures):
        return ""
    scores = passes_named(cell.heading, sources.run.log)
    if not scores or sources.record.result_file(str(claim)) is not None:
        return None
    nearest = min(scores, key=lambda scored: abs(scored.val_bpb - claim.value))
    return quoted(nearest, sources.run.log)


def passes_named(heading: str, log: FieldLog) -> list[Scored]:
    """The scores of a log of the pass that a heading names."""
    finals = log.finals
    if AVERAGED.search(heading):
        return [scored for scored in log.scores if AVERAGED.search(scored.label)]
    if BEFORE.search(heading):
        return log.before_packing
    if NOT_ADAPTED.search(heading):
        return [scored for scored in finals if not ADAPTED.search(scored.label)]
    for words in (ADAPTED, SLIDING):
        if words.search(heading):
            return [scored for scored in finals if words.search(scored.label)]
    if PACKED.search(heading):
        plain = [scored for scored in finals if not ADAPTED.search(scored.label)]
        return [scored for scored in plain if not SLIDING.search(scored.label)]
    return finals if PLAIN.fullmatch(heading) else []


def compare_loss(cell: Cell, sources: Sources) -> str | None:
    """Nats a token against all losses of the seed's logs."""
    claim = cell.figure
    if sources.run is None:
        return None
    figures = [figure for log in sources.logs for figure in log.figures_on("loss")]
    if any(agree(claim.value, claim.decimals, *figure) for figure in figures):
        return ""
    scores = passes_named(cell.heading, sources.run.log)
    if not scores or claim.decimals < 3:
        return None
    nearest = min(scores, key=lambda scored: abs(scored.val_loss - claim.value))
    return f"{nearest.val_loss:.4f} ({nearest.label}, {sources.run.log.where(nearest.line)})"


def compare_steps(cell: Cell, sources: Sources) -> str | None:
    """Steps against those of all step lines."""
    value = cell.figure.value
    if sources.run is None:
        claim = sources.claim(SEED_STEPS)
        return None if claim is None else differing(value, claim)
    known = [step for log in sources.logs for step in log.all_steps]
    if not known or cell.figure.decimals:
        return None
    if any(abs(step - value) <= rounded_to(int(value)) for step in known):
        return ""
    log = max((log for log in sources.logs if log.steps is not None), key=lambda each: each.steps)
    return f"{log.steps[0]:,} ({log.where(log.steps[1])})"


def differing(value: float, claim: Claim) -> str:
    """A claim, unless it is the figure."""
    return "" if abs(claim.value - value) <= 1 else f"{claim.value:,.0f} ({claim.where})"


def compare_bytes(cell: Cell, sources: Sources) -> str | None:
    """A total against all that a total of the seed's log may be of."""
    value = int(cell.figure.value)
    if value < SMALLEST_TOTAL or cell.figure.decimals:
        return None
    if sources.run is None:
        claim = sources.claim(TOTALS)
        if claim is None or 0 < abs(claim.value - value) < LARGEST_CODE:
            # One of them may be of the model alone.
            return None
        return differing(value, claim)
    log = sources.run.log
    rounding = rounded_to(value)
    allowed = rounding if rounding >= 1000 else 0
    known = totals_of(sources.logs, sources.code)
    if any(abs(total - value) <= allowed for total in known) or log.total_bytes is None:
        return "" if known else None
    packed = log.count("packed bytes", "bytes")
    if packed is not None and sources.code.is_packed and 0 < value - packed[0] < LARGEST_CODE:
        # Of packed code there are several counts.
        return None
    return f"{log.total_bytes[0]:,} ({log.where(log.total_bytes[1])})"


def compare_pace(cell: Cell, sources: Sources) -> str | None:
    """Milliseconds a step against those of the step lines, and time by steps."""
    known = {pace: log for log in sources.logs for pace in paces_of(log)}
    if not known or cell.unit not in ("", "ms"):
        return None
    nearest = min(known, key=lambda pace: abs(pace - cell.figure.value))
    if abs(nearest / max(cell.figure.value, 1e-9) - 1) <= OTHER_PACE:
        return ""
    return f"{nearest:.1f} ms by {known[nearest].name}"


def paces_of(log: FieldLog) -> list[float]:
    """All milliseconds a step that a log states, and its time by its steps."""
    stated = [*log.facts.get("trained", []), *log.facts.get("validated", [])]
    paces = [float(each.values["average"]) for each in stated if each.values.get("average")]
    if log.training is not None and log.steps is not None and log.steps[0]:
        paces.append(1000 * log.training[0] / log.steps[0])
    return paces


def compare_training_time(cell: Cell, sources: Sources) -> str | None:
    """Seconds of training; more than the log's may be of what belongs to it as well."""
    seconds = seconds_of(cell)
    if sources.run is None or seconds is None:
        return None
    log = sources.record.training_log(sources.run)
    if log.training is None:
        return None
    if seconds >= log.training[0] - max(SAME_SECONDS, unit_of(cell)):
        return ""
    return f"{log.training[0]:.1f} s ({log.where(log.training[1])})"


def compare_evaluation_time(cell: Cell, sources: Sources) -> str | None:
    """Seconds of evaluation against the claimed pass and the sums of all."""
    seconds = seconds_of(cell)
    if sources.run is None or sources.run.scored is None or seconds is None:
        return None
    time = StatedTime(sources.run.seed, cell.figure._replace(value=seconds), unit_of(cell))
    shorter = shorter_than_logs(sources.record, time)
    if not claimed_pass(sources.run):
        return None
    return shorter[0].partition("but ")[2] if shorter else ""


def seconds_of(cell: Cell) -> float | None:
    """A time in seconds; None without a unit."""
    if not cell.unit:
        return None
    return cell.figure.value / 1000 if cell.unit == "ms" else cell.figure.value


def unit_of(cell: Cell) -> float:
    """What the last digit of a time stands for, in seconds."""
    return 10.0**-cell.figure.decimals * (0.001 if cell.unit == "ms" else 1.0)


COMPARISONS: dict[str, Callable[[Cell, Sources], str | None]] = {
    "score": compare_score,
    "loss": compare_loss,
    "steps": compare_steps,
    "bytes": compare_bytes,
    "pace": compare_pace,
    "training time": compare_training_time,
    "evaluation time": compare_evaluation_time,
}


def wrong_means(cells: list[Cell]) -> list[str]:
    """Scores and losses that a table calls the mean, and that are not the mean of its seeds."""
    seeds = {cell.seed for cell in cells if cell.seed is not None}
    wrong = []
    for mean in cells:
        if mean.seed is not None or quantity_of(mean) not in ("score", "loss"):
            continue
        figures = [
            each.figure for each in cells if each.seed is not None and each.heading == mean.heading
        ]
        if len(figures) < 2 or len(figures) < len(seeds):
            continue
        value = statistics.mean(figure.value for figure in figures)
        decimals = min(figure.decimals for figure in figures)
        if not agree(mean.figure.value, mean.figure.decimals, value, decimals):
            told = ", ".join(str(figure) for figure in figures)
            text = f"{mean.figure} ({mean.figure.where}, {mean.heading}) is called the mean, but "
            wrong.append(f"{text}that of {told} is {value:.{max(decimals, 4)}f}")
    return wrong


def check_tables(record: FieldRecord, code: Code) -> Verdict:
    """Results in tables of README.md, by seed or of the only run, against logs and claims."""
    name = "README tables"
    lines = record.claims.readme_lines
    wrong = []
    pairs = []
    for cells in cells_by_seed(lines):
        wrong += wrong_means(cells)
        seeds = [cell for cell in cells if cell.seed is not None]
        pairs += [(cell, sources_of(record, code, cell.seed)) for cell in seeds]
    if len(record.logs) == 1 and record.claims.seed_count() is None:
        only = Sources(record, code, record.runs[0], record.logs, None)
        pairs += [(cell, only) for cell in cells_of_metrics(lines)]
    made = 0
    for cell, sources in pairs:
        quantity = quantity_of(cell)
        other = None if quantity is None else COMPARISONS[quantity](cell, sources)
        made += other is not None
        if other:
            wrong.append(f"{told_cell(cell)}, but {other}")
    if wrong:
        more = f"; and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
        text = "; ".join(wrong[:MOST_TOLD]) + more
        if record.absent_logs:
            told = f"{', '.join(record.absent_logs)}, which README.md names, is not here"
            return Verdict(name, UNCHECKED, f"{text}; {told}")
        return Verdict(name, FAILS, text)
    if not made:
        return Verdict(name, UNSTATED, "README.md has no table that the logs can be held against")
    return Verdict(name, HOLDS, f"{made} figures in tables of README.md")


def told_cell(cell: Cell) -> str:
    """A cell's figure, and where it stands."""
    figure = f"{cell.figure.value:,.{cell.figure.decimals}f}"
    seed = "" if cell.seed is None else f" of seed {cell.seed}"
    return f"{figure} ({cell.figure.where}, {cell.heading}{seed})"
