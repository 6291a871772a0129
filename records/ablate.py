"""Compare changes of train_gpt.py's settings with a base configuration, each with several seeds.

    python records/ablate.py --seeds 3 BACKOUT_ENABLED=0 MEMORY_TOKENS=0,32 "SWA_ENABLED=0 EMA_ENABLED=1"
    python records/ablate.py --base ITERATIONS=400 --grid MATRIX_LR=0.02,0.03 MUON_WD=0,0.04
    python records/ablate.py --equal seconds --launcher "torchrun --standalone --nproc_per_node=8" QUANT=rows
    python records/ablate.py --base "PRESET=record ITERATIONS=7000" --jobs 8 \\
        --launcher "srun -n1 --gpus=1 python" QUANT=rows

Each argument is a change: values behind commas are tried in turn, what is quoted together changes together.
The base is train_gpt.py's defaults, the settings in the environment, and --base. With --equal tokens a run
ends by ITERATIONS, scaled where TRAIN_BATCH_TOKENS changes (tokens are positions, memory tokens included, as
train_gpt.py counts them); with --equal seconds it ends by the base's MAX_WALLCLOCK_SECONDS; without --equal
it is tokens where ITERATIONS is set, else seconds. Each run has a folder of its own in --out, with its log.
The same command, called again, runs only what has not finished; changes and seeds may be added to it.

Without a launcher, or with torchrun, --jobs divides this machine's GPUs and cores. Any other launcher is a
command in front of the script's path that places its runs itself; it needs PRESET, for `auto` may be another
one where they run. If it loses the environment or the folder, {env} in it stands for `env NAME=VALUE...` and
{folder} for the run's folder, which must be there too (a shared file system): --launcher "ssh gpu1 'cd
{folder} && {env} python3'". Ctrl-C and SIGTERM end what was started here; of a run behind ssh that is ssh,
and the run itself may go on where it is.

It writes ablation.md, ablation.json and ablation.png, with no private folder's name in them. --publish FOLDER
makes a folder of these (ablation.md is its README.md) and the script, once all runs have ended; its place is
records/track_<track>/<date>_<name>. The exit status is 0 if every run has finished, 1 if one failed, 2 after
one line for what cannot be run, 130 if it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from audit import LABELS, ROOT, BadInput, Log, Parser, described, say
from record_text import deviation, table
from shards import write_atomically  # of data/, where finished_runs looks
from submit import RECORDS, split_readme, update_leaderboard, workspace

MANAGED = {"SEED", "RUN_ID", "RESUME", "ARTIFACT", "SAMPLE"}  # a run's own, not a configuration's
NEEDED = "settings_from fields_of parse_value as_typed mistyped_settings UserError FINEWEB FINEWEB_TOKENIZER"
PATHS = "DATA_PATH", "TOKENIZER_PATH"
SAME_TOKENS = 0.01  # by what share of the base's tokens a run of --equal tokens may miss them
GRACE = 40.0  # seconds from SIGTERM to SIGKILL: torchrun gives its workers 30
COLOURS = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#0072B2",
    "#999999",
)  # Okabe and Ito 2008
STYLES = "-", "--", ":"
OTHER = "use another --name or --out"


# ---- What is asked for
class Configuration(NamedTuple):
    """The base, or a change of it."""

    changes: dict[str, str]
    variables: dict[str, str]  # the environment variables that make it, without SEED and RUN_ID
    settings: dict  # typed and complete, as on this machine

    @property
    def slug(self) -> str:
        """The changes as a file name, with a digest where that loses something."""
        plain = (
            "+".join(f"{name.lower()}_{value}" for name, value in self.changes.items()) or "base"
        )
        safe = re.sub(r"[^A-Za-z0-9.+_-]", "_", plain)[:100]
        return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}"


class Run(NamedTuple):
    """One training run."""

    configuration: Configuration
    seed: int
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.folder.name}.txt"


def label_of(changes: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in changes.items()) or "base"


def import_script(path: Path) -> ModuleType:
    """The script as a module, for its settings; BadInput unless it has train_gpt.py's functions for them."""
    specification = importlib.util.spec_from_file_location("ablated_script", path)
    if not path.is_file() or not specification:
        raise BadInput(f"--script {path} is no Python file")
    module = sys.modules["ablated_script"] = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadInput(f"--script {path} cannot be imported: {described(error)}") from error
    if missing := [name for name in NEEDED.split() if not hasattr(module, name)]:
        raise BadInput(
            f"--script {path} has no {missing[0]}: its settings are not as train_gpt.py's"
        )
    return module


