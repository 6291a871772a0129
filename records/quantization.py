"""Compare ways to quantize one trained model: bytes, loss, seconds; a table, a plot, three figures.

    LATE_QAT_THRESHOLD=0 python records/quantization.py pocket.pt \\
        --json pocket.json --plot pocket.png

Trains as train_gpt.py would with the same environment and keeps the weights, with what training
says of their sensitivity, in the file; if the file is there, only compares. Every way quantizes the
same weights. Its artifact is read back and scored in float32 on the validation split, in windows of
the training length; the loss is what it has more than the float weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

# The commands share modules of data/. The script whose parts are compared is imported, too.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from commands import BadInput, Parser, command, packages_from

with packages_from("requirements.txt"):
    from files import write_atomically
    from quantization_plot import plot
    from quantization_ways import compare
    from quantized_model import HEADINGS, Comparison, trained
    from train_gpt import UserError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line; BadInput for what cannot be written at the end."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", type=Path, help="file of the float model; trained first if it is not there")
    add("--tokens", type=int, default=0, help="of the validation split to score; 0: all")
    add("--short", action="store_true", help="half of the points, and no refinements taken away")
    add("--json", type=Path, help="write the rows and the headline figures there")
    add("--plot", type=Path, help="write loss against bytes there (needs matplotlib)")
    options = parser.parse_args(arguments)
    for path in (options.weights, options.json, options.plot):
        if path is not None and not path.parent.is_dir():
            raise BadInput(f"{path.parent} is not a folder")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        raise BadInput("--plot needs matplotlib: pip install -r records/requirements.txt")
    return options


@command()
def main(arguments: list[str] | None = None) -> int:
    """Carry out the command; its exit status."""
    options = parse(arguments)
    try:
        comparison = Comparison(trained(options.weights), options.tokens)
    except UserError as error:
        raise BadInput(str(error)) from None
    print(f"float: {comparison.float}\n")
    print(f"| {' | '.join(HEADINGS)} |\n{'|---' * len(HEADINGS)}|")
    figures = compare(comparison, options.short)
    print()
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name}:{value:.3f}")

    if options.json:
        content = dict(
            float=comparison.float._asdict(),
            settings=comparison.kept["settings"],
            tokens=comparison.kept["tokens"],
            rows=comparison.rows,
            **figures,
        )
        write_atomically(options.json, (json.dumps(content, indent=1) + "\n").encode())
    if options.plot:
        plot(comparison.rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
