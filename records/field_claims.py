"""What a record folder of the field claims: submission.json with any fields, and README.md."""

from __future__ import annotations

import functools
import json
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from commands import described

SUBMISSION = "submission.json"
# Of these fields a submission under another file name has two.
DESCRIBING = {"author", "github_id", "name", "date", "track", "blurb"}
LARGEST_SUBMISSION = 1 << 20
# The names under which the score stands, the first that is there counts.
SCORES = (
    "val_bpb",
    "final_val_bpb",
    "bpb",
    "mean_val_bpb",
    "val_bpb_mean",
    "val_bpb_3seed_mean",
    "three_seed_mean_bpb",
    "score",
)
BEFORE_PACKING = ("pre_quant_val_bpb", "prequant_val_bpb", "val_bpb_pre_quant", "pre_quant_bpb")
LOSSES = ("val_loss", "mean_val_loss")
DEVIATIONS = (
    "val_bpb_std",
    "std_val_bpb",
    "val_bpb_stdev",
    "val_bpb_3seed_std",
    "three_seed_std_bpb",
    "seed_std",
)
TOTALS = (
    "bytes_total",
    "artifact_bytes",
    "total_bytes",
    "total_submission_bytes",
    "artifact_size_bytes",
    "artifact_size",
    "artifact",
)
# What some state of all seeds beside it, or instead of it.
TOTALS_OF_SEEDS = (
    "artifact_bytes_max",
    "max_artifact_bytes",
    "bytes_total_max",
    "artifact_bytes_mean",
    "mean_artifact_bytes",
    "bytes_total_mean",
)
CODES = ("bytes_code", "code_bytes")
MODELS = re.compile(r"bytes_model\w*|model_bytes\w*")
STEPS = ("step_stop", "steps", "training_steps", "train_steps", "num_steps")
# The time of the whole evaluation, with its unit; of a limit, or of one pass of several, it is not.
EVALUATION_TIME = re.compile(
    r"(?:(?:total|final|max|mean|ttt)_)?eval(?:uation)?"
    r"(?:_(?:wall_?clock|time|total|elapsed|duration|ttt))*"
    r"_(?P<unit>s|secs?|seconds|ms|milliseconds|min|mins|minutes)(?:_(?:mean|max|total|avg))?"
)
WALLCLOCKS = ("wallclock_seconds", "train_time_seconds", "training_time_seconds")
PARAMETERS = (
    "model_params",
    "params",
    "parameters",
    "num_params",
    "n_params",
    "parameter_count",
    "total_params",
)
# The names of a seed's figures.
SEED_SCORES = (
    "val_bpb",
    "final_val_bpb",
    "ttt_bpb",
    "val_bpb_ttt",
    "post_ttt_val_bpb",
    "sliding_bpb",
    "sliding_val_bpb",
    "val_bpb_sliding",
    "bpb",
    "roundtrip_val_bpb",
)
SEED_STEPS = ("steps", "train_steps", "step_stop", "stop_step", "steps_completed", "num_steps")
# Figures of other runs than the record's.
OTHER_RUNS = re.compile(
    r"supersed|baseline|ablat|previous|prior|compar|old|control|reference|sota|versus|_vs_|vs_"
    r"|pre_?fix|illegal|invalid|tainted|before|pre_quant|negative|verification|earlier|historic|legacy",
    re.I,
)
# What an object is called whose names are the numbers of seeds.
SEED_TABLE = re.compile(r"seed|result|run|bpb", re.I)
SEED_KEY = re.compile(r"(?:seed[_ -]?|s)?(\d+)", re.I)
# A line of README.md on another run.
OTHER_LINE = re.compile(
    r"baseline|sota|\bvs\b|previous|prior|merged|\bPR\b|#\d|beat|than|improve|delta|ablat|record to"
    r"|leaderboard|compar|earlier|current best|original|without|if |would|target|expect"
    r"|pending|todo|future|plan|will |not yet|await|upcoming|next step|require|needs?\b",
    re.I,
)
# A line of README.md on a score from before packing.
NO_FINAL = re.compile(r"pre.?(?:quant|export|ttt)|at stop|post.?ema|before (?:quant|pack)", re.I)
PACKED_AGAIN = re.compile(r"re-?(?:pack|export|quanti|serializ)", re.I)
MEAN_WORD = re.compile(r"\bmean\b|\baverage|\bavg\b", re.I)
COUNT_WORDS = dict(two=2, three=3, four=4, five=5)
SEED_COUNT = re.compile(
    r"\b(?:mean|average|avg)\b(?:[^.\n|]|\.(?=\d)){0,40}?"
    r"\b(\d|two|three|four|five)[ -](?:random )?seeds?\b"
    r"|\b(\d|two|three|four|five)[- ](?:\w+ )?seeds? (?:exact )?(?:mean|average|avg)",
    re.I,
)
NON_RECORD = re.compile(r"non.?record|unlimited.compute|not (?:a )?(?:leaderboard|record)", re.I)
GPU_COUNT = re.compile(
    r"\b(\d+)\s*[x×]\s*(?:NVIDIA\s*)?((?:H|A|B|L)\d{2,3}\w*|RTX\s?\d{4}|\d{4}\b)", re.I
)
PARAMETER_COUNT = re.compile(
    r"(?:model_params[: =]*|param(?:eter)?s?\**[: |=]+)\**([\d,]{7,})|\b([\d,]{9,})\**\s*"
    r"(?:model |total |trainable |unique )?param",
    re.I,
)


