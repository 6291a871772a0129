"""The audit of one artifact: what is asked of the audited script's processes, and the verdicts."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audit_adaptive_verdicts import (
    JUDGES,
    documents_to_code,
    judge_evaluation,
    text_of_documents,
)
from audit_challenges import (
    Challenge,
    draw_chunks,
    draw_windows,
    judge_challenges,
    judge_drawn,
    judge_size,
)
from audit_confinement import describe
from audit_judges import (
    BFLOAT16_TOLERANCE,
    DEFAULT_MINUTES,
    TOLERANCE,
    judge_causality,
    judge_coding,
    judge_normalization,
    judge_score,
)
from audit_log import check_log
from audit_processes import Processes, Result, shard_of
from audit_text import Text, drawn_documents, drawn_windows, read_byte_files, read_validation
from byte_files import Comparison
from case_operators import is_rewritten
from challenge import CAP
from checks import CHECKS, Check, guarded
from commands import BadInput
from cores import usable_cores
from manifest import Data, read_manifest
from record_folder import Entry
from run_logs import LABELS, Log, Score
from shards import BOS_ID

# Tokens of the validation split that are decoded to see whether it is text as people write it.
SAMPLE_TOKENS = 1 << 16
# Checks that a probe of the same name in audit_probes.py makes.
PROBED = ("bytes", "targets", "causality", "normalization")
# Those of what learns while it scores.
ADAPTIVE_CHECKS = {*JUDGES, "adaptive_score", "adaptive_decompression"}
# Seconds in which everything is scored, if so many suffice and no fewer minutes were asked for.
WHOLE_SECONDS = 600.0
# Shares of the time in which parts of windows, and chunks of documents, are coded and decoded.
WINDOWS_SHARE = 0.05
CHUNKS_SHARE = 0.2
# Until it is measured: seconds of a forward pass over a window.
SECONDS_PER_WINDOW = 1.0


@dataclass(frozen=True)
class Wishes:
    """What is asked for: checks, minutes on two cores, the seed of the samples, and `margin`.

    A score that is known less well than `margin` bits per byte is not proven. In the folder `keep`,
    if it is not None, the decoder's folder is left.
    """

    only: tuple[str, ...] = CHECKS
    minutes: float = DEFAULT_MINUTES
    seed: int = 0
    margin: float = 0.003
    keep: Path | None = None

    def include(self, *names: str) -> bool:
        """Whether one of these checks is asked for."""
        return any(name in self.only for name in names)


class Scoring(NamedTuple):
    """A score that a log claims, and how the auditor computes its own.

    `check` is the name among CHECKS, `name` that of the row, `worker` one of audit_worker.WORKERS,
    `label` one of LABELS. `unit` are the pieces of text that are scored, of which parts are coded
    and decoded by two more workers.
    """

    check: str
    name: str
    worker: str
    label: str
    unit: str
    encoder: str
    decoder: str


class Coding(NamedTuple):
    """A proof by decompression: the name of its row, two of audit_worker.WORKERS, their files.

    The coded file begins with so many bytes that count what follows.
    """

    name: str
    encoder: str
    decoder: str
    coded: str
    decoded: str
    head: int


# Of the fixed model, as on track A, and of what learns while it scores.
FIXED_SCORE = Scoring(
    "score", "score", "score", "sliding", "windows", "encode_windows", "decode_windows"
)
ADAPTIVE_SCORE = Scoring(
    "adaptive_score",
    "adaptive score",
    "score_documents",
    "ttt",
    "documents",
    "encode_chunks",
    "decode_chunks",
)
FIXED_CODING = Coding("decompression", "encode", "decode", "coded.bin", "decoded.txt", 2)
ADAPTIVE_CODING = Coding(
    "adaptive decompression",
    "encode_documents",
    "decode_documents",
    "coded_documents.bin",
    "decoded_documents.txt",
    4,
)


class ArtifactAudit:
    """One artifact with its script and log: starts processes and judges what they return."""

    def __init__(self, entry: Entry, data: Data, wishes: Wishes, folder: Path):
        self.entry = entry
        self.data = data
        self.wishes = wishes
        self.log = Log(entry.log) if entry.log else None
        self.script = entry.script.read_bytes()
        self.artifact = entry.artifact.read_bytes()
        self.text = Text(data.tokenizer)
        self.tokens = read_text(data, self.text)
        # Bytes of each target as its piece says, and as byte files say, where there are such.
        self.sizes_by_pieces = self.text.bytes_of_targets(self.tokens)
        self.sizes = read_sizes(data, self.text, self.tokens)
        self.began = time.perf_counter()
        self.seconds = 60 * wishes.minutes * min(1, len(usable_cores()) / 2)
        self.generator = np.random.default_rng(wishes.seed)
        variables = dict(
            COMPILE="0",
            DEVICE="cpu",
            EVAL_BATCH_SEQS="4",
            DTYPE="auto" if self.log is None else self.log.dtype,
        )
        # A script in a process finds out the seed there, and shall not know what will be decoded.
        digest = hashlib.sha256(f"processes {wishes.seed}".encode()).digest()
        seed = int.from_bytes(digest[:6], "big")
        self.processes = Processes(entry, data, variables, self.seconds, seed, folder)
        # What the probes found, once they have run.
        self.inspected: dict = {}
        # Nats of the documents that were coded to be decoded, by their first token in the text.
        self.decoded: dict[int, float] = {}

    # -- the order of events
    def run(self) -> list[Check]:
        """All checks that are asked for. Scores are computed beside the others.

        BadInput if all that is asked for is of what adapts, and nothing does.
        """
        with ThreadPoolExecutor(1) as beside:
            try:
                scored = self.begin_scoring(beside, FIXED_SCORE)
                self.inspect()
                if self.adapts:
                    scored.update(self.begin_scoring(beside, ADAPTIVE_SCORE))
                made = self.checked()
                for scoring, result in scored.items():
                    check = guarded(scoring.name, self.check_score, scoring, result.result())
                    made[scoring.check] = check
                if self.hides_learning:
                    figure = "the log is of track B, but the script says that nothing in it learns"
                    made["adaptive_score"] = Check(ADAPTIVE_SCORE.name, False, figure)
            except BaseException:
                # Nobody waits for the scores any more.
                self.processes.stop()
                raise
        stopped = self.processes.stopped
        if stopped:
            figure = f"was stopped {len(stopped)} times: {stopped[0]}"
            made["alone"] = Check("runs alone", False, figure)
        if self.wishes.include("log"):
            made["log"] = guarded("log", self.check_log)
        if not made and set(self.wishes.only) <= ADAPTIVE_CHECKS:
            raise BadInput(
                f"--only {','.join(self.wishes.only)}: {self.entry.artifact} is of track A, "
                "nothing in it adapts"
            )
        return [made[name] for name in CHECKS if name in made]

    def begin_scoring(
        self, beside: ThreadPoolExecutor, scoring: Scoring
    ) -> dict[Scoring, Future[Result]]:
        """Have a score computed beside all else, behind those that are computed there already."""
        if not self.wishes.include(scoring.check):
            return {}
        whole = WHOLE_SECONDS if self.wishes.minutes >= DEFAULT_MINUTES else 0.0
        result = beside.submit(
            self.processes.run,
            scoring.worker,
            self.tokens,
            seconds=0.8 * self.seconds,
            whole_seconds=whole,
        )
        return {scoring: result}

    def checked(self) -> dict[str, Check]:
        """All checks that are asked for but those of scores and the log, by their names."""
        made = {}
        for name, check in self.checks().items():
            if self.wishes.include(name):
                made[name] = guarded(name, check)
        return made

    def checks(self) -> dict[str, Callable[[], Check]]:
        """The checks of the script and its artifact, but for those of scores."""
        fixed = {
            "size": self.check_size,
            "alone": self.check_alone,
            "bytes": self.check_bytes,
            "targets": self.check_targets,
            "causality": self.check_causality,
            "normalization": self.check_normalization,
            "decompression": self.check_decompression,
        }
        if not self.adapts:
            return fixed
        adaptive: dict[str, Callable[[], Check]] = {
            check: partial(self.probed, name, check, judge)
            for check, (name, judge) in JUDGES.items()
        }
        return {**fixed, **adaptive, "adaptive_decompression": self.check_adaptive_decompression}

    def inspect(self) -> None:
        """Run the probes; BadInput for what is no artifact of the script, outside of a record."""
        if not self.wishes.include("decompression", *PROBED, *ADAPTIVE_CHECKS):
            return
        probes = [name for name in (*PROBED, *JUDGES) if self.wishes.include(name)]
        result = self.processes.run("inspect", self.tokens, seconds=self.seconds, probes=probes)
        self.inspected = result.values
        if self.inspected.get("refused") and self.entry.record is None:
            raise BadInput(f"{self.entry.script} refuses the artifact: {result.error}")

    @property
    def adapts(self) -> bool:
        """Whether the artifact is of track B: it learns while it scores."""
        return self.inspected.get("adapts", False)

    @property
    def hides_learning(self) -> bool:
        """Whether a score of what learns is claimed, and there would be no row for it."""
        claimed = self.log is not None and self.log.track == "B"
        return claimed and not self.adapts and self.wishes.include("adaptive_score")

    @property
    def seconds_per_window(self) -> float:
        """How long a forward pass over a window takes."""
        return self.inspected.get("seconds_per_window", SECONDS_PER_WINDOW)

    def stretch(self, targets: int) -> np.ndarray:
        """Text from a random document on, with so many targets if there are so many."""
        starts = np.flatnonzero(self.tokens == BOS_ID)
        starts = starts[starts + targets < len(self.tokens)]
        start = int(self.generator.choice(starts)) if len(starts) else 0
        return self.tokens[start : start + targets + 1]

    def bits_and_bytes(self, scored: dict, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bits, and bytes of text, of each window that was scored: two arrays (windows,)."""
        rows = np.array(scored["rows"])
        firsts = rows[:, 1].astype(int)
        ends = rows[:, 2].astype(int)
        bits = rows[:, 3] / math.log(2)
        sizes = self.sizes if tokens is self.tokens else self.text.bytes_of_targets(tokens)
        bytes_before = np.append(0, sizes.cumsum())
        return bits, bytes_before[ends] - bytes_before[firsts]

    def logged_score(self) -> Score | None:
        """The sliding score that the log claims; None if there is no log, or no score in it."""
        return None if self.log is None else self.log.score(LABELS["sliding"])

    def probed(self, check: str, name: str, judge: Callable[[dict], tuple[bool, str]]) -> Check:
        """The verdict on what a probe found, or its error. `check` is the name in the table."""
        found = self.inspected.get(name)
        if found is None:
            return Check(check, False, self.inspected.get("error", "there is no result"))
        if "error" in found:
            return Check(check, False, found["error"])
        passed, figure = judge(found)
        return Check(check, passed, figure)

    # -- verdicts
    def check_log(self) -> Check:
        """The log against the files and itself; that of a record must have all lines."""
        stored = self.inspected.get("settings")
        required = self.entry.record is not None
        return check_log("log", self.log, self.script, self.artifact, stored, required)

    def check_size(self) -> Check:
        """The shipped files against the cap, which a log may only lower."""
        cap = CAP
        if self.log is not None:
            cap = min(CAP, self.log.settings.get("artifact_max_bytes", CAP))
        size = len(self.script) + len(self.artifact)
        parts = f"{len(self.script):,} + {len(self.artifact):,}"
        return Check("size", size <= cap, f"{parts} = {size:,} bytes of {cap:,}")

    def check_alone(self) -> Check:
        """The script as a program on a sample, in a folder with nothing else.

        Its score must be the auditor's.
        """
        name = "runs alone"
        windows = int(np.clip(0.04 * self.seconds / self.seconds_per_window, 8, 100))
        stride = self.inspected.get("settings", {}).get("eval_stride", 64)
        sample = self.stretch(windows * stride)
        done = self.processes.run("program", sample)
        if done.error is not None:
            return Check(name, False, done.error)
        if done.values["status"] != 0:
            last_words = " ".join(done.output.split())[-200:]
            return Check(name, False, f"status {done.values['status']}: {last_words}")
        said = Log(done.folder / "out.txt", with_source=False)
        found = {"sliding": done.values}
        if "documents" in done.values:
            found["ttt"] = done.values["documents"]
        scores = {label: said.score(LABELS[label]) for label in ("roundtrip", *found)}
        if None in scores.values():
            return Check(name, False, "it ends without the final_int6_*_exact lines")
        targets = len(sample) - 1
        size = int(self.text.bytes_of_targets(sample).sum())
        agrees = all((score.targets, score.bytes) == (targets, size) for score in scores.values())
        expected = {}
        for label, scored in found.items():
            bits, _ = self.bits_and_bytes(scored, sample)
            expected[label] = bits.sum() / size
            agrees &= bool(abs(scores[label].val_bpb - expected[label]) <= TOLERANCE)
        theirs = " and ".join(f"{scores[label].val_bpb:.6f}" for label in found)
        own = " and ".join(f"{expected[label]:.6f}" for label in found)
        last = scores[list(found)[-1]]
        figure = f"{theirs} bpb, {last.targets:,} targets, {last.bytes:,} bytes; "
        figure += f"own {own}, {targets:,}, {size:,}; {describe(done.values.get('held', False))}"
        return Check(name, agrees, figure)

    def check_bytes(self) -> Check:
        """The script's byte table over the whole split, the log's bytes, and the decoded text.

        The manifest's bytes are those of the text with the tokenizer that belongs to it.
        """
        own = self.text.count(self.tokens)
        counts = {own, int(self.sizes_by_pieces.sum())}
        counted = int(self.sizes.sum())
        stated = ""
        claims = set()
        score = self.logged_score()
        if score is not None:
            claims.add(score.bytes)
            stated += f", log {score.bytes:,}"
        noted = read_manifest(self.data.folder).table("val").get("bytes")
        if noted:
            claims.add(noted)
            stated += f", manifest {noted:,}"
        if counted != own:
            stated += f", byte files {counted:,}"

        def judge(found: dict) -> tuple[bool, str]:
            counts.add(found["bytes"])
            figure = f"script {found['bytes']:,}{stated}, decoded text {own:,} bytes"
            return len(counts) == 1 and claims <= {counted}, figure

        return self.probed("byte count", "bytes", judge)

    def check_targets(self) -> Check:
        """A counter for each target of texts made for it, and the log's number of targets."""
        targets = len(self.tokens) - 1
        score = self.logged_score()

        def judge(found: dict) -> tuple[bool, str]:
            wrong = list(found["wrong"])
            if score is not None and score.targets != targets:
                wrong.append(f"the log has {score.targets:,} targets, the text {targets:,}")
            if wrong:
                return False, "; ".join(wrong)
            figure = f"{found['counted']:,} counters are 1, both passes over "
            figure += f"{found['lengths']} tokens"
            if score is not None:
                figure += f"; log: {targets:,} of {targets:,}"
            return True, figure

        return self.probed("every target once", "targets", judge)

    def check_causality(self) -> Check:
        """No number up to a point changes with the text behind it, and later ones do."""
        return self.probed("causality", "causality", judge_causality)

    def check_normalization(self) -> Check:
        """Losses are those of a log-softmax, and the probabilities of all pieces sum to 1."""
        return self.probed("normalization", "normalization", judge_normalization)

    def check_score(self, scoring: Scoring, scored: Result) -> Check:
        """A score that the log claims against the auditor's own evaluation."""
        if scored.error is not None:
            return Check(scoring.name, False, scored.error)
        wrong = judge_drawn(scored.values, self.drawn(scoring, scored.values), scoring.unit)
        if wrong:
            return Check(scoring.name, False, wrong)
        bits, sizes = self.bits_and_bytes(scored.values, self.tokens)
        claim = None if self.log is None else self.log.score(LABELS[scoring.label])
        bfloat16 = self.log is not None and self.log.dtype == "bfloat16"
        check = judge_score(
            None if claim is None else claim.val_bpb,
            bits,
            sizes,
            scored.values["windows"],
            BFLOAT16_TOLERANCE if bfloat16 else TOLERANCE,
            self.wishes.margin,
            self.wishes.minutes,
            scoring.name,
            scoring.unit,
        )
        if scoring is ADAPTIVE_SCORE:
            check = judge_evaluation(check, scored.values, self.decoded, bfloat16)
        return self.challenged(check, scoring, scored, bfloat16)

    def drawn(self, scoring: Scoring, scored: dict) -> np.ndarray:
        """All windows or documents in their random order: first token, first target, end."""
        if scoring is ADAPTIVE_SCORE:
            return drawn_documents(self.tokens, self.processes.seed)[:, [0, 0, 1]]
        return drawn_windows(len(self.tokens) - 1, *scored["shape"], self.processes.seed)

    def challenged(self, check: Check, scoring: Scoring, scored: Result, bfloat16: bool) -> Check:
        """The verdict on a score, once parts of what was scored have been decoded.

        They are any parts, however long a document is, behind what stands before them.
        """
        if scoring is ADAPTIVE_SCORE:
            challenges = draw_chunks(
                self.tokens,
                scored.values,
                self.inspected["settings"],
                self.inspected["seconds_of_prediction"],
                CHUNKS_SHARE * self.seconds,
                self.generator,
            )
        else:
            # By the auditor's own clock: a script could say that it is slow.
            seconds_per_window = scored.seconds / len(scored.values["rows"])
            seconds = WINDOWS_SHARE * self.seconds
            challenges = draw_windows(scored.values, seconds_per_window, seconds, self.generator)
        if not challenges:
            return check
        wrong = self.code_parts(challenges, scoring, scored.values, bfloat16)
        if wrong:
            return check._replace(passed=False, figure=f"{check.figure}; {wrong}", unproven="")
        rows = sum(len(challenge.rows) for challenge in challenges)
        targets = sum(sum(challenge.counts) for challenge in challenges)
        last = max(max(challenge.parts) for challenge in challenges)
        figure = f"{check.figure}; {targets:,} targets of {rows:,} {scoring.unit} were decoded"
        return check._replace(figure=f"{figure}, up to part {last}")

    def code_parts(
        self, challenges: list[Challenge], scoring: Scoring, scored: dict, bfloat16: bool
    ) -> str:
        """Have parts of what was scored coded and decoded; say what is wrong, or nothing."""
        text = np.concatenate([challenge.text(self.tokens) for challenge in challenges])
        groups = [list(zip(each.known, each.counts, strict=True)) for each in challenges]
        encoded = self.processes.run(scoring.encoder, text, groups=groups)
        if encoded.error is not None:
            return encoded.error
        coded = encoded.folder / "coded_parts.bin"
        before = self.processes.folder / "before_parts.bin"
        known = [challenge.before(self.tokens) for challenge in challenges]
        before.write_bytes(shard_of(np.concatenate(known)))
        groups = [list(zip(each.known, each.most, strict=True)) for each in challenges]
        decoded = self.processes.run(scoring.decoder, extra=(coded, before), groups=groups)
        if decoded.error is not None:
            return decoded.error
        targets = [challenge.targets(self.tokens) for challenge in challenges]
        if decoded.values["tokens"] != targets:
            return f"parts of {scoring.unit} are OTHERS when they are decoded"
        nats = encoded.values["nats"]
        count = sum(sum(challenge.counts) for challenge in challenges)
        wrong = judge_size(sum(nats, []), count, coded.read_bytes())
        return wrong or judge_challenges(challenges, nats, scored, bfloat16)

    def seconds_to_code(self) -> float:
        """How long a decoder may take: a share of what is left of the time."""
        left = self.seconds - (time.perf_counter() - self.began)
        share = 0.3 if self.adapts else 0.6
        return share * max(left, 0.2 * self.seconds)

    def check_decompression(self) -> Check:
        """Code a stretch of text, decode it where nothing else is, and compare."""
        # Each target takes a forward pass, and another one to decode it.
        passes = self.seconds_to_code() / self.seconds_per_window
        stretch = self.stretch(min(max(int(passes), 64), 65535, len(self.tokens) - 1))
        check, _ = self.coding(FIXED_CODING, stretch)
        return check

    def check_adaptive_decompression(self) -> Check:
        """Code whole documents, decode them by a script that learns from what it has decoded."""
        documents = documents_to_code(
            self.tokens,
            self.inspected["settings"],
            self.inspected["seconds_of_prediction"],
            self.seconds_to_code(),
            self.generator,
        )
        if not len(documents):
            figure = "the text has no document that another one follows"
            return Check(ADAPTIVE_CODING.name, None, figure)
        check, encoded = self.coding(ADAPTIVE_CODING, text_of_documents(self.tokens, documents))
        self.decoded = dict(zip(documents[:, 0].tolist(), encoded.get("nats", []), strict=False))
        if "coded" not in encoded:
            return check
        targets = int((documents[:, 1] - documents[:, 0]).sum())
        wrong = judge_size(encoded["nats"], targets, encoded["coded"])
        if wrong:
            return check._replace(passed=False, figure=f"{check.figure}; {wrong}")
        more = f"{len(documents)} documents, {encoded['fixed_bpb']:.4f} bpb without learning"
        return check._replace(figure=f"{check.figure}; {more}")

    def coding(self, coding: Coding, stretch: np.ndarray) -> tuple[Check, dict]:
        """Have a stretch of text coded and decoded; the verdict, and what the encoder returned.

        The text must be the same, and the file as small as the stretch's score says.
        """
        encoded = self.processes.run(coding.encoder, stretch)
        if encoded.error is not None:
            return Check(coding.name, False, encoded.error), encoded.values
        coded = encoded.folder / coding.coded
        if self.wishes.keep is not None:
            self.processes.keep(coded, self.wishes.keep)
        decoded = self.processes.run(coding.decoder, extra=(coded,))
        if decoded.error is not None:
            return Check(coding.name, False, decoded.error), encoded.values
        written = (decoded.folder / coding.decoded).read_bytes()
        same = written == self.text.decode(stretch)
        same &= decoded.values["tokens"] == stretch.tolist()
        count = int(self.text.bytes_of_targets(stretch).sum())
        data = coded.read_bytes()
        stated = encoded.values["val_bpb"]
        check = judge_coding(
            coding.name, same, len(stretch) - 1, count, len(data), coding.head, stated
        )
        return check, {**encoded.values, "coded": data[coding.head :]}


