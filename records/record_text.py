"""What a record folder says: submission.json, README.md, requirements.txt."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
import types
from typing import NamedTuple

from challenge import CAP, CHALLENGE, NATS, P_VALUE, foreign_to_challenge, machines
from commands import BadInput, described
from finished_runs import FinishedRun
from markdown_table import table
from record_folder import artifact_name, log_name
from run_logs import MACHINE, Log
from significance import deviation, p_below

# The table of results: a figure of a seed, the title of its column, its format. Sliding windows
# have a column of their own only where they are not the score itself.
COLUMNS = (
    ("val_bpb", "val_bpb", ".4f"),
    ("val_loss", "val_loss, nats", ".4f"),
    ("sliding_val_bpb", "track A, sliding windows", ".4f"),
    ("roundtrip_val_bpb", "plain windows", ".4f"),
    ("pre_quant_val_bpb", "before quantization", ".4f"),
    ("steps", "steps", ",.0f"),
    ("step_avg_ms", "ms/step", ".1f"),
    ("artifact_bytes", "artifact bytes", ",.0f"),
    ("train_seconds", "training s", ".1f"),
    ("eval_time_s", "evaluation s", ".1f"),
)
# Figures of which submission.json has the mean over the seeds.
MEANS = ("val_bpb", "val_loss", "sliding_val_bpb", "sliding_val_loss", "pre_quant_val_bpb")
# Settings of one run that its command does not repeat, or says otherwise.
NOT_REPEATED = ("preset", "run_id", "resume", "seed")


# ---- A claim against another record
class Claim(NamedTuple):
    """Against another record: its bits per byte, the nats a token below it, p, and the verdict.

    p is one-sided, and None for one seed.
    """

    claimed: float
    nats: float
    p_value: float | None
    holds: bool


def compare_with(claimed: float, bpbs: list[float], losses: list[float]) -> Claim:
    """Test over the seeds whether their loss is below a claimed score by NATS nats a token.

    The test is a one-sample t-test. Bits per byte become nats with the ratio of these runs, so both
    scores must be of one text and one tokenizer.
    """
    mean = statistics.mean(losses)
    loss = claimed * mean / statistics.mean(bpbs)
    try:
        p_value = p_below(losses, loss - NATS)
    except ImportError:
        raise BadInput("--beats needs scipy: pip install -r records/requirements.txt") from None
    holds = p_value is not None and p_value < P_VALUE
    return Claim(claimed, loss - mean, p_value, holds)


def claim_text(submission: dict) -> str:
    """Say the claim against another record in words."""
    if "beats" not in submission:
        return "No claim against another record is made."
    claim = Claim(**submission["beats"])
    p_value = "- (it takes two seeds or more)"
    if claim.p_value is not None:
        p_value = f"{claim.p_value:.3g}"
    verdict = "beats" if claim.holds else "does NOT beat"
    return (
        f"Against {claim.claimed} bpb: {claim.nats:+.4f} nats a token better; p = {p_value} that "
        f"it is no more than {NATS} (one-sided one-sample t-test over the seeds' val_loss). "
        f"A record needs p < {P_VALUE}: this one {verdict} it. Only scores on one text with one "
        "tokenizer can be compared so."
    )


# ---- submission.json, requirements.txt
def submission_of(options: argparse.Namespace, runs: list[FinishedRun]) -> dict:
    """submission.json, in the field's names: what was asked for, and figures of the runs."""
    first = runs[0]
    logs = [run.log for run in runs]
    results = {str(run.seed): run.figures() for run in runs}
    figures = {}
    for name in results[str(first.seed)]:
        figures[name] = [result[name] for result in results.values()]
    code = len(first.source)
    summary = summary_of(first)
    submission = dict(author=options.author)
    if options.github_id:
        submission["github_id"] = options.github_id
    submission.update(
        date=options.date,
        name=options.name,
        blurb=options.blurb or summary,
        track=options.track,
        **adaptation_of(first.log),
    )
    for name in MEANS:
        if name in figures:
            submission[name] = statistics.mean(figures[name])
    submission.update(
        val_bpb_std=deviation(figures["val_bpb"]),
        bytes_total=code + max(figures["artifact_bytes"]),
        bytes_code=code,
        seeds=[run.seed for run in runs],
        seed_results=results,
        hardware=machines(logs),
        pytorch_version=first.results["versions"]["torch"],
        technique_summary=summary,
        compliance=compliance_of(logs),
    )
    if options.beats:
        claim = compare_with(options.beats, figures["val_bpb"], figures["val_loss"])
        submission["beats"] = claim._asdict()
    return submission


