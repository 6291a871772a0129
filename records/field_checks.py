"""What a record folder of the field claims, against its logs: scores, seeds, steps, machine, text.

Each check returns one verdict. What is missing is missing, and never wrong.
"""

from __future__ import annotations

import math
import re
import statistics

import fineweb
from challenge import GPUS
from checks import FAILS, HOLDS, UNCHECKED, UNSTATED, Verdict
from field_claims import (
    BEFORE_PACKING,
    DEVIATIONS,
    LOSSES,
    SEED_STEPS,
    STEPS,
    Claim,
    agree,
    claim_of,
    rounded_to,
)
from field_logs import FieldLog, Scored
from field_record import FieldRecord, Run, score_alone_in, score_in
from manifest import CASE_OPERATOR_EXPORT
from readme_tables import means_in_tables, seeds_in_tables

# Bits a byte between the mean over seeds and any of them: several standard deviations.
SPREAD = 0.006
# What is in the label of a score that is surely of a packed model.
PACKED_LABEL = re.compile(r"int\d|quant|zlib|zstd|lzma|brotli|round.?trip", re.I)
# Shares by which bytes of text may differ from the known ones, and from which they are others.
SAME_BYTES = 0.01
OTHER_BYTES = 0.03
# A standard deviation is another from this share on: some leave digits away before they compute it.
OTHER_DEVIATION = 0.05
# A rate of tokens is another from this share on: some print that of the last steps alone.
OTHER_RATE = 0.5


def quoted(scored: Scored, log: FieldLog) -> str:
    """A score of a log with its label and place."""
    return f"{scored.val_bpb:.{scored.decimals}f} ({scored.label}, {log.where(scored.line)})"


# ---- Scores
def check_score(record: FieldRecord) -> Verdict:
    """The score of the folder against its logs."""
    name = "score"
    claim = record.claims.score
    if claim is None:
        return Verdict(name, UNSTATED, "no score in submission.json or at the head of README.md")
    runs = record.runs
    finals = [(run, run.log.finals[-1]) for run in runs if run.log.finals]
    stated = f"{claim} ({claim.where})"
    if not finals:
        alone = score_alone(record, claim)
        if alone is not None:
            return Verdict(name, HOLDS, f"{stated}: {alone}")
        return without_final(name, record, claim, stated)
    for run in runs:
        scored = score_in(run.log, claim)
        if scored is not None:
            return Verdict(name, HOLDS, f"{stated}: {described_match(scored, run.log)}")
    mean = mean_that_agrees(runs, claim)
    if mean is not None:
        return Verdict(name, HOLDS, f"{stated}: {mean}")
    return other_score(name, record, claim, stated)


def described_match(scored: Scored, log: FieldLog) -> str:
    """How a claim agrees with a score of a log."""
    last = log.finals[-1]
    text = quoted(scored, log)
    if last.line == scored.line:
        return text
    return f"{text}; the last score of that log is {quoted(last, log)}"


def mean_that_agrees(runs: list[Run], claim: Claim) -> str | None:
    """The mean over the runs of one of their scores, if a claim agrees with it."""
    tables = [{scored.label: scored for scored in run.log.finals} for run in runs]
    labels = {scored.label: None for run in runs for scored in reversed(run.log.finals)}
    rows = [[run.scored or run.log.finals[-1] for run in runs if run.log.finals]]
    rows += [[table[label] for table in tables if label in table] for label in labels]
    # A log may hold several runs.
    for run in runs:
        rows += [[each for each in run.log.finals if each.label == label] for label in labels]
    rows = [row for row in rows if row]
    for row in rows:
        mean = statistics.mean(scored.val_bpb for scored in row)
        decimals = min(scored.decimals for scored in row)
        if agree(claim.value, claim.decimals, mean, decimals):
            figures = ", ".join(f"{scored.val_bpb:.{scored.decimals}f}" for scored in row)
            return f"the mean of {figures} ({row[0].label} of {len(row)} runs)"
    return None


