"""How fast train_gpt.py is on this machine, and what each of its optimizations brings.

    python records/bench.py [--rounds 8] [--json PATH]
    python records/bench.py --against ../other-checkout

Settings are environment variables, as ever. Each variant is a process of its own. They take turns,
a few steps at a time, so that a machine whose speed drifts treats them alike; every figure is the
median over the rounds, every ratio the median of the rounds' ratios. The plain path is the same
model, data and optimizer as one would write them first: scaled_dot_product_attention, no compiler,
Newton-Schulz matrix by matrix, and a sliding window that computes all logits and picks the scored
ones window by window. With --against the script of this repository and that of another checkout
take turns, each with all of its optimizations.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# The commands share modules of data/. The script that is measured is imported, too.
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from commands import BadInput, Parser, command, packages_from

with packages_from("requirements.txt"):
    import torch

    from files import write_atomically

ALL = "all optimizations"
PLAIN = "plain path"
FLOAT32 = "float32"
OTHER = "other checkout"
# What a variant changes: settings by name, and `without`, the parts of train_gpt.py to do without.
VARIANTS: dict[str, dict] = {
    ALL: {},
    PLAIN: dict(ATTENTION="sdpa", COMPILE="0", without=("batches", "scored_only")),
    "without the compiler": dict(COMPILE="0"),
    "with SDPA": dict(ATTENTION="sdpa"),
    "Newton-Schulz matrix by matrix": dict(without=("batches",)),
    "all logits in evaluation": dict(without=("scored_only",)),
    FLOAT32: dict(DTYPE="float32"),
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
# On a GPU all models share its memory.
GPU_SETTINGS = dict(TRAIN_BATCH_TOKENS="32768", MICRO_BATCH_TOKENS="8192", EVAL_BATCH_SEQS="16")


# ---- Processes


class Process:
    """A variant's process; `script` is the bench.py of the checkout that it measures."""

    def __init__(self, variant: dict, environment: dict[str, str], script: Path):
        settings = {name: value for name, value in variant.items() if name != "without"}
        # What it answers to warm_up.
        self.start: dict = {}
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--worker", *variant.get("without", ())],
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
        if not line:
            raise SystemExit(f"error: a variant ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"error: {answer['error']}")
        return answer

    def end(self) -> None:
        """Wait until the process has ended."""
        self.process.stdin.close()
        self.process.wait()


class Bench:
    """The processes of all variants, and what they answered in turn."""

    def __init__(self, environment: dict[str, str], batches: int, other: Path | None):
        self.environment = environment
        self.batches = batches
        self.scripts = {name: Path(__file__) for name in VARIANTS}
        self.variants = dict(VARIANTS)
        self.reference = PLAIN
        if other is not None:
            self.scripts = {ALL: Path(__file__), OTHER: other}
            self.variants = {ALL: {}, OTHER: {}}
            self.reference = OTHER
        self.processes: dict[str, Process] = {}
        # By variant, an answer for each round.
        self.trained: dict[str, list[dict]] = {}
        self.evaluated: dict[str, list[dict]] = {}
        # Operations a second of large products, for each round.
        self.products: list[float] = []

    def process(self, name: str) -> Process:
        """A new process of a variant."""
        return Process(self.variants[name], self.environment, self.scripts[name])

    def first_warm_up(self) -> float:
        """Seconds to warm up with an empty compiler's cache, which is filled then."""
        process = self.process(ALL)
        seconds = process.ask("warm_up", self.batches)["warm_up_s"]
        process.end()
        return seconds

    def start(self) -> None:
        """Start all variants at once, then warm one after the other up."""
        self.processes = {name: self.process(name) for name in self.variants}
        for process in self.processes.values():
            process.ask("ready")
        for name, process in self.processes.items():
            print(f"warming up: {name}", file=sys.stderr)
            process.start = process.ask("warm_up", self.batches)
            # Whoever has once freed large blocks gets memory faster ever after (mallopt(3),
            # M_MMAP_THRESHOLD): so all variants do, not only the one that tells the machine's rate.
            process.ask("multiply")
        if FLOAT32 in self.processes and self.is_in_float32():
            self.processes.pop(FLOAT32).end()
        self.trained = {name: [] for name in self.processes}
        self.evaluated = {name: [] for name in self.processes}

    def is_in_float32(self) -> bool:
        """Whether float32 is what this machine takes anyway."""
        reasons = self.processes[ALL].start["reasons"]
        return any(reason.startswith("dtype:float32") for reason in reasons)

    def take_turns(self, steps: int) -> None:
        """One round: every variant trains, then every variant evaluates.

        Every other round goes the other way round, so that none is always the first one.
        """
        order = list(self.processes.items())
        if len(self.products) % 2:
            order.reverse()
        self.products.append(self.processes[ALL].ask("multiply")["flops_per_s"])
        for name, process in order:
            self.trained[name].append(process.ask("train", steps))
        for name, process in order:
            self.evaluated[name].append(process.ask("evaluate", self.batches))

    def finish(self) -> dict[str, dict]:
        """End all processes; the figures of each variant."""
        rows = {}
        for name, process in self.processes.items():
            end = process.ask("finish")
            process.end()
            rows[name] = self.row(name, process.start, end)
        return rows

    def row(self, name: str, start: dict, end: dict) -> dict:
        """The figures of a variant."""
        train_tokens_per_s = statistics.median(rates(self.trained[name]))
        flops = start["flops_per_token"] * train_tokens_per_s
        return dict(
            warm_up_s=start["warm_up_s"],
            **end,
            train_loss=self.trained[name][-1]["loss"],
            eval_loss=self.evaluated[name][-1]["loss"],
            train_tokens_per_s=train_tokens_per_s,
            train_ratio=median_ratio(self.trained[name], self.trained[ALL]),
            eval_tokens_per_s=statistics.median(rates(self.evaluated[name])),
            eval_ratio=median_ratio(self.evaluated[name], self.evaluated[ALL]),
            train_gflops=flops / 1e9,
            matmul_share=flops / statistics.median(self.products),
            peak_memory_mb=end["peak_memory_bytes"] / 1e6,
        )


def rates(answers: list[dict]) -> list[float]:
    """Tokens a second of each round."""
    return [answer["tokens_per_s"] for answer in answers]


def median_ratio(answers: list[dict], others: list[dict]) -> float:
    """The median over the rounds of how many times as fast one variant is as another."""
    pairs = zip(rates(answers), rates(others), strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


# ---- The figures


def environment_for(cache: str) -> dict[str, str]:
    """The environment of all variants, which share a compiler's cache."""
    # Steps end a variant's turn, not the clock.
    fixed = dict(MAX_WALLCLOCK_SECONDS="0")
    if torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu":
        fixed.update(GPU_SETTINGS)
    return {**fixed, **os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}


def measure(rounds: int, steps: int, batches: int, other: Path | None = None) -> dict:
    """All figures. `other` is the bench.py of a checkout to compare with, in place of variants."""
    with tempfile.TemporaryDirectory() as cache:
        bench = Bench(environment_for(cache), batches, other)
        compile_s = bench.first_warm_up()
        bench.start()
        for done in range(rounds):
            print(f"round {done + 1} of {rounds}", file=sys.stderr)
            bench.take_turns(steps)
        variants = bench.finish()

    best = variants[ALL]
    start = bench.processes[ALL].start
    mfu = None
    if start["peak"]:
        mfu = 1e9 * best["train_gflops"] / start["peak"]
    reference = bench.reference
    return dict(
        train_tokens_per_s=best["train_tokens_per_s"],
        train_speedup=median_ratio(bench.trained[ALL], bench.trained[reference]),
        eval_speedup=median_ratio(bench.evaluated[ALL], bench.evaluated[reference]),
        against=reference,
        matmul_share=best["matmul_share"],
        mfu=mfu,
        compile_s=compile_s,
        compile_cached_s=best["warm_up_s"],
        peak_memory_bytes=best["peak_memory_bytes"],
        matmul_gflops=statistics.median(bench.products) / 1e9,
        recompilations=best["recompilations"],
        rounds=rounds,
        steps=rounds * steps,
        runtime=start["reasons"],
        torch=torch.__version__,
        variants=variants,
    )


def table(result: dict) -> str:
    """The result for people, in Markdown."""
    titles = " | ".join(title for title, _, _ in COLUMNS)
    lines = [f"| | {titles} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in result["variants"].items():
        cells = " | ".join(form.format(row[key]) for _, key, form in COLUMNS)
        lines.append(f"| {name} | {cells} |")

    reference = result["against"]
    training = (
        f"training: {result['train_speedup']:.2f} times the {reference}, "
        f"{result['matmul_share']:.0%} of the rate of matrix products"
    )
    if result["mfu"]:
        training += f", {result['mfu']:.3f} of the GPU's peak (MFU)"
    lines += [
        "",
        *result["runtime"],
        f"matrix products: {result['matmul_gflops']:,.0f} GFLOP/s; torch {result['torch']}",
        training,
        f"sliding evaluation: {result['eval_speedup']:.2f} times the {reference}",
        f"warm-up: {result['compile_s']:.1f} s, of which {result['compile_cached_s']:.1f} s remain "
        f"when the compiler's cache is filled; {result['recompilations']} recompilations after it",
    ]
    return "\n".join(lines)


# ---- The command


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line; BadInput for what cannot be measured."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=4, help="training steps a turn")
    parser.add_argument(
        "--batches", type=int, default=4, help="batches of the sliding evaluation a turn"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="another checkout of this repository to compare with, in place of the variants",
    )
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.rounds, options.steps, options.batches) < 1:
        raise BadInput("--rounds, --steps and --batches must be at least 1")
    if options.json and not options.json.parent.is_dir():
        raise BadInput(f"--json: {options.json.parent} is not a folder")
    if options.against and not bench_of(options.against).is_file():
        raise BadInput(f"--against: {bench_of(options.against)} is not there")
    return options


def bench_of(checkout: Path) -> Path:
    """The bench.py of a checkout."""
    return checkout.resolve() / "records" / "bench.py"


@command()
def main(arguments: list[str] | None = None) -> int:
    """Measure and print, or be a variant's process."""
    options = parse(arguments)
    if options.worker is not None:
        from bench_worker import work

        work(options.worker)
        return 0
    other = bench_of(options.against) if options.against else None
    result = measure(options.rounds, options.steps, options.batches, other)
    print(table(result))
    if options.json:
        write_atomically(options.json, json.dumps(result, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
