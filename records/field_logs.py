"""Read a log of any script of the field: what it states, and in which line.

run_logs.SHAPES says how lines look. A log may hold the source of the script that ran: that is
found, kept apart, and never read as lines of the run.
"""

from __future__ import annotations

import codecs
import collections
import functools
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from field_claims import Claim, agree
from field_scripts import tree_of
from run_logs import SHAPES, Log

# A line of '=' parts source, machine and run.
RULE = re.compile(r"={60,}\s*")
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# What a logger puts before a line: a time, a level, a rank.
PREFIX = re.compile(
    r"(?:\[(?:rank ?\d+|[\d:., TZ-]{8,}|INFO|default\d+)\]:? ?"
    r"|\d{4}-\d\d-\d\d[ T][\d:.,]+Z?(?: \|| -| INFO:?)* )+"
)
# Lines that only Python has. One of them in a part of a log makes it source.
PYTHON = re.compile(r"import [\w.]+|from [\w.]+ import |def \w+\(|class \w+[(:]")
# Lines that only a run writes.
RUN_LINE = re.compile(r"step:\d+/\d+ \w+_loss:[\d.]+ |\w+ val_loss:[\d.]+ val_bpb:[\d.]+")
# From so many of them on, the part is source even if this Python cannot parse it.
SURELY_SOURCE = 20
MAIN = re.compile(r"if __name__ == ['\"]__main__['\"]:")
# What a score is called that is not of the packed artifact.
BEFORE_PACKING = re.compile(
    r"pre.?quant|pre.?roundtrip|pre_ttt|post.?(?:ema|swa|train|sdttt|avg)|\bdiagnostic post|"
    r"selected_final_weights|raw_model|\bema\b|\bswa\b|float",
    re.I,
)
# What is no score of the whole text.
PROGRESS = re.compile(r"running|chunk|windows|batch|\[|progress|epoch|step|/", re.I)
# Of the shapes of our own lines those that other logs are read for, too.
ROWS = [row for row in SHAPES if row.needle or row.fact in ("settings", "resumed", "adapted")]
SEED_IN_NAME = re.compile(r"(?:seed|_s)[_-]?(\d+)(?![\d])", re.I)


class Statement(NamedTuple):
    """What a line states: values by name, and the number of the line, from 1."""

    values: dict[str, str]
    line: int


class Scored(NamedTuple):
    """A score in a log: what it is called, nats a token, bits a byte, seconds, and its line.

    `decimals` are those of `val_bpb`. `packed` tells whether it is of the packed artifact.
    """

    label: str
    val_loss: float
    val_bpb: float
    decimals: int
    seconds: float | None
    line: int
    packed: bool


class Point(NamedTuple):
    """A step of a curve: seconds and tokens are None where the log does not state them."""

    step: int
    value: float
    seconds: float | None
    tokens: int | None


def lines_of(data: bytes) -> list[str]:
    """The lines of a log, without colours and without what stands before a logger's lines."""
    # Windows PowerShell writes what it redirects in two bytes a character.
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8"
    text = COLOURS.sub("", data.decode(encoding, errors="replace"))
    # Line ends of Windows, and those that a progress bar leaves.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [PREFIX.sub("", line, count=1) if PREFIX.match(line) else line for line in lines]


def decimals_of(number: str) -> int:
    """How many digits stand behind the point."""
    return len(number.partition(".")[2])


def whole(number: str) -> int:
    """A count as logs write it, with commas or without."""
    return int(number.replace(",", ""))