def without_final(name: str, record: FieldRecord, claim: Claim, stated: str) -> Verdict:
    """A claim whose logs have no score of the packed artifact."""
    if not record.logs:
        return Verdict(name, UNCHECKED, f"{stated}: there is no log")
    for run in record.runs:
        for scored in run.log.before_packing:
            if agree(claim.value, claim.decimals, scored.val_bpb, scored.decimals):
                text = f"{stated} is {quoted(scored, run.log)}, before packing; "
                return Verdict(name, UNCHECKED, text + "its log has no score of the artifact")
    return Verdict(name, UNCHECKED, f"{stated}: no log has a score of the packed artifact")


def other_score(name: str, record: FieldRecord, claim: Claim, stated: str) -> Verdict:
    """A claim that agrees with no score of the packed artifacts."""
    alone = score_alone(record, claim)
    if alone is not None:
        return Verdict(name, HOLDS, f"{stated}: {alone}")
    runs = [run for run in record.runs if run.log.finals]
    for run in runs:
        for scored in run.log.before_packing:
            if agree(claim.value, claim.decimals, scored.val_bpb, scored.decimals):
                text = f"{stated} is {quoted(scored, run.log)}, before packing; the artifact's is "
                # In README.md alone the first score need not be that of the record.
                state = UNCHECKED if claim.where.startswith("README") else FAILS
                return Verdict(name, state, text + quoted(run.log.finals[-1], run.log))
    for log in record.logs:
        scored = score_in(log, claim)
        if scored is not None:
            return Verdict(name, HOLDS, f"{stated}: {described_match(scored, log)}")
        line = log.line_with(claim.value, claim.decimals)
        if line is not None:
            text = f"{stated} stands in {log.where(line)}, in a line that is not understood"
            return Verdict(name, UNCHECKED, text)
    table = record.result_file(str(claim)) if claim.decimals >= 4 else None
    if table is not None:
        return Verdict(name, UNCHECKED, f"{stated} stands in {table}, and in no log")
    nearest, log = min(
        ((scored, run.log) for run in runs for scored in run.log.finals),
        key=lambda pair: abs(pair[0].val_bpb - claim.value),
    )
    text = f"{stated}, but the nearest score in the logs is {quoted(nearest, log)}"
    wanted = record.claims.seed_count()
    missing = wanted is not None and len(runs) < wanted[0]
    if missing and abs(nearest.val_bpb - claim.value) < SPREAD:
        return Verdict(name, UNCHECKED, f"{text}; {wanted[0]} seeds are claimed, not all have logs")
    if record.absent_logs:
        told = ", ".join(record.absent_logs)
        return Verdict(name, UNCHECKED, f"{text}; {told}, which README.md names, is not here")
    if record.claims.tells_of_packing_again(claim, nearest.val_bpb):
        told = f"{text}; README.md names both, and that the model was packed again"
        return Verdict(name, UNCHECKED, told)
    means = [*mean_of_claims(record), *means_in_tables(record.claims.readme_lines)]
    if missing and any(agree(claim.value, claim.decimals, *mean) for mean in means):
        return Verdict(name, UNCHECKED, f"{stated} is the mean of the seeds; not all have logs")
    return Verdict(name, FAILS, text)


def score_alone(record: FieldRecord, claim: Claim) -> str | None:
    """Where a claim stands among scores without a loss, or as their mean over the logs."""
    for log in record.logs:
        scored = score_alone_in(log, claim)
        if scored is not None:
            return quoted(scored, log)
    last = [log.scores_alone[-1] for log in record.logs if log.scores_alone]
    if len(last) > 1:
        mean = statistics.mean(scored.val_bpb for scored in last)
        if agree(claim.value, claim.decimals, mean, min(scored.decimals for scored in last)):
            return f"the mean of {len(last)} logs' {last[0].label}"
    return None


def mean_of_claims(record: FieldRecord) -> list[tuple[float, int]]:
    """The mean of the seeds' claimed scores, and its decimals; none without a score of each."""
    scores = [seed.score for seed in record.claims.seeds.values()]
    if len(scores) < 2 or None in scores:
        return []
    decimals = min(score.decimals for score in scores)
    return [(statistics.mean(score.value for score in scores), max(decimals, 3))]