def adaptation_of(log: Log) -> dict:
    """Which of the field's tracks, A or B, a run is of; and of B, what adapts, and when."""
    if log.track == "A":
        return dict(evaluation_track="A")
    return dict(evaluation_track="B", adaptation=(log.compliance or {}).get("adaptation"))


def summary_of(run: FinishedRun) -> str:
    """The size of a run's model, and what is switched on."""
    settings = run.log.settings
    size = f"{settings.get('num_layers')} layers of width {settings.get('model_dim')}"
    return ", ".join([size, *(name for name, _ in run.techniques())])


def compliance_of(logs: list[Log]) -> dict:
    """The rules of the field, each true or false, by what the logs state."""
    stated = [log.compliance or {} for log in logs]
    flags = {}
    for name in ("train_under_600s", "eval_under_600s", "artifact_under_16mb"):
        flags[name] = all(each.get(name) is True for each in stated)
    opened = {each.get("validation_opened") for each in stated}
    tracks = {each.get("track") for each in stated}
    if tracks <= {"A"}:
        adapts = dict(no_ttt=True)
    else:
        # Where it is so, the log says what is learnt, and when a score is final.
        score_first = tracks == {"B"} and all(each.get("adaptation") for each in stated)
        adapts = dict(no_ttt=False, score_first_ttt=score_first)
    return dict(
        flags,
        three_seeds=len(logs) >= 3,
        validation_after_packing=opened <= {"after packing"},
        **adapts,
        challenge_hardware_and_text=not any(foreign_to_challenge(log) for log in logs),
    )


def requirements_of(versions: dict) -> str:
    """The packages as they ran; a build's own mark (2.13.0+cpu) is in no package index."""
    lines = [f"# Python {versions['python']}"]
    for name, version in versions.items():
        if name == "python":
            continue
        public, mark, _ = version.partition("+")
        line = f"{name}=={public}"
        if mark:
            line += f"  # ran as {version}"
        lines.append(line)
    return "\n".join(lines) + "\n"


# ---- Configuration
def preset_of(run: FinishedRun) -> tuple[str, dict]:
    """The preset of a run, and its settings by the script that ran."""
    name = run.log.preset
    module = types.ModuleType("script_as_run")
    # Dataclasses look up the module that they are defined in.
    sys.modules["script_as_run"] = module
    try:
        exec(compile(run.source, "train_gpt.py", "exec"), module.__dict__)
        return name, dataclasses.asdict(module.Settings()) | module.PRESETS[name]
    except (Exception, SystemExit) as error:
        raise BadInput(
            f"the script in {run.log.path} does not give its settings: {described(error)}"
        ) from None


def variable(name: str, value: object) -> str:
    """A setting as a shell takes it, NAME=value."""
    if isinstance(value, bool):
        value = int(value)
    return f"{name.upper()}={shlex.quote(str(value))}"


def run_command(run: FinishedRun, preset: str, defaults: dict) -> str:
    """The command that repeats a run: settings that are not the preset's, and the launcher."""
    words = [variable("preset", preset), variable("seed", run.seed)]
    for name, value in run.log.settings.items():
        if name not in NOT_REPEATED and value != defaults.get(name):
            words.append(variable(name, value))
    launcher = "python"
    if run.log.world_size > 1:
        launcher = f"torchrun --standalone --nproc_per_node={run.log.world_size}"
    return " ".join([*words, launcher, "train_gpt.py"])


