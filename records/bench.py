"""How fast train_gpt.py is on this machine, and what each of its optimizations brings.

    python records/bench.py [--rounds 8] [--json PATH]     # settings are environment variables, as ever

Each variant is a process of its own. They take turns, a few steps at a time, so that a machine whose speed drifts
treats them alike; every figure is the median over the rounds, every ratio the median of the rounds' ratios. The plain
path is the same model, data and optimizer as one would write them first: scaled_dot_product_attention, no compiler,
Newton-Schulz matrix by matrix, and a sliding window that computes all logits and picks the scored ones window by
window.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

ALL, PLAIN = "all optimizations", "plain path"
# What a variant changes: settings by name, and the parts of train_gpt.py to do without.
VARIANTS: dict[str, dict] = {
    ALL: {},
    PLAIN: dict(ATTENTION="sdpa", COMPILE="0", without=("batches", "scored_only")),
    "without the compiler": dict(COMPILE="0"),
    "with SDPA": dict(ATTENTION="sdpa"),
    "Newton-Schulz matrix by matrix": dict(without=("batches",)),
    "all logits in evaluation": dict(without=("scored_only",)),
    "float32": dict(DTYPE="float32"),
}
COLUMNS = (
    ("train tokens/s", "train_tokens_per_s", "{:,.0f}"),
    ("against all", "train_ratio", "{:.2f}"),
    ("GFLOP/s", "train_gflops", "{:,.0f}"),
    ("share of products", "matmul_share", "{:.0%}"),
    ("sliding tokens/s", "eval_tokens_per_s", "{:,.0f}"),
    ("against all", "eval_ratio", "{:.2f}"),
    ("warm-up s", "warm_up_s", "{:.1f}"),
    ("memory MB", "peak_memory_mb", "{:,.0f}"),
    ("last loss", "train_loss", "{:.4f}"),
)

# Operations a second of dense bfloat16 products with float32 sums, by the GPU's name.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}


def flops_per_token(model: train_gpt.GPT, s: train_gpt.Settings) -> float:
    """Operations to train on a position: 6 for each weight of a product (2 forward, 4 backward) and, for causal
    attention's two products, 6 for each channel and position of a row."""
    sizes = collections.Counter()
    for name, kind in model.roles().items():
        sizes[kind] += model.get_parameter(name).numel()
    text = (
        sizes["bigram_projection"] + sizes["mtp_head"] + model.output.numel()
    )  # not for memory tokens
    blocks = sizes["attention"] + sizes["mlp"] + s.num_layers * s.train_seq_len * s.model_dim
    return 6.0 * (blocks + text * (1 - s.memory_tokens / s.train_seq_len))