class Claim(NamedTuple):
    """A figure that a folder states, the digits behind its point, and where it stands."""

    value: float
    decimals: int
    where: str

    def __str__(self) -> str:
        return f"{self.value:.{self.decimals}f}"


def claim_of(value: object, where: str) -> Claim | None:
    """A figure as a claim; None for what is no finite number."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        if not re.fullmatch(r"-?\d+(\.\d+)?", value.strip()):
            return None
        value = Decimal(value.strip())
    if not isinstance(value, (int, Decimal)):
        return None
    decimals = 0
    if isinstance(value, Decimal) and value.is_finite():
        decimals = max(0, -value.as_tuple().exponent)
    try:
        number = float(value)
    except OverflowError:
        return None
    return Claim(number, decimals, where) if math.isfinite(number) else None


def agree(first: float, its_decimals: int, second: float, others: int) -> bool:
    """Whether two figures are one, which was rounded or cut to the fewer decimals."""
    decimals = min(its_decimals, others, 8)
    return abs(first - second) <= 1.01 * 10.0**-decimals


def rounded_to(value: int) -> int:
    """The power of ten that a count which ends in zeros may be rounded to."""
    return 10 ** (len(str(value)) - len(str(value).rstrip("0")))


class StatedTime(NamedTuple):
    """Seconds that submission.json states, of a seed or, with None, of the record.

    `unit` is what the last digit stands for, in seconds.
    """

    seed: int | None
    claim: Claim
    unit: float


class SeedClaims(NamedTuple):
    """What submission.json states of one seed."""

    seed: int
    figures: dict
    where: str

    def first(self, names: tuple[str, ...]) -> Claim | None:
        """The first of these names that has a figure."""
        for name in names:
            claim = claim_of(self.figures.get(name), f"{self.where}.{name}")
            if claim is not None:
                return claim
        return None

    @property
    def score(self) -> Claim | None:
        """Its score: under a known name, or the only one in bits a byte."""
        known = self.first(SEED_SCORES)
        if known is not None:
            return known
        others = [name for name in self.figures if "bpb" in name and not OTHER_RUNS.search(name)]
        return self.first((others[0],)) if len(others) == 1 else None


class Claims:
    """All that submission.json and README.md of a folder state."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = submission_of(folder)
        # As verdicts name it.
        self.name = SUBMISSION if self.file is None else self.file.name
        self.problem: str | None = None
        self.stated = self._read()
        readme = next((path for path in folder.glob("*") if path.name.lower() == "readme.md"), None)
        self.readme_lines: list[str] = []
        if readme is not None and readme.is_file():
            text = readme.read_text(encoding="utf-8", errors="replace")
            self.readme_lines = text.splitlines()

    def _read(self) -> dict:
        if self.file is None:
            return {}
        try:
            text = self.file.read_text(encoding="utf-8-sig", errors="replace")
            found = parsed(text)
        except (ValueError, RecursionError) as error:
            self.problem = described(error)
            try:
                # The one mistake whose meaning is plain: a comma behind the last entry.
                found = parsed(re.sub(r",(\s*[}\]])", r"\1", text))
            except (ValueError, RecursionError):
                return {}
        if not isinstance(found, dict):
            self.problem = "it is no object"
            return {}
        return found

    # -- submission.json
    def first(self, names: tuple[str, ...]) -> Claim | None:
        """The first of these names that has a figure, at the top or in an object in it."""
        tables = [("", self.stated)]
        for key, value in self.stated.items():
            if isinstance(value, dict) and not OTHER_RUNS.search(key):
                tables.append((f"{key}.", value))
        for name in names:
            for prefix, table in tables:
                claim = claim_of(table.get(name), f"{self.name} {prefix}{name}")
                if claim is not None:
                    return claim
        return None

    @functools.cached_property
    def seeds(self) -> dict[int, SeedClaims]:
        """The seeds of which submission.json has figures."""
        return seeds_in(self.stated, self.name, 0) or seeds_in_lists(self.stated, self.name)

    @functools.cached_property
    def named_seeds(self) -> list[int]:
        """All seeds that submission.json names as those of the record."""
        listed = self.stated.get("seeds")
        found = dict.fromkeys(self.seeds)
        if not isinstance(listed, list):
            listed = [self.stated.get("seed")]
        for seed in listed:
            if isinstance(seed, str) and seed.isdigit():
                seed = int(seed)
            if isinstance(seed, int) and not isinstance(seed, bool):
                found[seed] = None
        return list(found)

    @functools.cached_property
    def score(self) -> Claim | None:
        """The score of the record: of submission.json, else of the head of README.md."""
        claim = self.first(SCORES)
        if claim is not None and 0 < claim.value < 100:
            return claim
        return self.readme_score

    def other_scores(self) -> list[Claim]:
        """All figures in bits a byte at the top of submission.json that are not of other runs."""
        found = []
        for name, value in self.stated.items():
            claim = claim_of(value, f"{self.name} {name}")
            if claim is not None and "bpb" in name and not OTHER_RUNS.search(name):
                found.append(claim)
        return found

    def texts(self) -> list[tuple[str, str]]:
        """Name and blurb of submission.json and the lines of README.md, each with its place."""
        found = []
        for name in ("name", "blurb", "description", "summary", "technique_summary"):
            if isinstance(self.stated.get(name), str):
                found.append((self.stated[name], f"{self.name} {name}"))
        for number, line in enumerate(self.readme_lines, 1):
            found.append((line, f"README.md:{number}"))
        return found

    def sentences(self) -> list[tuple[str, str]]:
        """Those texts, with the ones of submission.json, which are long, sentence by sentence."""
        found = []
        for text, where in self.texts():
            parts = re.split(r"(?<=[.;]) ", text) if where.startswith(self.name) else [text]
            found += [(part, where) for part in parts]
        return found

    # -- README.md
    def readme_figures(self) -> list[Claim]:
        """All figures with three decimals or more in README.md."""
        found = []
        for number, line in enumerate(self.readme_lines, 1):
            for text in re.findall(r"(?<![\d.,])\d\.\d{3,10}(?![\d])", line):
                found.append(claim_of(Decimal(text), f"README.md:{number}"))
        return found

    @functools.cached_property
    def readme_score(self) -> Claim | None:
        """The score at the head of README.md: the first figure of a line on bits a byte."""
        for number, line in enumerate(self.readme_lines[:25], 1):
            if "bpb" not in line.lower() or line.startswith("|"):
                continue
            if OTHER_LINE.search(line) or NO_FINAL.search(line):
                continue
            behind = re.findall(r"bpb\D{0,15}?(?<![\d.,+-])(\d\.\d{3,10})(?!\d)", line, re.I)
            anywhere = re.findall(r"(?<![\d.,+-])\d\.\d{3,10}(?![\d])", line)
            # A loss may stand in the same line.
            found = behind or ([] if "loss" in line.lower() else anywhere)
            if found:
                return claim_of(Decimal(found[0]), f"README.md:{number}")
        return None

    def discloses(self, *figures: int) -> bool:
        """Whether README.md names all of these counts: who names both knows how they differ."""
        text = "\n".join(self.readme_lines).replace(",", "")
        return all(re.search(rf"(?<!\d){figure}(?!\d)", text) for figure in figures)

    def tells_of_packing_again(self, claim: Claim, other: float) -> bool:
        """Whether README.md has a score, another one, and that the model was packed in between."""
        text = "\n".join(self.readme_lines)
        figures = self.readme_figures()
        named = [
            any(agree(value, 8, figure.value, figure.decimals) for figure in figures)
            for value in (claim.value, other)
        ]
        return all(named) and PACKED_AGAIN.search(text) is not None

    def named_logs(self) -> set[str]:
        """The names of logs in README.md."""
        names = set()
        for line in self.readme_lines:
            names.update(re.findall(r"`(?:[\w.-]+/)*([\w.-]+\.(?:log|out))`", line))
            names.update(re.findall(r"`(?:[\w.-]+/)*((?:train|log|run)[\w.-]*\.txt)`", line))
        return names

    def named_scripts(self) -> set[str]:
        """The names of scripts in README.md."""
        text = "\n".join(self.readme_lines)
        return set(re.findall(r"(?<![\w/.-])[\w-]+\.py\b", text))

    def called_mean(self, score: Claim, mean: float) -> str | None:
        """Where the folder calls a score the mean; None if it does not.

        A text that has the true mean beside it says which is which.
        """
        for text, where in self.texts():
            if not MEAN_WORD.search(text) or re.search(r"\bbest\b|submitted", text, re.I):
                continue
            figures = re.findall(r"(?<![\d.])\d\.\d{4,10}(?![\d])", text)
            claims = [claim_of(Decimal(figure), where) for figure in figures]
            if any(agree(claim.value, claim.decimals, mean, 8) for claim in claims):
                continue
            for claim in claims:
                if agree(claim.value, claim.decimals, score.value, score.decimals):
                    return where
        return None

    def columns(self) -> dict[str, list[Claim]]:
        """Figures in bits a byte that submission.json has of all seeds, by their names."""
        found = {}
        tables = list(self.seeds.values())
        names = dict.fromkeys(name for seed in tables for name in seed.figures if "bpb" in name)
        for name in names:
            column = [seed.first((name,)) for seed in tables]
            if len(column) > 1 and None not in column:
                found[name] = column
        return found

    def seed_count(self) -> tuple[int, str] | None:
        """How many seeds the folder claims, and where; None for fewer than two."""
        found = []
        listed = self.stated.get("seeds")
        if isinstance(listed, list) and len(listed) == 1:
            # Means of more are told of beside the one run that is claimed.
            return None
        if len(self.named_seeds) > 1:
            found.append((len(self.named_seeds), f"{self.name} seeds"))
        for text, where in self.sentences():
            if OTHER_LINE.search(text):
                continue
            for match in SEED_COUNT.finditer(text):
                word = match[1] or match[2]
                count = COUNT_WORDS.get(word.lower()) or int(word)
                found.append((count, where))
            listed = re.search(r"\bseeds:? (\d+(?:, \d+)*(?:,? and \d+)?)", text, re.I)
            if listed:
                found.append((len(re.findall(r"\d+", listed[1])), where))
        found = [each for each in found if each[0] > 1]
        return max(found, key=lambda each: each[0], default=None)

    def gpus(self) -> list[tuple[int, str, str]]:
        """Numbers and kinds of GPUs that submission.json says it ran on, and where."""
        found = []
        for name, value in flat(self.stated):
            key = name.rsplit(".", 1)[-1].lower()
            if isinstance(value, str) and re.search(r"hardware|gpu|platform|machine|device", key):
                for match in GPU_COUNT.finditer(value):
                    found.append((int(match[1]), match[2].upper(), f"{self.name} {name}"))
        return found

    def readme_gpus(self) -> list[tuple[int, str, str]]:
        """Numbers and kinds of GPUs in README.md."""
        found = []
        for number, line in enumerate(self.readme_lines, 1):
            for match in GPU_COUNT.finditer(line):
                found.append((int(match[1]), match[2].upper(), f"README.md:{number}"))
        return found

    def parameters(self) -> list[Claim]:
        """Numbers of parameters that the folder states to the digit, of no other run."""
        found = []
        for path, value in flat(self.stated):
            claim = claim_of(value, f"{self.name} {path}")
            named = path.rsplit(".", 1)[-1] in PARAMETERS and not OTHER_RUNS.search(path)
            if named and claim is not None and claim.value >= 1e6:
                found.append(claim)
        for text, where in self.texts():
            if OTHER_LINE.search(text):
                continue
            counts = [match[1] or match[2] for match in PARAMETER_COUNT.finditer(text)]
            if counts and text.startswith("|"):
                # A row of a table may have those of several runs.
                counts = re.findall(r"(?<![\d,.])\d[\d,]{6,}(?![\d.])", text)
            for count in counts:
                digits = count.replace(",", "")
                if 6 < len(digits) < 12:
                    found.append(Claim(float(digits), 0, where))
        return found

    def evaluation_times(self) -> list[StatedTime]:
        """The evaluation times that submission.json states, of seeds and of the record."""
        found = []
        for seed, claims in self.seeds.items():
            for name, value in flat(claims.figures):
                found.append((seed, name, value, f"{claims.where}.{name}"))
        for name, value in self.stated.items():
            tables = {"": value} if not isinstance(value, dict) else value
            if OTHER_RUNS.search(name) or any(SEED_KEY.fullmatch(key) for key in tables):
                continue
            for key, figure in tables.items():
                path = f"{name}.{key}" if key else name
                found.append((None, key or name, figure, f"{self.name} {path}"))
        times = []
        for seed, name, value, where in found:
            named = EVALUATION_TIME.fullmatch(name.rsplit(".", 1)[-1])
            claim = claim_of(value, where) if named else None
            if claim is not None and not OTHER_RUNS.search(name):
                times.append(in_seconds(seed, claim, named["unit"]))
        return times

    def flag(self, name: str) -> bool | None:
        """A flag of compliance; None if it is not stated."""
        table = self.stated.get("compliance")
        value = table.get(name) if isinstance(table, dict) else None
        return value if isinstance(value, bool) else None

    @functools.cached_property
    def track(self) -> str:
        """10min, non-record, or empty if it is not stated: submission.json, folder, README.md."""
        keys = ("track", "submission_kind", "submission_type")
        named = " ".join(str(self.stated.get(key, "")) for key in keys).lower()
        folder = str(self.folder.resolve().parent.name).lower()
        for text in (named, folder):
            if re.search(r"non.?record|unlimited", text):
                return "non-record"
            if "10min" in text or "10_min" in text or "record_16mb" in text:
                return "10min"
        head = " ".join([*(text for text, _ in self.texts()[:5]), *self.readme_lines[:30]])
        if NON_RECORD.search(head):
            return "non-record"
        return ""


