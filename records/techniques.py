"""Every technique that was tried, in one report: records/ablations.md and records/ablations.png.

    python records/techniques.py

The figures are those of the ablations in records/ablations/<folder>/ablation.json, which
records/ablate.py wrote. techniques.json beside them lists the experiments, each with the folders of
its ablations, which have one base and were run one after the other, and of each technique
the settings that switch it on and off, its lines of code, whether it was kept, and why; and tables
of what no pair of runs shows, such as width against depth. Experiments that are marked as `main`
have a column each, and the plot is of them. An experiment whose base has a technique was run
without it, and the other way round: the report turns all effects into those of switching it on.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

# The commands share modules of data/.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data"))

from commands import BadInput, Parser, command, packages_from

with packages_from("requirements.txt"):
    from ablation_outcomes import Outcome, Row, compare
    from ablation_plot import COLOURS, DOTS_PER_INCH
    from ablation_report import read_report, results_table, shown_interval
    from files import write_atomically
    from manifest import ROOT
    from markdown_table import table

FOLDER = ROOT / "records" / "ablations"
# Inches.
WIDTH = 9.0
HEIGHT_OF_A_TECHNIQUE = 0.42
HEIGHT_AROUND = 1.3
INTRODUCTION = """\
# Techniques, and what they brought

