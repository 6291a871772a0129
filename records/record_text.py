"""What a record folder of records/submit.py says: submission.json, README.md, requirements.txt."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import statistics
import sys
import types
from typing import NamedTuple

import audit
from audit import CAP, MACHINE, BadInput, Log
from finished_runs import CHALLENGE, Run, compliance_line, foreign_to_challenge, machines

NATS, P_VALUE = 0.005, 0.01  # by which, in nats a token, and how surely a record beats the last
COLUMNS = (
    ("val_bpb", "val_bpb", ".4f"),
    ("val_loss", "val_loss, nats", ".4f"),
    ("roundtrip_val_bpb", "plain windows", ".4f"),
    ("pre_quant_val_bpb", "before quantization", ".4f"),
    ("steps", "steps", ",.0f"),
    ("step_avg_ms", "ms/step", ".1f"),
    ("artifact_bytes", "artifact bytes", ",.0f"),
    ("train_seconds", "training s", ".1f"),
    ("eval_time_s", "evaluation s", ".1f"),
)


# ---- Statistics
class Claim(NamedTuple):
    """Against another record: its bpb, the nats a token below it, one-sided p (None: one seed), verdict."""

    claimed: float
    nats: float
    p_value: float | None
    holds: bool


def compare_with(claimed: float, bpbs: list[float], losses: list[float]) -> Claim:
    """Is the mean loss below a claimed score by NATS nats a token? One-sample t-test over the seeds.

    Bits per byte become nats with the ratio of these runs, so both must be of one text and one tokenizer."""
    mean = statistics.mean(losses)
    loss, p_value = claimed * mean / statistics.mean(bpbs), None
    if len(losses) > 1:
        try:
            from scipy import stats
        except ImportError:
            raise BadInput("--beats needs scipy: pip install -r records/requirements.txt") from None
        p_value = float(stats.ttest_1samp(losses, loss - NATS, alternative="less").pvalue)
        p_value = None if math.isnan(p_value) else p_value
    return Claim(claimed, loss - mean, p_value, p_value is not None and p_value < P_VALUE)


def deviation(values: list[float]) -> float | None:
    """The standard deviation (n − 1) of a sample; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


# ---- submission.json, requirements.txt
def submission_of(options: argparse.Namespace, runs: list[Run]) -> dict:
    """submission.json, in the field's names: what was asked for, and figures of the runs."""
    first, results = runs[0], {str(run.seed): run.figures() for run in runs}
    columns = {name: [each[name] for each in results.values()] for name, _, _ in COLUMNS}
    mean = {
        name: statistics.mean(columns[name])
        for name in ("val_bpb", "val_loss", "pre_quant_val_bpb")
    }
    settings, code = first.log.settings, len(first.source)
    summary = ", ".join(
        [
            f"{settings.get('num_layers')} layers of width {settings.get('model_dim')}",
            *(name for name, _ in first.techniques()),
        ]
    )
    claim = (
        compare_with(options.beats, columns["val_bpb"], columns["val_loss"])
        if options.beats
        else None
    )
    return dict(
        author=options.author,
        **(dict(github_id=options.github_id) if options.github_id else {}),
        date=options.date,
        name=options.name,
        blurb=options.blurb or summary,
        track=options.track,
        **mean,
        val_bpb_std=deviation(columns["val_bpb"]),
        bytes_total=code + max(columns["artifact_bytes"]),
        bytes_code=code,
        seeds=[run.seed for run in runs],
        seed_results=results,
        hardware=machines([run.log for run in runs]),
        pytorch_version=first.results["versions"]["torch"],
        technique_summary=summary,
        compliance=compliance_of([run.log for run in runs]),
        **(dict(beats=claim._asdict()) if claim else {}),
    )


def compliance_of(logs: list[Log]) -> dict:
    """The rules of the field, each true or false, by what the logs state."""
    stated = [compliance_line(log) for log in logs]
    flags = {
        name: all(each.get(name) is True for each in stated)
        for name in ("train_under_600s", "eval_under_600s", "artifact_under_16mb")
    }
    return dict(
        flags,
        three_seeds=len(logs) >= 3,
        validation_after_packing=all(
            each.get("validation_opened") == "after packing" for each in stated
        ),
        no_ttt=all(each.get("track") == "A" for each in stated),
        challenge_hardware_and_text=not any(map(foreign_to_challenge, logs)),
    )


def requirements_of(versions: dict) -> str:
    """The packages as they ran; a build's own mark (2.13.0+cpu) is in no package index."""
    lines = [f"# Python {versions['python']}"]
    for name, version in versions.items():
        public, mark, _ = version.partition("+")
        lines += (
            [f"{name}=={public}" + f"  # ran as {version}" * bool(mark)] if name != "python" else []
        )
    return "\n".join(lines) + "\n"


# ---- Configuration
def preset_of(run: Run) -> tuple[str, dict]:
    """The preset of a run, and its defaults by the script that ran."""
    name = run.log.last(r"preset:(\w+)\b.*", "record")
    module = sys.modules["script_as_run"] = types.ModuleType(
        "script_as_run"
    )  # dataclasses look it up
    try:
        exec(compile(run.source, "train_gpt.py", "exec"), module.__dict__)
        return name, dataclasses.asdict(module.Settings()) | module.PRESETS[name]
    except (Exception, SystemExit) as error:
        raise BadInput(
            f"the script in {run.log.path} does not give its settings: {audit.described(error)}"
        ) from None


