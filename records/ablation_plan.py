"""What an ablation compares: a script, a base, changes of it, and a run of each with every seed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from filelock import FileLock

from commands import BadInput, described
from files import folder_lock, write_atomically
from manifest import ROOT

# Settings that belong to a single run. A configuration has none of them.
MANAGED = frozenset({"SEED", "RUN_ID", "RESUME", "ARTIFACT", "SAMPLE"})
# What a script must have, so that its settings can be read as those of train_gpt.py are.
NEEDED = (
    "settings_from",
    "fields_of",
    "parse_value",
    "as_typed",
    "mistyped_settings",
    "UserError",
    "find_fineweb",
)
PATHS = ("DATA_PATH", "TOKENIZER_PATH")
CLOCK = "MAX_WALLCLOCK_SECONDS"
# With equal tokens, the share of the base's tokens by which a run may miss them.
SAME_TOKENS = 0.01
OTHER_FOLDER = "use another --name or --out"
# The longest part of a file name that stands for a change, without its digest.
LONGEST_SLUG = 100


class Configuration(NamedTuple):
    """The base, or a change of it.

    `variables` are the environment variables that make it, without SEED and RUN_ID. `settings` are
    typed and complete, as they are on this machine.
    """

    changes: dict[str, str]
    variables: dict[str, str]
    settings: dict

    @property
    def slug(self) -> str:
        """The changes as a file name, with a digest where the name does not hold all of them."""
        parts = [f"{name.lower()}_{value}" for name, value in self.changes.items()]
        plain = "+".join(parts) or "base"
        safe = re.sub(r"[^A-Za-z0-9.+_-]", "_", plain)[:LONGEST_SLUG]
        if safe == plain:
            return safe
        digest = hashlib.sha256(plain.encode()).hexdigest()[:6]
        return f"{safe}-{digest}"


class PlannedRun(NamedTuple):
    """One training run, in a folder of its own."""

    configuration: Configuration
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Its RUN_ID, which is its folder's name too."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """Where the script writes its log; the results, a JSON, are beside it."""
        return self.folder / "logs" / f"{self.name}.txt"


def label_of(changes: dict[str, str]) -> str:
    """The changes as people type them."""
    return " ".join(f"{name}={value}" for name, value in changes.items()) or "base"


# ---- Settings as people type them


def import_script(path: Path) -> ModuleType:
    """The script as a module, for its settings; BadInput if it has not the functions for them."""
    specification = importlib.util.spec_from_file_location("ablated_script", path)
    if not path.is_file() or not specification:
        raise BadInput(f"--script {path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up by its name.
    sys.modules["ablated_script"] = module
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadInput(f"--script {path} cannot be imported: {described(error)}") from error
    for name in NEEDED:
        if not hasattr(module, name):
            raise BadInput(f"--script {path} has no {name}: its settings are not as train_gpt.py's")
    return module


class Reader:
    """Reads settings as people type them, checks them against a script's, and keeps its order."""

    def __init__(self, script: ModuleType):
        self.script = script
        self.fields = {field.name.upper(): field for field in script.fields_of()}

    def normal(self, name: str, text: str) -> str:
        """The value as the script would write it; BadInput for no setting, or no value of it."""
        if name not in self.fields:
            raise BadInput(self.advice_on(name, text))
        if name in MANAGED:
            advice = "; use --seeds" if name == "SEED" else ""
            raise BadInput(f"{name}={text}: every run has its own{advice}")
        if not text:
            raise BadInput(f"{name}: a value is empty: write {name}=value or {name}=value,value")
        if name in PATHS:
            # Runs have other working folders.
            text = str(Path(text).absolute())
        try:
            return self.script.as_typed(self.script.parse_value(self.fields[name], text))
        except ValueError as error:
            raise BadInput(f"{name}={text} {error}") from None

    def advice_on(self, name: str, text: str) -> str:
        """What to say of a name that is no setting."""
        warnings = self.script.mistyped_settings({name: text})
        if warnings:
            return warnings[0].removeprefix("warning: ")
        if name.upper() in self.fields:
            return f"{name} is not a setting; did you mean {name.upper()}?"
        return f"{name} is not a setting: python train_gpt.py --help lists them"

    def pairs(self, text: str) -> dict[str, str]:
        """`NAME=value NAME=value` as a dictionary; only the form is checked."""
        found: dict[str, str] = {}
        for word in text.split():
            name, equals, value = word.partition("=")
            if not equals:
                raise BadInput(f"{name}: write NAME=value")
            if name in found:
                raise BadInput(f"{name} is given twice in '{text}'")
            found[name] = value
        return found

    def ordered(self, changes: dict[str, str]) -> dict[str, str]:
        """The changes in the order in which the script has its settings."""
        return {name: changes[name] for name in self.fields if name in changes}

    def alternatives(self, argument: str) -> list[dict[str, str]]:
        """The changes that one argument stands for: each of its values, or each combination."""
        pairs = self.pairs(argument)
        if not pairs:
            raise BadInput("an argument is empty: write NAME=value")
        values = []
        for name, text in pairs.items():
            values.append([self.normal(name, value) for value in text.split(",")])
        combinations = itertools.product(*values)
        return [self.ordered(dict(zip(pairs, chosen, strict=True))) for chosen in combinations]

    def changes(self, arguments: list[str], grid: bool) -> list[dict[str, str]]:
        """The changes of all arguments in order; with `grid` the product of the arguments."""
        of_each = [self.alternatives(argument) for argument in arguments]
        if not grid or not of_each:
            return list(itertools.chain(*of_each))

        names: list[str] = []
        for alternatives in of_each:
            names += alternatives[0]
        for name in names:
            if names.count(name) > 1:
                raise BadInput(f"--grid: {name} is in two arguments")

        found = []
        for chosen in itertools.product(*of_each):
            together: dict[str, str] = {}
            for part in chosen:
                together.update(part)
            found.append(self.ordered(together))
        return found

    def base(self, text: str, environment: dict[str, str]) -> dict[str, str]:
        """The base's settings: those of the environment, then those of --base, which win."""
        given = {}
        for name in self.fields:
            if environment.get(name) and name not in MANAGED:
                given[name] = environment[name]
        given.update(self.pairs(text))
        return self.ordered({name: self.normal(name, value) for name, value in given.items()})

    def with_data(self, variables: dict[str, str]) -> dict[str, str]:
        """The variables with the data by absolute paths, where it is FineWeb or is named.

        Without either the script takes the demo corpus, wherever it is called. Raises BadInput for
        data that is named and not there.
        """
        found = dict(variables)
        data = variables.get("DATA_PATH")
        tokenizer = variables.get("TOKENIZER_PATH")
        if data and not Path(data).is_dir():
            raise BadInput(f"DATA_PATH={data} is not a folder")
        if tokenizer and not Path(tokenizer).is_file():
            raise BadInput(f"TOKENIZER_PATH={tokenizer} is not a file")
        if tokenizer:
            found["TOKENIZER_PATH"] = str(Path(tokenizer).absolute())
        if not data:
            data = self.fineweb(variables)
        if data:
            found["DATA_PATH"] = str(Path(data).absolute())
        return found

    def fineweb(self, variables: dict[str, str]) -> Path | None:
        """The challenge's text with the vocabulary of a run; None if it is not here at all."""
        try:
            settings, _ = self.script.settings_from(variables)
        except self.script.UserError:
            # What is wrong with the settings is said where they are checked.
            return None
        try:
            found = self.script.find_fineweb(settings.vocab_size)
        except self.script.UserError as error:
            raise BadInput(str(error)) from error
        return None if found is None else found[0]


