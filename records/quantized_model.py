"""One trained model for records/quantization.py: kept in a file, quantized in many ways, scored."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

import train_gpt
from commands import BadInput
from files import write_atomically
from train_gpt import Fit, Grid

# Of a trained model, in its file. `rows` and `columns` are what an error costs, by training.
KEPT = ("settings", "weights", "rows", "columns", "tokens")
# Training rows from which plain GPTQ takes the covariance of its inputs, and how many at once.
COVARIANCE_ROWS = 64
ROWS_AT_ONCE = 8
# What is added to a covariance, over its mean (Frantar et al. 2022).
DAMPING = 0.01

EMBEDDING = "embedding.weight"

Codes = dict[str, torch.Tensor]
# Makes the bytes of an artifact.
Maker = Callable[[train_gpt.Settings], bytes]


# ---- The float model


def trained(path: Path, environment: Mapping[str, str] = os.environ) -> dict:
    """The float model: what an earlier call has kept, else a new one with this environment."""
    if path.exists():
        return read_kept(path)
    kept = train(environment)
    file = io.BytesIO()
    torch.save(kept, file)
    write_atomically(path, file.getvalue())
    return kept


def read_kept(path: Path) -> dict:
    """What trained() has kept; BadInput for another file."""
    try:
        kept = torch.load(path, weights_only=True)
        return {key: kept[key] for key in KEPT}
    except Exception as error:
        # A file that is none of ours fails in one of many ways.
        raise BadInput(
            f"{path}: not kept by this program ({type(error).__name__}); name another"
        ) from None


def train(environment: Mapping[str, str]) -> dict:
    """Train a model as train_gpt.py would with this environment; what is kept of it."""
    settings, _ = train_gpt.settings_from(environment)
    settings = dataclasses.replace(settings, quant="fit", int5_mlp="auto")
    runtime = train_gpt.start_runtime(settings)
    train_gpt.claim_disk(settings.artifact_max_bytes)
    log = train_gpt.Logger(settings.run_id or f"quantization-{os.getpid()}", runtime)
    run = train_gpt.Run(settings, runtime, log)
    model, fit = run.train(b"")
    return dict(
        settings=dataclasses.asdict(run.settings),
        weights=model.state_dict(),
        rows=fit.row_costs,
        columns=fit.column_costs,
        tokens=run.results["tokens"],
    )


def settings_to_score(kept: dict) -> train_gpt.Settings:
    """The settings of a kept model, in float32: bfloat16 would blur losses of 0.0001."""
    known = {field.name for field in train_gpt.fields_of()}
    stored = {name: value for name, value in kept["settings"].items() if name in known}
    # The log of that name is there once training has ended.
    here, _ = train_gpt.settings_from({**os.environ, "RUN_ID": ""})
    stored.update(
        run_id="",
        dtype="float32",
        attention="auto",
        compile="0",
        data_path=here.data_path or kept["settings"]["data_path"],
    )
    return train_gpt.Settings(**stored)


# ---- The ways to quantize it


class Comparison:
    """One float model, the ways to quantize it, and what came of them.

    `tokens` is how many tokens of the validation split are scored; 0: all.
    """

    def __init__(self, kept: dict, tokens: int):
        self.kept = kept
        self.rows: list[dict] = []
        self.settings = settings_to_score(kept)
        self.runtime = train_gpt.start_runtime(self.settings)
        folder, tokenizer = train_gpt.find_data(self.settings, self.runtime, print)
        self.train_files = train_gpt.find_shards(folder, "train")
        vocab_size = self.settings.vocab_size
        validation = train_gpt.load_validation(train_gpt.find_shards(folder, "val"), vocab_size)
        self.tokens = validation[:tokens] if tokens else validation

        self.model = train_gpt.build_model(self.settings, self.runtime)
        try:
            self.model.load_state_dict(kept["weights"])
        except RuntimeError:
            raise BadInput(
                "the model was kept with another train_gpt.py: name another file"
            ) from None
        # Gets the weights of the artifacts.
        self.read = train_gpt.build_model(self.settings, self.runtime)
        table = train_gpt.ByteTable(train_gpt.load_tokenizer(tokenizer, vocab_size))
        self.evaluator = train_gpt.Evaluator(self.settings, self.runtime, table, print)
        stored = train_gpt.fields_of("model", "evaluation")
        self.manifest = dict(
            tokenizer="",
            settings={field.name: getattr(self.settings, field.name) for field in stored},
        )
        self.float = self.evaluator.score(self.model, self.tokens, "plain")

    def weight(self, name: str) -> torch.Tensor:
        """A matrix of the float model."""
        return self.model.get_parameter(name).detach()

    def row_grid(self, int5_mlp: str) -> Grid:
        """The entries' steps, with an int5 MLP ("1") or without ("0")."""
        settings = dataclasses.replace(self.settings, quant="rows", int5_mlp=int5_mlp)
        return train_gpt.row_grid(self.model, settings)

    def fit(self, quant: str = "fit") -> Fit:
        """Fitted steps from what training has seen, for the matrices that `quant` codes."""
        names = list(train_gpt.coded_parameters(self.model, "fit"))
        rows = dict(zip(names, self.kept["rows"], strict=True))
        columns = dict(zip(names, self.kept["columns"], strict=True))
        fit = Fit(train_gpt.coded_parameters(self.model, quant))
        fit.row_costs = [rows[name] for name in fit.weights]
        fit.column_costs = [columns[name] for name in fit.weights]
        fit.finish()
        return fit

    def pack(self, grid: Grid, codes: Codes | None = None) -> Maker:
        """A maker of artifacts from steps and codes, by default the nearest."""
        codes = codes or self.nearest(grid)

        def make(settings: train_gpt.Settings) -> bytes:
            return train_gpt.pack(self.model, codes, grid, self.manifest, settings)

        return make

    def pack_fit(self, budget: float, fit: Fit) -> Maker:
        """A maker of artifacts of QUANT=fit, of at most so many bytes."""

        def make(settings: train_gpt.Settings) -> bytes:
            return train_gpt.pack_under_cap(self.model, settings, self.manifest, int(budget), fit)

        return make

    def nearest(self, grid: Grid) -> Codes:
        """Each weight's nearest code."""
        codes = {}
        for name, (rows, columns) in grid.items():
            codes[name] = train_gpt.quantize(self.weight(name), rows, columns)
        return codes

    def add(self, way: str, make: Maker, **changes) -> dict:
        """Measure the artifact that `make` returns for the settings with these changes."""
        settings = dataclasses.replace(self.settings, **changes)
        started = time.perf_counter()
        data = make(settings)
        made = time.perf_counter()
        _, weights = train_gpt.read_artifact(data, way)
        ended = time.perf_counter()
        self.read.load_state_dict(weights, strict=False)
        score = self.evaluator.score(self.read, self.tokens, "plain")
        row = dict(
            way=way,
            bytes=len(data),
            **rate(data, self.model, settings),
            val_bpb=score.val_bpb,
            loss_nats=score.val_loss - self.float.val_loss,
            loss_bpb=score.val_bpb - self.float.val_bpb,
            seconds=made - started,
            read_seconds=ended - made,
        )
        self.rows.append(row)
        print(line(row), flush=True)
        return row


