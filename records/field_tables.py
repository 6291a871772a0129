"""Tables of results in README.md, seed by seed, against the logs and submission.json."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import NamedTuple

from checks import FAILS, HOLDS, UNCHECKED, UNSTATED, Verdict
from field_checks import quoted
from field_claims import OTHER_LINE, SEED_STEPS, TOTALS, Claim, StatedTime, agree, rounded_to
from field_logs import FieldLog, Scored
from field_record import FieldRecord
from field_sizes import Code, totals_of
from field_times import SAME_SECONDS, claimed_pass, shorter_than_logs

# A section or a column on other runs, or on differences.
OTHER_SECTION = re.compile(
    r"ablat|baseline|previous|prior|compar|histor|earlier|original|retract|superse|sweep|reference"
    r"|diagnos|\bvs\b|sota|\bPR\b|#\d|negative|explor|reproduc|old\b|control|pre.?fix",
    re.I,
)
OTHER_COLUMN = re.compile(
    r"Δ|delta|gain|improve|\bvs\b|baseline|sota|diff|#\d|\bPR\b|std|dev\b|headroom|margin|reduc"
    r"|minus|%|saving|cost|penalty|gap|over|under|previous|prior|old|control|ppm.?only|limit|cap\b",
    re.I,
)
SEED_HEADING = re.compile(r"(?:random )?seeds?", re.I)
SEED_CELL = re.compile(r"(?:seed[ =:]*)?(\d{1,6})", re.I)
MEAN_CELL = re.compile(r"(?:(\d)[- ]seed )?(?:mean|average|avg)", re.I)
FIGURE = re.compile(r"(\d[\d,]*(?:\.\d+)?)(s|sec|seconds|ms|b|bytes)?(?:/step)?", re.I)
# What a column has, by words of its heading; the first that fits counts.
QUANTITIES = (
    ("score", re.compile(r".*(?:bp[bp]|bits.per.byte).*", re.I)),
    ("loss", re.compile(r".*(?:val.?loss|\bnats\b).*", re.I)),
    ("pace", re.compile(r".*(?:step.?avg|ms ?/ ?step|ms per step).*", re.I)),
    ("steps", re.compile(r"(?:(?:train(?:ing)?|total|num) )?steps", re.I)),
    ("training time", re.compile(r"train(?:ing)?[ _](?:time|wall.?clock)(?: ?\(m?s\))?", re.I)),
    ("evaluation time", re.compile(r"(?:\w+ )?eval(?:uation)?[ _]time(?: ?\(m?s\))?", re.I)),
    ("bytes", re.compile(r"(?:total |final )?(?:artifact|submission|total|bytes)\b.*", re.I)),
)
# Parts of the artifact, and sizes in a unit that is rounded.
NO_TOTAL = re.compile(r"code|model|script|weights|\b[mk]i?b\b", re.I)
# Words of a heading that say of which pass a score is.
BEFORE = re.compile(r"pre.?quant|ema|swa|fp32|bf16|fp16|float|unquant|raw|before|pre.?gptq", re.I)
ADAPTED = re.compile(r"ttt|slot|n.?gram|ppm|mix|cache|adapt|lora", re.I)
NOT_ADAPTED = re.compile(r"(?:pre|no|without|w/o).?(?:ttt|slot|n.?gram|ppm)", re.I)
SLIDING = re.compile(r"slid|stride|window|\bs64\b|\bsw\b", re.I)
PACKED = re.compile(r"round.?trip|quant|int\d|gptq", re.I)
PLAIN = re.compile(r"(?:final |exact )?(?:val[_ ])?(?:bp[bp]|loss)(?: \((?:final|exact)\))?", re.I)
# A pace is another from this share on: some print that of the last steps alone.
OTHER_PACE = 0.05
SMALLEST_TOTAL = 1_000_000
# More bytes than any packed script has.
LARGEST_CODE = 200_000
MOST_TOLD = 4


class Cell(NamedTuple):
    """A cell of a table of README.md: its column's heading, its figure, where it stands.

    `seed` is None for the mean over the seeds of the table.
    """

    seed: int | None
    heading: str
    figure: Claim
    unit: str


# ---- Reading
def tables_of(lines: list[str]) -> Iterator[list[tuple[int, list[str]]]]:
    """The tables of a text that are not of other runs: rows of cells, with their line's number."""
    rows: list[tuple[int, list[str]]] = []
    section = ""
    fenced = False
    for number, line in enumerate([*lines, ""], 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if line.lstrip().startswith("|") and not fenced:
            rows.append((number, cells_of(line)))
            continue
        if len(rows) > 2 and not OTHER_SECTION.search(section):
            yield [row for row in rows if not is_rule(row[1])]
        rows = []
        if line.startswith("#") and not fenced:
            section = line.lstrip("# ")
        elif line.strip() and re.search(OTHER_LINE, line) and line.rstrip().endswith(":"):
            # Such a line stands above a table and says what it is of.
            section += f" {line}"


def cells_of(line: str) -> list[str]:
    """The cells of a row, without emphasis and check marks."""
    text = re.sub(r"[*`✅✓✔]|<[^>]*>", "", line.strip())
    return [cell.strip() for cell in text.strip("|").split("|")]


def is_rule(cells: list[str]) -> bool:
    """Whether a row is the line below the head."""
    return all(re.fullmatch(r":?-+:?", cell) for cell in cells)


def cells_by_seed(lines: list[str]) -> list[list[Cell]]:
    """For each table of results by seed its cells that have a figure."""
    found = []
    for table in tables_of(lines):
        by_row = SEED_HEADING.fullmatch(table[0][1][0])
        cells = cells_of_rows(table) if by_row else cells_of_columns(table)
        seeds = [(cell.seed, cell.heading) for cell in cells]
        # With several rows of one seed, they are of several runs.
        if cells and len(set(seeds)) == len(seeds):
            found.append(cells)
    return found


def cells_of_rows(table: list[tuple[int, list[str]]]) -> list[Cell]:
    """The cells of a table that has a row for each seed."""
    head = table[0][1]
    found = []
    for number, row in table[1:]:
        seed = SEED_CELL.fullmatch(row[0])
        if seed is None and not is_mean_of(row[0], len(table) - 2):
            continue
        for heading, text in zip(head[1:], row[1:], strict=False):
            cell = cell_of(None if seed is None else int(seed[1]), heading, text, number)
            if cell is not None:
                found.append(cell)
    return found


def cells_of_columns(table: list[tuple[int, list[str]]]) -> list[Cell]:
    """The cells of a table that has a column for each seed, such as `seed 42`."""
    head = table[0][1]
    seeds = [SEED_CELL.fullmatch(cell) for cell in head]
    if not any(seed is not None and seed[0] != seed[1] for seed in seeds):
        return []
    found = []
    for number, row in table[1:]:
        for seed, text in zip(seeds[1:], row[1:], strict=False):
            cell = None if seed is None else cell_of(int(seed[1]), row[0], text, number)
            if cell is not None:
                found.append(cell)
    return found


def is_mean_of(text: str, rows: int) -> bool:
    """Whether a row is the mean over the other rows."""
    named = MEAN_CELL.fullmatch(text)
    return named is not None and named[1] in (None, str(rows))


def cell_of(seed: int | None, heading: str, text: str, line: int) -> Cell | None:
    """A cell with one exact figure; None for any other."""
    found = FIGURE.fullmatch(text.replace(" ", ""))
    if found is None:
        return None
    value = Decimal(found[1].replace(",", ""))
    decimals = max(0, -value.as_tuple().exponent)
    unit = (found[2] or "").lower()
    if not unit and re.search(r"\((?:s|sec|ms)\)", heading):
        unit = re.search(r"\((s|sec|ms)\)", heading)[1]
    return Cell(seed, heading, Claim(float(value), decimals, f"README.md:{line}"), unit)


def quantity_of(cell: Cell) -> str | None:
    """What a cell's column has; None if its heading does not tell for sure."""
    heading = cell.heading
    if OTHER_COLUMN.search(heading):
        return None
    for name, pattern in QUANTITIES:
        if pattern.fullmatch(heading):
            return name
    return None


# ---- Comparing
class Sources:
    """What README.md's figures of one seed are compared with: its run, logs and claims."""

    def __init__(self, record: FieldRecord, code: Code, seed: int):
        self.record = record
        self.code = code
        self.run = record.run_of(seed)
        self.logs = [
            log for log in record.logs if seed in (log.seed, log.named_seed) or seed in log.seeds
        ]
        self.claims = record.claims.seeds.get(seed)

    def claim(self, names: tuple[str, ...]) -> Claim | None:
        """What submission.json has of a seed whose log is not here."""
        return None if self.run is not None or self.claims is None else self.claims.first(names)


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
    if BEFORE.search(heading):
        return log.before_packing
    if NOT_ADAPTED.search(heading):
        return [scored for scored in log.finals if not ADAPTED.search(scored.label)]
    for words in (ADAPTED, SLIDING):
        if words.search(heading):
            return [scored for scored in log.finals if words.search(scored.label)]
    if PACKED.search(heading):
        others = (ADAPTED, SLIDING)
        return [
            scored
            for scored in log.finals
            if not any(words.search(scored.label) for words in others)
        ]
    return log.finals if PLAIN.fullmatch(heading) else []


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
    if value < SMALLEST_TOTAL or cell.figure.decimals or NO_TOTAL.search(cell.heading):
        return None
    if sources.run is None:
        claim = sources.claim(TOTALS)
        return None if claim is None else differing(value, claim)
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
    """Results by seed in tables of README.md against logs and submission.json."""
    name = "README tables"
    wrong = []
    made = 0
    for cells in cells_by_seed(record.claims.readme_lines):
        wrong += wrong_means(cells)
        for cell in cells:
            quantity = quantity_of(cell)
            if cell.seed is None or quantity is None:
                continue
            other = COMPARISONS[quantity](cell, Sources(record, code, cell.seed))
            made += other is not None
            if other:
                figure = f"{cell.figure.value:,.{cell.figure.decimals}f}"
                place = f"{cell.figure.where}, {cell.heading} of seed {cell.seed}"
                wrong.append(f"{figure} ({place}), but {other}")
    if wrong:
        more = f"; and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
        text = "; ".join(wrong[:MOST_TOLD]) + more
        if record.absent_logs:
            told = f"{', '.join(record.absent_logs)}, which README.md names, is not here"
            return Verdict(name, UNCHECKED, f"{text}; {told}")
        return Verdict(name, FAILS, text)
    if not made:
        return Verdict(name, UNSTATED, "README.md has no table by seed that logs can be held to")
    return Verdict(name, HOLDS, f"{made} figures of seeds in tables of README.md")
