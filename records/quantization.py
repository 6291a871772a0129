"""Compare ways to quantize one trained model: bytes, loss, seconds; a table, a plot, three headline figures.

    LATE_QAT_THRESHOLD=0 python records/quantization.py pocket.pt --json pocket.json --plot pocket.png

Trains as train_gpt.py would with the same environment and keeps the weights, with what training says of their
sensitivity, in the file; if the file is there, only compares. Every way quantizes the same weights. Its artifact
is read back and scored in float32 on the validation split, in windows of the training length; the loss is what it
has more than the float weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt
from train_gpt import Fit, Grid, UserError

COVARIANCE_ROWS = 64  # training rows from which plain GPTQ takes the covariance of its inputs
SIGMAS = (
    1.2,
    1.7,
    2.3,
    3.3,
    4.6,
    6.5,
)  # steps in a row's standard deviation, for GPTQ with such steps
SHARES = (
    0.3,
    0.37,
    0.45,
    0.55,
    0.65,
    0.72,
    0.85,
    1.0,
)  # of the bytes of int6 with zstd, for QUANT=fit
REFINED = 0.45  # the share at which refinements are taken away
KEPT = ("settings", "weights", "rows", "columns", "tokens")  # of a trained model, in its file


def trained(path: Path) -> dict:
    """The float model: what an earlier call has kept at `path`, or a new one with the environment's settings."""
    if path.exists():
        try:
            kept = torch.load(path, weights_only=True)
            return {key: kept[key] for key in KEPT}
        except Exception as error:  # a file that is none of ours fails in one of many ways
            raise UserError(
                f"{path}: not kept by this program ({type(error).__name__}); name another"
            ) from None
    settings = dataclasses.replace(
        train_gpt.settings_from(os.environ)[0], quant="fit", int5_mlp="auto"
    )
    runtime = train_gpt.start_runtime(settings)
    train_gpt.claim_disk(settings.artifact_max_bytes)
    log = train_gpt.Log(settings.run_id or f"quantization-{os.getpid()}", runtime)
    run = train_gpt.Run(settings, runtime, log)
    model, fit = run.train(b"")
    kept = dict(
        settings=dataclasses.asdict(settings),
        weights=model.state_dict(),
        rows=fit.rows,
        columns=fit.columns,
        tokens=run.results["tokens"],
    )
    partial = path.with_suffix(".partial")
    torch.save(kept, partial)
    partial.rename(path)
    return kept


class Comparison:
    """One float model, the ways to quantize it, and what came of them."""

    def __init__(self, kept: dict, tokens: int):
        settings, known = kept["settings"], {field.name for field in train_gpt.fields_of()}
        self.settings = dataclasses.replace(  # in float32: bfloat16 would blur losses of 0.0001
            train_gpt.Settings(**{key: value for key, value in settings.items() if key in known}),
            run_id="",
            dtype="float32",
            attention="auto",
            compile="0",
            data_path=train_gpt.settings_from(os.environ)[0].data_path or settings["data_path"],
        )
        self.runtime = train_gpt.start_runtime(self.settings)
        folder, tokenizer = train_gpt.find_data(self.settings, self.runtime, print)
        self.model, self.read = (
            train_gpt.build_model(self.settings, self.runtime) for _ in range(2)
        )
        self.model.load_state_dict(kept["weights"])
        self.train_files = train_gpt.find_shards(folder, "train")
        self.tokens = train_gpt.load_validation(
            train_gpt.find_shards(folder, "val"), self.settings.vocab_size
        )
        self.tokens = self.tokens[:tokens] if tokens else self.tokens
        table = train_gpt.ByteTable(train_gpt.load_tokenizer(tokenizer, self.settings.vocab_size))
        self.evaluator = train_gpt.Evaluator(self.settings, self.runtime, table, print)
        self.manifest = dict(
            tokenizer="",
            settings={
                f.name: getattr(self.settings, f.name)
                for f in train_gpt.fields_of("model", "evaluation")
            },
        )
        self.kept, self.rows = kept, []
        self.float = self.evaluator.score(self.model, self.tokens, "plain")

    def fit(self, quant: str = "fit") -> Fit:
        """Fitted steps from what training has seen, for the matrices that `quant` codes."""
        fit, every = (
            Fit(train_gpt.coded_parameters(self.model, quant)),
            train_gpt.coded_parameters(self.model, "fit"),
        )
        seen = dict(zip(every, zip(self.kept["rows"], self.kept["columns"])))
        fit.rows, fit.columns = zip(*(seen[name] for name in fit.weights))
        fit.finish()
        return fit

    def add(self, way: str, make, **changes) -> dict:
        """Measure the artifact that `make(settings)` returns."""
        settings = dataclasses.replace(self.settings, **changes)
        started = time.perf_counter()
        data = make(settings)
        seconds, started = time.perf_counter() - started, time.perf_counter()
        _, weights = train_gpt.read_artifact(data, way)
        read_seconds = time.perf_counter() - started
        self.read.load_state_dict(weights, strict=False)
        score = self.evaluator.score(self.read, self.tokens, "plain")
        row = dict(
            way=way,
            bytes=len(data),
            **rate(data, self.model, settings),
            val_bpb=score.val_bpb,
            loss_nats=score.val_loss - self.float.val_loss,
            loss_bpb=score.val_bpb - self.float.val_bpb,
            seconds=seconds,
            read_seconds=read_seconds,
        )
        self.rows.append(row)
        print(line(row), flush=True)
        return row

    def pack(self, grid: Grid, codes=None):
        """A maker of artifacts from steps and codes, by default the nearest."""
        nearest = {
            name: train_gpt.quantize(self.model.get_parameter(name).detach(), *grid[name])
            for name in grid
        }
        return lambda settings: train_gpt.pack(
            self.model, codes or nearest, grid, self.manifest, settings
        )

    def pack_fit(self, budget: float, fit: Fit):
        """A maker of artifacts of QUANT=fit."""
        return lambda settings: train_gpt.pack_under_cap(
            self.model, settings, self.manifest, int(budget), fit
        )