HEADINGS = (
    "way",
    "bytes",
    "bits a weight",
    "of the embedding",
    "over entropy",
    "val_bpb",
    "loss, bpb",
    "loss, nats",
    "pack s",
    "read s",
)


def line(row: dict) -> str:
    """A row of the table in Markdown."""
    cells = (
        row["way"],
        f"{row['bytes']:,}",
        f"{row['bits']:.3f}",
        f"{row['embedding_bits']:.3f}",
        f"{row['over_entropy']:+.1%}",
        f"{row['val_bpb']:.4f}",
        f"{row['loss_bpb']:+.5f}",
        f"{row['loss_nats']:+.5f}",
        f"{row['seconds']:.1f}",
        f"{row['read_seconds']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def rate(data: bytes, model: train_gpt.GPT, settings: train_gpt.Settings) -> dict:
    """Bits of a coded weight, tables included, and their excess over each matrix's entropy.

    The entropy is that of order 0: of the shares that each code has in its matrix. `embedding_bits`
    is that of the embedding, a weight; nan if it is not coded.
    """
    parameters = train_gpt.coded_parameters(model, settings.quant)
    shapes = [tuple(weight.shape) for weight in parameters.values()]
    body, codes = codes_in(data, settings, shapes)
    sizes = [rows * columns for rows, columns in shapes]
    entropy_bytes = 0.0
    embedding_bits = math.nan
    matrices = np.split(codes, np.cumsum(sizes)[:-1])
    for name, matrix in zip(parameters, matrices, strict=True):
        _, counts = np.unique(matrix, return_counts=True)
        shares = counts / counts.sum()
        bits = -float((counts * np.log2(shares)).sum())
        entropy_bytes += bits / 8
        if name == EMBEDDING:
            embedding_bits = bits / matrix.size
    over_entropy = math.nan
    if entropy_bytes:
        over_entropy = len(body) / entropy_bytes - 1
    bits = 8 * len(body) / sum(sizes)
    return dict(bits=bits, embedding_bits=embedding_bits, over_entropy=over_entropy)


def codes_in(
    data: bytes, settings: train_gpt.Settings, shapes: list[tuple[int, int]]
) -> tuple[bytes, np.ndarray]:
    """An artifact's codes: as they are stored, and decoded, int16, one matrix after the other."""
    header = train_gpt.ARTIFACT_HEADER
    _, _, _, _, packed_size, _ = header.unpack_from(data)
    body = data[header.size + packed_size :]
    _, decode = train_gpt.CODECS[settings.codec]
    return body, decode(memoryview(body), shapes)


# ---- Plain GPTQ


def inputs_of_products(comparison: Comparison) -> list[list[str]]:
    """The matrices in the order in which the model multiplies by them, again in each repetition.

    Those that share a product stand together.
    """
    groups = []
    if comparison.model.bigram is not None:
        groups.append(["bigram.projection"])
    for visit in comparison.model.looped_order:
        attention = f"blocks.{visit.layer}.attention"
        mlp = f"blocks.{visit.layer}.mlp"
        groups.append([f"{attention}.query", f"{attention}.key", f"{attention}.value"])
        if comparison.settings.sparse_attn_gate_enabled:
            groups.append([f"{attention}.gate.weight"])
        groups.append([f"{attention}.out"])
        groups.append([f"{mlp}.up"])
        groups.append([f"{mlp}.down"])
    return groups


@torch.no_grad()
def covariances(comparison: Comparison, products: int) -> list[torch.Tensor]:
    """Of each of so many products in a forward pass, the sum of x xT over its inputs, float64."""
    settings = comparison.settings
    length = settings.train_seq_len - settings.memory_tokens
    data = train_gpt.TrainingRows(
        comparison.train_files, length, settings.seed, settings.vocab_size
    )
    linear = train_gpt.linear
    seen: list[torch.Tensor] = []

    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2).double()
        seen.append(flat.T @ flat)
        return linear(x, weight)

    sums: list = [0.0] * products
    train_gpt.linear = watched
    try:
        for start in range(0, COVARIANCE_ROWS, ROWS_AT_ONCE):
            seen.clear()
            rows = np.stack([data.row(start + i) for i in range(ROWS_AT_ONCE)])
            comparison.model.hidden(torch.from_numpy(rows)[:, :-1])
            sums = [total + each for total, each in zip(sums, seen, strict=True)]
    finally:
        train_gpt.linear = linear
    return sums


