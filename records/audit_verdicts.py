"""The audit of one artifact: what is asked of the audited script's processes, and the verdicts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audit_log import check_log
from audit_processes import Processes, Result
from audit_text import Text, read_byte_files, read_validation
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

# Bits per byte between two ways to compute a score.
TOLERANCE = 1e-4
# The same, if one is a compiled run in bfloat16, which rounds elsewhere: by 0.00009 as measured.
BFLOAT16_TOLERANCE = 2e-4
# Nats between a loss that is counted and a log-softmax; a sum of probabilities from 1.
LOSS_TOLERANCE = 1e-3
SUM_TOLERANCE = 1e-4
# The size of the coded text may differ from its score by this share and by its last byte.
CODING_TOLERANCE = 0.005
# Standard errors in the interval of a score that is known from drawn windows.
STANDARD_ERRORS = 4
# Tokens of the validation split that are decoded to see whether it is text as people write it.
SAMPLE_TOKENS = 1 << 16
# Checks that a probe of the same name in audit_probes.py makes.
PROBED = ("bytes", "targets", "causality", "normalization")
# Minutes for an artifact on two cores, unless others are asked for; and seconds in which all
# windows are scored, if so many suffice and no fewer minutes were asked for.
DEFAULT_MINUTES = 3.0
WHOLE_SECONDS = 600.0
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
        self.processes = Processes(entry, data, variables, self.seconds, wishes.seed, folder)
        # What the probes found, once they have run.
        self.inspected: dict = {}

    # -- the order of events
    def run(self) -> list[Check]:
        """All checks that are asked for. The score is computed beside the others."""
        with ThreadPoolExecutor(1) as beside:
            scoring = None
            if self.wishes.include("score"):
                seconds = 0.8 * self.seconds
                whole = WHOLE_SECONDS if self.wishes.minutes >= DEFAULT_MINUTES else 0.0
                scoring = beside.submit(
                    self.processes.run,
                    "score",
                    self.tokens,
                    seconds=seconds,
                    whole_seconds=whole,
                )
            try:
                made = self.checked()
                if scoring is not None:
                    made["score"] = guarded("score", self.check_score, scoring.result())
            except BaseException:
                # Nobody waits for the score any more.
                self.processes.stop()
                raise
        stopped = self.processes.stopped
        if stopped:
            figure = f"was stopped {len(stopped)} times: {stopped[0]}"
            made["alone"] = Check("runs alone", False, figure)
        if self.wishes.include("log"):
            made["log"] = guarded("log", self.check_log)
        return [made[name] for name in CHECKS if name in made]

    def checked(self) -> dict[str, Check]:
        """All checks that are asked for but those of the score and the log, by their names."""
        self.inspect()
        made = {}
        for name, check in self.checks().items():
            if self.wishes.include(name):
                made[name] = guarded(name, check)
        return made

    def checks(self) -> dict[str, Callable[[], Check]]:
        """The checks of the script and its artifact, but for that of the score."""
        return {
            "size": self.check_size,
            "alone": self.check_alone,
            "bytes": self.check_bytes,
            "targets": self.check_targets,
            "causality": self.check_causality,
            "normalization": self.check_normalization,
            "decompression": self.check_decompression,
        }

    def inspect(self) -> None:
        """Run the probes; BadInput for what is no artifact of the script, outside of a record."""
        if not self.wishes.include("decompression", *PROBED):
            return
        probes = [name for name in PROBED if self.wishes.include(name)]
        result = self.processes.run("inspect", self.tokens, seconds=self.seconds, probes=probes)
        self.inspected = result.values
        if self.inspected.get("refused") and self.entry.record is None:
            raise BadInput(f"{self.entry.script} refuses the artifact: {result.error}")

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
        scores = [said.score(label) for label in LABELS.values()]
        if None in scores:
            return Check(name, False, "it ends without the final_int6_*_exact lines")
        bits, sizes = self.bits_and_bytes(done.values, sample)
        targets = len(sample) - 1
        size = int(sizes.sum())
        expected = bits.sum() / size
        sliding = scores[1]
        counted = all((score.targets, score.bytes) == (targets, size) for score in scores)
        close = abs(sliding.val_bpb - expected) <= TOLERANCE
        theirs = f"{sliding.val_bpb:.6f} bpb, {sliding.targets:,} targets, {sliding.bytes:,} bytes"
        own = f"own {expected:.6f}, {targets:,}, {size:,}"
        return Check(name, counted and bool(close), f"{theirs}; {own}")

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

        def judge(found: dict) -> tuple[bool, str]:
            figure = f"{found['places']} places with other text behind them, "
            figure += f"{found['compared']:,} numbers up to them, "
            figure += f"largest difference {found['difference']:.3g}"
            if found["wrong"]:
                figure += f", after changes behind tokens {found['wrong'][:5]}"
            if not found["moved"]:
                figure += "; later losses did not change either"
            return found["moved"] and not found["wrong"], figure

        return self.probed("causality", "causality", judge)

    def check_normalization(self) -> Check:
        """Losses are those of a log-softmax, and the probabilities of all pieces sum to 1."""

        def judge(found: dict) -> tuple[bool, str]:
            passed = found["difference"] <= LOSS_TOLERANCE and found["brute"] <= SUM_TOLERANCE
            figure = f"losses {found['difference']:.2g} nats from log-softmax "
            figure += f"at {found['places']:,} places; sums over the vocabulary "
            figure += f"{found['brute']:.2g} from 1 at {found['brute_places']} places"
            return passed, figure

        return self.probed("normalization", "normalization", judge)

    def check_score(self, scored: Result) -> Check:
        """The score that the log claims against the auditor's own sliding evaluation."""
        if scored.error is not None:
            return Check("score", False, scored.error)
        bits, sizes = self.bits_and_bytes(scored.values, self.tokens)
        claim = self.logged_score()
        claimed = None if claim is None else claim.val_bpb
        bfloat16 = self.log is not None and self.log.dtype == "bfloat16"
        tolerance = BFLOAT16_TOLERANCE if bfloat16 else TOLERANCE
        windows = scored.values["windows"]
        spent = self.wishes.minutes
        return judge_score(claimed, bits, sizes, windows, tolerance, self.wishes.margin, spent)

    def check_decompression(self) -> Check:
        """Code a stretch of text, decode it where nothing else is, and compare.

        The text must be the same, and the file as small as the stretch's score says.
        """
        name = "decompression"
        left = self.seconds - (time.perf_counter() - self.began)
        # Each target takes a forward pass, and another one to decode it.
        passes = 0.6 * max(left, 0.2 * self.seconds) / self.seconds_per_window
        stretch = self.stretch(min(max(int(passes), 64), 65535, len(self.tokens) - 1))
        encoded = self.processes.run("encode", stretch)
        if encoded.error is not None:
            return Check(name, False, encoded.error)
        coded = encoded.folder / "coded.bin"
        if self.wishes.keep is not None:
            self.processes.keep(coded, self.wishes.keep)
        decoded = self.processes.run("decode", extra=(coded,))
        if decoded.error is not None:
            return Check(name, False, decoded.error)
        written = (decoded.folder / "decoded.txt").read_bytes()
        same = written == self.text.decode(stretch)
        same &= decoded.values["tokens"] == stretch.tolist()
        count = int(self.text.bytes_of_targets(stretch).sum())
        size = coded.stat().st_size
        # Two bytes say how many targets follow.
        rate = 8 * (size - 2) / count
        stated = encoded.values["val_bpb"]
        # The last byte is not full.
        allowed = CODING_TOLERANCE * stated + 8 / count
        close = abs(rate - stated) <= allowed
        which = "the" if same else "ANOTHER"
        figure = f"{len(stretch) - 1:,} tokens, {count:,} bytes of {which} text from {size:,}: "
        figure += f"{rate:.4f} bpb, scored {stated:.4f} ± {allowed:.4f}"
        return Check(name, same and close, figure)


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