def submission_of(folder: Path) -> Path | None:
    """The submission.json of a folder, or the one file in it that has its fields; None if none has.

    A file has them if it states a score, and who made what when.
    """
    path = folder / SUBMISSION
    if path.is_file():
        return path
    found = []
    for path in sorted(folder.glob("*.json")):
        if not path.is_file() or path.stat().st_size > LARGEST_SUBMISSION:
            continue
        try:
            stated = parsed(path.read_text(encoding="utf-8-sig", errors="replace"))
        except (OSError, ValueError, RecursionError):
            continue
        named = isinstance(stated, dict) and len(DESCRIBING & stated.keys()) >= 2
        if named and any(stated.get(name) is not None for name in SCORES):
            found.append(path)
    return found[0] if len(found) == 1 else None


def in_seconds(seed: int | None, claim: Claim, unit: str) -> StatedTime:
    """A time that is stated in seconds, milliseconds or minutes."""
    factor = 1.0
    if unit.startswith("min"):
        factor = 60.0
    elif unit.startswith("m"):
        factor = 0.001
    seconds = Claim(factor * claim.value, 1, claim.where)
    return StatedTime(seed, seconds, factor * 10.0**-claim.decimals)


def parsed(text: str) -> object:
    """What a JSON text holds, its decimals as they are written; NaN and the like are None."""
    return json.loads(text, parse_float=Decimal, parse_constant=lambda name: None)


