"""A record folder of the field: its logs, its script, and the runs that it claims."""

from __future__ import annotations

import functools
import itertools
import os
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from field_claims import Claim, Claims, agree
from field_logs import FieldLog, Scored
from field_scripts import unpacks
from record_folder import ARTIFACTS, SCRIPT

LOG_SUFFIXES = (".log", ".txt", ".out", ".stdout")
NO_LOG = re.compile(r"require|readme|licen[sc]e|pr_body|notes?\.txt", re.I)
# A script that is shipped for readers, beside the packed one that counts.
READABLE_COPY = re.compile(
    r"human|plain|readable|pretty|unminified|unpacked|expanded|decoded", re.I
)
# Logs of runs that are shown beside the record's.
OTHER_RUN = re.compile(
    r"ablat|baseline|(?:^|/)old|_old|stopped|smoke|partial|dry|probe|control|compare|reference|sweep|supersed|debug"
    r"|abort|fail|crash|prev|original|dev_|_only|repeat|attempt|first_try|quant_eval|verify|preflight",
    re.I,
)
# Facts that make a text a log.
FACTS = ("trained", "validated", "scored", "stopped", "total", "packed bytes", "score alone")
LARGEST_LOG = 50 << 20
RESULT_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl"}
LARGEST_RESULTS = 1 << 20
# Of several logs of one seed so many choices are tried.
MOST_CHOICES = 1000
SKIPPED_FOLDERS = {"__pycache__", "node_modules"}


class Run(NamedTuple):
    """A run that the folder claims: its seed, its log, and the score in the log that is claimed."""

    seed: int | None
    log: FieldLog
    scored: Scored | None


class FieldRecord:
    """A folder of the field. What it does not hold is None or empty."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.claims = Claims(folder)
        self.files = files_below(folder)
        self.scripts = [path for path in self.files if path.suffix == ".py"]

    def name_of(self, path: Path) -> str:
        """A file as verdicts name it."""
        return path.relative_to(self.folder).as_posix()

    def result_file(self, figure: str) -> str | None:
        """A table of results, which is no log, that has a figure; None if none has."""
        for path in self.files:
            if path.suffix.lower() not in RESULT_SUFFIXES or path == self.claims.file:
                continue
            small = path.stat().st_size <= LARGEST_RESULTS
            if small and figure in path.read_text(encoding="utf-8", errors="replace"):
                return self.name_of(path)
        return None

    @functools.cached_property
    def logs(self) -> list[FieldLog]:
        """All logs, by whatever name and in whatever subfolder."""
        found = []
        for path in self.files:
            if path.suffix.lower() not in LOG_SUFFIXES or NO_LOG.search(path.name):
                continue
            if path.stat().st_size > LARGEST_LOG:
                continue
            log = FieldLog(path, self.name_of(path))
            if any(fact in log.facts for fact in FACTS):
                found.append(log)
        return found

    @property
    def is_record(self) -> bool:
        """Whether the folder is a record folder at all."""
        if self.claims.file is not None:
            return True
        return bool(self.logs and (self.scripts or self.claims.readme_lines))

    @functools.cached_property
    def is_own(self) -> bool:
        """Whether our script made it: it is there, or the logs, which are then read, say so."""
        return has_own_script(self.folder) or any(log.is_own for log in self.logs)

    @property
    def can_be_proven(self) -> bool:
        """Whether it has artifacts that the auditor can audit."""
        return bool(self.artifacts) and self.is_own

    @property
    def artifacts(self) -> list[Path]:
        """The packed models in it."""
        return sorted(self.folder.glob(ARTIFACTS))

    # -- the script
    @functools.cached_property
    def script(self) -> Path | None:
        """The script that trains: train_gpt.py, or that which the logs hold, or the likeliest.

        A folder may have helpers and no script that trains.
        """
        scripts = [path for path in self.scripts if not READABLE_COPY.search(path.stem)]
        beside = [path for path in scripts if path.parent == self.folder] or scripts
        for path in beside:
            if path.name == SCRIPT:
                return path
        sources = {"".join(log.source.split()) for log in self.logs if log.source}
        for path in beside:
            if "".join(path.read_text(encoding="utf-8", errors="replace").split()) in sources:
                return path
        named = [path for path in beside if "train" in path.name]
        likely = named or [path for path in beside if may_train(path)]
        return max(likely, key=lambda path: path.stat().st_size, default=None)

    # -- the runs
    @functools.cached_property
    def main_logs(self) -> list[FieldLog]:
        """The logs that are not named as those of other runs."""
        main = [log for log in self.logs if not OTHER_RUN.search(log.name)]
        return main or self.logs

    def logs_of(self, seed: int) -> list[FieldLog]:
        """The logs that say, in their lines or else in their names, that they ran a seed."""
        return [log for log in self.main_logs if log.seed == seed or seed in log.seeds]

    @functools.cached_property
    def runs(self) -> list[Run]:
        """The runs that the folder claims, each with a log."""
        seeds = self.claims.named_seeds
        if seeds:
            found = [self.run_of(seed) for seed in seeds]
            found = [run for run in found if run is not None]
            if found:
                return found
        return self.unnamed_runs()

    def training_log(self, run: Run) -> FieldLog:
        """The log of a run's training: its own, or that beside it of a seed scored elsewhere."""
        if run.log.training is None and run.seed is not None:
            for log in self.logs_of(run.seed):
                if log.training is not None and not log.finals:
                    return log
        return run.log

    def logs_with(self, run: Run) -> list[FieldLog]:
        """The log of a run, and that of its training if that is another."""
        training = self.training_log(run)
        return [run.log] if training is run.log else [run.log, training]

    @functools.cached_property
    def claimed_runs(self) -> list[Run]:
        """The runs whose scores are claimed; all of them if a claim is of none or of their mean.

        A folder that claims so many seeds claims them all, whichever it shows first.
        """
        count = self.claims.seed_count()
        if count is not None and len(self.runs) <= count[0]:
            return self.runs
        return [run for run in self.runs if run.scored is not None] or self.runs

    def run_of(self, seed: int) -> Run | None:
        """The run of a seed that submission.json names."""
        claim = self.claims.seeds.get(seed)
        score = None if claim is None else claim.score
        logs = self.logs_of(seed)
        if not logs:
            return None
        for log in logs:
            scored = score_in(log, score)
            if scored is not None:
                return Run(seed, log, scored)
        log = max(logs, key=lambda each: (bool(each.finals), each.name))
        return Run(seed, log, None)

    def unnamed_runs(self) -> list[Run]:
        """The runs of a folder whose submission.json names no seeds."""
        claim = self.claims.score
        agreeing = []
        for log in self.main_logs:
            scored = score_in(log, claim)
            if scored is not None:
                agreeing.append(Run(log.seed, log, scored))
        if self.claims.seed_count() is None:
            if not agreeing:
                agreeing = [Run(log.seed, log, None) for log in self.main_logs if log.had(claim)]
            if agreeing:
                return agreeing[:1]
        by_seed: dict[object, list[FieldLog]] = {}
        for log in self.main_logs:
            if log.finals:
                by_seed.setdefault(log.name if log.seed is None else log.seed, []).append(log)
        scored = {run.log.name: run for run in agreeing}
        chosen = chosen_logs(list(by_seed.values()), claim, scored) or self.main_logs
        return [scored.get(log.name) or Run(log.seed, log, None) for log in chosen]

    @functools.cached_property
    def absent_logs(self) -> list[str]:
        """Logs that README.md names and that are not here."""
        here = {path.name for path in self.files}
        return sorted(self.claims.named_logs() - here)

    @functools.cached_property
    def absent_scripts(self) -> list[str]:
        """Scripts beside the one that trains that README.md names and that are not here."""
        here = {SCRIPT, *(path.name for path in self.files)}
        return sorted(self.claims.named_scripts() - here)

    def values(self) -> tuple[list[float], list[float]]:
        """Bits a byte and nats a token of each run, by the logs, as they are claimed."""
        bpbs = []
        losses = []
        for run in self.runs:
            scored = run.scored or (run.log.finals[-1] if run.log.finals else None)
            if scored is not None:
                bpbs.append(scored.val_bpb)
                losses.append(scored.val_loss)
        return bpbs, losses

    @functools.cached_property
    def bpb(self) -> float | None:
        """The score of the record: as claimed, else the mean over its logs."""
        if self.claims.score is not None:
            return self.claims.score.value
        bpbs, _ = self.values()
        return statistics.mean(bpbs) if bpbs else None