def read_text(data: Data, text: Text) -> np.ndarray:
    """The validation split, uint16 (tokens,); BadInput if it is none of the tokenizer's."""
    tokens = read_validation(data.folder)
    begins = len(tokens) > 1 and tokens[0] == BOS_ID
    if not begins or tokens.max() >= text.size:
        raise BadInput(
            f"{data.folder}: the validation split does not begin with token {BOS_ID}, or has "
            f"tokens beyond {text.size} of {data.tokenizer}: check --data and --tokenizer"
        )
    if is_rewritten(text.decode(tokens[:SAMPLE_TOKENS]).decode()):
        raise BadInput(
            f"{data.folder}: capitals are rewritten as operators, which {data.tokenizer} does not "
            "have as four pieces of their own: check --data and --tokenizer"
        )
    return tokens


def read_sizes(data: Data, text: Text, tokens: np.ndarray) -> np.ndarray:
    """The bytes of each of tokens[1:]: those of the byte files, where there are some.

    BadInput unless they agree with the pieces, but for what a tokenizer that normalizes has
    changed: a control token, and an operator that is not escaped, stand for none.
    """
    by_pieces = text.bytes_of_targets(tokens)
    stated = read_byte_files(data.folder)
    if stated is None:
        return by_pieces
    found = Comparison(len(tokens), bytes=int(stated.sum(dtype=np.int64)))
    found.by_pieces = int(by_pieces.sum())
    loud = 0
    if len(stated) == len(tokens):
        sizes = stated[1:]
        other = np.flatnonzero(sizes != by_pieces)
        found.other = len(other)
        found.first = f"behind target {other[:1]}"
        stands_for_none = (text.silent | text.operators)[tokens[1:]] & (by_pieces == 0)
        loud = np.count_nonzero(sizes[stands_for_none])
    if len(stated) != len(tokens) or loud or not found.agrees:
        raise BadInput(
            f"{data.folder}: the byte files are not of these shards: {len(stated):,} sizes for "
            f"{len(tokens):,} tokens, {found}; {loud:,} tokens have bytes that stand for none"
        )
    return sizes.astype(np.int64)