def rate(data: bytes, model: train_gpt.GPT, settings: train_gpt.Settings) -> dict:
    """Bits of a coded weight, the coder's tables included, and their excess over each matrix's order-0 entropy."""
    shapes = [
        tuple(weight.shape) for weight in train_gpt.coded_parameters(model, settings.quant).values()
    ]
    body = data[train_gpt.ARTIFACT_HEADER.size + train_gpt.ARTIFACT_HEADER.unpack_from(data)[4] :]
    codes = train_gpt.CODECS[settings.codec][1](memoryview(body), shapes)
    sizes, entropy = [m * n for m, n in shapes], 0.0
    for matrix in np.split(codes, np.cumsum(sizes)[:-1]):
        counts = np.unique(matrix, return_counts=True)[1]
        entropy -= float((counts * np.log2(counts / counts.sum())).sum()) / 8
    return dict(
        bits=8 * len(body) / sum(sizes),
        over_entropy=len(body) / entropy - 1 if entropy else math.nan,
    )


@torch.no_grad()
def input_factors(comparison: Comparison) -> dict[str, torch.Tensor]:
    """For plain GPTQ: of each matrix in the blocks, and the bigram projection, the upper Cholesky factor of the
    inverse covariance of its inputs, 1% damped (Frantar et al. 2022)."""
    s, model, seen, linear = comparison.settings, comparison.model, [], train_gpt.linear
    names = [["bigram.projection"]] if model.bigram is not None else []
    for i in range(s.num_layers):
        names += [
            [f"blocks.{i}.attention.{x}" for x in ("query", "key", "value")],
            [f"blocks.{i}.attention.out"],
            [f"blocks.{i}.mlp.up"],
            [f"blocks.{i}.mlp.down"],
        ]

    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2).double()
        seen.append(flat.T @ flat)
        return linear(x, weight)

    length = s.train_seq_len - s.memory_tokens
    data = train_gpt.TrainingRows(comparison.train_files, length, s.seed, s.vocab_size)
    sums = [0.0] * len(names)
    train_gpt.linear = watched
    try:
        for start in range(0, COVARIANCE_ROWS, 8):
            seen.clear()
            rows = torch.from_numpy(np.stack([data.row(start + i) for i in range(8)]))
            model.hidden(rows[:, :-1])
            sums = [total + each for total, each in zip(sums, seen, strict=True)]
    finally:
        train_gpt.linear = linear
    factors = {}
    for group, covariance in zip(names, sums):
        covariance.diagonal().add_(0.01 * covariance.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        factors.update(dict.fromkeys(group, torch.linalg.cholesky(inverse, upper=True).float()))
    return factors


@torch.no_grad()
def with_feedback(
    comparison: Comparison, grid: Grid, factors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """GPTQ's codes; the bigram table, which no product multiplies, is rounded to the nearest."""
    codes = {}
    for name, steps in grid.items():
        weight = comparison.model.get_parameter(name).detach()
        codes[name] = (
            train_gpt.round_with_feedback(weight, *steps, factors[name])
            if name in factors
            else train_gpt.quantize(weight, *steps)
        )
    return codes


@torch.no_grad()
def clipped_grid(grid: Grid, model: train_gpt.GPT) -> Grid:
    """Row steps shrunk, where clipping its largest weights lowers a row's squared error (#414)."""
    found = {}
    for name, (rows, columns) in grid.items():
        weight, best, steps = model.get_parameter(name).detach(), None, rows.clone()
        for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6):
            narrow = (rows * share).half().float()
            codes = train_gpt.quantize(weight, narrow, columns).clamp(
                -train_gpt.INT6, train_gpt.INT6
            )
            error = (train_gpt.dequantize(codes, narrow, columns) - weight).square().sum(1)
            better = error < best if best is not None else torch.ones_like(error, dtype=torch.bool)
            steps, best = (
                torch.where(better, narrow, steps),
                torch.where(better, error, best if best is not None else error),
            )
        found[name] = steps, columns
    return found


def geometric_mean(x: torch.Tensor) -> torch.Tensor:
    return x.log2().mean().exp2().expand(x.shape)


def refinements(comparison: Comparison, budget: float) -> None:
    """QUANT=fit at one size with each of its parts taken away."""

    def changed(
        steps=lambda rows, columns: (rows, columns), factor=lambda factor: factor, quant="fit"
    ) -> Fit:
        fit = comparison.fit(quant)
        fit.factors = {name: factor(each) for name, each in fit.factors.items()}
        fit.steps = {
            name: (*steps(rows, columns), finest)
            for name, (rows, columns, finest) in fit.steps.items()
        }
        return fit

    budget = int(budget)
    comparison.add(
        "fit without feedback",
        comparison.pack_fit(budget, changed(factor=lambda factor: torch.eye(len(factor)))),
    )
    comparison.add(
        "fit without steps for columns",
        comparison.pack_fit(budget, changed(lambda rows, columns: (rows, geometric_mean(columns)))),
    )
    comparison.add(
        "fit without steps for rows",
        comparison.pack_fit(budget, changed(lambda rows, columns: (geometric_mean(rows), columns))),
    )
    comparison.add(
        "fit with one step a matrix",
        comparison.pack_fit(
            budget, changed(lambda rows, columns: (geometric_mean(rows), geometric_mean(columns)))
        ),
    )
    comparison.add(
        "fit with one step for all",
        comparison.pack_fit(
            budget, changed(lambda rows, columns: (torch.ones_like(rows), torch.ones_like(columns)))
        ),
    )
    comparison.add(
        "fit with float16 embeddings",
        comparison.pack_fit(budget, changed(quant="rows")),
        quant="rows",
    )
    comparison.add("fit with zstd", comparison.pack_fit(budget, changed()), codec="zstd")


def compare(comparison: Comparison, short: bool) -> dict:
    """All ways, and the headline figures."""
    c, rows_ = comparison, dict(quant="rows")
    grids = [
        train_gpt.row_grid(c.model, dataclasses.replace(c.settings, quant="rows", int5_mlp=x))
        for x in "01"
    ]
    entry = c.add("int6 rows, zstd", c.pack(grids[0]), codec="zstd", **rows_)
    c.add("int6 rows, rANS", c.pack(grids[0]), **rows_)
    c.add("int5 MLP, zstd", c.pack(grids[1]), codec="zstd", **rows_)
    c.add(
        "int6 rows, clip search, zstd",
        c.pack(clipped_grid(grids[0], c.model)),
        codec="zstd",
        **rows_,
    )
    factors = input_factors(c)
    c.add(
        "int6 rows, GPTQ, zstd",
        c.pack(grids[0], with_feedback(c, grids[0], factors)),
        codec="zstd",
        **rows_,
    )
    sigma = []
    for per_sigma in SIGMAS[1::2] if short else SIGMAS:
        grid = {
            name: (
                (c.model.get_parameter(name).detach().std(1) / per_sigma)
                .clamp(min=2.0**-24)
                .half()
                .float(),
                columns,
            )
            for name, (_, columns) in grids[0].items()
        }
        sigma.append(
            c.add(
                f"GPTQ, {per_sigma} steps a sigma",
                c.pack(grid, with_feedback(c, grid, factors)),
                **rows_,
            )
        )
    fit = c.fit()
    curve = [
        c.add(f"fit, {share:.0%} of int6's bytes", c.pack_fit(share * entry["bytes"], fit))
        for share in (SHARES[1::2] if short else SHARES)
    ]
    if not short:
        refinements(c, REFINED * entry["bytes"])
    at_int6 = curve[-1]["loss_bpb"] / entry["loss_bpb"]
    needed = interpolated(
        [row["loss_bpb"] for row in curve], [row["bytes"] for row in curve], entry["loss_bpb"]
    )
    ratios = {
        row["way"]: interpolated(
            [each["bytes"] for each in curve], [each["loss_bpb"] for each in curve], row["bytes"]
        )
        / row["loss_bpb"]
        for row in sigma
    }
    ratios = {way: ratio for way, ratio in ratios.items() if math.isfinite(ratio)}
    return dict(
        loss_share_at_bytes_of_int6=at_int6,
        bytes_share_at_loss_of_int6=needed / entry["bytes"],
        loss_over_sigma_gptq=float(np.median(list(ratios.values()))),
        loss_over_sigma_gptq_each=ratios,
    )


def interpolated(x: list[float], y: list[float], at: float) -> float:
    """y where x is `at`, along straight lines between logarithms; nan outside of the curve."""
    pairs = sorted((math.log(a), math.log(b)) for a, b in zip(x, y) if a > 0 and b > 0)
    if at <= 0 or not pairs or not pairs[0][0] <= math.log(at) <= pairs[-1][0]:
        return math.nan
    return math.exp(float(np.interp(math.log(at), *zip(*pairs))))


HEADINGS = (
    "way",
    "bytes",
    "bits a weight",
    "over entropy",
    "val_bpb",
    "loss, bpb",
    "loss, nats",
    "pack s",
    "read s",
)


def line(row: dict) -> str:
    return (
        f"| {row['way']} | {row['bytes']:,} | {row['bits']:.3f} | {row['over_entropy']:+.1%} | "
        f"{row['val_bpb']:.4f} | {row['loss_bpb']:+.5f} | {row['loss_nats']:+.5f} | {row['seconds']:.1f} | "
        f"{row['read_seconds']:.1f} |"
    )


def plot(rows: list[dict], path: str) -> None:
    """Loss against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    groups = {
        "QUANT=fit": [row for row in rows if row["way"].startswith("fit, ")],
        "GPTQ, steps in a row's sigma": [row for row in rows if "sigma" in row["way"]],
    }
    for label, group in groups.items():
        group = sorted(
            (row["bytes"] / 1e6, row["loss_bpb"]) for row in group if row["loss_bpb"] > 0
        )
        axes.plot(*zip(*group), "o-", label=label)
    for row in rows:
        if row["way"].startswith("int") and row["loss_bpb"] > 0:
            axes.plot(row["bytes"] / 1e6, row["loss_bpb"], "s", label=row["way"])
        elif row["way"].startswith("fit with") and row["loss_bpb"] > 0:
            axes.plot(row["bytes"] / 1e6, row["loss_bpb"], "x", label=row["way"])
    axes.set(yscale="log", xlabel="MB of model", ylabel="bits per byte lost by quantization")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "weights", type=Path, help="file of the float model; trained first if it is not there"
    )
    parser.add_argument(
        "--tokens", type=int, default=0, help="of the validation split to score; 0: all"
    )
    parser.add_argument(
        "--short", action="store_true", help="half of the points, and no refinements taken away"
    )
    parser.add_argument("--json", type=Path, help="write the rows and the headline figures there")
    parser.add_argument(
        "--plot", type=Path, help="write loss against bytes there (needs matplotlib)"
    )
    arguments = parser.parse_args()
    try:
        for path in (arguments.weights, arguments.json, arguments.plot):
            if path is not None and not path.parent.is_dir():
                raise UserError(f"{path.parent} is not a folder")
        if arguments.plot:
            try:
                import matplotlib  # noqa: F401
            except ImportError:
                raise UserError(
                    "--plot needs matplotlib: pip install -r records/requirements.txt"
                ) from None
        comparison = Comparison(trained(arguments.weights), arguments.tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"float: {comparison.float}\n\n| {' | '.join(HEADINGS)} |\n{'|---' * len(HEADINGS)}|")
    figures = compare(comparison, arguments.short)
    print(
        "\n"
        + "\n".join(
            f"{name}:{value:.3f}" for name, value in figures.items() if isinstance(value, float)
        )
    )
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                dict(
                    float=comparison.float._asdict(),
                    settings=comparison.kept["settings"],
                    tokens=comparison.kept["tokens"],
                    rows=comparison.rows,
                    **figures,
                ),
                indent=1,
            )
            + "\n"
        )
    if arguments.plot:
        plot(comparison.rows, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