def chosen_logs(
    by_seed: list[list[FieldLog]], claim: Claim | None, scored: dict[str, Run]
) -> list[FieldLog]:
    """One log of each seed: that whose score is claimed, or those whose mean is, or the first."""
    first = []
    for logs in by_seed:
        own = [log for log in logs if log.name in scored]
        first.append((own or logs)[0])
    if claim is None or scored:
        return first
    for logs in itertools.islice(itertools.product(*by_seed), MOST_CHOICES):
        finals = [log.finals[-1] for log in logs]
        if not finals:
            break
        mean = statistics.mean(each.val_bpb for each in finals)
        if agree(claim.value, claim.decimals, mean, min(each.decimals for each in finals)):
            return list(logs)
    return first


def may_train(path: Path) -> bool:
    """Whether a script may train: it prints bits a byte, or it unpacks what is run."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return "val_bpb" in text or unpacks(text)


def has_own_script(folder: Path) -> bool:
    """Whether the script of a folder reads artifacts as ours does."""
    script = folder / SCRIPT
    return script.is_file() and "def read_artifact(" in script.read_text(errors="replace")


def score_in(log: FieldLog, claim) -> Scored | None:
    """The score of a log, the last first, that a claim agrees with."""
    if claim is None:
        return None
    for scored in reversed(log.finals):
        if agree(claim.value, claim.decimals, scored.val_bpb, scored.decimals):
            return scored
    return None


def score_alone_in(log: FieldLog, claim) -> Scored | None:
    """A score without a loss in a log that a claim agrees with."""
    for scored in reversed(log.scores_alone):
        if agree(claim.value, claim.decimals, scored.val_bpb, scored.decimals):
            return scored
    return None


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, in order, but hidden ones; links are not followed out of it."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name[0] != "." and name not in SKIPPED_FOLDERS
        )
        for name in sorted(names):
            path = Path(parent) / name
            if name[0] != "." and path.is_file():
                found.append(path)
    return found