def parse_seeds(text: str) -> list[int]:
    """`3` is 1, 2, 3; `1337,42` are these two; `42,` is this one."""
    try:
        if "," in text:
            seeds = [int(part) for part in text.split(",") if part]
        else:
            seeds = list(range(1, int(text) + 1))
    except ValueError:
        seeds = []
    repeated = len(set(seeds)) < len(seeds)
    if not seeds or min(seeds) < 0 or repeated:
        raise BadInput(
            f"--seeds {text}: write how many, or the seeds themselves, each once: 3 or 1337,42,7"
        )
    return seeds


# ---- The ablation


class Ablation:
    """A script, a base to compare with, and the folder of their runs.

    plan.json in the folder says what all calls asked for; `known` and `seeds` are the changes
    and seeds in it.
    """

    def __init__(self, script: Path, base: str, equal: str | None, folder: Path):
        self.script = script.absolute()
        self.folder = folder.absolute()
        self.plan = self.folder / "plan.json"
        self.reader = Reader(import_script(self.script))
        self.code = self.script.read_bytes()
        self.source = self.script.read_text(encoding="utf-8")
        self.sha256 = hashlib.sha256(self.code).hexdigest()
        self.known: list[dict[str, str]] = []
        self.seeds: list[int] = []

        self.given = self.reader.base(base, dict(os.environ))
        self.equal = equal or ("tokens" if "ITERATIONS" in self.given else "seconds")
        # It is always given, since a preset would bring a clock of its own.
        self.given[CLOCK] = str(self.seconds_of_a_run())
        self.base = self.configure({})

    def seconds_of_a_run(self) -> float:
        """The training clock of all runs: 0, which is none, with equal tokens."""
        if self.equal == "tokens":
            if "ITERATIONS" not in self.given:
                raise BadInput("--equal tokens needs ITERATIONS in --base or the environment")
            if float(self.given.get(CLOCK, 0)):
                raise BadInput(
                    f"{CLOCK}={self.given[CLOCK]} may end runs before they have equal tokens: "
                    "leave it out or use --equal seconds"
                )
            return 0.0
        seconds = self.typed({}, self.given)[CLOCK.lower()]
        if not seconds:
            raise BadInput(f"--equal seconds needs {CLOCK} above 0")
        return seconds

    def configure(self, changes: dict[str, str]) -> Configuration:
        """The base with these changes, as long as the base; BadInput for what cannot be."""
        fixed = [CLOCK, "ITERATIONS"] if self.equal == "tokens" else [CLOCK]
        for name in fixed:
            if name in changes:
                raise BadInput(
                    f"{name} cannot change: --equal {self.equal} gives all runs the base's"
                )
        variables = self.reader.with_data({**self.given, **changes})
        settings = self.typed(changes, variables)
        if self.equal == "tokens" and changes:
            variables["ITERATIONS"] = str(self.steps_for_equal_tokens(changes, settings))
            settings = self.typed(changes, variables)
        return Configuration(changes, variables, settings)

    def steps_for_equal_tokens(self, changes: dict[str, str], settings: dict) -> int:
        """The steps after which a run has seen as many tokens as the base."""
        base = self.base.settings
        batch = settings["train_batch_tokens"]
        tokens = base["iterations"] * base["train_batch_tokens"]
        steps = max(1, round(tokens / batch))
        if abs(steps * batch / tokens - 1) > SAME_TOKENS:
            raise BadInput(
                f"{label_of(changes)}: {steps} of its steps of {batch:,} tokens are not the "
                f"base's {tokens:,} tokens: choose another ITERATIONS or --equal seconds"
            )
        return steps

    def typed(self, changes: dict[str, str], variables: dict[str, str]) -> dict:
        """The script's settings, all of them; BadInput with what the script says against them."""
        try:
            settings, _ = self.reader.script.settings_from(variables)
        except self.reader.script.UserError as error:
            raise BadInput(f"{label_of(changes)}: {error}") from None
        return dataclasses.asdict(settings)

    def configurations(self, arguments: list[str], grid: bool) -> list[Configuration]:
        """The base and what the arguments ask for; BadInput where two of them are the same."""
        found = [self.base]
        for changes in self.reader.changes(arguments, grid):
            new = self.configure(changes)
            same = next((old for old in found if old.settings == new.settings), None)
            if same is None:
                found.append(new)
            elif same is not self.base:
                raise BadInput(
                    f"{label_of(new.changes)} is what {label_of(same.changes)} is: leave one out"
                )
            elif not grid:
                # Only a grid may pass through the base.
                raise BadInput(f"{label_of(new.changes)} is what the base has: leave it out")
        return found

    # -- Its folder

    def identity(self) -> dict:
        """What all runs of a folder share."""
        return dict(script_sha256=self.sha256, equal=self.equal, base=self.base.variables)

    @contextlib.contextmanager
    def claim(self) -> Iterator[FileLock]:
        """Hold the folder's lock, and read its plan; BadInput if it cannot be this ablation's."""
        if self.is_foreign():
            raise BadInput(f"{self.folder} is no ablation's folder: {OTHER_FOLDER}")
        busy = f"{self.folder}: another ablate.py, or a run it left, is at work here"
        with folder_lock(self.folder, busy, name=".lock") as lock:
            if self.plan.is_file():
                self.read_plan()
            yield lock

    def is_foreign(self) -> bool:
        """Whether the folder, or the file in its place, is something else than an ablation's."""
        if self.plan.is_file() or not self.folder.exists():
            return False
        if not self.folder.is_dir():
            return True
        ours = (".lock", ".plan")
        return any(not path.name.startswith(ours) for path in self.folder.iterdir())

    def read_plan(self) -> None:
        """Take changes and seeds of earlier calls; BadInput if these had another base or script."""
        try:
            plan = json.loads(self.plan.read_text(encoding="utf-8"))
            theirs = {name: plan[name] for name in self.identity()}
            self.known = plan["changes"]
            self.seeds = plan["seeds"]
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{self.plan} is damaged: {OTHER_FOLDER}") from None
        for name, ours in self.identity().items():
            if theirs[name] != ours:
                what = differing(name, theirs[name], ours)
                raise BadInput(f"{self.folder} has another {what}: {OTHER_FOLDER}")

    def add_to_plan(self, configurations: list[Configuration], seeds: list[int]) -> None:
        """Write down what is asked for now beside what was asked for before."""
        for configuration in configurations:
            if configuration.changes not in self.known:
                self.known.append(configuration.changes)
        for seed in seeds:
            if seed not in self.seeds:
                self.seeds.append(seed)
        plan = dict(self.identity(), changes=self.known, seeds=self.seeds)
        write_atomically(self.plan, json.dumps(plan, indent=1).encode())

    def run(self, configuration: Configuration, seed: int) -> PlannedRun:
        """The run of a configuration with a seed, whether it was begun or not."""
        return PlannedRun(configuration, seed, self.folder / f"{configuration.slug}-seed{seed}")

    def all_runs(self, asked: list[PlannedRun]) -> list[PlannedRun]:
        """The runs of this call, then those of earlier calls that were begun."""
        found = {run.name: run for run in asked}
        for changes in self.known:
            configuration = self.configure(changes)
            for seed in self.seeds:
                run = self.run(configuration, seed)
                if run.folder.is_dir():
                    found.setdefault(run.name, run)
        return list(found.values())

    def public(self, text: str) -> str:
        """A text without names of private folders.

        A path in the repository or in the current folder becomes relative to it. Of any other one
        its last part is left.
        """
        folders = [ROOT, Path.cwd()]
        for variables in (self.base.variables, *self.known):
            folders += [Path(variables[name]).parent for name in PATHS if name in variables]
        for folder in folders:
            text = text.replace(f"{folder}{os.sep}", "")
        text = re.sub(r"""(?<![\w./)~-])/(?:[^\s/:;,'"]+/)*(?=[\w.~])""", "", text)
        # Windows: C:\a\b, whose backslashes JSON doubles.
        return re.sub(r"""\b[A-Za-z]:[\\/]+(?:[^\s\\/:;,'"]+[\\/]+)*(?=[\w.~])""", "", text)


def differing(name: str, theirs, ours) -> str:
    """In a few words, what is not the same."""
    if name == "equal":
        return f"--equal ({theirs}, not {ours})"
    if name == "script_sha256":
        return f"script_sha256 ({theirs[:9]}, not {ours[:9]})"
    names = [*theirs, *ours]
    first = next(each for each in names if theirs.get(each) != ours.get(each))
    return f"base ({first}={theirs.get(first, 'unset')}, not {ours.get(first, 'unset')})"