def check_seed_scores(record: FieldRecord) -> Verdict:
    """What submission.json states of each seed against that seed's log."""
    name = "seed scores"
    seeds = record.claims.seeds
    scores = {seed: claims.score for seed, claims in seeds.items() if claims.score}
    if not scores:
        return Verdict(name, UNSTATED, "submission.json has no scores by seed")
    held = []
    wrong = []
    absent = []
    for seed, claim in scores.items():
        run = record.run_of(seed)
        others = [log for log in record.logs if seed in (log.seed, log.named_seed)]
        alone = any(score_alone_in(log, claim) is not None for log in others)
        if alone or (run is not None and run.scored is not None):
            held.append(str(seed))
        elif run is None or not run.log.finals:
            absent.append(str(seed))
        else:
            wrong.append(wrong_seed(claim, run))
    if wrong:
        return Verdict(name, FAILS, "; ".join(wrong))
    if not held:
        return Verdict(name, UNCHECKED, f"no logs of seeds {', '.join(absent)} with a score")
    text = f"seeds {', '.join(held)} have the scores of their logs"
    if absent:
        text += f"; no logs of {', '.join(absent)}"
    return Verdict(name, HOLDS, text)


def wrong_seed(claim: Claim, run: Run) -> str:
    """A seed's score that is not its log's."""
    for scored in run.log.before_packing:
        if agree(claim.value, claim.decimals, scored.val_bpb, scored.decimals):
            return f"{claim} ({claim.where}) is {quoted(scored, run.log)}, before packing"
    return f"{claim} ({claim.where}), but {quoted(run.log.finals[-1], run.log)}"


def check_mean(record: FieldRecord) -> Verdict:
    """The score against the mean over the seeds, if it is called that."""
    name = "mean"
    claim = record.claims.score
    values, decimals, source = seed_values(record)
    if claim is None or len(values) < 2:
        return Verdict(name, UNSTATED, "there are no scores of two seeds to take the mean of")
    count = record.claims.seed_count()
    if count is not None and count[0] > len(values):
        return Verdict(name, UNCHECKED, f"{count[0]} seeds are claimed, {len(values)} are stated")
    mean = statistics.mean(values)
    stated = f"{claim} ({claim.where})"
    told = f"the mean of {', '.join(f'{value:.{decimals}f}' for value in values)} ({source})"
    if agree(claim.value, claim.decimals, mean, max(decimals, 4)):
        return Verdict(name, HOLDS, f"{stated} is {told}")
    for column, claims in record.claims.columns().items():
        other = statistics.mean(each.value for each in claims)
        digits = min(each.decimals for each in claims)
        if agree(claim.value, claim.decimals, other, max(digits, 4)):
            return Verdict(name, HOLDS, f"{stated} is the mean of {column} over the seeds")
    where = record.claims.called_mean(claim, mean)
    same = [value for value in values if agree(claim.value, claim.decimals, value, decimals)]
    figure = f"{mean:.{max(decimals, 4)}f}"
    if where is None:
        kind = "one seed's" if same else "no seed's"
        return Verdict(name, UNSTATED, f"{stated} is {kind} and not called the mean, {figure}")
    if same:
        best = "the best" if same[0] == min(values) else "one"
        text = f"{where} calls {claim} the mean, but that is {best} seed's; {told} is {figure}"
        return Verdict(name, FAILS, text)
    if count is None or source.endswith("logs"):
        return Verdict(name, UNCHECKED, f"{stated}, called the mean, but {told} is {figure}")
    return Verdict(name, FAILS, f"{stated}, called the mean in {where}, but {told} is {figure}")


def seed_values(record: FieldRecord) -> tuple[list[float], int, str]:
    """The scores of the seeds, their decimals, and where they are from."""
    scores = [seed.score for seed in record.claims.seeds.values()]
    if len(scores) > 1 and None not in scores:
        decimals = min(score.decimals for score in scores)
        return [score.value for score in scores], decimals, "seeds in submission.json"
    scored = [run.scored or run.log.finals[-1] for run in record.runs if run.log.finals]
    if not scored:
        return [], 0, ""
    decimals = min(each.decimals for each in scored)
    return [each.val_bpb for each in scored], decimals, "last scores of the logs"


