"""Read the log of a training run: the one place that knows how the lines of a log look.

SHAPES has a row for each kind of line, of our script and of other scripts of the field. Log reads
our own logs: one begins with the source of the script that ran, a line of 100 '=' ends the source,
and the run's own lines follow; a resumed run writes such a line again. field_logs.FieldLog reads
any log.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple

# What the last lines of a log call the passes over the validation text: two of the fixed model
# (track A), and one of a model that learns from what is scored (track B).
LABELS = dict(
    roundtrip="final_int6_roundtrip",
    sliding="final_int6_sliding_window",
    ttt="final_int6_ttt",
)
SEPARATOR = "=" * 100
# Settings in which the seeds of one configuration may differ: the machine's, and those of one run.
MACHINE = {
    "run_id",
    "resume",
    "checkpoint_every",
    "artifact",
    "sample",
    "sample_tokens",
    "sample_temperature",
    "data_path",
    "tokenizer_path",
    "device",
    "attention",
    "compile",
    "micro_batch_tokens",
    "eval_batch_seqs",
    "train_log_every",
}
# A progress report looks for the last step in so many bytes at the end of a log.
TAIL_BYTES = 2000


# ---- The shapes of lines
@dataclasses.dataclass(frozen=True)
class Shape:
    """A kind of line: the fact that it states, and the pattern of the whole line.

    The groups of the pattern are the values, by their names. `needle` is in every such line, so
    that most lines need not be matched.
    """

    fact: str
    pattern: re.Pattern[str]
    needle: str = ""


def shape(fact: str, pattern: str, needle: str = "") -> Shape:
    """A row of SHAPES. NUMBER stands for a decimal number, which may be nan or inf."""
    number = r"(?:-?[\d.]+(?:e[+-]?\d+)?|nan|-?inf)"
    return Shape(fact, re.compile(rf"^{pattern.replace('NUMBER', number)}$", re.M), needle)


# A fact may have several rows: each is another way to state it.
SHAPES = (
    shape("preset", r"preset:(?P<name>\w+)\b.*"),
    shape("world_size", r"world_size:(?P<processes>\d+)(?: \(threads:(?P<threads>.*)\))?"),
    shape("device", r"device:(?P<kind>\S+) \((?P<name>.*)\)"),
    shape("dtype", r"dtype:(?P<name>bfloat16|float32)\b.*"),
    shape("settings", r"settings:(?P<json>\{.*\})"),
    shape("data", r"data:(?P<folder>.*) tokenizer:(?P<tokenizer>.*) sha256:(?P<sha256>[0-9a-f]+)"),
    shape("resumed", r"resumed at step:(?P<step>\d+)\b.*"),
    shape(
        "step",
        r"step:(?P<step>\d+)/(?P<iterations>\d+) train_loss:(?P<train_loss>NUMBER) (?:.* )?"
        r"train_time:(?P<milliseconds>\d+)ms step_avg:(?P<average>[\d.]+)ms",
    ),
    shape(
        "step",
        r"step:(?P<step>\d+)/(?P<iterations>\d+) val_loss:(?P<val_loss>NUMBER) "
        r"val_bpb:(?P<val_bpb>NUMBER) (?:.* )?"
        r"train_time:(?P<milliseconds>\d+)ms step_avg:(?P<average>[\d.]+)ms",
    ),
    shape("stage", r"stage:(?P<name>\w+) (?P<seconds>[\d.]+)s"),
    shape(
        "throughput",
        r"late_qat_steps:(?P<late_qat_steps>\d+) tokens:(?P<tokens>\d+) "
        r"tokens_per_second:(?P<tokens_per_second>\d+)\b.*",
    ),
    shape("artifact", r"artifact:\S+ .*?sha256:(?P<sha256>[0-9a-f]{64})\b.*"),
    shape("model_bytes", r"Serialized model int6\+zstd: (?P<bytes>\d+) bytes"),
    shape("code_bytes", r"Code size: (?P<bytes>\d+) bytes"),
    shape("total_bytes", r"Total submission size int6\+zstd: (?P<bytes>\d+) bytes"),
    shape("eval_seconds", r"eval_seconds:(?P<seconds>NUMBER) .*"),
    shape("compliance", r"compliance:(?P<json>.*)"),
    shape(
        "score",
        r"(?P<label>final_int6_\w+) val_loss:(?P<val_loss>NUMBER) val_bpb:(?P<val_bpb>NUMBER) "
        r"eval_time:(?P<milliseconds>\d+)ms targets:(?P<targets>\d+) bytes:(?P<bytes>\d+)",
    ),
    shape(
        "exact_score",
        r"(?P<label>final_int6_\w+)_exact "
        r"val_loss:(?P<val_loss>NUMBER) val_bpb:(?P<val_bpb>NUMBER)",
    ),
    # How a failed run ends on the console: the script's own line, or a traceback's last one.
    shape("error", r"(?P<text>(?:error: |\w*(?:Error|Exception)\b).*)"),
    # The field's logs, of all scripts and months. Several rows state one fact; a line of our own
    # script is found by some of them, too.
    shape("ran seed", r"(?:.*[\s,;])?seed[:=] ?(?P<seed>\d+)(?![\d/.]).*", "seed"),
    shape("ran processes", r"(?:.*\s)?world_size[:=] ?(?P<count>\d+)\b.*", "world_size"),
    shape("ran processes", r".*\sws:(?P<count>\d+)\b.*", "ws:"),
    shape("gpu", r"\|\s+\d+\s+(?P<name>NVIDIA .*?)\s+(?:On|Off)\s+\|.*", "NVIDIA"),
    shape("parameters", r"(?:.*\s)?model_params[:=] ?(?P<count>[\d,]+)\b.*", "model_params"),
    shape("parameters", r"\s*(?:total_|num_)?param(?:eter)?s: ?(?P<count>[\d,]{7,})", "param"),
    shape("validation tokens", r"val_loader:.*\btokens:(?P<count>\d+)\b.*", "val_loader"),
    shape("validation tokens", r"\s*val_tokens[:=] ?(?P<count>\d+)", "val_tokens"),
    shape(
        "training data",
        r"train_loader:dataset:(?P<name>\S+) train_shards:(?P<shards>\d+).*",
        "train_loader",
    ),
    shape("training shards", r"\s*train_shards[:=] ?(?P<shards>\d+)", "train_shards"),
    shape(
        "training data",
        r"WARNING: train_loader:subset dataset:(?P<name>\S+) train_shards:(?P<shards>\d+)/\d+.*",
        "train_loader:subset",
    ),
    shape("data folder", r"\s*(?:datasets_dir|data_path)[:=] ?(?P<path>\S+)", "data"),
    shape("batch tokens", r"(?:.*\s)?train_batch_tokens[:=] ?(?P<count>\d+)\b.*", "train_batch"),
    shape("batch tokens", r"lr:.*\sbatch:(?P<count>\d{4,}) .*", " batch:"),
    shape(
        "time limit",
        r"(?:.*\s)?max_wallclock_seconds[:=] ?(?P<seconds>NUMBER)(?:\s.*)?",
        "max_wallclock",
    ),
    shape("switched on", r"\s*(?P<name>\w+)[:=] ?True", "True"),
    shape(
        "trained",
        r"step:(?P<step>\d+)/(?P<iterations>\d+) train_loss:(?P<train_loss>NUMBER)(?: .*?)? "
        r"train_time:(?P<milliseconds>\d+)ms(?: step_avg:(?P<average>[\d.]+)ms)?.*",
        "train_loss:",
    ),
    shape(
        "trained",
        r"(?P<step>\d+)/(?P<iterations>\d+) train_loss: (?P<train_loss>NUMBER) "
        r"train_time: (?P<minutes>NUMBER)m tok/s: (?P<tokens_per_second>[\d.]+).*",
        "train_loss: ",
    ),
    shape(
        "validated",
        r"step:(?P<step>\d+)/(?P<iterations>\d+) val_loss:(?P<val_loss>NUMBER) "
        r"val_bpb:(?P<val_bpb>NUMBER)(?: .*?)? "
        r"train_time:(?P<milliseconds>\d+)ms(?: step_avg:(?P<average>[\d.]+)ms)?.*",
        "val_bpb:",
    ),
    shape(
        "validated",
        r"(?P<step>\d+)/(?P<iterations>\d+) val_loss: (?P<val_loss>NUMBER) "
        r"val_bpb: (?P<val_bpb>NUMBER)",
        "val_bpb: ",
    ),
    shape(
        "stopped",
        r"stopping_early:.*\btrain_time: ?(?P<milliseconds>\d+)ms "
        r"step: ?(?P<step>\d+)/(?P<iterations>\d+)",
        "stopping_early",
    ),
    shape(
        "packed bytes",
        r"(?:Serialized|Compressed|Quantized) model (?!fp32|raw)"
        r"(?P<codec>[\w+.=-]+(?: [\w+.=-]+)?): (?P<bytes>[\d,]{5,})(?![\d.]).*",
        " model ",
    ),
    shape("packed bytes", r"Compressed model: (?P<bytes>[\d,]+) bytes.*", "Compressed model"),
    shape(
        "packed bytes",
        r"serialized_model_(?P<codec>\w+):(?P<bytes>[\d,]+) bytes.*",
        "serialized_model_",
    ),
    shape(
        "packed bytes",
        r"Quantized\+compressed(?: \((?P<codec>[\w+.-]+)\))?: (?P<bytes>[\d,]+) bytes.*",
        "Quantized+compressed",
    ),
    shape("unpacked bytes", r"Raw model: (?P<bytes>[\d,]+) bytes.*", "Raw model:"),
    shape(
        "packed bytes",
        r"Serialized (?P<codec>[a-z]+-?\d*): (?P<bytes>[\d,]+) bytes\s+Total: .*",
        "Total:",
    ),
    shape(
        "total",
        r"Serialized (?P<codec>[a-z]+-?\d*): .*\bTotal: (?P<bytes>[\d,]+) bytes",
        "Total:",
    ),
    shape("counted code", r"Serialized model: .*\bCode: (?P<bytes>[\d,]+) bytes.*", "Code:"),
    shape("counted code", r"Raw model: .*\bCode: (?P<bytes>[\d,]+) bytes.*", "Raw model:"),
    shape("unpacked bytes", r"Serialized model: (?P<bytes>[\d,]+) bytes.*", "Serialized model:"),
    shape(
        "counted code",
        r"Code size(?: \((?P<kind>[\w ]+)\)| (?P<mark>\w+))?: (?P<bytes>[\d,]+)(?: bytes.*)?",
        "Code size",
    ),
    shape("counted code", r"code_size:(?P<bytes>[\d,]+) bytes.*", "code_size:"),
    shape(
        "total",
        r"total_submission_size_(?P<codec>\w+):(?P<bytes>[\d,]+) bytes.*",
        "total_submission_size_",
    ),
    shape(
        "total",
        r"Total submission size (?!raw)(?P<codec>[\w+.-]+): (?P<bytes>[\d,]{5,})(?![\d.]).*",
        "Total submission size ",
    ),
    shape(
        "total without codec",
        r"Total submission(?: size)?: (?P<bytes>[\d,]{5,})(?![\d.]).*",
        "Total submission",
    ),
    shape(
        "scored",
        r"(?!step\b)(?P<label>[A-Za-z][\w()+./ :-]*?)(?P<exact>_exact)?(?: \w+:\S+)* "
        r"val_loss: ?(?P<val_loss>NUMBER),? val_bpb: ?(?P<val_bpb>NUMBER)"
        r"(?:.*?\b(?:eval_)?time: ?(?P<milliseconds>\d+)ms)?.*",
        "val_bpb:",
    ),
    shape(
        "scored",
        r"(?P<label>\w+):done val_loss=(?P<val_loss>NUMBER) val_bpb=(?P<val_bpb>NUMBER)"
        r"(?: elapsed=(?P<seconds>[\d.]+)s)?.*",
        ":done",
    ),
    shape(
        "score alone",
        r"(?P<label>(?:[A-Za-z][\w ()+.-]*?[ :])?\w*)bpb ?[:=] ?"
        r"(?P<val_bpb>\d\.\d{4,})\b(?!.*loss).*",
        "bpb",
    ),
    shape(
        "score alone",
        r"(?!.*loss)(?P<label>[A-Za-z]\w*)(?: \w+:[^\s:]+)+ val_bpb:(?P<val_bpb>\d\.\d{4,})\b.*",
        " val_bpb:",
    ),
    shape("evaluation", r"(?:\w+:)?total_(?:eval|pass)_time: ?(?P<seconds>[\d.]+)s", "total_"),
    shape("adapted", r"\s*(?P<how>ttt\w*|tttg|ttpp?|TTT)\b[:= ].*", "tt"),
    shape("adapted", r"\s*(?P<how>TTT\w*|ngram_\w+|ppm_mix|slot\w*)\b[:= ].*"),
)


def statements(fact: str, text: str) -> list[dict[str, str]]:
    """The values of every line that states a fact, in the order of the lines."""
    found = [match for row in SHAPES if row.fact == fact for match in row.pattern.finditer(text)]
    found.sort(key=lambda match: match.start())
    return [match.groupdict() for match in found]


# ---- What a log states
class DataSource(NamedTuple):
    """Where a run found its shards and its tokenizer; the start of the tokenizer's SHA-256."""

    folder: str
    tokenizer: str
    tokenizer_sha256: str