class Reader:
    """Settings as people type them, checked against a script's and put into its order."""

    def __init__(self, script: ModuleType):
        self.script, self.fields = (
            script,
            {field.name.upper(): field for field in script.fields_of()},
        )

    def normal(self, name: str, text: str) -> str:
        """The value as the script would write it; BadInput for what is no setting or no value of it."""
        if name not in self.fields:
            hints = self.script.mistyped_settings({name: text}) or [
                f"{name} is not a setting"
                + (
                    f"; did you mean {name.upper()}?"
                    if name.upper() in self.fields
                    else ": python train_gpt.py --help lists them"
                )
            ]
            raise BadInput(hints[0].removeprefix("warning: "))
        if name in MANAGED:
            raise BadInput(
                f"{name}={text}: every run has its own" + "; use --seeds" * (name == "SEED")
            )
        if not text:
            raise BadInput(f"{name}: a value is empty: write {name}=value or {name}=value,value")
        try:
            text = (
                str(Path(text).absolute()) if name in PATHS else text
            )  # runs have other working folders
            return self.script.as_typed(self.script.parse_value(self.fields[name], text))
        except ValueError as error:
            raise BadInput(f"{name}={text} {error}") from None

    def pairs(self, text: str) -> dict[str, str]:
        """`NAME=value NAME=value` by name, not checked but for its form."""
        found: dict[str, str] = {}
        for name, equals, value in (word.partition("=") for word in text.split()):
            if not equals:
                raise BadInput(f"{name}: write NAME=value")
            if name in found:
                raise BadInput(f"{name} is given twice in '{text}'")
            found[name] = value
        return found

    def ordered(self, changes: dict[str, str]) -> dict[str, str]:
        return {name: changes[name] for name in self.fields if name in changes}

    def alternatives(self, argument: str) -> list[dict[str, str]]:
        """What one argument stands for: a change for each of its values, the product within a group."""
        pairs = self.pairs(argument)
        if not pairs:
            raise BadInput("an argument is empty: write NAME=value")
        values = [
            [self.normal(name, value) for value in text.split(",")] for name, text in pairs.items()
        ]
        return [self.ordered(dict(zip(pairs, chosen))) for chosen in itertools.product(*values)]

    def changes(self, arguments: list[str], grid: bool) -> list[dict[str, str]]:
        """All changes in order; with `grid` the product of the arguments."""
        each = [self.alternatives(argument) for argument in arguments]
        if not grid or not each:
            return list(itertools.chain(*each))
        names = [name for first, *_ in each for name in first]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise BadInput(f"--grid: {repeated[0]} is in two arguments")
        return [
            self.ordered(dict(itertools.chain(*(part.items() for part in chosen))))
            for chosen in itertools.product(*each)
        ]

    def base(self, text: str, environment: dict[str, str]) -> dict[str, str]:
        """The base's settings: the environment's, then --base's."""
        inherited = {
            x: environment[x] for x in self.fields if environment.get(x) and x not in MANAGED
        }
        given = {**inherited, **self.pairs(text)}
        return self.ordered({name: self.normal(name, value) for name, value in given.items()})

    def with_data(self, variables: dict[str, str]) -> dict[str, str]:
        """With FineWeb by absolute paths, if it is here; BadInput for data that is named and not there."""
        data, tokenizer = map(variables.get, PATHS)
        folder, file = (
            Path(data or self.script.FINEWEB),
            Path(tokenizer or self.script.FINEWEB_TOKENIZER),
        )
        if data and not folder.is_dir():
            raise BadInput(f"DATA_PATH={data} is not a folder")
        if tokenizer and not file.is_file():
            raise BadInput(f"TOKENIZER_PATH={tokenizer} is not a file")
        if not folder.is_dir():  # the script takes the demo corpus, wherever it is called
            return variables
        used = tokenizer or file.is_file() and not (folder / "tokenizer.model").is_file()
        return {
            **variables,
            "DATA_PATH": str(folder.absolute()),
            **({"TOKENIZER_PATH": str(file.absolute())} if used else {}),
        }


def parse_seeds(text: str) -> list[int]:
    """`3` is 1, 2, 3; `1337,42` are these two, `42,` this one."""
    try:
        seeds = (
            [int(x) for x in text.split(",") if x] if "," in text else list(range(1, int(text) + 1))
        )
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise BadInput(
            f"--seeds {text}: write how many, or the seeds themselves, each once: 3 or 1337,42,7"
        )
    return seeds