def check_deviation(record: FieldRecord) -> Verdict:
    """The standard deviation over the seeds; some divide by n, some by n - 1."""
    name = "deviation"
    claim = record.claims.first(DEVIATIONS)
    values, decimals, source = seed_values(record)
    if claim is None or len(values) < 2:
        return Verdict(name, UNSTATED, "no standard deviation over seeds is stated")
    _, losses = record.values()
    samples = [values]
    for claims in record.claims.columns().values():
        samples.append([each.value for each in claims])
    if len(losses) == len(values):
        samples.append(losses)
    rounding = max(1.01 * 10.0**-claim.decimals, 1.01 * 10.0**-decimals)
    tolerance = max(rounding, OTHER_DEVIATION * claim.value)
    found = [how(sample) for sample in samples for how in (statistics.stdev, statistics.pstdev)]
    nearest = min(found, key=lambda value: abs(value - claim.value))
    text = f"{claim} ({claim.where}); over the {source} {found[0]:.6f}, or {found[1]:.6f} with n"
    if abs(nearest - claim.value) <= tolerance:
        return Verdict(name, HOLDS, text)
    count = record.claims.seed_count()
    if count is not None and count[0] != len(values):
        return Verdict(name, UNCHECKED, f"{text}; {count[0]} seeds are claimed")
    if source.endswith("logs"):
        return Verdict(name, UNCHECKED, f"{text}; submission.json does not say of which scores")
    return Verdict(name, FAILS, text)


def check_loss(record: FieldRecord) -> Verdict:
    """The loss of the folder against its logs."""
    name = "loss"
    claim = record.claims.first(LOSSES)
    if claim is None or claim.value <= 0:
        return Verdict(name, UNSTATED, "no val_loss in submission.json")
    runs = [run for run in record.runs if run.log.finals]
    if not runs:
        return Verdict(name, UNCHECKED, f"{claim} ({claim.where}): no log has a last score")
    _, losses = record.values()
    found = [statistics.mean(losses), *losses]
    claimed = [seed.first(LOSSES) for seed in record.claims.seeds.values()]
    if claimed and None not in claimed:
        found.append(statistics.mean(each.value for each in claimed))
    for run in runs:
        found += [scored.val_loss for scored in run.log.scores]
        found += [scored.val_loss for scored in run.log.before_packing]
    decimals = min(claim.decimals, 4 if claim.decimals <= 4 else 8)
    nearest = min(found, key=lambda loss: abs(loss - claim.value))
    text = f"{claim} ({claim.where}), logs {nearest:.8f}"
    if abs(nearest - claim.value) <= max(1.01 * 10.0**-decimals, 1e-7):
        return Verdict(name, HOLDS, text)
    count = record.claims.seed_count()
    if count is not None and count[0] > len(runs):
        return Verdict(name, UNCHECKED, f"{text}; {count[0]} seeds are claimed, {len(runs)} logs")
    bits = [scored.val_bpb for run in runs for scored in run.log.finals]
    bits.append(statistics.mean(record.values()[0]))
    if claim.decimals >= 4 and any(agree(claim.value, claim.decimals, each, 8) for each in bits):
        return Verdict(name, FAILS, f"{text}: it is bits a byte, not nats a token")
    # What is off by more than the score is of another unit or another run: the score says which.
    if check_score(record).state == FAILS:
        return Verdict(name, FAILS, text)
    return Verdict(name, UNCHECKED, f"{text}: perhaps of other tokens than the logs'")


def check_before_packing(record: FieldRecord) -> Verdict:
    """The score of the model as it was trained: some give that of a packed one as this."""
    name = "before packing"
    claim = record.claims.first(BEFORE_PACKING)
    if claim is None or claim.value <= 0:
        return Verdict(name, UNSTATED, "no score from before packing in submission.json")
    stated = f"{claim} ({claim.where})"
    runs = [run for run in record.runs if run.log.before_packing]
    if not runs:
        return Verdict(name, UNCHECKED, f"{stated}: no log has such a score")
    for log in record.logs:
        for scored in log.before_packing:
            if agree(claim.value, claim.decimals, scored.val_bpb, scored.decimals):
                return Verdict(name, HOLDS, f"{stated}: {quoted(scored, log)}")
    last = [run.log.before_packing[-1] for run in runs]
    mean = statistics.mean(scored.val_bpb for scored in last)
    if agree(claim.value, claim.decimals, mean, min(scored.decimals for scored in last)):
        return Verdict(name, HOLDS, f"{stated}: the mean of {len(last)} logs")
    text = f"{stated}, but the log has {quoted(last[0], runs[0].log)}"
    for run in runs:
        for scored in run.log.finals:
            same = agree(claim.value, claim.decimals, scored.val_bpb, scored.decimals)
            if same and PACKED_LABEL.search(scored.label):
                told = f"{text}; it is {quoted(scored, run.log)}, of a packed model"
                return Verdict(name, FAILS, told)
    return Verdict(name, UNCHECKED, f"{text}: perhaps of another pass or average")


