"""A log against the files that are shipped with it, and against itself."""

from __future__ import annotations

import hashlib
import math

from challenge import CAP, LIMIT
from checks import Check, Tally
from run_logs import LABELS, Log, Score, Step

# What rounding may take off a statement: half of the last digit, and a bit for binary fractions.
FOUR_DECIMALS = 0.500001e-4
EIGHT_DECIMALS = 1e-7
# Stages and seconds of evaluation are stated to a tenth of a second.
TENTH = 0.0501
MILLISECOND = 0.0006


def check_log(
    name: str,
    log: Log | None,
    script: bytes,
    artifact: bytes | None,
    stored: dict | None,
    required: bool,
) -> Check:
    """Compare a log with the shipped files and its lines with each other.

    `stored` are the settings in the artifact. `required`: the log must be that of a training run,
    with all its lines.
    """
    if log is None:
        return Check(name, None, "there is no log; name it with --log")
    tally = Tally()
    tally.expect(log.settings, "no line settings:{...}")
    compare_sizes(tally, log, script, artifact, required)
    compare_scores(tally, log)
    if required or any(log.steps()):
        compare_steps(tally, log)
    compare_compliance(tally, log, required)
    for key, value in (stored or {}).items():
        mine = log.settings.get(key)
        tally.expect(mine == value, f"{key} is {mine}, but {value} in the artifact")
    return tally.check(name)


def compare_sizes(
    tally: Tally, log: Log, script: bytes, artifact: bytes | None, required: bool
) -> None:
    """Bytes and digest of the shipped files.

    A log of an evaluation names no digest; that of a training run, which a record needs, does.
    """
    tally.expect(log.source.encode() == script, "its source is not the shipped script")
    tally.equal("code size", log.code_bytes, len(script))
    both = None
    if log.model_bytes is not None and log.code_bytes is not None:
        both = log.model_bytes + log.code_bytes
    tally.equal("total size", log.total_bytes, both)
    cap = log.settings.get("artifact_max_bytes", CAP)
    tally.expect((log.total_bytes or 0) <= cap, "the total is over the cap")
    digest = log.artifact_sha256
    tally.expect(digest or not required, "no line artifact:... sha256:...")
    if artifact is not None:
        tally.equal("size of the artifact", log.model_bytes, len(artifact))
        if digest:
            same = digest == hashlib.sha256(artifact).hexdigest()
            tally.expect(same, "its sha256 is not the artifact's")


def compare_scores(tally: Tally, log: Log) -> None:
    """The final lines, rounded and exact, and the clock of evaluation."""
    scores: list[Score] = []
    labels = [LABELS[name] for name in log.passes]
    for label in labels:
        score = log.score(label)
        if score is None:
            tally.expect(False, f"no lines {label}")
            continue
        scores.append(score)
        tally.equal(f"{label} val_loss", score.rounded_val_loss, score.val_loss, FOUR_DECIMALS)
        tally.equal(f"{label} val_bpb", score.rounded_val_bpb, score.val_bpb, FOUR_DECIMALS)
        bits = score.val_loss / math.log(2) * score.targets
        tally.equal(f"{label} val_bpb", score.val_bpb, bits / max(score.bytes, 1), EIGHT_DECIMALS)
    for label in set(LABELS.values()) - set(labels):
        tally.expect(log.score(label) is None, f"lines {label}, but nothing learns (ttt_enabled)")
    if len(scores) < len(labels):
        return
    for score in scores[1:]:
        tally.equal("targets of all passes", scores[0].targets, score.targets)
        tally.equal("bytes of all passes", scores[0].bytes, score.bytes)
    passes = sum(score.seconds for score in scores)
    long_enough = log.eval_seconds is not None and log.eval_seconds >= passes - 0.06
    tally.expect(long_enough, "eval_seconds is less than its passes")