def peak_flops(device: torch.device) -> float | None:
    """The GPU's rate by its data sheet, where it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)


# ---- One variant, in its own process
def by_matrix(newton_schulz):
    """Newton-Schulz on one matrix after the other."""

    def each(matrices: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([newton_schulz(matrix[None], steps, dtype) for matrix in matrices])

    return each


@torch.no_grad()
def score_by_window(
    logits, device, tokens: np.ndarray, window: int, stride: int, batch: int
) -> float:
    """Nats a target of the sliding window, as usually written: all logits, then a loop over the windows."""
    nats, window = 0.0, min(window, len(tokens) - 1)
    ends = list(range(window, len(tokens) - 1, stride)) + [len(tokens) - 1]
    for at in range(0, len(ends), batch):
        rows = np.stack([tokens[end - window : end + 1] for end in ends[at : at + batch]]).astype(
            np.int64
        )
        rows = torch.from_numpy(rows).to(device)
        losses = F.cross_entropy(
            logits(rows[:, :-1].contiguous()).transpose(1, 2), rows[:, 1:], reduction="none"
        )
        for i, row in enumerate(losses):
            first = ends[at + i - 1] - ends[at + i] if at + i else -window
            nats += float(row[first:].double().sum())
    return nats / (len(tokens) - 1)


class Worker:
    """A model in training under one variant, and what the parent may ask of it."""

    def __init__(self, without: list[str]):
        self.without = without
        if "batches" in without:
            train_gpt.newton_schulz = by_matrix(train_gpt.newton_schulz)
        self.settings, _ = train_gpt.settings_from(os.environ)
        self.runtime = train_gpt.start_runtime(self.settings)
        folder, tokenizer = train_gpt.find_data(self.settings, self.runtime, print)
        s = self.settings
        data = train_gpt.TrainingRows(
            train_gpt.find_shards(folder, "train"), s.train_seq_len, s.seed, s.vocab_size
        )
        self.model = train_gpt.build_model(s, self.runtime)
        self.trainer = train_gpt.Trainer(self.model, s, self.runtime, quiet, data, 0)
        table = train_gpt.ByteTable(train_gpt.load_tokenizer(tokenizer, s.vocab_size))
        self.evaluator = train_gpt.Evaluator(s, self.runtime, table, quiet)
        self.logits = self.runtime.compile(train_gpt.GPT.logits, "graph")
        self.validation = train_gpt.load_validation(
            train_gpt.find_shards(folder, "val"), s.vocab_size
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
        """Seconds of each of some training steps, and the loss of the last."""
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            loss = self.trainer.step(1.0)
            self.runtime.synchronize()
            seconds.append(time.perf_counter() - started)
        return dict(
            tokens_per_s=self.settings.train_batch_tokens / statistics.median(seconds),
            loss=float(loss),
        )

    def evaluate(self, batches: int) -> dict:
        """Tokens a second of a sliding evaluation that fills so many batches."""
        window, stride = self.evaluator.passes["sliding"]
        later = max(
            0, batches * self.evaluator.batch - -(-window // stride)
        )  # windows after the first
        tokens = self.validation[: window + stride * later + 1]
        started = time.perf_counter()
        if "scored_only" in self.without:
            loss = score_by_window(
                functools.partial(self.logits, self.model),
                self.runtime.device,
                tokens,
                window,
                stride,
                self.evaluator.batch,
            )
        else:
            loss = self.evaluator.score(self.model, tokens, "sliding").val_loss
        self.runtime.synchronize()
        return dict(tokens_per_s=(len(tokens) - 1) / (time.perf_counter() - started), loss=loss)

    def multiply(self) -> dict:
        """Operations a second of large matrix products in the model's type, the fastest of ten."""
        size = 8192 if self.runtime.device.type == "cuda" else 2048
        a, b = (
            torch.randn(size, size, device=self.runtime.device).to(self.runtime.dtype)
            for _ in range(2)
        )
        seconds = []
        for _ in range(10):
            started = time.perf_counter()
            a @ b
            self.runtime.synchronize()
            seconds.append(time.perf_counter() - started)
        return dict(flops_per_s=2 * size**3 / min(seconds))

    def finish(self) -> dict:
        """What only the end can tell."""
        return dict(
            peak_memory_bytes=self.runtime.peak_memory_bytes(),
            recompilations=graphs() - self.graphs,
        )


def quiet(line: str, console: bool = True) -> None:
    """A log that keeps nothing."""


def graphs() -> int:
    """How many graphs the compiler has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def work(without: list[str]) -> None:
    """Answer the parent's requests, a line of JSON for each."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints goes to stderr
    try:
        worker = Worker(without)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(worker, name)(*arguments)), file=answers)
    except train_gpt.UserError as error:
        print(json.dumps(dict(error=str(error))), file=answers)


