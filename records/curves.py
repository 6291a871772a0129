"""Draw loss and bits per byte of training runs over steps, seconds and tokens.

    python records/curves.py logs/<RUN_ID>.txt
    python records/curves.py records/track_pocket/2026-11-28_CaseOperators train.log --out a.png

It takes logs of train_gpt.py and of other scripts of the field, and folders, whose logs it finds,
and draws all runs into one picture: training loss thin, validation with dots, and the last scores
of the packed artifacts as stars. Runs of one folder have one colour. What a log does not state
(tokens, for one) is not drawn, and printed. The exit status is 0, or 2 after one line if nothing
can be drawn.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

# The commands share modules of data/.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data"))

from commands import BadInput, Parser, command, packages_from, say

with packages_from("records/requirements.txt"):
    import matplotlib

    from field_logs import FieldLog, Point
    from field_record import FieldRecord
    from files import write_atomically

# Colours that people with any colour vision can tell apart (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
AXES = ("steps", "seconds", "tokens")
# The share of the points, from the last on, that must be seen: the first ones lie far above.
SHOWN = 0.85
INCHES = (17.0, 9.0)
DOTS_PER_INCH = 110


def logs_of(path: Path) -> list[FieldLog]:
    """A log, or the logs of a folder; BadInput for what is none."""
    if not path.exists():
        raise BadInput(f"{path} does not exist: name logs, or folders with logs")
    found = FieldRecord(path).logs if path.is_dir() else [FieldLog(path, path.name)]
    found = [log for log in found if log.curve("train_loss") or log.curve("val_loss")]
    if not found:
        raise BadInput(f"{path} has no step lines that can be read: name the log of a training run")
    return found


def place(point: Point, axis: str) -> float | None:
    """Where a point lies on an axis; None if its log does not state that."""
    return dict(steps=point.step, seconds=point.seconds, tokens=point.tokens)[axis]


def on_axis(points: list[Point], axis: str) -> tuple[list[float], list[float]]:
    """The places and values of the points that have a place on an axis."""
    pairs = [(place(point, axis), point.value) for point in points]
    pairs = [pair for pair in pairs if pair[0] is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def names_of(logs: list[FieldLog]) -> list[str]:
    """A name for each log, with its folder if they are from several."""
    if len({log.path.resolve().parent for log in logs}) == 1:
        return [log.name for log in logs]
    return [f"{log.path.resolve().parent.name}/{log.path.name}" for log in logs]


def looks_of(logs: list[FieldLog]) -> list[dict]:
    """Colour, line and name of each run: runs of one folder have one colour, if there are several.

    The name has the last score, which is the star.
    """
    folders = list(dict.fromkeys(log.path.resolve().parent for log in logs))
    number_in_folder = dict.fromkeys(folders, 0)
    looks = []
    for number, (log, name) in enumerate(zip(logs, names_of(logs), strict=True)):
        folder = log.path.resolve().parent
        colour = folders.index(folder) if len(folders) > 1 else number
        line = number_in_folder[folder] if len(folders) > 1 else number // len(COLOURS)
        number_in_folder[folder] += 1
        looks.append(
            dict(
                color=COLOURS[colour % len(COLOURS)],
                linestyle=LINES[line % len(LINES)],
                label=f"{name}: {log.finals[-1].val_bpb:.4f}" if log.finals else name,
            )
        )
    return looks


def short_number(value: float, _position: int = 0) -> str:
    """A number on an axis: 1.5B for 1,500,000,000 tokens."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def limits(values: list[float]) -> tuple[float, float] | None:
    """The ends of the vertical axis: the lowest of all values, and what most are below."""
    if not values:
        return None
    ordered = sorted(values)
    high = ordered[int(SHOWN * (len(ordered) - 1))]
    margin = 0.08 * (high - ordered[0]) or 0.1
    return ordered[0] - margin, high + 3 * margin


def draw_panel(axes, logs: list[FieldLog], looks: list[dict], axis: str, loss: bool) -> list[float]:
    """Draw the curves of all logs into one panel; return all values in it."""
    values = []
    for log, look in zip(logs, looks, strict=True):
        thin = dict(look, label=None)
        quantity = "val_loss" if loss else "val_bpb"
        if loss:
            x, y = on_axis(log.curve("train_loss"), axis)
            axes.plot(x, y, linewidth=0.7, alpha=0.6, **thin)
            values += y
        x, y = on_axis(log.curve(quantity), axis)
        axes.plot(x, y, marker=".", markersize=7, linewidth=1.4, **look)
        values += y
        ends = [place(point, axis) for point in [*log.curve("train_loss"), *log.curve("val_loss")]]
        ends = [end for end in ends if end is not None]
        for scored in log.finals[-1:] if ends else []:
            value = scored.val_loss if loss else scored.val_bpb
            star = dict(color=look["color"], markersize=14, markeredgecolor="white", zorder=5)
            star["markeredgewidth"] = 0.6
            axes.plot(max(ends), value, "*", **star)
            values.append(value)
    return values


def draw(logs: list[FieldLog]) -> bytes:
    """All panels as PNG: loss above, bits per byte below; over steps, seconds, tokens."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    looks = looks_of(logs)
    figure, panels = pyplot.subplots(
        2, 3, figsize=INCHES, layout="constrained", sharey="row", sharex="col"
    )
    for row, loss in zip(panels, (True, False), strict=True):
        values = []
        for axes, axis in zip(row, AXES, strict=True):
            values += draw_panel(axes, logs, looks, axis, loss)
            axes.set_xlabel("" if loss else axis)
            axes.xaxis.set_major_formatter(short_number)
            absent = len(absent_on(axis, logs))
            if absent and loss:
                text = f"not stated by {absent} of {len(logs)} runs"
                axes.set_title(text, fontsize="small", loc="right")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("loss, nats a token" if loss else "val_bpb, bits per byte")
        ends = limits(values)
        if ends is not None:
            row[0].set_ylim(*ends)
    handles, labels = panels[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    title = "thin: training loss; dots: validation; stars: last scores of the artifact"
    panels[0][0].set_title(title, fontsize="medium", loc="left")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DOTS_PER_INCH)
    pyplot.close(figure)
    return picture.getvalue()


def say_absent(logs: list[FieldLog]) -> None:
    """Say which logs do not state what an axis needs."""
    for axis in AXES:
        absent = absent_on(axis, logs)
        if absent:
            say(f"{axis} are not stated, and not drawn, of {', '.join(absent)}")


def absent_on(axis: str, logs: list[FieldLog]) -> list[str]:
    """The names of the logs that state no place on an axis."""
    absent = []
    for log in logs:
        points = [*log.curve("train_loss"), *log.curve("val_loss")]
        if all(place(point, axis) is None for point in points):
            absent.append(log.name)
    return absent


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="LOG_OR_FOLDER", help="logs, or folders with logs"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("curves.png"), help="the picture [%(default)s]"
    )
    return parser.parse_args(arguments)


@command(stopped="interrupted: nothing is written")
def main(arguments: list[str] | None = None) -> int:
    """Draw the logs that the arguments name; the exit status."""
    options = parse(arguments)
    if not options.out.resolve().parent.is_dir():
        raise BadInput(f"--out {options.out}: its folder does not exist")
    logs = []
    for path in options.paths:
        logs += logs_of(path)
    say_absent(logs)
    write_atomically(options.out, draw(logs))
    print(f"{options.out}: {len(logs)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