def flat(table: dict, prefix: str = "") -> list[tuple[str, object]]:
    """All values in nested objects, with their paths."""
    found = []
    for key, value in table.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def seeds_in(table: dict, where: str, depth: int) -> dict[int, SeedClaims]:
    """The figures of seeds: an object by seeds, or a list of objects that name theirs."""
    if depth > 3:
        return {}
    for key, value in table.items():
        if OTHER_RUNS.search(key):
            continue
        place = f"{where} {key}" if depth == 0 else f"{where}.{key}"
        found = seeds_of(key, value, place)
        if not found and isinstance(value, dict):
            found = seeds_in(value, place, depth + 1)
        if found:
            return found
    return {}


def seeds_in_lists(table: dict, where: str) -> dict[int, SeedClaims]:
    """The figures of seeds in lists as long as that of the seeds, such as per_seed_val_bpb."""
    seeds = table.get("seeds")
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        return {}
    figures: dict[int, dict] = {seed: {} for seed in seeds}
    for name, values in table.items():
        named = re.fullmatch(r"(?:per_seed|seed)_(\w+)|(\w+)_(?:per_seed|by_seed)", name)
        if named and isinstance(values, list) and len(values) == len(seeds):
            for seed, value in zip(seeds, values, strict=True):
                figures[seed][named[1] or named[2]] = value
    if not any(figures.values()):
        return {}
    place = f"{where} lists by seed"
    return {seed: SeedClaims(seed, found, f"{place}.{seed}") for seed, found in figures.items()}


def seeds_of(key: str, value: object, where: str) -> dict[int, SeedClaims]:
    """The seeds of one value, which may be an object by seeds, or a list of objects."""
    found = {}
    if isinstance(value, dict):
        for name, figures in value.items():
            named = SEED_KEY.fullmatch(name)
            if named is None or (name.isdigit() and not SEED_TABLE.search(key)):
                continue
            if isinstance(figures, (Decimal, int)) and ("bpb" in key or "seed" in key):
                figures = dict(val_bpb=figures)
            if isinstance(figures, dict):
                found[int(named[1])] = SeedClaims(int(named[1]), figures, f"{where}.{name}")
    elif isinstance(value, list):
        for figures in value:
            if isinstance(figures, dict) and isinstance(figures.get("seed"), int):
                seed = figures["seed"]
                found[seed] = SeedClaims(seed, figures, f"{where} of seed {seed}")
    return found