# ---- The parent
class Process:
    """A variant's process."""

    def __init__(self, variant: dict, environment: dict):
        settings = {name: value for name, value in variant.items() if name != "without"}
        command = [sys.executable, __file__, "--worker", *variant.get("without", ())]
        self.process = subprocess.Popen(
            command,
            env={**environment, **settings},
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, *request) -> dict:
        """The answer to a request; exits with its reason where there is none."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
        line = self.process.stdout.readline()
        answer = (
            json.loads(line)
            if line
            else dict(error=f"a variant ended with status {self.process.wait()}")
        )
        if "error" in answer:
            sys.exit(f"error: {answer['error']}")
        return answer

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(rounds: int, steps: int, batches: int) -> dict:
    """All figures, by variant."""
    fixed = dict(MAX_WALLCLOCK_SECONDS="0")  # steps end a variant's turn, not the clock
    if (
        torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu"
    ):  # all models share the memory
        fixed.update(TRAIN_BATCH_TOKENS="32768", MICRO_BATCH_TOKENS="8192", EVAL_BATCH_SEQS="16")
    with tempfile.TemporaryDirectory() as cache:
        environment = {**fixed, **os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        first = Process(VARIANTS[ALL], environment)
        compile_s = first.ask("warm_up", batches)["warm_up_s"]
        first.end()
        processes = {name: Process(variant, environment) for name, variant in VARIANTS.items()}
        for process in processes.values():
            process.ask("ready")
        for name, process in processes.items():
            print(f"warming up: {name}", file=sys.stderr)
            process.start = process.ask("warm_up", batches)
        if any(reason.startswith("dtype:float32") for reason in processes[ALL].start["reasons"]):
            processes.pop("float32").end()
        found = {name: dict(train=[], eval=[]) for name in processes}
        rates = []
        for done in range(rounds):
            print(f"round {done + 1} of {rounds}", file=sys.stderr)
            rates.append(processes[ALL].ask("multiply")["flops_per_s"])
            for kind, request in (("train", ("train", steps)), ("eval", ("evaluate", batches))):
                for name, process in processes.items():
                    found[name][kind].append(process.ask(*request))
        variants = {}
        for name, process in processes.items():
            start, end = process.start, process.ask("finish")
            process.end()
            variants[name] = row = dict(
                warm_up_s=start["warm_up_s"],
                **end,
                train_loss=found[name]["train"][-1]["loss"],
                eval_loss=found[name]["eval"][-1]["loss"],
            )
            for kind in ("train", "eval"):
                mine, best = (
                    [turn["tokens_per_s"] for turn in found[each][kind]] for each in (name, ALL)
                )
                row[f"{kind}_tokens_per_s"] = statistics.median(mine)
                row[f"{kind}_ratio"] = statistics.median(a / b for a, b in zip(mine, best))
            flops = start["flops_per_token"] * row["train_tokens_per_s"]
            row.update(
                train_gflops=flops / 1e9,
                matmul_share=flops / statistics.median(rates),
                peak_memory_mb=end["peak_memory_bytes"] / 1e6,
            )
    best, peak = variants[ALL], processes[ALL].start["peak"]
    speedups = {
        f"{kind}_speedup": statistics.median(
            a["tokens_per_s"] / b["tokens_per_s"]
            for a, b in zip(found[ALL][kind], found[PLAIN][kind])
        )
        for kind in ("train", "eval")
    }
    return dict(
        train_tokens_per_s=best["train_tokens_per_s"],
        **speedups,
        matmul_share=best["matmul_share"],
        mfu=1e9 * best["train_gflops"] / peak if peak else None,
        compile_s=compile_s,
        compile_cached_s=best["warm_up_s"],
        peak_memory_bytes=best["peak_memory_bytes"],
        matmul_gflops=statistics.median(rates) / 1e9,
        recompilations=best["recompilations"],
        rounds=rounds,
        steps=rounds * steps,
        runtime=processes[ALL].start["reasons"],
        torch=torch.__version__,
        variants=variants,
    )


def table(result: dict) -> str:
    """The result for people, in Markdown."""
    lines = [
        "| | " + " | ".join(title for title, _, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in result["variants"].items():
        lines.append(
            f"| {name} | " + " | ".join(form.format(row[key]) for _, key, form in COLUMNS) + " |"
        )
    lines += [
        "",
        *result["runtime"],
        f"matrix products: {result['matmul_gflops']:,.0f} GFLOP/s; torch {result['torch']}",
        f"training: {result['train_speedup']:.2f} times the plain path, "
        f"{result['matmul_share']:.0%} of the rate of matrix products"
        + (f", {result['mfu']:.3f} of the GPU's peak (MFU)" if result["mfu"] else ""),
        f"sliding evaluation: {result['eval_speedup']:.2f} times the plain path",
        f"warm-up: {result['compile_s']:.1f} s, of which {result['compile_cached_s']:.1f} s remain when the "
        f"compiler's cache is filled; {result['recompilations']} recompilations after it",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=4, help="training steps a turn")
    parser.add_argument(
        "--batches", type=int, default=4, help="batches of the sliding evaluation a turn"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker)
        return 0
    if min(arguments.rounds, arguments.steps, arguments.batches) < 1:
        parser.error("--rounds, --steps and --batches must be at least 1")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: {arguments.json.parent} is not a folder")
    result = measure(arguments.rounds, arguments.steps, arguments.batches)
    print(table(result))
    if arguments.json:
        train_gpt.write_atomically(arguments.json, json.dumps(result, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
