"""The plot of records/quantization.py: bits per byte lost against bytes."""

from __future__ import annotations

from pathlib import Path

DOTS_PER_INCH = 120
# Inches.
SIZE = (8, 5)


def plot(rows: list[dict], path: Path) -> None:
    """Write the plot. Ways that lose nothing have no place on it, since losses are logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE)
    shown = [row for row in rows if row["loss_bpb"] > 0]
    curves = {
        "QUANT=fit": [row for row in shown if row["way"].startswith("fit, ")],
        "GPTQ, steps in a row's sigma": [row for row in shown if "sigma" in row["way"]],
    }
    for label, group in curves.items():
        points = sorted((megabytes(row), row["loss_bpb"]) for row in group)
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=label)
    for row in shown:
        if row["way"].startswith("int"):
            axes.plot(megabytes(row), row["loss_bpb"], "s", label=row["way"])
        elif row["way"].startswith("fit with"):
            axes.plot(megabytes(row), row["loss_bpb"], "x", label=row["way"])
    axes.set(yscale="log", xlabel="MB of model", ylabel="bits per byte lost by quantization")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)


def megabytes(row: dict) -> float:
    """The size of a row's artifact."""
    return row["bytes"] / 1e6
