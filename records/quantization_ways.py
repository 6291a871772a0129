"""The ways that records/quantization.py compares, and its headline figures."""

from __future__ import annotations

import math
import statistics

import numpy as np
import torch

import train_gpt
from quantized_model import EMBEDDING, Comparison, input_factors, with_feedback
from train_gpt import Fit, Grid

# Steps in a row's standard deviation, for GPTQ with such steps.
SIGMAS = (1.2, 1.7, 2.3, 3.3, 4.6, 6.5)
# Of the bytes of int6 with zstd, for QUANT=fit.
SHARES = (0.3, 0.37, 0.45, 0.55, 0.65, 0.72, 0.85, 1.0)
# The share at which refinements of QUANT=fit are taken away.
REFINED = 0.45
# The embedding's steps over those that QUANT=fit gives it, to see whether these are the best.
EMBEDDING_STEPS = (0.5, 0.71, 1.41, 2.0)
# Of a row's steps, when clipping is searched (#414).
CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
# The finest step that float16 holds.
FINEST = 2.0**-24


def compare(comparison: Comparison, short: bool) -> dict:
    """Measure all ways; the headline figures."""
    grid = comparison.row_grid(int5_mlp="0")
    entry = entries(comparison, grid)
    sigma = gptq(comparison, grid, SIGMAS[1::2] if short else SIGMAS)

    fit = comparison.fit()
    curve = []
    for share in SHARES[1::2] if short else SHARES:
        way = f"fit, {share:.0%} of int6's bytes"
        curve.append(comparison.add(way, comparison.pack_fit(share * entry["bytes"], fit)))
    if not short:
        refinements(comparison, REFINED * entry["bytes"])
    return headlines(entry, sigma, curve)


# ---- Steps for rows, as the entries have them


def entries(comparison: Comparison, grid: Grid) -> dict:
    """The entries' scheme and variants of it; the row of the scheme itself."""
    nearest = comparison.pack(grid)
    entry = comparison.add("int6 rows, zstd", nearest, codec="zstd", quant="rows")
    comparison.add("int6 rows, rANS", nearest, quant="rows")
    int5 = comparison.pack(comparison.row_grid(int5_mlp="1"))
    comparison.add("int5 MLP, zstd", int5, codec="zstd", quant="rows")
    clipped = comparison.pack(clipped_grid(comparison, grid))
    comparison.add("int6 rows, clip search, zstd", clipped, codec="zstd", quant="rows")
    return entry


@torch.no_grad()
def clipped_grid(comparison: Comparison, grid: Grid) -> Grid:
    """Row steps shrunk, where clipping its largest weights lowers a row's squared error (#414)."""
    found = {}
    for name, (rows, columns) in grid.items():
        weight = comparison.weight(name)
        steps = rows.clone()
        least = torch.full_like(rows, math.inf)
        for share in CLIPPED:
            narrow = (rows * share).half().float()
            codes = train_gpt.quantize(weight, narrow, columns)
            codes = codes.clamp(-train_gpt.INT6, train_gpt.INT6)
            error = train_gpt.dequantize(codes, narrow, columns) - weight
            error = error.square().sum(1)
            better = error < least
            steps = torch.where(better, narrow, steps)
            least = torch.where(better, error, least)
        found[name] = steps, columns
    return found


# ---- Plain GPTQ


def gptq(comparison: Comparison, grid: Grid, sigmas: tuple[float, ...]) -> list[dict]:
    """GPTQ on the entries' steps, and on steps in proportion to each row's deviation.

    Returns the rows of the latter.
    """
    factors = input_factors(comparison)
    codes = with_feedback(comparison, grid, factors)
    maker = comparison.pack(grid, codes)
    comparison.add("int6 rows, GPTQ, zstd", maker, codec="zstd", quant="rows")
    found = []
    for per_sigma in sigmas:
        steps = sigma_grid(comparison, grid, per_sigma)
        maker = comparison.pack(steps, with_feedback(comparison, steps, factors))
        found.append(comparison.add(f"GPTQ, {per_sigma} steps a sigma", maker, quant="rows"))
    return found


