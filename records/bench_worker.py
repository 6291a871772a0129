"""One variant of records/bench.py: a model in training, in a process that answers requests.

A request is a line of JSON on stdin, a list of a method of Worker and its arguments. The answer is
a line of JSON on stdout. Checkouts whose benches have the same requests can be compared.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

import train_gpt

# Operations a second of dense bfloat16 products with float32 sums, by the GPU's name.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}
# Operations to train on a position, for each weight of a product: 2 forward and 4 backward.
OPERATIONS_A_WEIGHT = 6.0
# Rows and columns of the matrices whose product tells what the machine can do, and how often.
PRODUCT_SIZE_GPU = 8192
PRODUCT_SIZE_CPU = 2048
PRODUCTS = 10


def flops_per_token(model: train_gpt.GPT, settings: train_gpt.Settings) -> float:
    """Operations to train on a position, memory tokens included, while blocks are looped.

    Causal attention's two products count 6 for each channel and position of a row. Embeddings are
    looked up, which is no operation. Bigrams and output matrices are not for memory tokens.
    """
    sizes = collections.Counter()
    for name, role in model.roles().items():
        sizes[role] += model.get_parameter(name).numel()
    everywhere = settings.num_visits * settings.train_seq_len * settings.model_dim
    for visit in model.looped_order:
        everywhere += multiplied_weights(model.blocks[visit.layer])
    for_text = sizes["bigram_projection"] + sizes["mtp_head"] + model.output.numel()
    share_of_text = 1 - settings.memory_tokens / settings.train_seq_len
    return OPERATIONS_A_WEIGHT * (everywhere + for_text * share_of_text)


def multiplied_weights(block: train_gpt.Block) -> int:
    """How many weights each position is multiplied by in a block."""
    matrices = [*block.attention.parameters(), *block.mlp.parameters()]
    return sum(matrix.numel() for matrix in matrices if matrix.ndim == 2)


def peak_flops(device: torch.device) -> float | None:
    """The GPU's operations a second by its data sheet, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for gpu, peak in PEAK_FLOPS.items():
        if gpu in name:
            return peak
    return None


def first_plan(trainer: train_gpt.Trainer) -> object:
    """What Trainer.step takes for the first step: a script without a Schedule takes the scale.

    Where blocks are looped later in a run, they are looped here: so are most steps.
    """
    if not hasattr(trainer, "schedule"):
        return 1.0
    plan = trainer.schedule.plan(step=0, progress=0.0)
    return plan._replace(looped=True) if hasattr(plan, "looped") else plan


# ---- The plain path, where a variant does without an optimization