def input_factors(comparison: Comparison) -> dict[str, torch.Tensor]:
    """For plain GPTQ, of each matrix in the blocks, and of the bigram projection, a factor.

    It is the upper Cholesky factor of the inverse covariance of its inputs, damped (Frantar et al.
    2022).
    """
    groups = inputs_of_products(comparison)
    of_groups: dict[tuple[str, ...], torch.Tensor] = {}
    for names, covariance in zip(groups, covariances(comparison, len(groups)), strict=True):
        for name in names:
            if comparison.model.get_parameter(name).size(1) != len(covariance):
                raise ValueError(f"{name} is not the matrix of its place in the forward pass")
        # The visits of a looped block share its matrices.
        of_groups[tuple(names)] = of_groups.get(tuple(names), 0.0) + covariance

    factors = {}
    for names, covariance in of_groups.items():
        covariance.diagonal().add_(DAMPING * covariance.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        factor = torch.linalg.cholesky(inverse, upper=True).float()
        for name in names:
            factors[name] = factor
    return factors


@torch.no_grad()
def with_feedback(comparison: Comparison, grid: Grid, factors: dict[str, torch.Tensor]) -> Codes:
    """GPTQ's codes; the bigram table, which no product multiplies, is rounded to the nearest."""
    codes = {}
    for name, (rows, columns) in grid.items():
        weight = comparison.weight(name)
        if name in factors:
            codes[name] = train_gpt.round_with_feedback(weight, rows, columns, factors[name])
        else:
            codes[name] = train_gpt.quantize(weight, rows, columns)
    return codes