class Ablation:
    """A script, a base to compare with, and the folder of their runs; plan.json in it says what was asked for
    in all calls."""

    def __init__(self, script: Path, base: str, equal: str | None, folder: Path):
        self.path, self.folder = script.absolute(), folder.absolute()
        self.reader, self.plan = Reader(import_script(self.path)), self.folder / "plan.json"
        self.known, self.seeds = [], []
        self.code, self.source = self.path.read_bytes(), self.path.read_text(encoding="utf-8")
        self.sha256 = hashlib.sha256(self.code).hexdigest()
        self.given = self.reader.base(base, dict(os.environ))
        self.equal = equal or ("tokens" if "ITERATIONS" in self.given else "seconds")
        clock = "MAX_WALLCLOCK_SECONDS"
        if self.equal == "tokens" and "ITERATIONS" not in self.given:
            raise BadInput("--equal tokens needs ITERATIONS in --base or the environment")
        if self.equal == "tokens" and float(self.given.get(clock, 0)):
            raise BadInput(
                f"{clock}={self.given[clock]} may end runs before they have equal tokens: leave "
                "it out or use --equal seconds"
            )
        # a preset would bring a clock of its own
        seconds = 0.0 if self.equal == "tokens" else self.typed({}, self.given)[clock.lower()]
        if self.equal == "seconds" and not seconds:
            raise BadInput(f"--equal seconds needs {clock} above 0")
        self.given[clock] = str(seconds)
        self.base = self.configure({})

    def configure(self, changes: dict[str, str]) -> Configuration:
        """The base with these changes, as long as the base; BadInput for what cannot be."""
        fixed = ["MAX_WALLCLOCK_SECONDS", "ITERATIONS"][: 2 if self.equal == "tokens" else 1]
        if wrong := [name for name in fixed if name in changes]:
            raise BadInput(
                f"{wrong[0]} cannot change: --equal {self.equal} gives all runs the base's"
            )
        variables = self.reader.with_data({**self.given, **changes})
        settings = self.typed(changes, variables)
        if self.equal == "tokens" and changes:
            base, batch = self.base.settings, settings["train_batch_tokens"]
            tokens = base["iterations"] * base["train_batch_tokens"]
            steps = max(1, round(tokens / batch))
            if abs(steps * batch / tokens - 1) > SAME_TOKENS:
                raise BadInput(
                    f"{label_of(changes)}: {steps} of its steps of {batch:,} tokens are not the "
                    f"base's {tokens:,} tokens: choose another ITERATIONS or --equal seconds"
                )
            variables = {**variables, "ITERATIONS": str(steps)}
            settings = self.typed(changes, variables)
        return Configuration(changes, variables, settings)

    def typed(self, changes: dict[str, str], variables: dict[str, str]) -> dict:
        """The script's settings, all of them; BadInput with what the script says against them."""
        try:
            return dataclasses.asdict(self.reader.script.settings_from(variables)[0])
        except self.reader.script.UserError as error:
            raise BadInput(f"{label_of(changes)}: {error}") from None

    def configurations(self, arguments: list[str], grid: bool) -> list[Configuration]:
        """The base and what the arguments ask for; BadInput where two of them are the same."""
        found = [self.base]
        for new in map(self.configure, self.reader.changes(arguments, grid)):
            same = next((old for old in found if old.settings == new.settings), None)
            if same is None:
                found.append(new)
            elif same is not self.base:
                raise BadInput(
                    f"{label_of(new.changes)} is what {label_of(same.changes)} is: leave one out"
                )
            elif not grid:  # a grid may pass through the base
                raise BadInput(f"{label_of(new.changes)} is what the base has: leave it out")
        return found

    def identity(self) -> dict:
        """What all runs of a folder share."""
        return dict(script_sha256=self.sha256, equal=self.equal, base=self.base.variables)

    def claim(self):
        """Lock the folder until the returned file, and its copies in runs, are closed, and read its plan."""
        if (
            self.folder.exists()
            and not self.plan.is_file()
            and (
                not self.folder.is_dir()
                or any(path.name[:5] not in (".lock", ".plan") for path in self.folder.iterdir())
            )
        ):
            raise BadInput(f"{self.folder} is no ablation's folder: {OTHER}")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(
                f"{self.folder}: another ablate.py, or a run it left, is at work here"
            ) from None
        if self.plan.is_file():
            self.read_plan()
        return lock

    def read_plan(self) -> None:
        """Take changes and seeds of earlier calls; BadInput if those had another base, script or data."""
        try:
            plan = json.loads(self.plan.read_text(encoding="utf-8"))
            theirs = {x: plan[x] for x in self.identity()}
            self.known, self.seeds = plan["changes"], plan["seeds"]
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{self.plan} is damaged: {OTHER}") from None
        for name, ours in self.identity().items():
            if theirs[name] != ours:
                raise BadInput(
                    f"{self.folder} has another {differing(name, theirs[name], ours)}: {OTHER}"
                )

    def add_to_plan(self, configurations: list[Configuration], seeds: list[int]) -> None:
        """Note what is asked for now beside what was before."""
        self.known += [x.changes for x in configurations if x.changes not in self.known]
        self.seeds += [seed for seed in seeds if seed not in self.seeds]
        plan = dict(self.identity(), changes=self.known, seeds=self.seeds)
        write_atomically(self.plan, json.dumps(plan, indent=1).encode())

    def run(self, configuration: Configuration, seed: int) -> Run:
        return Run(configuration, seed, self.folder / f"{configuration.slug}-seed{seed}")

    def all_runs(self, asked: list[Run]) -> list[Run]:
        """The runs of this call, and of earlier calls those that were begun."""
        earlier = [
            self.run(self.configure(changes), seed) for changes in self.known for seed in self.seeds
        ]
        begun = {run.folder.name: run for run in earlier if run.folder.is_dir()}
        return list({**{run.folder.name: run for run in asked}, **begun}.values())

    def public(self, text: str) -> str:
        """A text without names of private folders: a path in the repository or the current folder is relative
        to it, of another its last part is left."""
        named = [x[name] for x in (self.base.variables, *self.known) for name in PATHS if name in x]
        for folder in (ROOT, Path.cwd(), *(Path(path).parent for path in named)):
            text = text.replace(f"{folder}{os.sep}", "")
        return re.sub(r"""(?<![\w./)~-])/(?:[^\s/:;,'"]+/)*(?=[\w.~])""", "", text)


def differing(name: str, theirs, ours) -> str:
    """What is not the same, in a few words."""
    if name != "base":
        return f"{name.replace('equal', '--equal')} ({str(theirs)[:9]}, not {str(ours)[:9]})"
    first = next(x for x in [*theirs, *ours] if theirs.get(x) != ours.get(x))
    return f"base ({first}={theirs.get(first, 'unset')}, not {ours.get(first, 'unset')})"


# ---- What came of a run
class Outcome(NamedTuple):
    """A run as its log and its JSON tell it. Curves are lists of (tokens, value)."""

    name: str
    changes: dict[str, str]
    seed: int
    status: str  # finished, failed, or unfinished
    error: str = ""
    script_sha256: str = ""
    val_bpb: float = 0.0  # of the sliding window, like val_loss
    val_loss: float = 0.0
    roundtrip_val_bpb: float = 0.0
    pre_quantization_val_bpb: float = 0.0
    val_targets: int = 0
    val_bytes: int = 0  # of the text that was scored
    bytes_total: int = 0
    steps: int = 0
    tokens: int = 0
    step_avg_ms: float = 0.0
    train_seconds: float = 0.0
    seconds: float = 0.0  # of all stages
    data: str = ""
    runtime: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    val_curve: list[tuple[int, float]] = []
    train_curve: list[tuple[int, float]] = []

    @property
    def finished(self) -> bool:
        return self.status == "finished"


def read_results(run: Run) -> dict:
    """The JSON of a run that has its score, else nothing."""
    try:
        results = json.loads(run.log.with_suffix(".json").read_text(encoding="utf-8"))
        return results if LABELS["sliding"] in results and run.log.is_file() else {}
    except (OSError, ValueError, TypeError):
        return {}


