"""Finished training runs for records/submit.py: read, compared with their logs and with each other."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import audit
from audit import LABELS, MACHINE, ROOT, BadInput, Check, Log, Tally

sys.path.append(str(ROOT / "data"))
from shards import digest  # noqa: E402

CHALLENGE, CHALLENGE_GPUS, CHALLENGE_GPU, LIMIT = "10min_16mb", 8, "H100", 600  # LIMIT: seconds
FINEWEB_BYTES = 151_080_000  # of the challenge's validation text, to 0.5%
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
    *LABELS.values(),
    "compliance",
)
# Of a run's figures that its log states: how far rounding in the log may move them. Others are to the digit.
ROUNDED = dict(
    val_bpb=0.51e-8,
    val_loss=0.51e-8,
    roundtrip_val_bpb=0.51e-8,
    roundtrip_val_loss=0.51e-8,
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
    ("mtp_num_heads", "{} MTP heads in training", "#352"),
)
AVERAGES = {"swa": [("SWA", "#339")], "ema": [("EMA", "#352")]}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run left: results (the JSON at `path`), log, artifact."""

    path: Path
    results: dict
    log: Log
    artifact: Path

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def source(self) -> bytes:
        """The script that ran."""
        return self.log.source.encode()

    def figures(self) -> dict:
        """The run's entry in seed_results: bits per byte, nats a token, bytes, milliseconds, seconds."""
        found, plain, sliding = self.results, *(self.results[label] for label in LABELS.values())
        return dict(
            val_bpb=sliding["val_bpb"],
            val_loss=sliding["val_loss"],
            artifact_bytes=found["bytes_model"],
            steps=found["steps"],
            step_avg_ms=found["step_avg_ms"],
            train_seconds=found["train_seconds"],
            eval_time_s=found["eval_seconds"],
            roundtrip_val_bpb=plain["val_bpb"],
            roundtrip_val_loss=plain["val_loss"],
            pre_quant_val_bpb=found["pre_quantization"]["val_bpb"],
            artifact_sha256=found["artifact_sha256"],
        )

    def techniques(self) -> list[tuple[str, str]]:
        """What the run's settings switch on, each with where it comes from."""
        settings, found = self.log.settings, self.results
        named = [
            (words.format(settings[name]), credit)
            for name, words, credit in TECHNIQUES
            if settings.get(name)
        ]
        late = [("late QAT", "#352")] * (found["late_qat_steps"] > 0)
        return named + AVERAGES.get(found["exported"], []) + late


def read_run(path: Path) -> Run:
    """A run by its results file; BadInput unless it is finished, whole, under the cap and of one mind."""
    if path.suffix != ".json":
        raise BadInput(f"{path} is not a run's results: name its logs/<RUN_ID>.json")
    try:
        run = open_run(path, dict(json.loads(path.read_text(encoding="utf-8"))))
        for name in ("train_seconds", "eval_seconds"):
            if not run.results[name] <= LIMIT:
                raise BadInput(
                    f"{path}: {name} {run.results[name]:.1f} is over the {LIMIT} s of a record"
                )
        for check in (
            compare_results(run),
            audit.check_log("log", run.log, run.source, run.artifact.read_bytes(), None, True),
        ):
            if not check.passed:
                raise BadInput(f"{path} and {run.log.path.name} do not agree: {check.figure}")
        return run
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: a run writes it when it is finished") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(
            f"{path} cannot be read as a run's results: {audit.described(error)}"
        ) from None


def open_run(path: Path, results: dict) -> Run:
    """A run's files, as far as they are there."""
    if results.get("under_cap") is False:
        raise BadInput(f"{path}: {results['bytes_total']} bytes are over the cap: no entry")
    if missing := [name for name in NEEDED if name not in results]:
        raise BadInput(f"{path} is not of a finished training run: it has no {', '.join(missing)}")
    log, artifact = (path.with_suffix(suffix) for suffix in (".txt", ".final_model.int6.ptz"))
    for file in (log, artifact):
        if not file.is_file():
            raise BadInput(
                f"{file} is missing: a run's log and artifact belong beside its {path.name}"
            )
    run = Run(path, results, Log(log), artifact)
    if not run.log.parts:
        raise BadInput(f"{log} does not begin with the script's source and a line of 100 '='")
    return run


def compliance_line(log: Log) -> dict:
    """What the line compliance:{...} states, nothing where there is none."""
    return dict(json.loads(log.last(r"compliance:(.*)", "{}")))


def logged_figures(log: Log) -> dict:
    """Run.figures() by the log alone; None for what it does not state."""
    plain, sliding = (log.score(label) or {} for label in LABELS.values())
    steps = [line for part in log.steps() for line in part] or [(None,) * 4]
    size = log.numbers(r"Serialized model int6\+zstd: (\d+) bytes") or (None,)
    before = log.numbers(r"step:\d+/\d+ val_loss:\S+ val_bpb:(\S+) .*") or (None,)
    stated = compliance_line(log)
    return dict(
        val_bpb=sliding.get("val_bpb"),
        val_loss=sliding.get("val_loss"),
        artifact_bytes=size[0],
        steps=steps[-1][0],
        step_avg_ms=steps[-1][3],
        train_seconds=stated.get("train_seconds"),
        eval_time_s=stated.get("eval_seconds"),
        roundtrip_val_bpb=plain.get("val_bpb"),
        roundtrip_val_loss=plain.get("val_loss"),
        pre_quant_val_bpb=before[0],
        artifact_sha256=log.last(r"artifact:\S+ .*?sha256:([0-9a-f]{64})\b.*"),
    )