def by_matrix(newton_schulz: Callable) -> Callable:
    """Newton-Schulz on one matrix after the other, in place of all matrices of a shape at once."""

    def each(matrices: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([newton_schulz(matrix[None], steps, dtype) for matrix in matrices])

    return each


@torch.no_grad()
def score_by_window(
    logits: Callable,
    device: torch.device,
    tokens: np.ndarray,
    window: int,
    stride: int,
    batch: int,
) -> float:
    """Nats a target of the sliding window, as usually written.

    All logits are computed, and a loop over the windows picks those that are scored.
    """
    targets = len(tokens) - 1
    window = min(window, targets)
    ends = [*range(window, targets, stride), targets]
    nats = 0.0
    scored = 0
    for at in range(0, len(ends), batch):
        group = ends[at : at + batch]
        rows = np.stack([tokens[end - window : end + 1] for end in group]).astype(np.int64)
        rows = torch.from_numpy(rows).to(device)
        predicted = logits(rows[:, :-1].contiguous()).transpose(1, 2)
        losses = F.cross_entropy(predicted, rows[:, 1:], reduction="none")
        for end, row in zip(group, losses, strict=True):
            # The last targets of a window are those that no window before it has scored.
            nats += float(row[scored - end :].double().sum())
            scored = end
    return nats / targets


# ---- The worker


def quiet(line: str, console: bool = True) -> None:
    """A log that keeps nothing."""


def graphs() -> int:
    """How many graphs the compiler has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Worker:
    """A model in training under one variant, and what the parent may ask of it.

    `without` names the parts of train_gpt.py to do without: "batches", "scored_only".
    """

    def __init__(self, without: list[str]):
        self.without = without
        if "batches" in without:
            train_gpt.newton_schulz = by_matrix(train_gpt.newton_schulz)
        settings, _ = train_gpt.settings_from(os.environ)
        self.runtime = train_gpt.start_runtime(settings)
        self.graphs = 0
        folder, path = train_gpt.find_data(settings, self.runtime, print)
        tokenizer = train_gpt.load_tokenizer(path, settings.vocab_size)
        settings = dataclasses.replace(settings, vocab_size=tokenizer.vocab_size)
        self.settings = settings
        rows = train_gpt.TrainingRows(
            train_gpt.find_shards(folder, "train"),
            settings.train_seq_len,
            settings.seed,
            settings.vocab_size,
        )
        self.model = train_gpt.build_model(settings, self.runtime)
        pieces = train_gpt.texts_of_pieces(tokenizer)
        self.trainer = train_gpt.Trainer(self.model, settings, self.runtime, quiet, rows, 0, pieces)
        table = train_gpt.ByteTable(tokenizer)
        self.evaluator = train_gpt.Evaluator(settings, self.runtime, table, quiet)
        self.logits = self.runtime.compile(train_gpt.GPT.logits, "graph")
        self.validation = train_gpt.load_validation(
            train_gpt.find_shards(folder, "val"), settings.vocab_size
        )

    def ready(self) -> dict:
        """Nothing, once everything is loaded."""
        return {}

    def warm_up(self, batches: int) -> dict:
        """Compile everything; how long that took, first steps included."""
        started = time.perf_counter()
        self.trainer.warm_up()
        self.evaluate(batches)
        self.runtime.synchronize()
        self.graphs = graphs()
        return dict(
            warm_up_s=time.perf_counter() - started,
            reasons=self.runtime.reasons,
            flops_per_token=flops_per_token(self.model, self.settings),
            peak=peak_flops(self.runtime.device),
        )

    def train(self, steps: int) -> dict:
        """Tokens a second of some training steps, by their median, and the loss of the last."""
        seconds = []
        loss = torch.tensor(0.0)
        plan = first_plan(self.trainer)
        for _ in range(steps):
            started = time.perf_counter()
            loss = self.trainer.step(plan)
            self.runtime.synchronize()
            seconds.append(time.perf_counter() - started)
        tokens_per_s = self.settings.train_batch_tokens / statistics.median(seconds)
        return dict(tokens_per_s=tokens_per_s, loss=float(loss))

    def evaluate(self, batches: int) -> dict:
        """Tokens a second of a sliding evaluation that fills so many batches, and its loss."""
        window, stride = self.evaluator.passes["sliding"]
        # The first window is worth several later ones.
        worth = -(-window // stride)
        later = max(0, batches * self.evaluator.batch - worth)
        tokens = self.validation[: window + stride * later + 1]
        started = time.perf_counter()
        if "scored_only" in self.without:
            loss = score_by_window(
                self.all_logits,
                self.runtime.device,
                tokens,
                window,
                stride,
                self.evaluator.batch,
            )
        else:
            loss = self.evaluator.score(self.model, tokens, "sliding").val_loss
        self.runtime.synchronize()
        seconds = time.perf_counter() - started
        return dict(tokens_per_s=(len(tokens) - 1) / seconds, loss=loss)

    def all_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The model's logits (rows, positions, pieces) for tokens (rows, positions)."""
        return self.logits(self.model, rows)

    def multiply(self) -> dict:
        """Operations a second of large matrix products in the model's type, the fastest of some."""
        device = self.runtime.device
        size = PRODUCT_SIZE_GPU if device.type == "cuda" else PRODUCT_SIZE_CPU
        left = torch.randn(size, size, device=device).to(self.runtime.dtype)
        right = torch.randn(size, size, device=device).to(self.runtime.dtype)
        seconds = []
        for _ in range(PRODUCTS):
            started = time.perf_counter()
            torch.matmul(left, right)
            self.runtime.synchronize()
            seconds.append(time.perf_counter() - started)
        return dict(flops_per_s=2 * size**3 / min(seconds))

    def finish(self) -> dict:
        """What only the end can tell."""
        return dict(
            peak_memory_bytes=self.runtime.peak_memory_bytes(),
            recompilations=graphs() - self.graphs,
        )


def work(without: list[str]) -> None:
    """Answer the parent's requests until it has no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Whatever else prints to stdout goes to stderr.
    os.dup2(2, 1)
    try:
        worker = Worker(without)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            answer = getattr(worker, name)(*arguments)
            print(json.dumps(answer), file=answers)
    except train_gpt.UserError as error:
        print(json.dumps(dict(error=str(error))), file=answers)
