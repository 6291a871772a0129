"""Finished training runs: read, compared with their logs and with each other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from audit_log import check_log
from challenge import LIMIT
from checks import Check, Tally
from commands import BadInput, described
from files import digest
from run_logs import LABELS, Log, differing_settings, passes_of

ARTIFACT_SUFFIX = ".final_model.int6.ptz"
# What the results of a finished training run have, beside its scores.
NEEDED = (
    "seed",
    "settings",
    "runtime",
    "versions",
    "bytes_code",
    "bytes_model",
    "artifact_sha256",
    "steps",
    "step_avg_ms",
    "train_seconds",
    "eval_seconds",
    "exported",
    "late_qat_steps",
    "pre_quantization",
    "compliance",
)
# Of a run's figures that its log states: how far rounding in the log may move them. Others are to
# the digit.
EIGHT_DECIMALS = 0.51e-8
ROUNDED = dict(
    val_bpb=EIGHT_DECIMALS,
    val_loss=EIGHT_DECIMALS,
    roundtrip_val_bpb=EIGHT_DECIMALS,
    roundtrip_val_loss=EIGHT_DECIMALS,
    sliding_val_bpb=EIGHT_DECIMALS,
    sliding_val_loss=EIGHT_DECIMALS,
    pre_quant_val_bpb=0.51e-4,
    step_avg_ms=0.0051,
)
# A setting that switches a technique on, what to call it, and where it comes from.
TECHNIQUES = (
    ("backout_enabled", "backout", "#339"),
    ("memory_tokens", "{} memory tokens", "#352"),
    ("smear_enabled", "SmearGate", "#162, shut at BOS since #1851"),
    ("bigram_vocab_size", "BigramHash with {} rows", "#162"),
    ("rope_dims", "{} rotary dimensions a head", "#315"),
    ("key_offset_enabled", "partial key offset", "modded-nanogpt #169"),
    ("xsa_last_n", "XSA", "#265"),
    ("sparse_attn_gate_enabled", "sparse attention gate", "#1787"),
    ("document_attention", "attention within documents", "#1530"),
    ("negative_slope", "leaky squared ReLU", "#549"),
    ("skip_gates_enabled", "skip gates", "#1218"),
    ("num_loops", "{} loops", "#1394"),
    ("parallel_start_layer", "two lanes from block {} on", "#1530"),
    ("muon_row_normalize", "equal rows for Muon", "#1260"),
    ("spelling_lr", "shared spelling", "new here, after fastText"),
    ("mtp_num_heads", "{} MTP heads in training", "#352"),
)
# The same of what learns while it scores, by track.
ADAPTATIONS = dict(
    A=(),
    B=(
        ("ttt_lr", "updates per document (track B)", "#1530"),
        ("ttt_ngram_order", "mixture of orders 1 to {} (track B)", "context mixing, as in PAQ"),
    ),
)
# What was exported, what to call it, and where it comes from.
AVERAGES = dict(swa=("SWA", "#339"), ema=("EMA", "#352"))
LATE_QAT = ("late QAT", "#352")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a training run left: results (the JSON at `path`), log, artifact."""

    path: Path
    results: dict
    log: Log
    artifact: Path

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.results["seed"]

    @property
    def source(self) -> bytes:
        """The script that ran."""
        return self.log.source.encode()

    def figures(self) -> dict:
        """The run's entry in seed_results.

        Bits per byte, nats a token, bytes, milliseconds, seconds. val_bpb and val_loss are those of
        the run's own score, of track B or else of sliding windows; the other passes stand beside.
        """
        *beside, last = passes_of(self.log.settings)
        score = self.results[LABELS[last]]
        figures = dict(
            val_bpb=score["val_bpb"],
            val_loss=score["val_loss"],
            artifact_bytes=self.results["bytes_model"],
            steps=self.results["steps"],
            step_avg_ms=self.results["step_avg_ms"],
            train_seconds=self.results["train_seconds"],
            eval_time_s=self.results["eval_seconds"],
            pre_quant_val_bpb=self.results["pre_quantization"]["val_bpb"],
            artifact_sha256=self.results["artifact_sha256"],
        )
        for name in beside:
            score = self.results[LABELS[name]]
            figures[f"{name}_val_bpb"] = score["val_bpb"]
            figures[f"{name}_val_loss"] = score["val_loss"]
        return figures

    def techniques(self) -> list[tuple[str, str]]:
        """What the run's settings switch on, each with where it comes from."""
        found = []
        for name, words, credit in TECHNIQUES + ADAPTATIONS[self.log.track]:
            value = self.log.settings.get(name)
            if value:
                found.append((words.format(value), credit))
        if self.results["exported"] in AVERAGES:
            found.append(AVERAGES[self.results["exported"]])
        if self.results["late_qat_steps"] > 0:
            found.append(LATE_QAT)
        return found


# ---- One run
def read_run(path: Path) -> FinishedRun:
    """Read a run by its results file.

    BadInput unless it is finished, whole, under the cap and in time, and its files agree.
    """
    if path.suffix != ".json":
        raise BadInput(f"{path} is not a run's results: name its logs/<RUN_ID>.json")
    try:
        results = dict(json.loads(path.read_text(encoding="utf-8")))
        run = open_run(path, results)
        refuse_overtime(run)
        refuse_disagreement(run)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: a run writes it when it is finished") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as a run's results: {described(error)}") from None
    return run