class Device(NamedTuple):
    """A kind of device (cpu, cuda:0) and its name, or why it was chosen."""

    kind: str
    name: str


class Step(NamedTuple):
    """A step line: the step of how many, milliseconds of training, and milliseconds a step."""

    step: int
    iterations: int
    milliseconds: int
    average: float


class Throughput(NamedTuple):
    """Steps with late QAT, tokens trained on, and tokens a second."""

    late_qat_steps: int
    tokens: int
    tokens_per_second: int


class Score(NamedTuple):
    """A pass over the validation text: nats a token, bits a byte, seconds, targets, bytes of text.

    A log states loss and bits twice: rounded to four decimals, and to eight.
    """

    val_loss: float
    val_bpb: float
    rounded_val_loss: float
    rounded_val_bpb: float
    seconds: float
    targets: int
    bytes: int


class Log:
    """The log of a run.

    Where several lines state a fact, the last one counts: a resumed run states many things again.
    """

    def __init__(self, path: Path, with_source: bool = True):
        text = path.read_text(encoding="utf-8", errors="replace")
        self.path = path
        self.source = ""
        # The run's own lines: one part, and one more for each time that it was resumed.
        self.parts = re.split(rf"^{SEPARATOR}\n", text, flags=re.M)
        if with_source:
            self.source = self.parts.pop(0)
        self.lines = "".join(self.parts)
        self.settings = self._settings()

    def last(self, fact: str, **wanted: str) -> dict[str, str] | None:
        """The values of the last line that states a fact; None if no line does.

        Only lines count that have the wanted values.
        """
        for values in reversed(statements(fact, self.lines)):
            if wanted.items() <= values.items():
                return values
        return None

    def _settings(self) -> dict:
        stated = self.last("settings")
        if stated is None:
            return {}
        try:
            return dict(json.loads(stated["json"]))
        except ValueError:
            return {}

    def _text(self, fact: str, value: str, default: str | None = None) -> str | None:
        stated = self.last(fact)
        return default if stated is None else stated[value]

    def _bytes(self, fact: str) -> int | None:
        stated = self.last(fact)
        return None if stated is None else int(stated["bytes"])

    # -- the machine
    @property
    def preset(self) -> str:
        """The preset; record if it is not stated."""
        return self._text("preset", "name", "record")

    @property
    def dtype(self) -> str:
        """The type of the forward pass; auto if it is not stated."""
        return self._text("dtype", "name", "auto")

    @property
    def world_size(self) -> int:
        """The number of processes; 1 if it is not stated."""
        return int(self._text("world_size", "processes", "1"))

    @property
    def threads(self) -> str:
        """The number of threads in each process; unknown if it is not stated."""
        return self._text("world_size", "threads") or "unknown"

    @property
    def device(self) -> Device | None:
        """The device; None if it is not stated, as with all that follows."""
        stated = self.last("device")
        return None if stated is None else Device(**stated)

    # -- the data
    @property
    def data(self) -> DataSource | None:
        """Where shards and tokenizer were."""
        stated = self.last("data")
        if stated is None:
            return None
        return DataSource(stated["folder"], stated["tokenizer"], stated["sha256"])

    # -- training
    def steps(self) -> list[list[Step]]:
        """The step lines of each part of the run."""
        return [[step_of(values) for values in statements("step", part)] for part in self.parts]

    @property
    def last_step(self) -> Step | None:
        """The last step line."""
        stated = self.last("step")
        return None if stated is None else step_of(stated)

    def curve(self, quantity: str) -> list[tuple[int, float]]:
        """Pairs of step and train_loss, val_loss or val_bpb, in order.

        If several lines state the quantity at one step, the last one counts.
        """
        points = {}
        for values in statements("step", self.lines):
            if quantity in values:
                points[int(values["step"])] = float(values[quantity])
        return sorted(points.items())

    @property
    def pre_quantization_bpb(self) -> float | None:
        """Bits a byte of the model as it was trained."""
        points = [values for values in statements("step", self.lines) if "val_bpb" in values]
        return float(points[-1]["val_bpb"]) if points else None

    @property
    def resumed_at(self) -> list[int]:
        """The steps from which the run went on after it was interrupted."""
        return [int(values["step"]) for values in statements("resumed", self.lines)]

    @property
    def throughput(self) -> Throughput | None:
        """The line on late QAT, tokens and their rate."""
        stated = self.last("throughput")
        if stated is None:
            return None
        return Throughput(**{name: int(value) for name, value in stated.items()})

    def stage_seconds(self, name: str) -> float | None:
        """How long a stage took, the last time that it ran."""
        stated = self.last("stage", name=name)
        return None if stated is None else float(stated["seconds"])

    # -- the artifact
    @property
    def artifact_sha256(self) -> str | None:
        """The digest of the artifact."""
        return self._text("artifact", "sha256")

    @property
    def model_bytes(self) -> int | None:
        """Bytes of the artifact."""
        return self._bytes("model_bytes")

    @property
    def code_bytes(self) -> int | None:
        """Bytes of the script."""
        return self._bytes("code_bytes")

    @property
    def total_bytes(self) -> int | None:
        """Bytes of both."""
        return self._bytes("total_bytes")

    # -- evaluation
    @property
    def track(self) -> str:
        """A, a fixed predictor, or B, which learns while it scores, by the settings."""
        return track_of(self.settings)

    @property
    def passes(self) -> list[str]:
        """The names in LABELS of the passes that such a run ends with, its own score last."""
        return passes_of(self.settings)

    @property
    def final_score(self) -> Score | None:
        """The score of the run; None if it is not there."""
        return self.score(LABELS[self.passes[-1]])

    def score(self, label: str) -> Score | None:
        """The score under one of LABELS; None unless both of its lines are there."""
        rounded = self.last("score", label=label)
        exact = self.last("exact_score", label=label)
        if rounded is None or exact is None:
            return None
        return Score(
            val_loss=float(exact["val_loss"]),
            val_bpb=float(exact["val_bpb"]),
            rounded_val_loss=float(rounded["val_loss"]),
            rounded_val_bpb=float(rounded["val_bpb"]),
            seconds=int(rounded["milliseconds"]) / 1000,
            targets=int(rounded["targets"]),
            bytes=int(rounded["bytes"]),
        )

    @property
    def eval_seconds(self) -> float | None:
        """Seconds of evaluation, all passes."""
        stated = self.last("eval_seconds")
        return None if stated is None else float(stated["seconds"])

    @property
    def compliance(self) -> dict | None:
        """What the line compliance:{...} states; None if there is no such line.

        ValueError if it is no JSON object.
        """
        text = self._text("compliance", "json")
        if text is None:
            return None
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"the compliance line of {self.path} is no JSON object")
        return found