class FieldLog:
    """Any log. What it does not state is None or empty."""

    def __init__(self, path: Path, name: str):
        self.path = path
        self.name = name
        self.lines = lines_of(path.read_bytes())
        self.source, self.source_lines = find_source(self.lines)
        self.facts = self._facts()

    def _facts(self) -> dict[str, list[Statement]]:
        """All statements of the run's lines, by fact, in the order of the lines."""
        facts = collections.defaultdict(list)
        for number, line in enumerate(self.lines, 1):
            if number in self.source_lines or "{" in line[:1]:
                continue
            for row in ROWS:
                if row.needle in line:
                    found = row.pattern.fullmatch(line)
                    if found:
                        facts[row.fact].append(Statement(found.groupdict(), number))
        return facts

    def where(self, line: int) -> str:
        """A line as a verdict quotes it."""
        return f"{self.name}:{line}"

    def last(self, fact: str) -> Statement | None:
        """The last line that states a fact."""
        found = self.facts.get(fact)
        return found[-1] if found else None

    def count(self, fact: str, value: str = "count") -> tuple[int, int] | None:
        """A whole number that a fact has, as it stands last, and its line."""
        stated = self.last(fact)
        return None if stated is None else (whole(stated.values[value]), stated.line)

    # -- the run
    @functools.cached_property
    def seeds(self) -> dict[int, int]:
        """The seeds that the run's lines state, each with its first line."""
        found: dict[int, int] = {}
        for stated in self.facts.get("ran seed", []):
            found.setdefault(int(stated.values["seed"]), stated.line)
        own = self.own_settings.get("seed")
        if not found and isinstance(own, int):
            found[own] = self.facts["settings"][-1].line
        return found

    @property
    def named_seed(self) -> int | None:
        """The seed in the name of the file."""
        found = SEED_IN_NAME.search(Path(self.name).stem)
        return int(found[1]) if found else None

    @property
    def seed(self) -> int | None:
        """The seed that ran; without one in the lines, that in the name. None for several."""
        if len(self.seeds) == 1:
            return next(iter(self.seeds))
        return None if self.seeds else self.named_seed

    @functools.cached_property
    def own_settings(self) -> dict:
        """The settings line of our script, if this log is of it."""
        return Log(self.path).settings if "settings" in self.facts else {}

    @property
    def is_own(self) -> bool:
        """Whether our script wrote this log."""
        return bool(self.own_settings)

    @functools.cached_property
    def gpus(self) -> list[str]:
        """The GPUs that the machine listed."""
        return [stated.values["name"] for stated in self.facts.get("gpu", [])]

    # -- training
    @functools.cached_property
    def training(self) -> tuple[float, int] | None:
        """Seconds of training, to the millisecond, and their line."""
        stated = [*self.facts.get("stopped", [])]
        stated += self.facts.get("trained", []) + self.facts.get("validated", [])
        timed = [each for each in stated if each.values.get("milliseconds")]
        if not timed:
            return None
        longest = max(timed, key=lambda each: int(each.values["milliseconds"]))
        return int(longest.values["milliseconds"]) / 1000, longest.line

    @functools.cached_property
    def clock_goes_back(self) -> tuple[Statement, Statement] | None:
        """Two lines of one step or of following ones whose clock goes back; None if none are."""
        timed = [each for each in self.facts.get("trained", []) if each.values.get("milliseconds")]
        for before, after in itertools.pairwise(timed):
            if int(after.values["step"]) < int(before.values["step"]):
                continue
            if int(after.values["milliseconds"]) < int(before.values["milliseconds"]):
                return before, after
        return None

    @functools.cached_property
    def steps(self) -> tuple[int, int] | None:
        """The last step, and its line."""
        stated = [*self.facts.get("stopped", []), *self.facts.get("validated", [])]
        stated += self.facts.get("trained", [])
        if not stated:
            return None
        last = max(stated, key=lambda each: int(each.values["step"]))
        return int(last.values["step"]), last.line

    @functools.cached_property
    def all_steps(self) -> set[int]:
        """The steps of all step lines."""
        facts = ("validated", "stopped", "trained")
        return {int(each.values["step"]) for fact in facts for each in self.facts.get(fact, [])}

    def curve(self, quantity: str) -> list[Point]:
        """The points of train_loss, val_loss or val_bpb. The last line of a step counts."""
        fact = "trained" if quantity == "train_loss" else "validated"
        batch = self.count("batch tokens") or (None, 0)
        if batch[0] is None and "train_batch_tokens" in self.own_settings:
            batch = (self.own_settings["train_batch_tokens"], 0)
        points = {}
        for stated in self.facts.get(fact, []):
            step = int(stated.values["step"])
            tokens = None if batch[0] is None else step * batch[0]
            seconds = self.seconds_of(stated.values, tokens)
            if seconds is None and fact == "validated":
                seconds = self.clock.get(step)
            points[step] = Point(step, float(stated.values[quantity]), seconds, tokens)
        return [points[step] for step in sorted(points)]

    @functools.cached_property
    def clock(self) -> dict[int, float]:
        """Seconds by step, for lines that do not state them beside lines that do."""
        found = {}
        for point in self.curve("train_loss") if "trained" in self.facts else []:
            if point.seconds is not None:
                found[point.step] = point.seconds
        for stated in self.facts.get("stopped", []):
            found[int(stated.values["step"])] = int(stated.values["milliseconds"]) / 1000
        return found

    def seconds_of(self, values: dict[str, str], tokens: int | None) -> float | None:
        """The clock of a step line: milliseconds, or tokens by their rate, or minutes."""
        if values.get("milliseconds"):
            return int(values["milliseconds"]) / 1000
        rate = float(values.get("tokens_per_second") or 0)
        if rate and tokens is not None:
            return tokens / rate
        if values.get("minutes"):
            return 60 * float(values["minutes"])
        return None

    # -- scores
    @functools.cached_property
    def scores(self) -> list[Scored]:
        """Every score with a label, in order; an exact line takes the place of its rounded one."""
        found: list[Scored] = []
        for stated in self.facts.get("scored", []):
            one = scored_of(stated)
            if one is None:
                continue
            exact = bool(stated.values.get("exact"))
            if exact and found and found[-1].label == one.label:
                before = found.pop()
                one = one._replace(seconds=before.seconds)
            elif exact and any(figures(each) == figures(one) for each in found):
                # One score under another name, as scripts print it for readers of older logs.
                continue
            found.append(one)
        return found

    @functools.cached_property
    def finals(self) -> list[Scored]:
        """The scores of the packed artifact."""
        return [each for each in self.scores if each.packed]

    @functools.cached_property
    def before_packing(self) -> list[Scored]:
        """Scores of the model as it was trained: labelled ones, and the last of the training."""
        found = [each for each in self.scores if not each.packed]
        stated = self.last("validated")
        if stated is not None:
            found.append(validated_of(stated))
        return found

    def had(self, claim: Claim | None) -> bool:
        """Whether a claim agrees with a score from before packing."""
        return claim is not None and any(
            agree(claim.value, claim.decimals, each.val_bpb, each.decimals)
            for each in self.before_packing
        )

    @functools.cached_property
    def scores_alone(self) -> list[Scored]:
        """Bits a byte without a loss beside them, in lines that are no progress of a pass."""
        found = []
        for stated in self.facts.get("score alone", []):
            label = f"{stated.values['label']}bpb"
            if PROGRESS.search(label) or BEFORE_PACKING.search(label):
                continue
            text = stated.values["val_bpb"]
            bpb = float(text)
            found.append(Scored(label, 0.0, bpb, decimals_of(text), None, stated.line, True))
        return found

    def line_with(self, value: float, decimals: int) -> int | None:
        """A line on bits a byte that states a figure, to so many decimals, and is no progress."""
        wanted = f"{value:.{decimals}f}"
        if decimals < 4:
            return None
        for number, line in enumerate(self.lines, 1):
            if number in self.source_lines or wanted not in line:
                continue
            if "bpb" in line.lower() and not PROGRESS.search(line):
                return number
        return None

    def figures_on(self, word: str) -> set[tuple[float, int]]:
        """All figures with three decimals or more in lines on bpb or loss, and their decimals.

        The lines of training steps are left out.
        """
        return self._figures[word]

    @functools.cached_property
    def _figures(self) -> dict[str, set[tuple[float, int]]]:
        found = {"bpb": set(), "loss": set()}
        for number, line in enumerate(self.lines, 1):
            words = [word for word in found if word in line.lower()]
            if not words or "train_loss" in line or number in self.source_lines:
                continue
            for text in re.findall(r"(?<![\d.])\d{1,2}\.\d{3,}(?![\d.])", line):
                for word in words:
                    found[word].add((float(text), decimals_of(text)))
        return found

    # -- bytes
    @functools.cached_property
    def total_bytes(self) -> tuple[int, int] | None:
        """Bytes of code and packed model, and their line."""
        stated = self.count("total", "bytes")
        if stated is not None:
            return stated
        plain = self.count("total without codec", "bytes")
        raw = self.count("unpacked bytes", "bytes")
        # A total of the model before packing has no meaning.
        if plain is None or (raw is not None and plain[0] >= raw[0]):
            return None
        return plain

    @functools.cached_property
    def code_bytes(self) -> dict[str, tuple[int, int]]:
        """Bytes of code by kind, empty or such as compressed, and their lines."""
        found = {}
        for stated in self.facts.get("counted code", []):
            kind = stated.values.get("kind") or stated.values.get("mark") or ""
            found[kind] = (whole(stated.values["bytes"]), stated.line)
        return found


