"""How long training and evaluation took, by logs and submission.json, against ten minutes each."""

from __future__ import annotations

import itertools

from challenge import GPUS, LIMIT
from checks import FAILS, HOLDS, UNCHECKED, UNSTATED, Verdict
from field_checks import claim_at_top
from field_claims import WALLCLOCKS, StatedTime
from field_logs import FieldLog
from field_record import FieldRecord, Run

# Seconds behind the limit at which a run still ends with the step that was begun before it.
LAST_STEP = 1.0
# Of so many passes of a log all sums are tried.
MOST_PASSES = 8
# Seconds, and the share, by which a time that is stated may be below that of a log.
SAME_SECONDS = 1.5
SAME_SHARE = 0.01


# ---- Training
def check_training_time(record: FieldRecord) -> Verdict:
    """Training against the limit of ten minutes, on the track that has it."""
    name = "training time"
    logs = [record.training_log(run) for run in record.claimed_runs]
    timed = [(log, *log.training) for log in logs if log.training is not None]
    if not timed:
        return Verdict(name, UNSTATED, "the logs do not state it")
    log, seconds, line = max(timed, key=lambda each: each[1])
    text = f"{seconds:.3f} s ({log.where(line)})"
    steps = log.steps[0] if log.steps else 0
    allowed = LIMIT + max(LAST_STEP, 2 * seconds / max(steps, 1))
    if seconds <= allowed:
        claim = claim_at_top(record, WALLCLOCKS)
        times = [log.training[0] for log in record.logs if log.training is not None]
        # To the millisecond it is copied from a log. A longer one may be that of all the program.
        exact = claim is not None and claim.decimals >= 3
        if exact and claim.value < min(times) - LAST_STEP:
            return Verdict(name, FAILS, f"{claim} s ({claim.where}), but {text}")
        ended = "" if seconds <= LIMIT else ", with the step that the limit found begun"
        return Verdict(name, HOLDS, f"{text}, of {LIMIT} s{ended}")
    return over_time(name, record, text, "train_under_600s", log)


def over_time(
    name: str, record: FieldRecord, text: str, flag: str, log: FieldLog | None
) -> Verdict:
    """A time over the limit: wrong on the track that has one, or where a flag denies it."""
    if record.claims.flag(flag) is True:
        return Verdict(name, FAILS, f"{text}, but {flag} is true (submission.json compliance)")
    if record.claims.track == "10min":
        return Verdict(name, FAILS, f"{text}, over the {LIMIT} s of track 10min_16mb")
    if record.claims.track == "non-record":
        return Verdict(name, HOLDS, f"{text}: a non-record track, which has no limit")
    limit = None if log is None else log.last("time limit")
    if limit is not None and float(limit.values["seconds"]) == LIMIT:
        where = log.where(limit.line)
        return Verdict(name, FAILS, f"{text}, over the {LIMIT} s that are its limit ({where})")
    return Verdict(name, UNCHECKED, f"{text}, over {LIMIT} s; the folder names no track")


# ---- Evaluation
def check_evaluation_time(record: FieldRecord) -> Verdict:
    """The pass whose score is claimed, or the evaluation's own clock, against the limit.

    What submission.json states of it is compared with the logs, and with the limit, too.
    """
    name = "evaluation time"
    stated = record.claims.evaluation_times()
    wrong = [told for each in stated for told in shorter_than_logs(record, each)]
    if wrong:
        return Verdict(name, FAILS, "; ".join(wrong))
    timed = [(time, run.log) for run in record.claimed_runs for time in claimed_pass(run)]
    longest = max(timed, key=lambda each: each[0][0], default=None)
    if longest is not None and longest[0][0] > LIMIT + LAST_STEP:
        (seconds, line), log = longest
        text = f"{seconds:.1f} s ({log.where(line)})"
        processes = log.count("ran processes")
        if processes is not None and processes[0] < GPUS:
            return Verdict(name, UNCHECKED, f"{text} on {processes[0]} of {GPUS} GPUs")
        return over_time(name, record, text, "eval_under_600s", log)
    claimed = max(stated, key=lambda each: each.claim.value, default=None)
    if claimed is not None and claimed.claim.value > LIMIT + LAST_STEP:
        return over_in_claims(name, record, claimed)
    if longest is not None:
        (seconds, line), log = longest
        return Verdict(name, HOLDS, f"{seconds:.1f} s ({log.where(line)}), of {LIMIT} s")
    if claimed is not None:
        text = f"{claimed.claim} s ({claimed.claim.where}), of {LIMIT} s"
        return Verdict(name, UNCHECKED, f"{text}: no log times its evaluation")
    return Verdict(name, UNSTATED, "the logs do not state it")