def compare_results(run: Run) -> Check:
    """The results against the log, which audit.check_log compares with itself and with the files."""
    tally, found, log = Tally(), run.results, run.log
    tally.expect(found["settings"] == log.settings, "the settings differ")
    tally.expect({"torch", "python"} <= set(found["versions"]), "the versions are not stated")
    tally.expect(found["compliance"] == compliance_line(log), "the compliance lines differ")
    tally.expect(
        set(found["runtime"]) <= set(log.lines.splitlines()), "device, dtype or compiler differ"
    )
    for label in LABELS.values():
        score = log.score(label) or {}
        for name in ("targets", "bytes"):
            tally.equal(f"{label} {name}", found[label][name], score.get(name))
    ours, logged = run.figures(), logged_figures(log)
    tally.expect(
        ours.pop("artifact_sha256") == logged["artifact_sha256"], "the artifact's sha256 differs"
    )
    for name, stated in ours.items():
        tally.equal(name, stated, logged[name], ROUNDED.get(name, 0.0))
    late = log.numbers(r"late_qat_steps:(\d+) .*") or (None,)
    for name, stated, other in (
        ("seed", run.seed, log.settings.get("seed")),
        ("late_qat_steps", found["late_qat_steps"], late[0]),
        ("bytes_model", found["bytes_model"], run.artifact.stat().st_size),
        ("bytes_code", found["bytes_code"], len(run.source)),
    ):
        tally.equal(name, stated, other)
    tally.expect(
        found["artifact_sha256"] == digest(run.artifact), "the artifact's sha256 is another"
    )
    return tally.check("results")


def refuse_mixtures(runs: list[Run]) -> None:
    """BadInput unless the runs are the seeds of one configuration of one script on one data set."""
    first, seen = runs[0], set()
    for run in runs:
        both = f"{first.path} and {run.path}"
        if run.seed in seen:
            raise BadInput(f"seed {run.seed} is there twice: name one run of each seed")
        seen.add(run.seed)
        if run.source != first.source:
            raise BadInput(
                f"{both} were not made by the same script: the sources in their logs differ"
            )
        mine, theirs = run.log.settings, first.log.settings
        if differ := [
            f"{name} ({theirs.get(name)}, {mine.get(name)})"
            for name in sorted({*mine, *theirs} - MACHINE - {"seed"})
            if mine.get(name) != theirs.get(name)
        ]:
            raise BadInput(f"{both} have different configurations: {', '.join(differ)}")
        for what, ours, others in (
            ("ran with different versions", run.results["versions"], first.results["versions"]),
            ("were scored on different data", scored_on(run.log), scored_on(first.log)),
        ):
            if ours != others:
                raise BadInput(f"{both} {what}: {others}, {ours}")


def scored_on(log: Log) -> str:
    """The tokenizer's digest, and targets and bytes of the text."""
    score = log.score(LABELS["sliding"])
    return f"tokenizer {log.last('data:.* sha256:(.+)')}, {score['targets']} targets, {score['bytes']} bytes"


def hardware(log: Log) -> str:
    """The devices that a log names: '8×NVIDIA H100 80GB HBM3', 'CPU, 2 threads'."""
    world, threads = log.last(r"world_size:(\d+) \((.*)\)", ("1", "threads:unknown"))
    device, name = log.last(r"device:(\S+) \((.*)\)", ("unknown", ""))
    if device.startswith("cuda"):
        return f"{world}×{name}"
    processes = f" in each of {world} processes" * (world != "1")
    return f"{device.upper()}, {threads.removeprefix('threads:')} threads{processes}"


def machines(logs: list[Log]) -> str:
    """The devices of all logs, each once."""
    return "; ".join(sorted({hardware(log) for log in logs}))


def foreign_to_challenge(log: Log) -> list[str]:
    """Why a score is none of the challenge's, whatever its track."""
    devices, size = hardware(log), (log.score(LABELS["sliding"]) or dict(bytes=0))["bytes"]
    run = "CPU run" if devices.startswith("CPU") else f"Run on {devices}"
    same = devices.startswith(f"{CHALLENGE_GPUS}×") and CHALLENGE_GPU in devices
    reasons = (
        [] if same else [f"{run}, not the challenge's hardware ({CHALLENGE_GPUS}×{CHALLENGE_GPU})"]
    )
    if abs(size / FINEWEB_BYTES - 1) > 0.005:
        reasons.append(
            f"Scored on a text of {size:,} bytes, not on the challenge's FineWeb validation text"
        )
    return reasons