def compare_steps(tally: Tally, log: Log) -> None:
    """Step lines, tokens, rate and clock of training."""
    for part in log.steps():
        compare_neighbours(tally, part)
    last = log.last_step
    rate = log.throughput
    if last is None or rate is None:
        tally.expect(False, "no step lines, or no line on tokens")
        return
    seconds = last.milliseconds / 1000
    batch = log.settings.get("train_batch_tokens", math.nan)
    tally.equal("tokens", rate.tokens, last.step * batch)
    tokens_per_second = max(rate.tokens_per_second, 1)
    tally.equal(
        "tokens / tokens_per_second",
        rate.tokens / tokens_per_second,
        seconds,
        MILLISECOND + 0.6 * seconds / tokens_per_second,
    )
    tally.equal("iterations", last.iterations, log.settings.get("iterations"))
    limit = log.settings.get("max_wallclock_seconds", 0.0)
    in_time = not limit or seconds <= limit + 0.0005
    tally.expect(in_time, f"train_time {seconds} s is over {limit} s")
    # Of a resumed run the stage is only the last part of the training.
    if len(log.parts) == 1:
        training = log.stage_seconds("training")
        opening = log.stage_seconds("opening") or 0.0
        long_enough = training is not None and training + opening >= seconds - 0.11
        told = f"the training stage is shorter than train_time, {seconds} s"
        tally.expect(long_enough, told)


def compare_neighbours(tally: Tally, part: list[Step]) -> None:
    """Each step line of one part of a run against the line before it."""
    before = Step(step=0, iterations=0, milliseconds=0, average=0.0)
    for line in part:
        forward = before.step <= max(line.step, 1) and before.milliseconds <= line.milliseconds
        step = max(line.step, 1)
        tally.expect(forward, f"step {step} goes back")
        mean = line.milliseconds / step
        tally.equal(f"step_avg of step {step}", line.average, mean, 0.51 / step + 0.0051)
        before = line


def compare_compliance(tally: Tally, log: Log, required: bool) -> None:
    """The line compliance:{...}, where a log has one, against the other lines.

    A record's log must have one, with training and evaluation under 600 s each.
    """
    try:
        stated = log.compliance
    except ValueError:
        tally.expect(False, "its compliance line is no JSON")
        return
    if stated is None:
        tally.expect(not required, "no line compliance:{...}")
        return
    last = log.last_step
    train_seconds = None if last is None else last.milliseconds / 1000
    compare_clock(tally, stated, "train", train_seconds, MILLISECOND, required)
    compare_clock(tally, stated, "eval", log.eval_seconds, TENTH, required)
    total = math.inf if log.total_bytes is None else log.total_bytes
    under_cap = stated.get("artifact_under_16mb") is (total <= CAP)
    tally.expect(under_cap, "artifact_under_16mb is wrong")
    scores = [log.score(LABELS[name]) for name in log.passes]
    for name in ("targets", "bytes"):
        every = stated.get(name)
        if not isinstance(every, list):
            every = [every]
        found = {None if score is None else getattr(score, name) for score in scores}
        tally.expect(set(every) == found, f"compliance {name} are others")
    track = stated.get("track", log.track)
    tally.expect(track == log.track, f"compliance track is {track}, by the settings {log.track}")
    adapts = bool(stated.get("adaptation"))
    told = "compliance adaptation is what a run of track B states, and no other"
    tally.expect(adapts == (log.track == "B"), told)
    same = stated.get("artifact_sha256") == log.artifact_sha256
    tally.expect(same, "compliance artifact_sha256 is another")
    resumed_at = stated.get("resumed_at") or []
    tally.expect(resumed_at == log.resumed_at, "compliance resumed_at is wrong")
    opened_early = "during" in str(stated.get("validation_opened"))
    tally.expect(
        log.settings.get("val_loss_every") or not opened_early,
        "validation was opened during training",
    )


def compare_clock(
    tally: Tally, stated: dict, which: str, found: float | None, tolerance: float, required: bool
) -> None:
    """Seconds of training or evaluation in the compliance line, and its verdict on them."""
    name = f"{which}_seconds"
    tally.equal(f"compliance {name}", stated.get(name), found, tolerance)
    flag = f"{which}_under_600s"
    in_time = (stated.get(name) or math.inf) <= LIMIT
    tally.expect(stated.get(flag) is in_time, f"{flag} is wrong")
    tally.expect(stated.get(flag) or not required, f"{flag} does not hold")