def judge_score(
    claimed: float | None,
    bits: np.ndarray,
    sizes: np.ndarray,
    windows: int,
    tolerance: float,
    margin: float,
    minutes: float = DEFAULT_MINUTES,
) -> Check:
    """Compare a claimed score with that of scored windows, of which there are `windows` in all.

    `bits` and bytes of text, `sizes`, are those of each scored window: (windows,). If it is not all
    of them, the ratio of their sums is an estimate with an interval of four standard errors, of a
    finite population. Then a claim inside of it is proven only if `margin` is as wide; else it is
    said how many of these `minutes` would do.
    """
    found = bits.sum() / sizes.sum()
    scored = len(bits)
    if scored == windows:
        figure = f"own {found:.6f} bpb on all {windows:,} windows"
    else:
        residuals = bits - found * sizes
        variance = residuals.var(ddof=1) / scored * (1 - scored / windows)
        tolerance += STANDARD_ERRORS * math.sqrt(variance) / sizes.mean()
        figure = f"own {found:.4f} ± {tolerance:.4f} bpb on {scored:,} of {windows:,} windows"
    if claimed is None:
        return Check("score", None, f"{figure}; no claim")
    figure = f"claimed {claimed:.6f}, {figure}"
    agrees = abs(found - claimed) <= tolerance
    if agrees and tolerance > margin:
        share = share_that_proves(tolerance, margin, scored, windows)
        advice = f"--minutes {math.ceil(1.2 * minutes * share)} would do"
        return Check("score", None, f"{figure}: not known to {margin}", unproven=advice)
    return Check("score", bool(agrees), figure)


def share_that_proves(tolerance: float, margin: float, scored: int, windows: int) -> float:
    """How many times the scored windows it takes until the interval is as narrow as the margin.

    The interval goes with the root of 1/n - 1/N for n windows of N.
    """
    spread = tolerance**2 / (1 / scored - 1 / windows)
    return 1 / (margin**2 / spread + 1 / windows) / scored