# ---- Seeds
def check_seeds(record: FieldRecord) -> Verdict:
    """The seeds that are claimed against those that ran."""
    name = "seeds"
    for log in record.main_logs:
        named = log.named_seed
        if named is not None and len(log.seeds) == 1 and named not in log.seeds:
            [(ran, line)] = log.seeds.items()
            text = f"{log.name} is named for seed {named}, but ran seed {ran} ({log.where(line)})"
            claimed = {*record.claims.named_seeds, *seeds_in_tables(record.claims.readme_lines)}
            # Without the one and with the other among the claims, the name counts the logs.
            if named in claimed:
                return Verdict(name, FAILS, text)
            if ran not in claimed and not record.claims.named_seeds:
                return Verdict(name, UNCHECKED if names_count_logs(record) else FAILS, text)
    count = record.claims.seed_count()
    seeds = {seed for log in record.main_logs for seed in (log.seeds or [log.seed])}
    ran = sorted(seed for seed in seeds if seed is not None)
    told = ", ".join(map(str, ran)) or "none is stated"
    if not record.logs:
        return Verdict(name, UNCHECKED, "there is no log")
    if count is None:
        return Verdict(name, HOLDS, f"{len(record.main_logs)} log, seed {told}: no more is claimed")
    wanted, where = count
    if len(record.logs) == 1 and len(ran) < 2:
        text = f"{wanted} seeds are claimed ({where}), one log is here: {record.logs[0].name}"
        if record.absent_logs:
            told = ", ".join(record.absent_logs)
            return Verdict(name, UNCHECKED, f"{text}; {told}, which README.md names, is not here")
        return Verdict(name, FAILS, f"{text}, seed {told}")
    named = record.claims.named_seeds
    absent = [seed for seed in named if not record.logs_of(seed)]
    unnamed = [log for log in record.main_logs if log.seed is None]
    if absent and not unnamed:
        return Verdict(name, UNCHECKED, f"no logs of seeds {', '.join(map(str, absent))}")
    if max(len(record.logs), len(ran)) < wanted:
        return Verdict(
            name, UNCHECKED, f"{wanted} seeds are claimed ({where}), fewer logs are here"
        )
    if not ran:
        return Verdict(name, UNSTATED, "the logs do not say their seeds")
    return Verdict(name, HOLDS, f"{wanted} are claimed ({where}); logs ran {told}")


def names_count_logs(record: FieldRecord) -> bool:
    """Whether the numbers in the names of logs are 1, 2, 3 or 0, 1, 2: perhaps no seeds at all."""
    named = sorted(log.named_seed for log in record.main_logs if log.named_seed is not None)
    return len(named) > 1 and named in (list(range(len(named))), list(range(1, len(named) + 1)))


# ---- Steps and parameters
def check_parameters(record: FieldRecord) -> Verdict:
    """The number of parameters that the folder states against the logs'."""
    name = "parameters"
    found = {}
    for log in record.logs:
        counted = log.count("parameters")
        if counted is not None:
            found.setdefault(counted[0], log.where(counted[1]))
    claims = record.claims.parameters()
    if not claims or not found:
        missing = "logs" if claims else "folder"
        return Verdict(name, UNSTATED, f"the {missing} do not state them to the digit")
    told = ", ".join(f"{count:,} ({where})" for count, where in found.items())
    for claim in claims:
        if int(claim.value) in found:
            return Verdict(name, HOLDS, f"{int(claim.value):,} ({claim.where})")
    for claim in claims:
        for log in record.logs:
            part = part_of_model(log, int(claim.value))
            if part is not None:
                text = f"{int(claim.value):,} ({claim.where}), without {part:,} that the log counts"
                return Verdict(name, HOLDS, text)
    counts = {int(claim.value) for claim in claims}
    stated = f"{int(claims[0].value):,} ({claims[0].where})"
    if len(counts) > 1:
        return Verdict(name, UNCHECKED, f"the folder states several counts; logs {told}")
    return Verdict(name, FAILS, f"{stated}, but logs {told}")


