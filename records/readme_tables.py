"""Tables in README.md of a record folder: the figures of seeds that they state plainly."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from decimal import Decimal
from typing import NamedTuple

from field_claims import OTHER_LINE, Claim

# A section or a column on other runs, or on differences.
OTHER_SECTION = re.compile(
    r"ablat|baseline|previous|prior|compar|histor|earlier|original|retract|superse|sweep|reference"
    r"|diagnos|\bvs\b|sota|\bPR\b|#\d|negative|explor|old\b|control|pre.?fix",
    re.I,
)
OTHER_COLUMN = re.compile(
    r"Δ|delta|gain|improve|\bvs\b|baseline|sota|diff|#\d|\bPR\b|std|dev\b|headroom|margin|reduc"
    r"|minus|%|saving|cost|penalty|gap|over|under|previous|prior|old|control|ppm.?only|limit|cap\b",
    re.I,
)
SEED_HEADING = re.compile(r"(?:random )?seeds?", re.I)
METRIC_HEADING = re.compile(r"metrics?|quantity|measure", re.I)
SEED_CELL = re.compile(r"(?:seed[ =:]*)?(\d{1,6})", re.I)
MEAN_CELL = re.compile(r"(?:(\d)[- ]seed )?(?:mean|average|avg)", re.I)
STATISTIC = re.compile(
    r"mean|average|avg|std|stdev|sd\b|dev|spread|range|min\b|max\b|±|\d[- ]seed", re.I
)
FIGURE = re.compile(r"(\d[\d,]*(?:\.\d+)?)(s|sec|seconds|ms|b|bytes)?(?:/step)?", re.I)
# What a column has, by words of its heading; the first that fits counts.
QUANTITIES = (
    ("score", re.compile(r".*(?:bp[bp]|bits.per.byte).*", re.I)),
    ("loss", re.compile(r".*(?:val.?loss|\bnats\b).*", re.I)),
    ("pace", re.compile(r".*(?:step.?avg|ms ?/ ?step|ms per step).*", re.I)),
    ("steps", re.compile(r"(?:(?:train(?:ing)?|total|num) )?steps", re.I)),
    ("training time", re.compile(r"train(?:ing)?[ _](?:time|wall.?clock)(?: ?\(m?s\))?", re.I)),
    ("evaluation time", re.compile(r"(?:\w+ )?eval(?:uation)?[ _]time(?: ?\(m?s\))?", re.I)),
    (
        "bytes",
        re.compile(
            r"(?:(?:total|final) )?(?:artifact|submission|bytes)(?:[ _](?:size|bytes|total))*"
            r"(?: ?\(bytes\))?|total[ _](?:size|bytes)(?: ?\(bytes\))?",
            re.I,
        ),
    ),
)


class Cell(NamedTuple):
    """A cell of a table of README.md: its column's heading, its figure, where it stands.

    `seed` is None for the mean over the seeds of the table, and for a run that is the only one.
    """

    seed: int | None
    heading: str
    figure: Claim
    unit: str


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
        elif line.strip() and OTHER_LINE.search(line) and line.rstrip().endswith(":"):
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


def seeds_in_tables(lines: list[str]) -> set[int]:
    """The seeds of which tables have results."""
    return {cell.seed for cells in cells_by_seed(lines) for cell in cells if cell.seed is not None}


def means_in_tables(lines: list[str]) -> list[tuple[float, int]]:
    """The means of the seeds' scores in each column of each table, and their decimals."""
    found = []
    for cells in cells_by_seed(lines):
        scores = [cell for cell in cells if cell.seed is not None and quantity_of(cell) == "score"]
        for heading in {cell.heading for cell in scores}:
            figures = [cell.figure for cell in scores if cell.heading == heading]
            if len(figures) > 1:
                decimals = min(figure.decimals for figure in figures)
                found.append((statistics.mean(figure.value for figure in figures), decimals))
    return found


def cells_of_rows(table: list[tuple[int, list[str]]]) -> list[Cell]:
    """The cells of a table that has a row for each seed."""
    head = table[0][1]
    found = []
    names = [row[0] for _, row in table[1:]]
    seeds = [name for name in names if SEED_CELL.fullmatch(name)]
    # With rows of other names it is not known what a mean is of.
    plain = len(seeds) == sum(not STATISTIC.match(name) for name in names)
    for number, row in table[1:]:
        seed = SEED_CELL.fullmatch(row[0])
        if seed is None and not (plain and is_mean_of(row[0], len(seeds))):
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


def cells_of_metrics(lines: list[str]) -> list[Cell]:
    """The cells of tables of metrics and values, which name no seed: they are of an only run."""
    found = []
    for table in tables_of(lines):
        head = table[0][1]
        if len(head) != 2 or not METRIC_HEADING.fullmatch(head[0]):
            continue
        for number, row in table[1:]:
            cell = cell_of(None, row[0], row[1], number) if len(row) == 2 else None
            if cell is not None:
                found.append(cell)
    return found


def is_mean_of(text: str, rows: int) -> bool:
    """Whether a row is the mean over the other rows."""
    named = MEAN_CELL.fullmatch(text)
    return named is not None and named[1] in (None, str(rows))


def cell_of(seed: int | None, heading: str, text: str, line: int) -> Cell | None:
    """A cell with one exact figure; None for any other."""
    # A share of the cap may stand behind a size.
    found = FIGURE.fullmatch(re.sub(r"\([\d.]+%\)| ", "", text))
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