def open_run(path: Path, results: dict) -> FinishedRun:
    """Find a run's files; BadInput if one is missing, or if it has no score."""
    if results.get("under_cap") is False:
        raise BadInput(f"{path}: {results['bytes_total']} bytes are over the cap: no entry")
    needed = {*NEEDED, *(LABELS[name] for name in passes_of(results.get("settings", {})))}
    missing = sorted(name for name in needed if name not in results)
    if missing:
        raise BadInput(f"{path} is not of a finished training run: it has no {', '.join(missing)}")
    log = path.with_suffix(".txt")
    artifact = path.with_suffix(ARTIFACT_SUFFIX)
    for file in (log, artifact):
        if not file.is_file():
            raise BadInput(
                f"{file} is missing: a run's log and artifact belong beside its {path.name}"
            )
    run = FinishedRun(path, results, Log(log), artifact)
    if not run.log.parts:
        raise BadInput(f"{log} does not begin with the script's source and a line of 100 '='")
    return run


def refuse_overtime(run: FinishedRun) -> None:
    """BadInput if training or evaluation took longer than a record's may."""
    for name in ("train_seconds", "eval_seconds"):
        seconds = run.results[name]
        if not seconds <= LIMIT:
            raise BadInput(f"{run.path}: {name} {seconds:.1f} is over the {LIMIT} s of a record")


def refuse_disagreement(run: FinishedRun) -> None:
    """BadInput unless results, log and artifact say the same."""
    artifact = run.artifact.read_bytes()
    checks = [compare_results(run), check_log("log", run.log, run.source, artifact, None, True)]
    for check in checks:
        if not check.passed:
            raise BadInput(f"{run.path} and {run.log.path.name} do not agree: {check.figure}")


def logged_figures(log: Log) -> dict:
    """FinishedRun.figures() by the log alone; None for what it does not state."""
    *beside, last = log.passes
    score = log.score(LABELS[last])
    stated = log.compliance or {}
    figures = dict(
        val_bpb=None if score is None else score.val_bpb,
        val_loss=None if score is None else score.val_loss,
        artifact_bytes=log.model_bytes,
        steps=None if log.last_step is None else log.last_step.step,
        step_avg_ms=None if log.last_step is None else log.last_step.average,
        train_seconds=stated.get("train_seconds"),
        eval_time_s=stated.get("eval_seconds"),
        pre_quant_val_bpb=log.pre_quantization_bpb,
        artifact_sha256=log.artifact_sha256,
    )
    for name in beside:
        score = log.score(LABELS[name])
        figures[f"{name}_val_bpb"] = None if score is None else score.val_bpb
        figures[f"{name}_val_loss"] = None if score is None else score.val_loss
    return figures


def compare_results(run: FinishedRun) -> Check:
    """The results against the log. check_log compares the log with itself and with the files."""
    tally = Tally()
    found = run.results
    log = run.log
    tally.expect(found["settings"] == log.settings, "the settings differ")
    tally.expect({"torch", "python"} <= set(found["versions"]), "the versions are not stated")
    tally.expect(found["compliance"] == (log.compliance or {}), "the compliance lines differ")
    lines = set(log.lines.splitlines())
    tally.expect(set(found["runtime"]) <= lines, "device, dtype or compiler differ")
    for label in (LABELS[name] for name in log.passes):
        score = log.score(label)
        for name in ("targets", "bytes"):
            stated = None if score is None else getattr(score, name)
            tally.equal(f"{label} {name}", found[label][name], stated)
    compare_figures(tally, run)
    late = None if log.throughput is None else log.throughput.late_qat_steps
    tally.equal("seed", run.seed, log.settings.get("seed"))
    tally.equal("late_qat_steps", found["late_qat_steps"], late)
    tally.equal("bytes_model", found["bytes_model"], run.artifact.stat().st_size)
    tally.equal("bytes_code", found["bytes_code"], len(run.source))
    same = found["artifact_sha256"] == digest(run.artifact)
    tally.expect(same, "the artifact's sha256 is another")
    return tally.check("results")


def compare_figures(tally: Tally, run: FinishedRun) -> None:
    """What the record will state of a run against what its log states."""
    logged = logged_figures(run.log)
    for name, stated in run.figures().items():
        if name == "artifact_sha256":
            tally.expect(stated == logged[name], "the artifact's sha256 differs")
        else:
            tally.equal(name, stated, logged[name], ROUNDED.get(name, 0.0))


# ---- Several runs
def refuse_mixtures(runs: list[FinishedRun]) -> None:
    """BadInput unless the runs are seeds of one configuration of one script on one data set."""
    first = runs[0]
    seen = set()
    for run in runs:
        if run.seed in seen:
            raise BadInput(f"seed {run.seed} is there twice: name one run of each seed")
        seen.add(run.seed)
        refuse_difference(first, run)


def refuse_difference(first: FinishedRun, run: FinishedRun) -> None:
    """BadInput if two runs differ in more than their seed."""
    both = f"{first.path} and {run.path}"
    if run.source != first.source:
        raise BadInput(f"{both} were not made by the same script: the sources in their logs differ")
    differing = []
    for name in differing_settings(first.log, run.log):
        values = f"{first.log.settings.get(name)}, {run.log.settings.get(name)}"
        differing.append(f"{name} ({values})")
    if differing:
        raise BadInput(f"{both} have different configurations: {', '.join(differing)}")
    versions = (first.results["versions"], run.results["versions"])
    if versions[0] != versions[1]:
        raise BadInput(f"{both} ran with different versions: {versions[0]}, {versions[1]}")
    texts = (scored_on(first.log), scored_on(run.log))
    if texts[0] != texts[1]:
        raise BadInput(f"{both} were scored on different data: {texts[0]}, {texts[1]}")


def scored_on(log: Log) -> str:
    """The tokenizer's digest, and targets and bytes of the text."""
    score = log.final_score
    tokenizer = None if log.data is None else log.data.tokenizer_sha256
    return f"tokenizer {tokenizer}, {score.targets} targets, {score.bytes} bytes"