def configuration(submission: dict, runs: list[FinishedRun]) -> list[str]:
    """What differs from the preset, and the command of each seed, as lines of README.md."""
    preset, defaults = preset_of(runs[0])
    changed = []
    for name, value in runs[0].log.settings.items():
        if name in MACHINE or name in ("seed", "preset") or value == defaults.get(name):
            continue
        changed.append([name.upper(), str(value), str(defaults.get(name, "no such setting"))])
    lines = ["## Configuration", "", f"On: {submission['technique_summary']}.", ""]
    if changed:
        lines += [f"Preset `{preset}`, with:", "", *table(["setting", "here", "preset"], changed)]
    else:
        lines += [f"Preset `{preset}`, nothing changed.", ""]
    commands = [run_command(run, preset, defaults) for run in runs]
    return [*lines, "## Run command", "", "```bash", *commands, "```", ""]


# ---- README.md
def columns_of(submission: dict) -> list[tuple[str, str, str]]:
    """The rows of COLUMNS that the seeds have."""
    first, *_ = submission["seed_results"].values()
    return [column for column in COLUMNS if column[0] in first]


def meaning_of_score(submission: dict) -> str:
    """What val_bpb is the score of, and what stands beside it."""
    words = (
        "sliding windows over the whole validation split, with the model read back from the "
        "artifact, as are plain windows. The seconds of evaluation hold all passes over that text."
    )
    if submission["evaluation_track"] == "A":
        return f"val_bpb is that of {words}"
    return (
        "val_bpb is that of a model that adapts while it scores the whole validation split: "
        f"{str(submission['adaptation']).rstrip('.')}. Beside it stand the scores of track A, of "
        f"the same artifact as a fixed predictor: those of {words}"
    )


def results_table(submission: dict) -> list[str]:
    """One row a seed; mean and standard deviation where there are several."""
    results = submission["seed_results"]
    columns = columns_of(submission)
    rows = []
    for seed, result in results.items():
        rows.append([seed, *(f"{result[name]:{form}}" for name, _, form in columns)])
    if len(results) > 1:
        for title, summarize in (("mean", statistics.mean), ("standard deviation", deviation)):
            row = [title]
            for name, _, form in columns:
                value = summarize([result[name] for result in results.values()])
                row.append(f"{value:{form}}")
            rows.append(row)
    return table(["seed", *(title for _, title, _ in columns)], rows)


def opening(submission: dict, runs: list[FinishedRun]) -> list[str]:
    """The score, and what keeps it from being one of the challenge's."""
    count = " (one seed)"
    spread = submission["val_bpb_std"]
    if spread is not None:
        count = f" ± {spread:.4f} ({len(runs)} seeds)"
    foreign = []
    if submission["evaluation_track"] == "B":
        score = submission["sliding_val_bpb"]
        foreign.append(
            f"Track B, which adapts while it scores; as a fixed predictor (track A) {score:.4f}"
        )
    if submission["track"] != CHALLENGE:
        foreign.append(f"Track {submission['track']} is none of the challenge's")
    reasons = set()
    for run in runs:
        reasons.update(foreign_to_challenge(run.log))
    foreign += sorted(reasons)
    lines = [
        f"# {submission['name']}",
        "",
        f"{submission['blurb'].rstrip('.')}.",
        "",
        f"**val_bpb {submission['val_bpb']:.4f}**{count}, {submission['bytes_total']:,} bytes of "
        f"{CAP:,}; by {submission['author']}, {submission['date']}.",
        "",
    ]
    if foreign:
        lines += [*(f"- **{reason}.**" for reason in foreign), ""]
    return lines


def readme_of(submission: dict, runs: list[FinishedRun], data: str) -> str:
    """README.md of the record; `data` is a sentence on the validation text."""
    first = runs[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.results["versions"].items())
    files = ["train_gpt.py", "submission.json", "requirements.txt"]
    for run in runs:
        files += [log_name(run.seed), artifact_name(run.seed)]
    rules = []
    for name, holds in submission["compliance"].items():
        rules.append([name, "yes" if holds else "**no**"])
    credits = "; ".join(f"{name} ({credit})" for name, credit in first.techniques())
    lines = [
        *opening(submission, runs),
        "## Results",
        "",
        *results_table(submission),
        meaning_of_score(submission),
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
        "The script starts from openai/parameter-golf #339 and #352. Of what is on here: "
        f"{credits}.",
        "",
    ]
    return "\n".join(lines)