def part_of_model(log: FieldLog, claimed: int) -> int | None:
    """Parameters by which a claim is below or above the log's, and that the log counts alone.

    Heads that are trained and not exported are such.
    """
    counted = log.count("parameters")
    if counted is None:
        return None
    parts = set()
    for number, line in enumerate(log.lines, 1):
        if "param" in line and number not in log.source_lines:
            parts.update(int(digits) for digits in re.findall(r"\b\d{3,9}\b", line))
    difference = abs(claimed - counted[0])
    return difference if difference in parts else None


def check_steps(record: FieldRecord) -> Verdict:
    """Steps and milliseconds a step of each seed, and steps against the clock and the rate."""
    name = "steps"
    wrong = [*steps_of_no_log(record)]
    made = len(wrong)
    for run in record.runs:
        claims = record.claims.seeds.get(run.seed)
        claim = None if claims is None else claims.first(SEED_STEPS)
        if claim is not None and run.log.steps is not None:
            made += 1
            ran, line = run.log.steps
            steps = {step for log in record.logs for step in log.all_steps}
            if abs(claim.value - ran) > 1 and int(claim.value) not in steps:
                wrong.append(f"{claim} ({claim.where}), but {ran} ({run.log.where(line)})")
        rates = compare_rate(run.log)
        made += rates is not None
        if rates:
            wrong.append(rates)
    if wrong:
        return Verdict(name, FAILS, "; ".join(wrong))
    for run in record.runs:
        back = run.log.clock_goes_back
        if back is not None:
            seconds = " s to ".join(f"{int(each.values['milliseconds']) / 1000}" for each in back)
            text = f"the clock goes back from {seconds} s ({run.log.where(back[1].line)}) while "
            return Verdict(name, UNCHECKED, f"{text}steps go on: of several runs, or resumed")
    if not made:
        return Verdict(name, UNSTATED, "no steps to compare")
    return Verdict(name, HOLDS, f"{made} comparisons with step lines, clock and rate")


def steps_of_no_log(record: FieldRecord) -> list[str]:
    """What submission.json states as the steps of the run, if it is in none of all the logs."""
    claim = claim_at_top(record, STEPS)
    ran = [run.log.steps for run in record.runs if run.log.steps is not None]
    if claim is None or claim.decimals or len(ran) < len(record.runs) or not ran:
        return []
    known = {statistics.mean(steps for steps, _ in ran)}
    for log in record.logs:
        for fact in ("validated", "stopped", "trained"):
            for stated in log.facts.get(fact, []):
                known.update((int(stated.values["step"]), int(stated.values["iterations"])))
    value = int(claim.value)
    rounding = rounded_to(value)
    if any(abs(steps - value) <= rounding for steps in known):
        return []
    steps, line = ran[0]
    return [f"{claim} ({claim.where}), but {steps} ({record.runs[0].log.where(line)})"]


def claim_at_top(record: FieldRecord, names: tuple[str, ...]) -> Claim | None:
    """A figure at the top of submission.json; None as well if not all claimed seeds have logs."""
    count = record.claims.seed_count()
    if record.absent_logs or (count is not None and count[0] > len(record.runs)):
        return None
    stated = record.claims.stated
    claims = [claim_of(stated.get(each), f"{record.claims.name} {each}") for each in names]
    return next((claim for claim in claims if claim is not None), None)


def compare_rate(log: FieldLog) -> str | None:
    """Steps times tokens against time and throughput of the last step: empty if they agree."""
    stated = [each for each in log.facts.get("trained", []) if each.values.get("tokens_per_second")]
    batch = log.count("batch tokens")
    if stated and batch is not None and log.training is not None:
        values = stated[-1].values
        seconds = 60 * float(values["minutes"])
        rate = float(values["tokens_per_second"])
        if seconds < 60 or rate <= 0:
            return None
        found = int(values["step"]) * batch[0] / seconds
        what = f"{rate:,.0f} tokens a second, but {found:,.0f} by steps and minutes"
    else:
        timed = [each for each in log.facts.get("trained", []) if each.values.get("average")]
        if not timed or not int(timed[-1].values["step"]):
            return None
        stated = timed
        values = timed[-1].values
        rate = float(values["average"])
        found = int(values["milliseconds"]) / int(values["step"])
        what = f"{rate:.2f} ms a step, but {found:.2f} by time and steps"
    if abs(found / max(rate, 1e-9) - 1) <= OTHER_RATE:
        return ""
    # A run that was resumed, or that a mean over the last steps describes, says something else.
    return None if log.facts.get("resumed") else f"{what} ({log.where(stated[-1].line)})"