def sigma_grid(comparison: Comparison, grid: Grid, per_sigma: float) -> Grid:
    """So many steps in the standard deviation of each row."""
    found = {}
    for name, (_, columns) in grid.items():
        rows = comparison.weight(name).std(1) / per_sigma
        found[name] = rows.clamp(min=FINEST).half().float(), columns
    return found


# ---- QUANT=fit with each of its parts taken away


def geometric_mean(x: torch.Tensor) -> torch.Tensor:
    """As many values, all of them the mean of the logarithms."""
    return x.log2().mean().exp2().expand(x.shape)


def even_columns(fit: Fit) -> None:
    """One step for all columns of a matrix."""
    for name, steps in fit.steps.items():
        fit.steps[name] = steps._replace(column_steps=geometric_mean(steps.column_steps))


def even_rows(fit: Fit) -> None:
    """One step for all rows of a matrix."""
    for name, steps in fit.steps.items():
        fit.steps[name] = steps._replace(row_steps=geometric_mean(steps.row_steps))


def one_step_a_matrix(fit: Fit) -> None:
    """One step for all weights of a matrix."""
    even_columns(fit)
    even_rows(fit)


def one_step(fit: Fit) -> None:
    """One step for all weights of all matrices."""
    for name, steps in fit.steps.items():
        fit.steps[name] = steps._replace(
            row_steps=torch.ones_like(steps.row_steps),
            column_steps=torch.ones_like(steps.column_steps),
        )


def no_feedback(fit: Fit) -> None:
    """No column makes up for the errors of another one."""
    for name, factor in fit.factors.items():
        fit.factors[name] = torch.eye(len(factor))


TAKEN_AWAY = (
    ("fit without feedback", no_feedback),
    ("fit without steps for columns", even_columns),
    ("fit without steps for rows", even_rows),
    ("fit with one step a matrix", one_step_a_matrix),
    ("fit with one step for all", one_step),
)


def refinements(comparison: Comparison, budget: float) -> None:
    """QUANT=fit at one size with each of its parts taken away."""
    for way, take_away in TAKEN_AWAY:
        fit = comparison.fit()
        take_away(fit)
        comparison.add(way, comparison.pack_fit(budget, fit))
    for factor in EMBEDDING_STEPS:
        fit = comparison.fit()
        steps = fit.steps[EMBEDDING]
        fit.steps[EMBEDDING] = steps._replace(row_steps=factor * steps.row_steps)
        way = f"fit, the embedding's steps times {factor}"
        comparison.add(way, comparison.pack_fit(budget, fit))
    fit = comparison.fit(quant="rows")
    comparison.add("fit with float16 embeddings", comparison.pack_fit(budget, fit), quant="rows")
    fit = comparison.fit()
    comparison.add("fit with zstd", comparison.pack_fit(budget, fit), codec="zstd")


# ---- Headline figures


def headlines(entry: dict, sigma: list[dict], curve: list[dict]) -> dict:
    """What QUANT=fit, whose rows are the curve, has over the entries' scheme and over GPTQ."""
    sizes = [row["bytes"] for row in curve]
    losses = [row["loss_bpb"] for row in curve]
    needed = interpolated(losses, sizes, entry["loss_bpb"])
    ratios = {}
    for row in sigma:
        ratio = interpolated(sizes, losses, row["bytes"]) / row["loss_bpb"]
        if math.isfinite(ratio):
            ratios[row["way"]] = ratio
    return dict(
        loss_share_at_bytes_of_int6=curve[-1]["loss_bpb"] / entry["loss_bpb"],
        bytes_share_at_loss_of_int6=needed / entry["bytes"],
        loss_over_sigma_gptq=statistics.median(ratios.values()) if ratios else math.nan,
        loss_over_sigma_gptq_each=ratios,
    )


def interpolated(x: list[float], y: list[float], at: float) -> float:
    """y where x is `at`, along straight lines between logarithms; nan outside of the curve."""
    pairs = []
    for x_value, y_value in zip(x, y, strict=True):
        if x_value > 0 and y_value > 0:
            pairs.append((math.log(x_value), math.log(y_value)))
    pairs.sort()
    if at <= 0 or not pairs:
        return math.nan
    logarithm = math.log(at)
    if not pairs[0][0] <= logarithm <= pairs[-1][0]:
        return math.nan
    known, values = zip(*pairs, strict=True)
    return math.exp(float(np.interp(logarithm, known, values)))