def last_words(run: Run) -> str:
    """How a run that left no results ended, with the last error that it printed, or else its last line."""
    status = int((run.folder / "exit_status").read_text())
    text = (run.folder / "console.txt").read_text(encoding="utf-8", errors="replace")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |\w*(Error|Exception)\b", line)]
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return f"ended {how}: {(errors or lines or ['it printed nothing'])[-1][:300]}"


def curve(log: Log, quantity: str, batch: int) -> list[tuple[int, float]]:
    """A quantity of the step lines over tokens; where a step has two such lines, the second's."""
    found = re.findall(rf"^step:(\d+)/\d+ (?:\S+ )?{quantity}:(\S+)", log.lines, re.M)
    return sorted({int(step) * batch: float(value) for step, value in found}.items())


def read_outcome(run: Run, ablation: Ablation) -> Outcome:
    """What came of a run; failed too if another script made it, or other settings than planned."""
    planned, results = run.configuration, read_results(run)
    known = run.folder.name, planned.changes, run.seed
    wanted = {name.lower(): planned.settings[name.lower()] for name in planned.variables}
    try:
        if not results and not (run.folder / "exit_status").is_file():
            return Outcome(*known, "unfinished")
        if not results:
            return Outcome(*known, "failed", last_words(run))
        log = Log(run.log)
        wrong = [
            x
            for x, value in {**wanted, "seed": run.seed}.items()
            if results["settings"][x] != value
        ]
        if wrong or log.source != ablation.source:
            return Outcome(
                *known,
                "failed",
                f"{wrong[0].upper()} is not as planned"
                if wrong
                else "its log begins with another script",
            )
        return Outcome(*known, "finished", script_sha256=ablation.sha256, **figures(results, log))
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        return Outcome(*known, "failed", f"its files cannot be read: {described(error)}")


def figures(results: dict, log: Log) -> dict:
    """The fields of an Outcome that a finished run's JSON and log have."""
    score, batch = results[LABELS["sliding"]], results["settings"]["train_batch_tokens"]
    same = ["bytes_total", "steps", "tokens", "step_avg_ms", "train_seconds", "versions"]
    return dict(
        {name: results[name] for name in same},
        val_bpb=score["val_bpb"],
        val_loss=score["val_loss"],
        roundtrip_val_bpb=results[LABELS["roundtrip"]]["val_bpb"],
        val_targets=score["targets"],
        pre_quantization_val_bpb=results["pre_quantization"]["val_bpb"],
        val_bytes=score["bytes"],
        seconds=sum(results["stages"].values()),
        runtime=tuple(results["runtime"]),
        data=log.last(r"data:(\S.* tokenizer:.* sha256:[0-9a-f]+)", ""),
        val_curve=curve(log, "val_bpb", batch),
        train_curve=curve(log, "train_loss", batch),
    )


def of_one_text(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes, of which those that scored another text than the first have failed: bits per byte of two
    texts cannot be compared."""
    size = next((x.val_bytes for x in outcomes if x.finished), 0)
    return [
        x._replace(
            status="failed",
            error=f"it scored another text, of {x.val_bytes} bytes, not {size}: "
            "move it away to run it again",
        )
        if x.finished and x.val_bytes != size
        else x
        for x in outcomes
    ]


# ---- Statistics
class Row(NamedTuple):
    """A configuration's results over its seeds; None where there are too few of them."""

    label: str
    status: dict[int, str]  # by seed
    val_bpb: dict[int, float]
    paired: dict[int, float]  # differences to the base with the same seed
    mean: float | None
    deviation: float | None  # n - 1
    difference: float | None  # of the means, to the base; like all that follows, over common seeds
    low: float | None  # of its 95% interval, by Welch's test
    high: float | None
    p_welch: float | None
    p_holm: float | None  # p_welch, adjusted for the number of changes (Holm 1979)
    p_paired: float | None
    bytes_total: float | None
    steps: float | None
    step_avg_ms: float | None
    train_seconds: float | None


def welch(
    values: list[float], base: list[float]
) -> tuple[float, float, float] | tuple[None, None, None]:
    """The 95% interval of mean(values) - mean(base), and p (Welch 1947); None with under two values in
    either, or no spread in both."""
    from scipy import stats

    if min(len(values), len(base)) < 2 or len(set(values)) == len(set(base)) == 1:
        return None, None, None
    test = stats.ttest_ind(values, base, equal_var=False)
    interval = test.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(test.pvalue)


def paired_p(differences: list[float]) -> float | None:
    """p of Student's test on pairs with these differences; None with under two of them, or no spread."""
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue) if len(set(differences)) > 1 else None


def holm(p_values: list[float | None]) -> list[float | None]:
    """p-values adjusted for their number n: the i-th smallest, from 0, times n - i, and never falling."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted, largest = list(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        largest = adjusted[i] = max(largest, min(1.0, p * (len(order) - rank)))
    return adjusted


def compare(outcomes: list[Outcome]) -> list[Row]:
    """A row for each configuration in order, the base first."""
    groups: dict[str, list[Outcome]] = {"base": []}
    for outcome in outcomes:
        groups.setdefault(label_of(outcome.changes), []).append(outcome)
    base = {x.seed: x.val_bpb for x in groups["base"] if x.finished}
    rows = [row_of(label, group, base) for label, group in groups.items()]
    return [row._replace(p_holm=p) for row, p in zip(rows, holm([row.p_welch for row in rows]))]


def row_of(label: str, group: list[Outcome], base: dict[int, float]) -> Row:
    """One configuration against the base's scores by seed; p_holm is left out."""
    done = sorted((x for x in group if x.finished), key=lambda x: x.seed)
    scores = {x.seed: x.val_bpb for x in done}
    common = [seed for seed in scores if seed in base and label != "base"]
    paired = {seed: scores[seed] - base[seed] for seed in common}
    return Row(
        label,
        {x.seed: x.status for x in group},
        scores,
        paired,
        statistics.fmean(scores.values()) if scores else None,
        deviation(list(scores.values())),
        statistics.fmean(paired.values()) if paired else None,
        *welch([scores[seed] for seed in common], [base[seed] for seed in common]),
        None,
        paired_p(list(paired.values())),
        *(
            statistics.fmean(getattr(x, name) for x in done) if done else None
            for name in Row._fields[-4:]
        ),
    )