# ---- Machine
def check_hardware(record: FieldRecord) -> Verdict:
    """The GPUs that are stated against the processes and GPUs of the logs."""
    name = "hardware"
    ran = []
    for run in record.claimed_runs:
        processes = run.log.count("ran processes")
        if processes is not None:
            ran.append((processes[0], run.log.where(processes[1]), run.log))
    claimed = record.claims.gpus()
    told = ", ".join(f"{count}x{kind} ({where})" for count, kind, where in claimed)
    if not ran:
        return Verdict(name, UNSTATED, f"the logs do not state world_size; claimed {told or '-'}")
    if claimed:
        return compare_hardware(name, claimed, told, ran)
    counts = sorted({count for count, _, _ in ran})
    where = ran[0][1]
    said = {count for count, _, _ in record.claims.readme_gpus()}
    if counts == [GPUS] or said & set(counts):
        return Verdict(name, HOLDS, f"world_size {counts[-1]} ({where})")
    if said == {GPUS} and record.claims.track == "10min":
        place = record.claims.readme_gpus()[0][2]
        text = f"{GPUS} GPUs ({place}), but world_size {counts[0]} ({where})"
        return Verdict(name, FAILS, text)
    return Verdict(
        name, UNSTATED, f"world_size {counts[0]} ({where}); no number of GPUs is claimed"
    )


def compare_hardware(name: str, claimed: list, told: str, ran: list) -> Verdict:
    """What submission.json says of the machine against the logs."""
    counts = {count for count, _, _ in claimed}
    for processes, where, log in ran:
        if processes not in counts:
            return Verdict(name, FAILS, f"{told}, but world_size {processes} ({where})")
        if log.gpus and not any(same_gpu(kind, log.gpus[0]) for _, kind, _ in claimed):
            line = log.facts["gpu"][0].line
            return Verdict(name, FAILS, f"{told}, but {log.gpus[0]} ({log.where(line)})")
    return Verdict(name, HOLDS, f"{told}; world_size {ran[0][0]} ({ran[0][1]})")


def same_gpu(kind: str, listed: str) -> bool:
    """Whether H100 is NVIDIA H100 80GB HBM3, and H100_PCIe NVIDIA H100 PCIe."""
    squeezed = [re.sub(r"[ _-]", "", name.upper()) for name in (kind, listed)]
    return squeezed[0] in squeezed[1]


# ---- Text
def check_split(record: FieldRecord) -> Verdict:
    """Validation tokens against the known split of the data set that the log names."""
    name = "validation split"
    for run in record.claimed_runs:
        counted = run.log.count("validation tokens")
        if counted is None:
            continue
        tokens, line = counted
        variant = variant_of(run.log)
        known = fineweb.VALIDATION_TOKENS.get(variant)
        text = f"{tokens:,} tokens ({run.log.where(line)})"
        for each, whole in fineweb.VALIDATION_TOKENS.items():
            if variant in ("", each) and is_whole(tokens, whole):
                return Verdict(name, HOLDS, f"{text}, the whole split of {each}")
        if known is None:
            told = f"{variant} is not known" if variant else "the data, which it does not name"
            return Verdict(name, UNCHECKED, f"{text}; the whole split of {told}")
        text += f", but the split of {variant} has about {known:,}"
        if record.claims.track == "non-record" or tokens > known:
            return Verdict(name, UNCHECKED, f"{text}: a score on other text")
        return Verdict(name, FAILS, f"{text}: a part of it")
    return Verdict(name, UNSTATED, "no log states its validation tokens")