Written by `python records/techniques.py` from the ablations in [ablations/](ablations/). An effect
is the difference in bits per byte that switching a technique on makes, in pairs of runs with one
seed, and below 0 it helps; in brackets its 95% interval (Student's t on the pairs), behind it the
number of pairs. With two pairs an interval is very wide. All runs of an experiment have equal
tokens, or equal seconds where its title says so. The time is that of a step with the technique over
that without it: processor time, medians of 15 steps in turn, four blocks of width 128, one thread
beside other work, good to about 0.02; ranges are of whole runs of older experiments.

![effects of the techniques](ablations.png)
"""
ELSEWHERE = """\
The numbers in the column of other experiments stand for these; each has its tables below:
"""


class Experiment(NamedTuple):
    """Ablations with one base, and what they were run on."""

    title: str
    folders: list[str]
    # Whether it has a column of its own and is in the plot.
    main: bool = False


class Technique(NamedTuple):
    """A technique as techniques.json has it. `on` and `off` are changes as people type them.

    There may be several that switch it off, since bases differ.
    """

    name: str
    on: str
    off: list[str]
    lines: int
    time: str
    kept: str
    why: str


class Table(NamedTuple):
    """Figures that are no effects of a technique, as techniques.json has them."""

    title: str
    # How they were measured, and what follows.
    text: str
    head: list[str]
    rows: list[list[str]]


class Report(NamedTuple):
    """What techniques.json says."""

    experiments: list[Experiment]
    techniques: list[Technique]
    tables: list[Table]


class Effect(NamedTuple):
    """What switching a technique on does, in bits per byte; no interval with one pair of runs."""

    difference: float
    low: float | None
    high: float | None
    pairs: int

    def __str__(self) -> str:
        interval = "" if self.low is None else f" {shown_interval(self.low, self.high, '+.4f')}"
        return f"{self.difference:+.4f}{interval}, {self.pairs}"


def effect_of(technique: Technique, rows: list[Row]) -> Effect | None:
    """Its effect by the rows of an experiment; None where it was not tried there."""
    for row in rows:
        if not row.paired or row.label not in (technique.on, *technique.off):
            continue
        if row.label == technique.on:
            return Effect(row.difference, row.paired_low, row.paired_high, len(row.paired))
        ends = (None, None)
        if row.paired_low is not None:
            ends = (-row.paired_high, -row.paired_low)
        return Effect(-row.difference, *ends, len(row.paired))
    return None


def read_list(folder: Path) -> Report:
    """What is in techniques.json; BadInput if it is not as it should be."""
    path = folder / "techniques.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        experiments = [Experiment(**each) for each in content["experiments"]]
        techniques = [Technique(**each) for each in content["techniques"]]
        tables = [Table(**each) for each in content.get("tables", [])]
        return Report(experiments, techniques, tables)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: {error}") from None


def spent(outcomes: dict[str, list[Outcome]]) -> str:
    """How many runs of all ablations trained, and for how long in all."""
    runs = [each for each in itertools.chain.from_iterable(outcomes.values()) if each.train_seconds]
    hours = sum(each.train_seconds for each in runs) / 3600
    return f"{len(runs)} runs trained for {hours:.0f} hours in all."


def report(content: Report, outcomes: dict[str, list[Outcome]], rows: dict[str, list[Row]]) -> str:
    """The report in Markdown: all techniques in one table, other tables, each experiment's own.

    `outcomes` are the runs by folder, `rows` the comparisons by the experiment's title.
    """
    main = [each.title for each in content.experiments if each.main]
    others = [each.title for each in content.experiments if not each.main]
    numbers = {title: number for number, title in enumerate(others, start=1)}
    head = ["technique", *main, "in other experiments", "time", "lines", "kept", "why"]
    cells = []
    for technique in content.techniques:
        effects = [effect_of(technique, rows[title]) for title in main]
        shown = ["-" if effect is None else str(effect) for effect in effects]
        elsewhere = []
        for title, number in numbers.items():
            effect = effect_of(technique, rows[title])
            if effect is not None:
                elsewhere.append(f"({number}) {effect}")
        shown.append("; ".join(elsewhere) or "-")
        name = f"{technique.name} (`{technique.on}`)"
        cells.append(
            [name, *shown, technique.time, str(technique.lines), technique.kept, technique.why]
        )
    parts = [INTRODUCTION, spent(outcomes), "", *table(head, cells)]
    if others:
        parts += [ELSEWHERE, *(f"{number}. {title}" for title, number in numbers.items()), ""]
    for each in content.tables:
        parts += [f"## {each.title}", "", each.text, "", *table(each.head, each.rows)]
    for each in content.experiments:
        heading = each.title if each.main else f"{numbers[each.title]}. {each.title}"
        parts += [f"## {heading}", ""]
        for folder in each.folders:
            about = json.loads((FOLDER / folder / "ablation.json").read_text(encoding="utf-8"))
            parts += [f"    {about['command']}", "", f"- {about['device'][0]}"]
            parts += [f"- {about['versions'][0]}", f"- {about['date']}", ""]
            parts += results_table(compare(outcomes[folder]))
    return "\n".join(parts).rstrip() + "\n"


def draw(titles: list[str], techniques: list[Technique], rows: dict[str, list[Row]]) -> bytes:
    """The effects of what is kept and their intervals as PNG, a mark for each of the experiments.

    What has no effect in any of them is left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    techniques = [
        each
        for each in techniques
        if each.kept != "no" and any(effect_of(each, rows[title]) for title in titles)
    ]
    height = HEIGHT_AROUND + HEIGHT_OF_A_TECHNIQUE * len(techniques)
    figure, axes = pyplot.subplots(figsize=(WIDTH, height), layout="constrained")
    axes.axvline(0, color="black", linewidth=1)
    marks = itertools.product("os^", COLOURS)
    for number, (title, (mark, colour)) in enumerate(zip(titles, marks, strict=False)):
        # Each experiment has a line of its own within a technique's.
        shift = 0.6 * (number / max(1, len(titles) - 1) - 0.5)
        places = []
        values = []
        for place, technique in enumerate(techniques):
            effect = effect_of(technique, rows[title])
            if effect is None:
                continue
            places.append(place + shift)
            values.append(effect.difference)
            if effect.low is not None:
                axes.plot([effect.low, effect.high], [place + shift] * 2, color=colour, alpha=0.5)
        axes.plot(values, places, mark, color=colour, label=title, markersize=6)
    axes.set_yticks(range(len(techniques)), [technique.name for technique in techniques])
    axes.set_ylim(len(techniques) - 0.5, -0.5)
    axes.set_xlabel("bits per byte that switching it on changes (left is better); 95% intervals")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DOTS_PER_INCH)
    pyplot.close(figure)
    return picture.getvalue()


@command()
def main(arguments: list[str] | None = None) -> int:
    """Write the report and its plot; exit status 0."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    content = read_list(FOLDER)
    outcomes = {}
    rows = {}
    for each in content.experiments:
        rows[each.title] = []
        for folder in each.folders:
            outcomes[folder] = read_report(FOLDER / folder)
            # The differences of each ablation are to its own base.
            rows[each.title] += compare(outcomes[folder])
    text = report(content, outcomes, rows)
    main_titles = [each.title for each in content.experiments if each.main]
    picture = draw(main_titles, content.techniques, rows)
    write_atomically(FOLDER.parent / "ablations.md", text.encode())
    write_atomically(FOLDER.parent / "ablations.png", picture)
    print(f"{FOLDER.parent}/ablations.md, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