def run_command(run: Run, preset: str, defaults: dict) -> str:
    """The command that repeats a run: settings that are not the preset's, and the launcher."""
    changed = {
        name: value
        for name, value in run.log.settings.items()
        if name not in ("preset", "run_id", "resume", "seed") and value != defaults.get(name)
    }
    words = [
        f"{name.upper()}={shlex.quote(str(int(value) if isinstance(value, bool) else value))}"
        for name, value in {"preset": preset, "seed": run.seed, **changed}.items()
    ]
    world = run.log.last(r"world_size:(\d+)\b.*", "1")
    launcher = "python" if world == "1" else f"torchrun --standalone --nproc_per_node={world}"
    return " ".join([*words, launcher, "train_gpt.py"])


def configuration(submission: dict, runs: list[Run]) -> list[str]:
    """What differs from the preset, and the command of each seed."""
    preset, defaults = preset_of(runs[0])
    changed = [
        [name.upper(), str(value), str(defaults.get(name, "no such setting"))]
        for name, value in runs[0].log.settings.items()
        if name not in MACHINE | {"seed", "preset"} and value != defaults.get(name)
    ]
    return [
        "## Configuration",
        "",
        f"On: {submission['technique_summary']}.",
        "",
        f"Preset `{preset}`, {'with' if changed else 'nothing changed'}{':' if changed else '.'}",
        "",
        *(table(["setting", "here", "preset"], changed) if changed else []),
        "## Run command",
        "",
        "```bash",
        *(run_command(run, preset, defaults) for run in runs),
        "```",
        "",
    ]


# ---- README.md
def names_of(run: Run) -> tuple[str, str]:
    """The names of a run's log and artifact in a record folder."""
    return f"train_seed{run.seed}.log", f"final_model_seed{run.seed}.int6.ptz"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table, and an empty one."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def results_table(submission: dict) -> list[str]:
    """One row a seed; mean and standard deviation where there are several."""
    results = submission["seed_results"]
    columns = [[each[name] for each in results.values()] for name, _, _ in COLUMNS]
    rows = [
        [seed, *(f"{each[name]:{form}}" for name, _, form in COLUMNS)]
        for seed, each in results.items()
    ]
    if len(results) > 1:
        for title, function in (("mean", statistics.mean), ("standard deviation", deviation)):
            rows.append(
                [
                    title,
                    *(
                        f"{function(values):{form}}"
                        for values, (_, _, form) in zip(columns, COLUMNS)
                    ),
                ]
            )
    return table(["seed", *(title for _, title, _ in COLUMNS)], rows)


def claim_text(submission: dict) -> str:
    """The claim against another record in words."""
    if "beats" not in submission:
        return "No claim against another record is made."
    claim = Claim(**submission["beats"])
    p_value = "- (it takes two seeds or more)" if claim.p_value is None else f"{claim.p_value:.3g}"
    verdict = "beats" if claim.holds else "does NOT beat"
    return (
        f"Against {claim.claimed} bpb: {claim.nats:+.4f} nats a token better; p = {p_value} that it is "
        f"no more than {NATS} (one-sided one-sample t-test over the seeds' val_loss). A record needs "
        f"p < {P_VALUE}: this one {verdict} it. Only scores on one text with one tokenizer can be "
        "compared so."
    )


def opening(submission: dict, runs: list[Run]) -> list[str]:
    """The score, and what keeps it from being one of the challenge's."""
    spread = submission["val_bpb_std"]
    count = f" ± {spread:.4f} ({len(runs)} seeds)" if spread is not None else " (one seed)"
    foreign = [f"Track {submission['track']} is none of the challenge's"] * (
        submission["track"] != CHALLENGE
    )
    foreign += sorted({reason for run in runs for reason in foreign_to_challenge(run.log)})
    return [
        f"# {submission['name']}",
        "",
        f"{submission['blurb'].rstrip('.')}.",
        "",
        f"**val_bpb {submission['val_bpb']:.4f}**{count}, {submission['bytes_total']:,} bytes of "
        f"{CAP:,}; by {submission['author']}, {submission['date']}.",
        "",
        *(f"- **{reason}.**" for reason in foreign),
        *[""] * bool(foreign),
    ]


def readme_of(submission: dict, runs: list[Run], data: str) -> str:
    """README.md of the record; `data`: a sentence on the validation text."""
    first = runs[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.results["versions"].items())
    files = [
        "train_gpt.py",
        "submission.json",
        "requirements.txt",
        *(name for run in runs for name in names_of(run)),
    ]
    rules = [
        [name, "yes" if holds else "**no**"] for name, holds in submission["compliance"].items()
    ]
    credits = "; ".join(f"{name} ({credit})" for name, credit in first.techniques())
    return "\n".join(
        [
            *opening(submission, runs),
            "## Results",
            "",
            *results_table(submission),
            "val_bpb is that of sliding windows over the whole validation split, with the model read back from "
            "the artifact, as are plain windows. The seconds of evaluation hold all passes over that text.",
            "",
            "## Statistics",
            "",
            claim_text(submission),
            "",
            *configuration(submission, runs),
            "## Hardware, versions, data",
            "",
            f"{submission['hardware']}; {versions}.",
            "",
            data,
            "",
            "## Included files",
            "",
            *(f"- `{name}`" for name in files),
            "",
            "## Compliance",
            "",
            *table(["rule", "holds"], rules),
            "## Credits",
            "",
            f"The script starts from openai/parameter-golf #339 and #352. Of what is on here: {credits}.",
            "",
        ]
    )