def check_shards(record: FieldRecord) -> Verdict:
    """The number of training shards; one export of so many is known to hold validation text."""
    name = "training shards"
    for run in record.claimed_runs:
        stated = run.log.last("training data") or run.log.last("training shards")
        if stated is None:
            continue
        count = int(stated.values["shards"])
        variant = variant_of(run.log)
        text = f"{count:,} ({run.log.where(stated.line)})"
        if count == fineweb.LEAKED_SHARDS and variant in ("", CASE_OPERATOR_EXPORT):
            told = "; the first public export of as many has 40,000 of the validation documents in "
            told += "them (issue #2127): whether these are it, the shards would show"
            return Verdict(name, UNCHECKED, text + told)
        return Verdict(name, HOLDS, f"{text} of {variant or 'data that are not named'}")
    return Verdict(name, UNSTATED, "no log states them")


def is_whole(tokens: int, known: int) -> bool:
    """Whether tokens are those of a known split, but for those that are cut to whole rows."""
    return abs(tokens / known - 1) <= fineweb.TOKENS_TOLERANCE


def variant_of(log: FieldLog) -> str:
    """The variant of FineWeb that a log names, empty if none."""
    stated = log.last("training data")
    if stated is not None:
        return fineweb.variant_of(stated.values["name"]) or stated.values["name"]
    stated = log.last("data folder")
    if stated is not None:
        folder = stated.values["path"].rstrip("/").rsplit("/", 1)[-1]
        return fineweb.variant_of(folder) or folder
    return ""


def check_text_bytes(record: FieldRecord) -> Verdict:
    """The bytes of text behind loss and bits a byte: the same whatever the tokenizer."""
    name = "bytes of text"
    for run in record.claimed_runs:
        scored = run.scored or (run.log.finals[-1] if run.log.finals else None)
        counted = run.log.count("validation tokens")
        if scored is None or scored.decimals < 4:
            continue
        ratio = scored.val_loss / math.log(2) / scored.val_bpb
        tokens = fineweb.VALIDATION_TOKENS.get(variant_of(run.log)) if counted is None else None
        if counted is not None:
            tokens = counted[0]
        if tokens is None:
            text = f"{ratio:.4f} bytes a token ({run.log.where(scored.line)})"
            return Verdict(name, UNCHECKED, f"{text}; how many tokens is not stated")
        size = round(ratio * tokens)
        text = f"{size:,} by loss, bits a byte ({run.log.where(scored.line)}) and {tokens:,} tokens"
        off = size / fineweb.BYTES - 1
        if abs(off) <= SAME_BYTES:
            return Verdict(name, HOLDS, text)
        text += f"; FineWeb's split has about {fineweb.BYTES:,} ({off:+.1%})"
        part = off < 0 and (record.claims.track != "10min" or off < -0.5)
        if part or abs(off) < OTHER_BYTES:
            return Verdict(name, UNCHECKED, f"{text}: the split, the data or the count is another")
        return Verdict(name, FAILS, text)
    return Verdict(name, UNSTATED, "no log states loss and bits a byte of one pass")


# ---- README.md
def is_figure(claim: Claim, other: Claim) -> bool:
    """Whether two claims are of one figure."""
    return agree(claim.value, claim.decimals, other.value, other.decimals)


def check_readme(record: FieldRecord) -> Verdict:
    """The score of submission.json against README.md."""
    name = "README"
    claim = record.claims.score
    lines = record.claims.readme_lines
    if claim is None or claim.where.startswith("README") or not lines:
        return Verdict(name, UNSTATED, "no score in both submission.json and README.md")
    stated = f"{claim} ({claim.where})"
    for figure in record.claims.readme_figures():
        if agree(claim.value, claim.decimals, figure.value, figure.decimals):
            return Verdict(name, HOLDS, f"{stated}, {figure} ({figure.where})")
    head = record.claims.readme_score
    if head is None:
        return Verdict(name, UNSTATED, f"{stated}; README.md names no such score")
    others = [each for each in record.claims.other_scores() if is_figure(each, head)]
    if others:
        text = f"{stated}; {head} ({head.where}) is {others[0].where}"
        return Verdict(name, UNSTATED, text)
    bpbs, _ = record.values()
    if len(bpbs) > 1 and agree(statistics.mean(bpbs), 8, head.value, head.decimals):
        text = f"{stated}; {head} ({head.where}) is the mean over the logs"
        return Verdict(name, UNSTATED, text)
    return Verdict(name, FAILS, f"{stated}, but {head} ({head.where})")
