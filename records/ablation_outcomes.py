"""What came of the runs of an ablation, by their logs and results, and how changes compare."""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics
from dataclasses import dataclass, field

import significance
from ablation_plan import Ablation, PlannedRun, label_of
from commands import described
from run_logs import LABELS, Log, console_errors, passes_of
from significance import Estimate

FINISHED = "finished"
FAILED = "failed"
UNFINISHED = "unfinished"
LONGEST_ERROR = 300


# ---- One run


@dataclass(frozen=True)
class Outcome:
    """A run as its log and its results tell it.

    Losses are in nats a target and scores in bits a byte. `val_bpb` and `val_loss` are those of the
    sliding window, `val_bytes` is the size of the text that it scored. `seconds` are those of all
    stages. A curve is a list of pairs of training tokens and value.
    """

    name: str
    changes: dict[str, str]
    seed: int
    status: str
    error: str = ""
    script_sha256: str = ""
    val_bpb: float = 0.0
    val_loss: float = 0.0
    roundtrip_val_bpb: float = 0.0
    pre_quantization_val_bpb: float = 0.0
    val_targets: int = 0
    val_bytes: int = 0
    bytes_total: int = 0
    steps: int = 0
    tokens: int = 0
    step_avg_ms: float = 0.0
    train_seconds: float = 0.0
    seconds: float = 0.0
    data: str = ""
    runtime: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    val_curve: list[tuple[int, float]] = field(default_factory=list)
    train_curve: list[tuple[int, float]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether it has a score that counts."""
        return self.status == FINISHED

    @property
    def label(self) -> str:
        """Its changes as people type them."""
        return label_of(self.changes)


def read_results(run: PlannedRun) -> dict:
    """The results of a run that has its score, else nothing."""
    try:
        results = json.loads(run.log.with_suffix(".json").read_text(encoding="utf-8"))
        has_score = final_label(results) in results and run.log.is_file()
    except (OSError, ValueError, TypeError):
        return {}
    return results if has_score else {}


def read_outcome(run: PlannedRun, ablation: Ablation) -> Outcome:
    """What came of a run.

    It has failed too if another script made it, or other settings than planned.
    """
    results = read_results(run)

    def outcome(status: str, error: str = "", **figures) -> Outcome:
        changes = run.configuration.changes
        return Outcome(run.name, changes, run.seed, status, error, **figures)

    try:
        if not results:
            if not (run.folder / "exit_status").is_file():
                return outcome(UNFINISHED)
            return outcome(FAILED, last_words(run))
        log = Log(run.log)
        problem = unlike_plan(run, ablation, results, log)
        if problem:
            return outcome(FAILED, problem)
        figures = figures_of(results, log)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        return outcome(FAILED, f"its files cannot be read: {described(error)}")
    return outcome(FINISHED, script_sha256=ablation.sha256, **figures)


def last_words(run: PlannedRun) -> str:
    """How a run without results ended: the last error that it printed, or else its last line."""
    status = int((run.folder / "exit_status").read_text())
    how = f"with status {status}"
    if status < 0:
        how = f"by {signal.Signals(-status).name}"
    text = (run.folder / "console.txt").read_text(encoding="utf-8", errors="replace")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    said = console_errors("\n".join(lines)) or lines or ["it printed nothing"]
    return f"ended {how}: {said[-1][:LONGEST_ERROR]}"


def unlike_plan(run: PlannedRun, ablation: Ablation, results: dict, log: Log) -> str:
    """What is not as planned in a run that has finished; empty if everything is."""
    planned = run.configuration
    wanted = {name.lower(): planned.settings[name.lower()] for name in planned.variables}
    wanted["seed"] = run.seed
    for name, value in wanted.items():
        if results["settings"][name] != value:
            return f"{name.upper()} is not as planned"
    if log.source != ablation.source:
        return "its log begins with another script"
    return ""


def final_label(results: dict) -> str:
    """The label of a run's score: of what learns while it scores, or else of sliding windows."""
    return LABELS[passes_of(results.get("settings", {}))[-1]]


def figures_of(results: dict, log: Log) -> dict:
    """The fields of an Outcome that a finished run's results and log have."""
    score = results[final_label(results)]
    return dict(
        val_bpb=score["val_bpb"],
        val_loss=score["val_loss"],
        roundtrip_val_bpb=results[LABELS["roundtrip"]]["val_bpb"],
        pre_quantization_val_bpb=results["pre_quantization"]["val_bpb"],
        val_targets=score["targets"],
        val_bytes=score["bytes"],
        bytes_total=results["bytes_total"],
        steps=results["steps"],
        tokens=results["tokens"],
        step_avg_ms=results["step_avg_ms"],
        train_seconds=results["train_seconds"],
        seconds=sum(results["stages"].values()),
        data=data_of(log),
        runtime=tuple(results["runtime"]),
        versions=results["versions"],
        val_curve=curve(results, log, "val_bpb"),
        train_curve=curve(results, log, "train_loss"),
    )


def data_of(log: Log) -> str:
    """The data as the log states it; empty if it does not."""
    source = log.data
    if source is None:
        return ""
    return f"{source.folder} tokenizer:{source.tokenizer} sha256:{source.tokenizer_sha256}"


def curve(results: dict, log: Log, quantity: str) -> list[tuple[int, float]]:
    """A quantity of the step lines over training tokens."""
    tokens_a_step = results["settings"]["train_batch_tokens"]
    return [(step * tokens_a_step, value) for step, value in log.curve(quantity)]


def of_one_text(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes, of which those that scored another text than the first one have failed.

    Bits per byte of two texts cannot be compared.
    """
    size = next((outcome.val_bytes for outcome in outcomes if outcome.finished), 0)
    found = []
    for outcome in outcomes:
        if outcome.finished and outcome.val_bytes != size:
            error = (
                f"it scored another text, of {outcome.val_bytes} bytes, not {size}: "
                "move it away to run it again"
            )
            outcome = dataclasses.replace(outcome, status=FAILED, error=error)
        found.append(outcome)
    return found


# ---- One change


@dataclass
class Row:
    """A configuration's results over its seeds, as ablation.json has them.

    Dictionaries are by seed. A figure is None where there are too few runs for it. All differences
    are to the base, over the seeds that both have: `paired` of each seed, `difference` their mean,
    `paired_low` to `paired_high` its 95% interval, `p_paired` of Student's test on these pairs.
    `low`, `high` and `p_welch` take the runs as independent. `p_paired_holm` and `p_holm` are
    p_paired and p_welch, adjusted for the number of changes.
    """

    label: str
    status: dict[int, str]
    val_bpb: dict[int, float]
    paired: dict[int, float]
    mean: float | None = None
    deviation: float | None = None
    difference: float | None = None
    paired_low: float | None = None
    paired_high: float | None = None
    p_paired: float | None = None
    p_paired_holm: float | None = None
    low: float | None = None
    high: float | None = None
    p_welch: float | None = None
    p_holm: float | None = None
    bytes_total: float | None = None
    steps: float | None = None
    step_avg_ms: float | None = None
    train_seconds: float | None = None

    def compare_by_pairs(self, found: Estimate) -> None:
        """Take the paired difference, its interval and p."""
        self.difference = found.difference
        self.paired_low = found.low
        self.paired_high = found.high
        self.p_paired = found.p_value

    def compare_by_welch(self, found: Estimate) -> None:
        """Take the interval and p of independent runs."""
        self.low = found.low
        self.high = found.high
        self.p_welch = found.p_value


def compare(outcomes: list[Outcome]) -> list[Row]:
    """A row for each configuration in order, the base first."""
    groups: dict[str, list[Outcome]] = {"base": []}
    for outcome in outcomes:
        groups.setdefault(outcome.label, []).append(outcome)
    base = {outcome.seed: outcome.val_bpb for outcome in groups["base"] if outcome.finished}
    rows = [row_of(label, group, base) for label, group in groups.items()]

    by_pairs = significance.holm([row.p_paired for row in rows])
    by_welch = significance.holm([row.p_welch for row in rows])
    for row, p_paired_holm, p_holm in zip(rows, by_pairs, by_welch, strict=True):
        row.p_paired_holm = p_paired_holm
        row.p_holm = p_holm
    return rows


def row_of(label: str, group: list[Outcome], base: dict[int, float]) -> Row:
    """One configuration against the base's scores by seed, not yet adjusted for other changes."""
    done = sorted((outcome for outcome in group if outcome.finished), key=lambda x: x.seed)
    scores = {outcome.seed: outcome.val_bpb for outcome in done}
    common = []
    if label != "base":
        common = [seed for seed in scores if seed in base]

    row = Row(
        label=label,
        status={outcome.seed: outcome.status for outcome in group},
        val_bpb=scores,
        paired={seed: scores[seed] - base[seed] for seed in common},
    )
    if done:
        row.mean = statistics.fmean(scores.values())
        row.deviation = significance.deviation(list(scores.values()))
        row.bytes_total = statistics.fmean(outcome.bytes_total for outcome in done)
        row.steps = statistics.fmean(outcome.steps for outcome in done)
        row.step_avg_ms = statistics.fmean(outcome.step_avg_ms for outcome in done)
        row.train_seconds = statistics.fmean(outcome.train_seconds for outcome in done)
    if common:
        ours = [scores[seed] for seed in common]
        theirs = [base[seed] for seed in common]
        row.compare_by_pairs(significance.paired(list(row.paired.values())))
        row.compare_by_welch(significance.welch(ours, theirs))
    return row