def scored_of(stated: Statement) -> Scored | None:
    """The score in a line; None if it is nan."""
    values = stated.values
    loss = float(values["val_loss"])
    bpb = float(values["val_bpb"])
    if not (0 < loss < 100 and 0 < bpb < 100):
        return None
    label = values["label"].strip()
    seconds = None
    if values.get("milliseconds"):
        # Zero is no time: the pass was timed elsewhere.
        seconds = int(values["milliseconds"]) / 1000 or None
    elif values.get("seconds"):
        seconds = float(values["seconds"])
    packed = not BEFORE_PACKING.search(label)
    return Scored(label, loss, bpb, decimals_of(values["val_bpb"]), seconds, stated.line, packed)


def figures(scored: Scored) -> tuple[float, float]:
    """Loss and bits a byte."""
    return scored.val_loss, scored.val_bpb


def validated_of(stated: Statement) -> Scored:
    """A validation during training, as a score."""
    values = stated.values
    label = f"step {values['step']}"
    bpb = float(values["val_bpb"])
    decimals = decimals_of(values["val_bpb"])
    return Scored(label, float(values["val_loss"]), bpb, decimals, None, stated.line, False)


# ---- Source
def find_source(lines: list[str]) -> tuple[str, range]:
    """The source of a script in a log, and the numbers of its lines, from 1; empty if none is."""
    python = [at for at, line in enumerate(lines) if PYTHON.match(line)]
    if not python:
        return "", range(0)
    rules = [at for at, line in enumerate(lines) if RULE.fullmatch(line)]
    before = list(rules)
    if len(python) >= SURELY_SOURCE:
        # What is left of an older log may stand behind the lines of a run.
        before += [at for at, line in enumerate(lines) if RUN_LINE.match(line)]
    # Without such a line before it, the source begins the log.
    first = max((at + 1 for at in before if at < python[0]), default=0)
    end = min((at for at in rules if at > python[-1]), default=None)
    if end is None:
        end = end_of_main(lines, python[-1])
    source = "\n".join([*lines[first:end], ""])
    if len(python) < SURELY_SOURCE and not tree_of(source).body:
        return "", range(0)
    return source, range(first + 1, end + 1)


def end_of_main(lines: list[str], last: int) -> int:
    """Where a source ends that no line of '=' ends: behind the block of its main program."""
    end = last + 1
    while end < len(lines) and (not lines[end].strip() or lines[end][:1] in " \t)]}#"):
        end += 1
    if end < len(lines) and MAIN.match(lines[end]):
        end += 1
        while end < len(lines) and (not lines[end].strip() or lines[end][:1] in " \t"):
            end += 1
    return end
