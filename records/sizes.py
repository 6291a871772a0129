"""How many weights at how many bits: models of several shapes, quantized to several sizes.

    MAX_WALLCLOCK_SECONDS=150 python records/sizes.py --out sizes --seeds 2 \\
        --bytes 300000,400000,540000,700000 MLP_MULT=2,4 "NUM_LAYERS=6 MLP_MULT=4"

Shapes are the base, the settings of the environment, and changes of it, written as for ablate.py. A
model of each shape is trained with each seed, by the clock or by steps as the settings say, and
kept in --out; where the file is there, it is not trained again. QUANT=fit then makes an artifact of
each of the sizes, of the model without code. It is read back and scored in float32 on the
validation split, in windows of the training length. In --out are then sizes.json, a table for each
shape, and sizes.png: bits per byte against bytes, a line for each shape. Where lines cross, another
number of weights is better. Equal seconds are equal only if nothing else runs beside.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
from pathlib import Path

# The commands share modules of data/. The script whose parts are used is imported, too.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from commands import BadInput, Parser, command, packages_from

with packages_from("requirements.txt"):
    import train_gpt
    from ablation_plan import Configuration, Reader, label_of, parse_seeds
    from files import write_atomically
    from quantized_model import Comparison, trained
    from train_gpt import UserError

DOTS_PER_INCH = 120
# Inches.
SIZE = (8, 5)


def parse_sizes(text: str) -> list[int]:
    """Sizes behind commas, ascending; argparse reports what is none."""
    sizes = sorted({int(part) for part in text.split(",")})
    if sizes[0] <= 0:
        raise ValueError
    return sizes


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line; BadInput for what cannot be done."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shapes", nargs="*", metavar="SHAPE", help='"SETTING=VALUE ..."')
    add("--out", type=Path, required=True, help="folder of models, sizes.json and sizes.png")
    add("--bytes", type=parse_sizes, required=True, help="sizes of the model, behind commas")
    add("--seeds", default="1", help="how many seeds, or which: 3 or 1337,42,7 [1]")
    add("--tokens", type=int, default=0, help="of the validation split to score; 0: all")
    options = parser.parse_args(arguments)
    options.shapes = [{}, *Reader(train_gpt).changes(options.shapes, grid=False)]
    options.seeds = parse_seeds(options.seeds)
    if not importlib.util.find_spec("matplotlib"):
        raise BadInput("the plot needs matplotlib: pip install -r records/requirements.txt")
    return options


def measure(folder: Path, shape: dict[str, str], seed: int, options: argparse.Namespace) -> dict:
    """Train a model of a shape, or take the one that was kept; what it scores at each size."""
    name = label_of(shape)
    file = folder / f"{Configuration(shape, {}, {}).slug}-seed{seed}.pt"
    environment = {**os.environ, **shape, "SEED": str(seed), "RUN_ID": f"{file.stem}-{os.getpid()}"}
    comparison = Comparison(trained(file, environment), options.tokens)
    fit = comparison.fit()
    for size in options.bytes:
        comparison.add(f"{name}, seed {seed}", comparison.pack_fit(size, fit))
    parameters = sum(parameter.numel() for parameter in comparison.model.parameters())
    rows = []
    for size, row in zip(options.bytes, comparison.rows, strict=True):
        kept = {key: row[key] for key in ("bytes", "bits", "val_bpb", "loss_bpb")}
        rows.append(dict(asked=size, **kept))
    return dict(
        shape=name,
        seed=seed,
        parameters=parameters,
        tokens=comparison.kept["tokens"],
        float_bpb=comparison.float.val_bpb,
        sizes=rows,
    )


def curves(models: list[dict]) -> dict[str, list[dict]]:
    """For each shape the means over its seeds, a point for each size."""
    of_shapes: dict[str, list[dict]] = {}
    for model in models:
        of_shapes.setdefault(model["shape"], []).append(model)
    found = {}
    for shape, group in of_shapes.items():
        points = []
        for rows in zip(*(model["sizes"] for model in group), strict=True):
            point = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
            points.append(point)
        found[shape] = points
    return found


def table(models: list[dict]) -> str:
    """The curves in Markdown: a line for each shape, bpb and bits a weight at each size."""
    found = curves(models)
    asked = [point["asked"] for point in next(iter(found.values()))]
    heading = [
        "shape",
        "parameters",
        "tokens",
        "float",
        *(f"{size / 1e3:,.0f} kB" for size in asked),
    ]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for shape, points in found.items():
        group = [model for model in models if model["shape"] == shape]
        tokens = statistics.mean(model["tokens"] for model in group)
        in_float = statistics.mean(model["float_bpb"] for model in group)
        cells = [shape, f"{group[0]['parameters']:,}", f"{tokens:,.0f}", f"{in_float:.4f}"]
        for point in points:
            cells.append(f"{point['val_bpb']:.4f} ({point['bits']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(models: list[dict], path: Path) -> None:
    """Bits per byte against the bytes of the model, a line for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE)
    for shape, points in curves(models).items():
        kilobytes = [point["bytes"] / 1e3 for point in points]
        axes.plot(kilobytes, [point["val_bpb"] for point in points], "o-", label=shape)
    axes.set(xscale="log", xlabel="kB of model, without code", ylabel="bits per byte")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)


@command()
def main(arguments: list[str] | None = None) -> int:
    """Carry out the command; its exit status."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    models = []
    try:
        for seed in options.seeds:
            for shape in options.shapes:
                models.append(measure(options.out, shape, seed, options))
    except UserError as error:
        raise BadInput(str(error)) from None
    content = json.dumps(models, indent=1) + "\n"
    write_atomically(options.out / "sizes.json", content.encode())
    plot(models, options.out / "sizes.png")
    print(f"\n{table(models)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