def claimed_pass(run: Run) -> list[tuple[float, int]]:
    """Seconds of the evaluation's own clock, else of the claimed pass, and their line."""
    stated = run.log.last("evaluation")
    if stated is not None:
        return [(float(stated.values["seconds"]), stated.line)]
    scored = run.scored or (run.log.finals[-1] if run.log.finals else None)
    if scored is not None and scored.seconds is not None:
        return [(scored.seconds, scored.line)]
    return []


def passes_of(log: FieldLog) -> dict[float, int]:
    """Seconds of every timed pass of a log, and their lines."""
    found = {each.seconds: each.line for each in log.scores if each.seconds is not None}
    for stated in log.facts.get("evaluation", []):
        found[float(stated.values["seconds"])] = stated.line
    return found


def sums_of(log: FieldLog) -> set[float]:
    """What an evaluation time may be of: each timed pass of a log, and the sums of several."""
    passes = list(passes_of(log))[-MOST_PASSES:]
    found = set()
    for number in range(1, len(passes) + 1):
        for chosen in itertools.combinations(passes, number):
            found.add(sum(chosen))
    return found


def same_time(seconds: float, stated: StatedTime) -> bool:
    """Whether a time is the one that is stated."""
    allowed = max(SAME_SECONDS, SAME_SHARE * seconds, stated.unit)
    return abs(seconds - stated.claim.value) <= allowed


def shorter_than_logs(record: FieldRecord, stated: StatedTime) -> list[str]:
    """A time that is stated, and is below that of every pass in the log whose score is claimed.

    A longer one may have loading in it, and what is between the passes.
    """
    runs = [run for run in record.claimed_runs if stated.seed in (None, run.seed)]
    runs = [run for run in runs if run.scored is not None and claimed_pass(run)]
    if not runs:
        return []
    shortest = min(runs, key=lambda run: claimed_pass(run)[0][0])
    [(seconds, line)] = claimed_pass(shortest)
    if stated.claim.value > seconds or same_time(seconds, stated):
        return []
    logs = [log for log in record.logs if stated.seed in (None, log.seed, log.named_seed)]
    if any(same_time(each, stated) for log in logs for each in sums_of(log)):
        return []
    place = shortest.log.where(line)
    return [f"{stated.claim} s ({stated.claim.where}), but {seconds:.1f} s ({place})"]


def over_in_claims(name: str, record: FieldRecord, stated: StatedTime) -> Verdict:
    """A time over the limit that submission.json alone states."""
    text = f"{stated.claim} s ({stated.claim.where})"
    for run in record.claimed_runs:
        within = [seconds for seconds, _ in claimed_pass(run) if seconds <= LIMIT + LAST_STEP]
        if within and any(same_time(each, stated) for each in sums_of(run.log)):
            told = f"{text}, all passes of {run.log.name}; the claimed one took {within[0]:.1f} s"
            return Verdict(name, UNCHECKED, told)
    counts = {count for count, _, _ in record.claims.gpus()}
    if counts and GPUS not in counts:
        return Verdict(name, UNCHECKED, f"{text} on {min(counts)} of {GPUS} GPUs")
    return over_time(name, record, text, "eval_under_600s", None)