def track_of(settings: dict) -> str:
    """The track of a run by its settings: A, or B if it learns while it scores."""
    return "B" if settings.get("ttt_enabled") else "A"


def passes_of(settings: dict) -> list[str]:
    """The names in LABELS of the passes that a run with these settings ends with.

    The last one is the run's score.
    """
    names = ["roundtrip", "sliding"]
    if track_of(settings) == "B":
        names.append("ttt")
    return names


def step_of(values: dict[str, str]) -> Step:
    """A step line's values as numbers."""
    return Step(
        step=int(values["step"]),
        iterations=int(values["iterations"]),
        milliseconds=int(values["milliseconds"]),
        average=float(values["average"]),
    )


# ---- Without reading a whole log
def progress(path: Path) -> str | None:
    """The last step of a run that may still go on, such as 463/20000; None before the first."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            tail = file.read().decode("utf-8", errors="replace")
    except OSError:
        return None
    steps = statements("step", tail)
    return f"{steps[-1]['step']}/{steps[-1]['iterations']}" if steps else None


def console_errors(text: str) -> list[str]:
    """The lines of a run's console output that name an error."""
    return [values["text"] for values in statements("error", text)]


# ---- Configurations
def configuration(log: Log) -> dict:
    """The settings of a run that the seeds of one record share."""
    kept = log.settings.keys() - MACHINE - {"seed"}
    return {name: log.settings[name] for name in log.settings if name in kept}


def differing_settings(first: Log, second: Log) -> list[str]:
    """The names of the settings in which two runs are not of one configuration."""
    ours = configuration(first)
    theirs = configuration(second)
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