# ---- What is written
def shown(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def shown_p(p: float | None) -> str:
    return "<0.0001" if p is not None and p < 1e-4 else shown(p, ".4f")


def results_table(rows: list[Row]) -> list[str]:
    """The rows in Markdown, and an empty line."""
    seeds = sorted({seed for row in rows for seed in row.status})
    lines = []
    for row in rows:
        cells = [
            f"{row.val_bpb[x]:.4f}" if x in row.val_bpb else row.status.get(x, "-") for x in seeds
        ]
        interval = "-" if row.low is None else f"[{row.low:+.4f}, {row.high:+.4f}]"
        lines.append(
            [
                row.label,
                *cells,
                shown(row.mean, ".4f"),
                shown(row.deviation, ".4f"),
                shown(row.difference, "+.4f"),
                interval,
                *map(shown_p, (row.p_welch, row.p_holm, row.p_paired)),
                shown(row.bytes_total, ",.0f"),
                shown(row.steps, ",.0f"),
                shown(row.step_avg_ms, ".1f"),
                shown(row.train_seconds, ".1f"),
            ]
        )
    return table(
        [
            "change",
            *(f"seed {seed}" for seed in seeds),
            "mean",
            "std",
            "difference",
            "95% interval",
            "p (Welch)",
            "p (Holm)",
            "p (paired)",
            "bytes",
            "steps",
            "ms/step",
            "train s",
        ],
        lines,
    )


def circumstances(ablation: Ablation, outcomes: list[Outcome]) -> dict:
    """What the figures were made with, by the runs' own logs where these know it."""
    done = [outcome for outcome in outcomes if outcome.finished]
    return dict(
        date=time.strftime("%Y-%m-%d"),
        script=str(ablation.path),
        script_sha256=ablation.sha256,
        equal=ablation.equal,
        base=ablation.base.variables,
        data=sorted({x.data for x in done}),
        validation=sorted(
            {f"{x.val_targets:,} targets, {x.val_bytes:,} bytes of text" for x in done}
        ),
        device=sorted({"; ".join(x.runtime[:3]) for x in done}),
        versions=sorted(
            {", ".join(f"{name} {text}" for name, text in x.versions.items()) for x in done}
        ),
    )


def markdown(name: str, command: str, about: dict, rows: list[Row], outcomes: list[Outcome]) -> str:
    """The report: what was run, the table, what it means, what failed."""
    compared, script = sum(row.p_welch is not None for row in rows), Path(about["script"]).name
    base = " ".join(f"{x}={y}" for x, y in about["base"].items())
    lines = [
        f"# Ablation: {name}",
        "",
        f"    {command}",
        "",
        f"- base: {base}; else {script}'s defaults. All runs have equal {about['equal']}.",
        f"- script: {about['script']}, sha256 {about['script_sha256']}",
        *(
            f"- {key}: {text}"
            for key in ("data", "validation", "device", "versions")
            for text in about[key]
        ),
        f"- date: {about['date']}",
        "",
        "Bits per byte of final_int6_sliding_window; a difference below 0 is better than the base.",
        "",
        *results_table(rows),
        "Difference, interval and p are over the seeds that a change and the base both have. The interval "
        "and p (Welch) take runs as independent; p (paired) takes the runs of a seed as a pair, since they "
        "share the order of the data.",
    ]
    if compared > 1:
        lines += [
            f"{compared} changes are compared: of as many that do nothing, one has p (Welch) below "
            f"{1 / compared:.2g} by chance. p (Holm) is adjusted for that."
        ]
    if not any(row.deviation for row in rows):
        lines += ["One seed shows no spread: no claim can rest on it."]
    lines += ["", "![differences to the base](ablation.png)"] * any(row.paired for row in rows)
    failed = [f"- {x.name}: {x.error}" for x in outcomes if x.status == "failed"]
    return "\n".join(lines + (["", "## Failed", "", *failed] if failed else [])) + "\n"


def draw_differences(axes, rows: list[Row], looks: dict[str, dict]) -> None:
    """Differences with their intervals, in this order from the top; small dots are single seeds."""
    for place, row in enumerate(rows):
        reach = (
            [[row.difference - row.low], [row.high - row.difference]]
            if row.low is not None
            else None
        )
        axes.errorbar(
            row.difference,
            place,
            xerr=reach,
            fmt="o",
            color=looks[row.label]["color"],
            markersize=7,
            linewidth=2.2,
        )
        pairs = list(row.paired.values())
        axes.plot(pairs, [place + 0.22] * len(pairs), ".", color="black", markersize=4)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.label.replace(" ", "\n") for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("difference in val_bpb to the base (left is better)")
    axes.set_title("mean and 95% interval (Welch); small dots: the runs of one seed", fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def draw_curves(axes, outcomes: list[Outcome], looks: dict[str, dict]) -> None:
    """The base's curve taken from each other one, over tokens: of val_bpb where runs were validated on the
    way, else of the training loss. The mean over common seeds, where all of them have a point."""
    from matplotlib.ticker import EngFormatter

    done, late = [x for x in outcomes if x.finished], [0.0]
    validated = any(len(x.val_curve) > 1 for x in done)
    curves = {
        (label_of(x.changes), x.seed): dict(x.val_curve if validated else x.train_curve)
        for x in done
    }
    for label, look in looks.items():
        pairs = [
            (own, curves["base", seed])
            for (name, seed), own in curves.items()
            if name == label and ("base", seed) in curves
        ]
        shared = sorted(set.intersection(*(set(own) & set(base) for own, base in pairs)))
        values = [statistics.fmean(own[x] - base[x] for own, base in pairs) for x in shared]
        axes.plot(shared, values, marker=".", linewidth=1.4, label=label, **look)
        late += [value for x, value in zip(shared, values) if x >= 0.15 * shared[-1]]
    margin = 0.05 * (max(late) - min(late)) or 1.0
    axes.set_ylim(min(late) - margin, max(late) + margin)  # the beginning would flatten the rest
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(
        f"difference in {'val_bpb' if validated else 'training loss, nats,'} to the base"
    )
    axes.set_title(
        "means over the seeds" + ", plain windows, before quantization" * validated, fontsize=10
    )
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def draw(rows: list[Row], outcomes: list[Outcome]) -> bytes:
    """Both panels as PNG, of the rows that have a difference, the best first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = [dict(color=colour, linestyle=style) for style in STYLES for colour in COLOURS]
    looks = dict(zip((row.label for row in rows if row.label != "base"), itertools.cycle(styles)))
    rows = sorted((row for row in rows if row.paired), key=lambda row: row.difference)
    height = 1.6 + 0.42 * sum(1 + row.label.count(" ") for row in rows)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(14, max(4.2, height)), layout="constrained"
    )
    draw_differences(left, rows, looks)
    draw_curves(right, outcomes, {row.label: looks[row.label] for row in rows})
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    pyplot.close(figure)
    return picture.getvalue()


def write_report(ablation: Ablation, name: str, asked: list[Run]) -> list[Outcome]:
    """Read every run and write ablation.md, .json and .png anew; what came of all runs. BadInput or OSError
    for what cannot be written."""
    outcomes = of_one_text([read_outcome(run, ablation) for run in ablation.all_runs(asked)])
    rows, about = compare(outcomes), circumstances(ablation, outcomes)
    command = shlex.join(["python", "records/ablate.py", *sys.argv[1:]])
    content = dict(
        name=name,
        command=command,
        **about,
        rows=[row._asdict() for row in rows],
        runs=[outcome._asdict() for outcome in outcomes],
    )
    for ending, text in (
        (".json", json.dumps(content, indent=1, ensure_ascii=False) + "\n"),
        (".md", markdown(name, command, about, rows, outcomes)),
    ):
        write_atomically(ablation.folder / f"ablation{ending}", ablation.public(text).encode())
    if any(row.paired for row in rows):
        try:
            picture = draw(rows, outcomes)
        except Exception as error:
            raise BadInput(f"the plot cannot be drawn: {described(error)}") from error
        write_atomically(ablation.folder / "ablation.png", picture)
    return outcomes


def check_target(folder: Path) -> None:
    """BadInput unless an ablation can be published there."""
    if folder.exists():
        raise BadInput(f"--publish {folder} exists already: name a new folder")
    if RECORDS in folder.absolute().parents:
        split_readme(RECORDS)


def publish(ablation: Ablation, folder: Path) -> None:
    """A new folder with the report and the script as it ran, all at once; the leaderboard links it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with workspace(folder.parent) as made:
        for path in sorted(ablation.folder.glob("ablation.*")):
            shutil.copyfile(path, made / ("README.md" if path.suffix == ".md" else path.name))
        (made / "train_gpt.py").write_bytes(ablation.code)
        check_target(folder)
        made.rename(folder)
    if RECORDS in folder.absolute().parents:
        update_leaderboard(RECORDS)


# ---- Running
Report = Callable[[], "list[Outcome]"]  # writes it, and returns what came of all runs


class Slot(NamedTuple):
    """A job's share of this machine; no cores: not confined."""

    cores: tuple[int, ...] = ()
    variables: dict[str, str] = {}


class Job(NamedTuple):
    """A run at work."""

    run: Run
    slot: Slot
    started: float
    process: subprocess.Popen


def visible_gpus() -> list[str]:
    """The GPUs that may be used, by CUDA_VISIBLE_DEVICES or by nvidia-smi, without opening any."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [
            x for x in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if x.strip() not in ("", "-1")
        ]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return [str(i) for i in range(len(re.findall(r"^GPU \d+:", listed, re.M)))]


def runs_elsewhere(launcher: list[str]) -> bool:
    """Whether a launcher places its runs itself."""
    return bool(launcher) and Path(launcher[0]).name != "torchrun"


def divide(jobs: int, launcher: list[str], on_gpus: bool) -> list[Slot]:
    """A slot for each job: equal shares of GPUs and cores, unless a launcher places its runs itself."""
    torchrun = bool(launcher) and not runs_elsewhere(launcher)
    if jobs == 1 or runs_elsewhere(launcher):
        return [Slot()] * jobs
    has = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if has else list(range(os.cpu_count()))
    gpus = visible_gpus() if on_gpus else []
    for things, what in ((cores, "cores"), (gpus, "GPUs")):
        if things and jobs > len(things):
            raise BadInput(f"--jobs {jobs}: there are only {len(things)} {what} here")
    slots, each, gpus_each = [], len(cores) // jobs, len(gpus) // jobs
    for i in range(jobs):
        variables = (
            {} if torchrun or os.environ.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": str(each)}
        )
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i * gpus_each : (i + 1) * gpus_each])
        slots.append(Slot(tuple(cores[i * each : (i + 1) * each]), variables))
    return slots


@contextlib.contextmanager
def confined_to(cores: tuple[int, ...]):
    """What is started in here runs on these cores; nothing changes if there are none or the system cannot."""
    can = cores and hasattr(os, "sched_setaffinity")
    before = os.sched_getaffinity(0) if can else cores
    try:
        os.sched_setaffinity(0, cores) if can else None
        yield
    finally:
        os.sched_setaffinity(0, before) if can else None


def command_of(
    launcher: list[str], script: Path, variables: dict[str, str], folder: Path
) -> list[str]:
    """The words that start a run: launcher and script, or this Python and the script."""
    assigned, words = ["env", *(f"{name}={value}" for name, value in variables.items())], []
    for word in launcher:
        place = str(folder) if word == "{folder}" else shlex.quote(str(folder))
        # within a longer word, which a shell elsewhere splits again, values are quoted
        words += (
            assigned
            if word == "{env}"
            else [word.replace("{env}", shlex.join(assigned)).replace("{folder}", place)]
        )
    return [*(words or [sys.executable]), str(script)]


class Pool:
    """The runs at work, each in a process group, a folder and a slot of its own."""

    def __init__(
        self, ablation: Ablation, launcher: list[str], slots: list[Slot], lock, keep_artifacts
    ):
        self.ablation, self.launcher, self.free, self.lock = ablation, launcher, list(slots), lock
        self.keep_artifacts = keep_artifacts
        self.running: list[Job] = []

    def start(self, run: Run) -> None:
        """Start a run in an empty folder. It holds the lock too, for as long as it lives."""
        if run.folder.exists():
            shutil.rmtree(run.folder)
        run.folder.mkdir()
        slot, names = self.free.pop(0), self.ablation.reader.fields
        own = {**run.configuration.variables, "SEED": str(run.seed), "RUN_ID": run.folder.name}
        inherited = {name: text for name, text in os.environ.items() if name not in names}
        with open(run.folder / "console.txt", "wb") as console, confined_to(slot.cores):
            self.running.append(
                Job(
                    run,
                    slot,
                    time.monotonic(),
                    subprocess.Popen(
                        command_of(self.launcher, self.ablation.path, own, run.folder),
                        cwd=run.folder,
                        env={**inherited, **slot.variables, **own},
                        stdin=subprocess.DEVNULL,
                        stdout=console,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=[self.lock.fileno()],
                    ),
                )
            )

    def ended(self) -> list[Outcome]:
        """What came of the runs that have ended since the last call; their slots are free."""
        done = [job for job in self.running if job.process.poll() is not None]
        self.running = [job for job in self.running if job not in done]
        self.free += [job.slot for job in done]
        return [self.outcome(job) for job in done]

    def outcome(self, job: Job) -> Outcome:
        """What came of a job that has ended. The artifacts of one that has finished are removed."""
        (job.run.folder / "exit_status").write_text(f"{job.process.returncode}\n")
        outcome = read_outcome(job.run, self.ablation)
        for path in (
            job.run.folder.rglob("*.ptz") if outcome.finished and not self.keep_artifacts else ()
        ):
            path.unlink()
        return outcome

    def stop(self) -> None:
        """End what is at work, with all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for job in self.running:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(job.process.pid, number)
            end = time.monotonic() + GRACE
            while (
                any(job.process.poll() is None for job in self.running) and time.monotonic() < end
            ):
                time.sleep(0.05)
        self.running = []


def step_of(run: Run) -> str:
    """How far a run is, by the last step line of its log."""
    try:
        with open(run.log, "rb") as file:
            file.seek(max(0, run.log.stat().st_size - 2000))
            found = re.findall(rb"^step:(\d+/\d+) ", file.read(), re.M)
    except OSError:
        found = []
    return found[-1].decode() if found else "-"


def time_left(pool: Pool, waiting: int, outcomes: list[Outcome]) -> str:
    """Hours, minutes and seconds, by the runs that have finished."""
    known = [x.seconds for x in outcomes if x.finished]
    if not known:
        return "?"
    mean, now = statistics.fmean(known), time.monotonic()
    work = waiting * mean + sum(max(0.0, mean - (now - job.started)) for job in pool.running)
    seconds = round(work / (len(pool.running) + len(pool.free)))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def tried(report: Report, before: list[Outcome]) -> list[Outcome]:
    """The report; where it cannot be written that is said, since runs are at work, and `before` returned."""
    try:
        return report()
    except Exception as error:
        say(f"warning: no report could be written: {described(error)}")
        return before


def carry_out(pool: Pool, asked: int, waiting: list[Run], report: Report) -> None:
    """Run what waits, in order, with a progress bar on stderr; report while others are at work."""
    from tqdm import tqdm

    outcomes, changed, reported, drawn = tried(report, []), False, time.monotonic(), 0.0
    pause = 1.0 if sys.stderr.isatty() else 60.0
    with tqdm(
        total=asked,
        initial=asked - len(waiting),
        mininterval=pause,
        bar_format="{n_fmt}/{total_fmt} runs, {elapsed}{desc}",
    ) as bar:
        while waiting or pool.running:
            while waiting and pool.free:
                pool.start(waiting.pop(0))
            time.sleep(0.1)
            for found in pool.ended():
                figure, changed = (
                    f"val_bpb {found.val_bpb:.4f}" if found.finished else found.error,
                    True,
                )
                bar.write(f"{found.name}: {figure}", file=sys.stderr)
                bar.update()
            if changed and pool.running and time.monotonic() > reported + 5:
                outcomes, changed, reported = tried(report, outcomes), False, time.monotonic()
            if time.monotonic() > drawn + pause:
                drawn, left = time.monotonic(), time_left(pool, len(waiting), outcomes)
                at_work = (f"{job.run.folder.name} {step_of(job.run)}" for job in pool.running)
                bar.set_description_str(f", left {left}: {', '.join(at_work)}")


def supervise(pool: Pool, asked: int, waiting: list[Run], report: Report) -> list[Outcome]:
    """carry_out() and the last report; whatever ends it, no run goes on after it, and the report has all that
    has finished."""
    try:
        carry_out(pool, asked, waiting, report)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(
                number, signal.SIG_IGN
            )  # to stop takes seconds, and must not be cut short
        missing = len(waiting) + len(pool.running)
        pool.stop()
        tried(report, [])
        raise KeyboardInterrupt(f"{asked - missing} of {asked} runs have ended") from None
    finally:
        pool.stop()
    return report()


def unfinished(asked: list[Run], ablation: Ablation) -> list[Run]:
    """The runs that have not finished. BadInput if one that has would be lost, since it is not as planned."""
    found = [(run, read_outcome(run, ablation)) for run in asked]
    for run, outcome in found:
        if not outcome.finished and read_results(run):
            raise BadInput(f"{run.folder} has a finished run, but {outcome.error}: move it away")
    return [run for run, outcome in found if not outcome.finished]


# ---- Command line
def check_tools(options: argparse.Namespace) -> tuple[int, list[str]]:
    """Jobs and the launcher's words; BadInput for a missing library or launcher, or no number of jobs."""
    if missing := [x for x in ("scipy", "matplotlib", "tqdm") if not importlib.util.find_spec(x)]:
        raise BadInput(f"{missing[0]} is not installed: pip install -r records/requirements.txt")
    try:
        launcher = shlex.split(options.launcher)
    except ValueError as error:
        raise BadInput(f"--launcher {options.launcher}: {error}") from None
    if launcher and not shutil.which(launcher[0]):
        raise BadInput(f"--launcher {options.launcher}: there is no program {launcher[0]}")
    if launcher and os.sep in launcher[0]:
        launcher[0] = os.path.abspath(launcher[0])  # runs have other working folders
    if not options.jobs.isdecimal() or int(options.jobs) < 1:
        raise BadInput(f"--jobs {options.jobs} must be a whole number of at least 1")
    return int(options.jobs), launcher


def ablate(options: argparse.Namespace) -> int:
    """Check everything, run what has not finished, write the report; the exit status."""
    (jobs, launcher), seeds = check_tools(options), parse_seeds(options.seeds)
    check_target(options.publish) if options.publish else None
    ablation = Ablation(
        options.script,
        options.base,
        options.equal,
        options.out or Path("logs", "ablations", options.name),
    )
    configurations = ablation.configurations(options.changes, options.grid)
    if runs_elsewhere(launcher) and ablation.base.settings["preset"] == "auto":
        raise BadInput(
            f"--launcher {options.launcher}: PRESET=auto may be another there: set it in --base"
        )
    slots = divide(jobs, launcher, ablation.base.settings["device"] != "cpu")
    asked = [
        ablation.run(configuration, seed) for seed in seeds for configuration in configurations
    ]
    with ablation.claim() as lock:
        waiting = unfinished(asked, ablation)
        ablation.add_to_plan(configurations, seeds)
        announce(ablation, options.equal, jobs)
        say(
            f"{ablation.folder}: {len(asked)} runs, {len(asked) - len(waiting)} of them have finished before"
        )
        pool = Pool(ablation, launcher, slots, lock, options.keep_artifacts)
        outcomes = supervise(
            pool, len(asked), waiting, lambda: write_report(ablation, options.name, asked)
        )
        publish(ablation, options.publish) if options.publish else None
    print(
        "\n".join(results_table(compare(outcomes)))
        + f"\n{ablation.folder}/ablation.md, .json, .png"
    )
    print(f"published: {options.publish}") if options.publish else None
    names = {run.folder.name for run in asked}
    return int(any(not outcome.finished for outcome in outcomes if outcome.name in names))


def announce(ablation: Ablation, asked: str | None, jobs: int) -> None:
    """What people should know before the runs begin."""
    for warning in ablation.reader.script.mistyped_settings(os.environ):
        say(warning)
    if not asked:
        name = dict(tokens="ITERATIONS", seconds="MAX_WALLCLOCK_SECONDS")[ablation.equal]
        say(
            f"--equal {ablation.equal}: runs end by {name}={ablation.base.settings[name.lower()]:g}"
        )
    if ablation.equal == "seconds" and jobs > 1:
        say("warning: --equal seconds with --jobs above 1: the runs slow each other down")


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, metavar, what in (
        ("base", "", "'NAME=VALUE ...'", "settings of all runs"),
        ("seeds", "3", "N|SEED,...", "how many, from 1 on, or which (default: 3)"),
        ("jobs", "1", "N", "runs at the same time"),
        ("launcher", "", "COMMAND", "put in front of the script's path"),
        ("name", "ablation", "NAME", "the folder is logs/ablations/NAME"),
    ):
        parser.add_argument(f"--{name}", default=default, metavar=metavar, help=what)
    parser.add_argument(
        "changes", nargs="*", metavar="NAME=VALUE", help="a change; none: only the base"
    )
    parser.add_argument(
        "--grid", action="store_true", help="the product of all arguments, not one at a time"
    )
    parser.add_argument(
        "--equal",
        choices=("tokens", "seconds"),
        help="what runs share (default: tokens if ITERATIONS is set, else seconds)",
    )
    parser.add_argument("--out", type=Path, help="another folder")
    parser.add_argument(
        "--publish", type=Path, metavar="FOLDER", help="a new folder for report and script"
    )
    parser.add_argument(
        "--script", type=Path, default=ROOT / "train_gpt.py", help="another train_gpt.py"
    )
    parser.add_argument(
        "--keep-artifacts", action="store_true", help="keep the *.ptz, up to 32 MB a run"
    )
    return parser.parse_intermixed_args()


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        return ablate(parse())
    except KeyboardInterrupt as stop:
        print(
            f"\nstopped: {stop or 'nothing was at work'}; the same command goes on", file=sys.stderr
        )
        return 130
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
