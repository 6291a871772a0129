"""The plot of an ablation: each change's paired difference to the base, and how it came about."""

from __future__ import annotations

import io
import itertools
import statistics

from ablation_outcomes import Outcome, Row

# Colours that people with any colour vision can tell apart (Okabe and Ito 2008).
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#999999")
# Line and marker of the changes for whom the colours come again.
LINES = (("-", "o"), ("--", "s"), (":", "^"))
WELCH_COLOUR = "#BBBBBB"
# The first part of the curves, whose large differences would flatten the rest.
BEGINNING = 0.15
# Inches of height.
HEIGHT_OF_A_LABEL_LINE = 0.21
HEIGHT_OF_A_ROW = 0.3
HEIGHT_AROUND = 1.9
SMALLEST_HEIGHT = 4.4
WIDTH = 16.0
DOTS_PER_INCH = 110
# How far below its interval, in rows, a change's other marks are.
SEEDS_BELOW = 0.2
WELCH_BELOW = 0.38


def draw(rows: list[Row], outcomes: list[Outcome]) -> bytes:
    """Both panels as PNG, of the rows that have a difference, the best first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    looks = looks_of(rows)
    rows = sorted((row for row in rows if row.paired), key=lambda row: row.difference)
    lines = sum(1 + row.label.count(" ") for row in rows)
    height = HEIGHT_AROUND + HEIGHT_OF_A_ROW * len(rows) + HEIGHT_OF_A_LABEL_LINE * lines
    figure, (left, right) = pyplot.subplots(
        1,
        2,
        figsize=(WIDTH, max(SMALLEST_HEIGHT, height)),
        width_ratios=(1.15, 1),
        layout="constrained",
    )
    draw_differences(left, rows, looks)
    draw_curves(right, outcomes, {row.label: looks[row.label] for row in rows})
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DOTS_PER_INCH)
    pyplot.close(figure)
    return picture.getvalue()


def looks_of(rows: list[Row]) -> dict[str, dict]:
    """Colour, line and marker of each change, by its label, the same in both panels."""
    styles = []
    for line, marker in LINES:
        for colour in COLOURS:
            styles.append(dict(color=colour, linestyle=line, marker=marker))
    labels = [row.label for row in rows if row.label != "base"]
    return dict(zip(labels, itertools.cycle(styles), strict=False))


def draw_differences(axes, rows: list[Row], looks: dict[str, dict]) -> None:
    """Paired differences with their intervals, in this order from the top.

    Dots are the differences of single seeds, the grey lines Welch's intervals. The figures of the
    paired difference are at the right.
    """
    axes.axvline(0, color="black", linewidth=1, zorder=0)
    for place, row in enumerate(rows):
        colour = looks[row.label]["color"]
        marker = looks[row.label]["marker"]
        if row.low is not None:
            below = place + WELCH_BELOW
            axes.plot([row.low, row.high], [below, below], color=WELCH_COLOUR, linewidth=2)
        if row.paired_low is not None:
            ends = [row.paired_low, row.paired_high]
            axes.plot(ends, [place, place], color=colour, linewidth=3, solid_capstyle="butt")
            axes.plot(ends, [place, place], "|", color=colour, markersize=9, markeredgewidth=2)
        axes.plot(row.difference, place, marker, color=colour, markersize=7)
        seeds = list(row.paired.values())
        below = place + SEEDS_BELOW
        axes.plot(seeds, [below] * len(seeds), ".", color="black", markersize=5)
        axes.text(
            1.015,
            place,
            figures_of(row),
            transform=axes.get_yaxis_transform(),
            verticalalignment="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(rows)), [row.label.replace(" ", "\n") for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.5)
    axes.set_xlabel("difference in val_bpb to the base (left is better)")
    axes.set_title(
        "Paired difference and its 95% interval\n"
        "black dots: single seeds; grey: 95% interval by Welch",
        fontsize=10,
    )
    axes.grid(axis="x", alpha=0.3)


def figures_of(row: Row) -> str:
    """The paired difference, the reach of its interval, and p, in two lines."""
    if row.paired_low is None:
        return f"{row.difference:+.5f}"
    reach = (row.paired_high - row.paired_low) / 2
    return (
        f"{row.difference:+.5f} ± {reach:.5f}\np {row.p_paired:.4f}, Holm {row.p_paired_holm:.4f}"
    )


def draw_curves(axes, outcomes: list[Outcome], looks: dict[str, dict]) -> None:
    """Each change's curve minus the base's, over training tokens.

    It is that of val_bpb where runs were validated on the way, else of the training loss: the mean
    over the seeds that both have, where all of these runs have a point.
    """
    from matplotlib.ticker import EngFormatter

    done = [outcome for outcome in outcomes if outcome.finished]
    validated = any(len(outcome.val_curve) > 1 for outcome in done)
    curves = {}
    for outcome in done:
        points = outcome.val_curve if validated else outcome.train_curve
        curves[outcome.label, outcome.seed] = dict(points)

    settled = [0.0]
    for label, look in looks.items():
        points = mean_difference(curves, label)
        if not points:
            continue
        tokens, values = zip(*points, strict=True)
        axes.plot(tokens, values, markersize=4, linewidth=1.4, label=label, **look)
        settled += [value for at, value in points if at >= BEGINNING * tokens[-1]]
    margin = 0.05 * (max(settled) - min(settled)) or 1.0
    axes.set_ylim(min(settled) - margin, max(settled) + margin)

    quantity = "val_bpb" if validated else "training loss, nats,"
    title = "Mean difference during training"
    if validated:
        title += "\nplain windows, before quantization"
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(f"difference in {quantity} to the base")
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    if len(settled) > 1:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def mean_difference(
    curves: dict[tuple[str, int], dict[int, float]], label: str
) -> list[tuple[int, float]]:
    """Pairs of tokens and mean difference to the base, where all runs of common seeds have a point.

    `curves` are by label and seed, each a value by tokens.
    """
    pairs = []
    for (name, seed), own in curves.items():
        if name == label and ("base", seed) in curves:
            pairs.append((own, curves["base", seed]))
    if not pairs:
        return []
    shared = set.intersection(*(set(own) & set(base) for own, base in pairs))
    found = []
    for tokens in sorted(shared):
        found.append((tokens, statistics.fmean(own[tokens] - base[tokens] for own, base in pairs)))
    return found
