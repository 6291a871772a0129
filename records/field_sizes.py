"""The bytes and the code of a record folder of the field: counts, cap, source, files, track."""

from __future__ import annotations

import functools
import itertools
import math
import re
import statistics

from challenge import CAP
from checks import FAILS, HOLDS, UNCHECKED, UNSTATED, Verdict
from field_claims import CODES, MODELS, TOTALS, TOTALS_OF_SEEDS, Claim, rounded_to
from field_logs import FieldLog, whole
from field_record import FieldRecord
from field_scripts import (
    NATIVE_SUFFIXES,
    files_used,
    missing_codec,
    packs_itself,
    places,
    unpack,
    unpacks,
)

# In so many lines the scripts of two seeds may differ by what is written into them.
MOST_SETTINGS = 20
MODEL_ALONE = "the model alone"
# More bytes than any packed script has.
LARGEST_CODE = 200_000
# Of so many files beside the script all sums are tried.
MOST_FILES = 6
# A count of code below this share of the script may be of its compressed form.
COMPRESSED_SHARE = 0.6
SWITCHES = re.compile(r"(?:ttt|slot|ngram|ppm)(?:_\w+)?_enabled")
ADAPTING = ("ttt", "ngram", "n_gram", "ppm", "slot", "adapt", "lora", "mixer", "cache")


class Code:
    """The script of a folder as it is shipped, and what it may have been counted as."""

    def __init__(self, record: FieldRecord):
        self.record = record
        self.path = record.script
        self.data = b"" if self.path is None else self.path.read_bytes()
        self.unpacked = None if self.path is None else unpack(self.data)
        self.text = (self.unpacked or self.data).decode("utf-8", errors="replace")
        self.name = "" if self.path is None else record.name_of(self.path)

    @property
    def size(self) -> int:
        """Bytes as shipped."""
        return len(self.data)

    @property
    def is_packed(self) -> bool:
        """Whether the script unpacks its code, even if it is not known how."""
        return self.unpacked is not None or unpacks(self.text)

    @property
    def how_packed(self) -> str:
        """Why it is not known what a script unpacks, and what would tell it."""
        codec = missing_codec(self.text)
        if codec is not None:
            return (
                f"{self.name} unpacks its code, and {codec} is not installed: with it, it is read"
            )
        return f"{self.name} unpacks its code in a way that is not known here"

    @functools.cached_property
    def beside(self) -> dict[str, int]:
        """Files of code below the script's folder that it uses, by name, with their bytes.

        What has to be compiled is there for nothing else, even where the script does not name it.
        """
        if self.path is None:
            return {}
        files = {}
        for path in self.record.files:
            if path != self.path and path.is_relative_to(self.path.parent):
                files[path.relative_to(self.path.parent).as_posix()] = path
        used = {}
        for name in files_used(self.text, files):
            used[name] = files[name].stat().st_size
        for name, path in files.items():
            if path.suffix.lower() in NATIVE_SUFFIXES:
                used[name] = path.stat().st_size
        # What is imported may import more.
        for name in list(used):
            if name.endswith(".py"):
                more = files_used(files[name].read_text(errors="replace"), files)
                used.update({each: files[each].stat().st_size for each in more})
        return used

    def explained(self, count: int) -> str | None:
        """What a count of code is of, in words; None if nothing in the folder has so many bytes."""
        if count == self.size:
            return f"{self.name} as shipped"
        if self.unpacked is not None and count in near(self.unpacked):
            return f"the source inside of {self.name}"
        if count in near(self.data):
            return f"{self.name} but for white space: line ends or a final newline"
        scripts = [path.stat().st_size for path in self.record.scripts if path != self.path]
        if count in scripts:
            return "another script of the folder"
        others = [*scripts, *(size for name, size in self.beside.items() if name[-3:] != ".py")]
        for number in range(1, min(len(others), MOST_FILES) + 1):
            for chosen in itertools.combinations(others[:MOST_FILES], number):
                if count in (self.size + sum(chosen), sum(chosen)):
                    return f"{self.name} and other files of the folder"
        return None


def near(data: bytes) -> set[int]:
    """The sizes of a text with line ends of either kind, and with a final newline or none."""
    plain = data.replace(b"\r\n", b"\n")
    found = set()
    for text in (data, plain, plain.replace(b"\n", b"\r\n")):
        stripped = text.rstrip(b"\r\n")
        found.update({len(text), len(stripped), len(stripped) + 1, len(stripped) + 2})
    # A count of characters, not of bytes.
    found.add(len(plain.decode("utf-8", errors="replace")))
    return found


# ---- Code
def check_code_size(record: FieldRecord, code: Code) -> Verdict:
    """The bytes of code that logs count against the script as shipped."""
    name = "code size"
    counted = [(run.log, *each) for run in record.runs for each in counted_code(run.log)]
    if not counted:
        return Verdict(name, UNSTATED, "the logs do not count the code")
    if code.path is None:
        log, count, line = counted[0]
        return Verdict(name, UNCHECKED, f"{count:,} ({log.where(line)}): no script is here")
    shipped = f"{code.name} has {code.size:,} bytes"
    told = ""
    for log, _, _ in counted:
        counts = log.code_bytes
        explained = [(*each, code.explained(each[0])) for each in counts.values()]
        for count, line, how in explained:
            if how is not None:
                told = told or f"{count:,} ({log.where(line)}): {how}"
        if any(how is not None for _, _, how in explained):
            continue
        count, line, _ = explained[-1]
        stated = f"{count:,} ({log.where(line)})"
        alike = squeezed(log.source) == squeezed(code.text)
        if alike and count in near(log.source.encode()):
            told = told or f"{stated}: {code.name} but for white space, as {log.name} has it"
            continue
        if record.claims.discloses(count, code.size):
            return Verdict(name, UNCHECKED, f"{stated}; {shipped}; README.md names both")
        if "compressed" in counts or (
            count < COMPRESSED_SHARE * code.size and packs_itself(code.text)
        ):
            return Verdict(name, UNCHECKED, f"{stated}, compressed; {shipped}: pack it to compare")
        if code.is_packed:
            how = "the log may count another form of it"
            if code.unpacked is None:
                how = code.how_packed
            return Verdict(name, UNCHECKED, f"{stated}; {shipped}: {how}")
        return Verdict(name, FAILS, f"{stated}, but {shipped}")
    return Verdict(name, HOLDS, told)


def counted_code(log: FieldLog) -> list[tuple[int, int]]:
    """The count of code of a log that the total has: of the script as it ran, or compressed."""
    kinds = log.code_bytes
    if "compressed" in kinds:
        return [kinds["compressed"]]
    return list(kinds.values())[:1]


def check_source(record: FieldRecord, code: Code) -> Verdict:
    """The source in the logs against the script."""
    name = "source"
    logs = [run.log for run in record.runs if run.log.source]
    if not logs:
        return Verdict(name, UNSTATED, "no log holds the source")
    if code.path is None:
        return Verdict(name, UNCHECKED, "logs hold their source, but no script is here")
    texts = {code.name: code.data.decode("utf-8", errors="replace")}
    if code.unpacked is not None:
        texts[f"the source inside of {code.name}"] = code.text
    for path in record.scripts:
        texts.setdefault(record.name_of(path), path.read_text(encoding="utf-8", errors="replace"))
    space = ""
    known = [squeezed(text) for text in texts.values()]
    shipped = [log.name for log in logs if squeezed(log.source) in known]
    for log in logs:
        same = [each for each, text in texts.items() if log.source == text]
        if same:
            continue
        alike = [each for each, text in texts.items() if squeezed(log.source) == squeezed(text)]
        if not alike:
            lines = settings_that_differ(log, code)
            if shipped and lines:
                told = f"{log.name} has {code.name}, as {shipped[0]} has it, but for lines {lines}"
                return Verdict(name, UNCHECKED, f"{told}: perhaps a seed that is written there")
            return other_source(name, log, code)
        space = f"{log.name} and {alike[0]} differ in white space alone (line ends, final newline)"
    return Verdict(name, HOLDS, space or f"{len(logs)} logs hold {code.name}")


def squeezed(text: str) -> list[str]:
    """The lines of a text without white space at their ends, and without empty ones."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def settings_that_differ(log: FieldLog, code: Code) -> str:
    """The few lines in which a log's source is another than the script; empty if it is more.

    Some write the seed and the name of a run into the script.
    """
    mine = squeezed(code.text)
    theirs = squeezed(log.source)
    if len(mine) != len(theirs):
        return ""
    pairs = enumerate(zip(mine, theirs, strict=True), 1)
    lines = [str(number) for number, (ours, other) in pairs if ours != other]
    return ", ".join(lines) if len(lines) <= MOST_SETTINGS else ""


def other_source(name: str, log: FieldLog, code: Code) -> Verdict:
    """A log with another source than the script's."""
    mine = squeezed(code.text)
    theirs = squeezed(log.source)
    if theirs == mine[: len(theirs)]:
        return Verdict(name, UNCHECKED, f"{log.name} holds only the beginning of {code.name}")
    if code.unpacked is None and code.is_packed:
        text = f"{log.name} holds {len(theirs):,} lines of source"
        return Verdict(name, UNCHECKED, f"{text}; {code.how_packed}")
    pairs = itertools.zip_longest(theirs, mine)
    first = next(number for number, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    text = f"{log.where(log.source_lines[0])} has {len(log.source.encode()):,} bytes of source, "
    text += f"{code.name} {code.size:,}; they differ from line {first} on"
    return Verdict(name, FAILS, text)


def check_files(record: FieldRecord, code: Code) -> Verdict:
    """Files that the script imports or compiles and that are in no count."""
    name = "files outside of the counted bytes"
    if code.path is None:
        return Verdict(name, UNCHECKED, "no script is here")
    if not code.beside:
        return Verdict(name, HOLDS, f"{code.name} uses no code beside it")
    told = ", ".join(f"{each} ({size:,} bytes)" for each, size in code.beside.items())
    for run in record.runs:
        for count, line in run.log.code_bytes.values():
            if count >= code.size + sum(code.beside.values()):
                return Verdict(name, HOLDS, f"{told}: counted ({run.log.where(line)})")
    counts = [counted_code(run.log) for run in record.runs]
    counts = [count for count in counts if count]
    if not counts:
        return Verdict(name, UNCHECKED, f"{told} beside {code.name}; no log counts code")
    count, line = counts[0][0]
    log = next(run.log for run in record.runs if run.log.code_bytes)
    text = f"{told} beside {code.name}; {count:,} bytes of code are counted ({log.where(line)})"
    if code.explained(count) is None:
        return Verdict(name, UNCHECKED, f"{text}: of what is not known")
    return Verdict(name, FAILS, text)


# ---- Totals
def check_total(record: FieldRecord, code: Code) -> Verdict:
    """What submission.json states in bytes against the logs, and against its own seeds."""
    name = "bytes"
    wrong = []
    unsure = []
    disclosed = []
    made = []
    of_all = totals_of_record(record)
    for claim, logs, sure in claimed_totals(record):
        figures = totals_of(logs, code)
        if not figures:
            continue
        if claim in of_all:
            figures.update(totals_of_absent(record))
        value = int(claim.value)
        rounding = rounded_to(value)
        allowed = rounding if rounding >= 1000 else 0
        same = [figure for figure in figures if abs(figure - value) <= allowed]
        if not same:
            # A figure of a run whose log is here beside that of the claimed one.
            figures = {**totals_of(record.logs, code), **figures}
            same = [figure for figure in figures if abs(figure - value) <= allowed]
        if same and all(figures[each].startswith(MODEL_ALONE) for each in same):
            told = f"{value:,} ({claim.where}) is {figures[same[0]]}"
            total = next((log.total_bytes for log in logs if log.total_bytes is not None), None)
            if "total" in claim.where.rsplit(".", 1)[-1] and total is not None:
                wrong.append(f"{told}; the total is {total[0]:,} ({logs[0].where(total[1])})")
            else:
                made.append(told)
        elif same:
            made.append(f"{value:,} ({claim.where}): {figures[same[0]]}")
        elif lines_with_total(logs, value):
            made.append(f"{value:,} ({claim.where}): {lines_with_total(logs, value)[0]}")
        else:
            nearest = min(figures, key=lambda figure: abs(figure - value))
            told = f"{value:,} ({claim.where}), but {nearest:,}: {figures[nearest]}"
            totals = [log.total_bytes[0] for log in logs if log.total_bytes is not None]
            if any(record.claims.discloses(value, total) for total in totals):
                disclosed.append(f"{told}; README.md names both")
                continue
            certain = (sure or made) and not only_code_apart(value, figures)
            (wrong if certain else unsure).append(told)
    if disclosed and not wrong:
        return Verdict(name, UNCHECKED, "; ".join(disclosed))
    wrong += models_of_no_log(record)
    if unsure and not wrong:
        return Verdict(name, UNCHECKED, f"{'; '.join(unsure)}; not all that counts is here")
    if wrong:
        if record.absent_logs:
            told = f"{', '.join(record.absent_logs)}, which README.md names, is not here"
            return Verdict(name, UNCHECKED, f"{'; '.join(wrong)}; {told}")
        return Verdict(name, FAILS, "; ".join(wrong))
    if not made:
        return Verdict(name, UNSTATED, "no total in both submission.json and the logs")
    return Verdict(name, HOLDS, made[0])


def only_code_apart(value: int, figures: dict[int, str]) -> bool:
    """Whether a total is that of a model and of code that nothing here counts."""
    if not all(told.startswith(MODEL_ALONE) for told in figures.values()):
        return False
    return any(0 < value - model < LARGEST_CODE for model in figures)


def models_of_no_log(record: FieldRecord) -> list[str]:
    """What submission.json states as the bytes of the packed model, if it is in no log."""
    count = record.claims.seed_count()
    if record.absent_logs or (count is not None and count[0] > len(record.runs)):
        return []
    packed = {}
    for log in record.logs:
        for stated in [*log.facts.get("packed bytes", []), *log.facts.get("unpacked bytes", [])]:
            packed[whole(stated.values["bytes"])] = log.where(stated.line)
    last = [log.count("packed bytes", "bytes") for log in record.logs]
    sizes = [each[0] for each in last if each is not None]
    if sizes:
        packed.setdefault(round(statistics.mean(sizes)), "the mean of the logs")
    packed.update((path.stat().st_size, path.name) for path in record.artifacts)
    wrong = []
    for key, value in record.claims.stated.items():
        if not sizes or not MODELS.fullmatch(key) or not isinstance(value, int):
            continue
        if value >= 1000 and value not in packed:
            nearest = min(packed, key=lambda size: abs(size - value))
            where = f"{record.claims.name} {key}"
            wrong.append(f"{value:,} ({where}), but {nearest:,} ({packed[nearest]})")
    return wrong


def claimed_totals(record: FieldRecord) -> list[tuple[Claim, list[FieldLog], bool]]:
    """The bytes that submission.json states of the record and of each seed, with their logs.

    The last one of a tuple tells whether these are the logs of the claimed runs, and all of them.
    """
    found = []
    runs = record.runs
    count = record.claims.seed_count()
    all_here = count is None or count[0] <= len(runs)
    for claim in totals_of_record(record):
        found.append((claim, [log for run in runs for log in record.logs_with(run)], all_here))
    for run in runs:
        claims = record.claims.seeds.get(run.seed)
        claim = None if claims is None else claims.first(TOTALS)
        if claim is not None and claim.value >= 1000 and claim.decimals == 0:
            own = run.scored is not None or claims.score is None
            found.append((claim, record.logs_with(run), own))
    return found


def totals_of_record(record: FieldRecord) -> list[Claim]:
    """The total that submission.json states, and the largest and the mean over the seeds."""
    claims = [record.claims.first(TOTALS)]
    claims += [record.claims.first((name,)) for name in TOTALS_OF_SEEDS]
    found = []
    for claim in claims:
        if claim is None or claim.value < 1000:
            continue
        if claim.decimals == 0 or "mean" in claim.where:
            found.append(claim._replace(value=float(round(claim.value)), decimals=0))
    return found


def whole_means(counts: list[int]) -> set[int]:
    """The mean of two counts or more, cut and rounded up; empty for fewer."""
    if len(counts) < 2:
        return set()
    mean = statistics.mean(counts)
    return {math.floor(mean), math.ceil(mean)}


def lines_with_total(logs: list[FieldLog], value: int) -> list[str]:
    """Lines of logs on a total or a size, of a shape that is not known, with this very count."""
    found = []
    for log in logs:
        for number, line in enumerate(log.lines, 1):
            if number in log.source_lines or not re.search(
                r"total|size|artifact|submission", line, re.I
            ):
                continue
            if re.search(rf"(?<![\d,.]){value:,}(?![\d,])|(?<![\d,.]){value}(?!\d)", line):
                found.append(log.where(number))
    return found


def totals_of_absent(record: FieldRecord) -> dict[int, str]:
    """The totals that submission.json states of seeds without a log, and the mean of all seeds'."""
    seen = {run.seed for run in record.runs}
    claims = {seed: claims.first(TOTALS) for seed, claims in record.claims.seeds.items()}
    values = {seed: int(claim.value) for seed, claim in claims.items() if claim is not None}
    found = {}
    for seed in values.keys() - seen:
        found[values[seed]] = f"that of seed {seed} ({claims[seed].where}), which has no log"
    for mean in whole_means(list(values.values())):
        found.setdefault(mean, "the mean of those of the seeds in submission.json")
    return found


def totals_of(logs: list[FieldLog], code: Code) -> dict[int, str]:
    """All sums that a total may mean, each with what it is of."""
    found: dict[int, str] = {}
    claimed = code.record.claims.first(CODES)
    for log in logs:
        for fact in ("total", "total without codec"):
            for stated in log.facts.get(fact, []):
                value = int(stated.values["bytes"].replace(",", ""))
                if fact == "total" or log.total_bytes == (value, stated.line):
                    found.setdefault(value, f"the total of {log.where(stated.line)}")
        for stated in log.facts.get("packed bytes", []):
            value = int(stated.values["bytes"].replace(",", ""))
            where = log.where(stated.line)
            found.setdefault(value, f"{MODEL_ALONE}, without code ({where})")
            found.setdefault(value + code.size, f"model ({where}) and {code.name}")
            for count, line in log.code_bytes.values():
                found.setdefault(value + count, f"model ({where}) and code ({log.where(line)})")
            if claimed is not None:
                found.setdefault(value + int(claimed.value), f"model ({where}) and {claimed.where}")
    last = [log.total_bytes[0] for log in logs if log.total_bytes is not None]
    models = [log.count("packed bytes", "bytes") for log in logs]
    for mean in whole_means([model[0] for model in models if model is not None]):
        found.setdefault(mean, f"{MODEL_ALONE}, the mean of the logs")
    for mean in whole_means(last):
        found.setdefault(mean, "the mean of the logs' totals")
    for path in code.record.artifacts:
        size = path.stat().st_size
        found.setdefault(size, f"{path.name} alone")
        found.setdefault(size + code.size, f"{path.name} and {code.name}")
    return found


def check_code_claim(record: FieldRecord, code: Code) -> Verdict:
    """The bytes of code that submission.json states against script and logs."""
    name = "code claim"
    claim = record.claims.first(CODES)
    if claim is None or claim.value < 100:
        return Verdict(name, UNSTATED, "no bytes_code in submission.json")
    value = int(claim.value)
    stated = f"{value:,} ({claim.where})"
    counts = {}
    for log in record.logs:
        for count, line in log.code_bytes.values():
            counts.setdefault(count, log.where(line))
    if value in counts:
        return Verdict(name, HOLDS, f"{stated}, {counts[value]}")
    how = None if code.path is None else code.explained(value)
    if how is not None:
        return Verdict(name, HOLDS, f"{stated}: {how}")
    if code.path is None and not counts:
        return Verdict(name, UNCHECKED, f"{stated}: no script is here, and no log counts code")
    told = [f"{count:,} ({where})" for count, where in counts.items()]
    absent = record.absent_scripts
    if absent and value > max(counts, default=0):
        text = f"{stated}; {', '.join(told)}; {', '.join(absent)}, which README.md names, is not "
        return Verdict(name, UNCHECKED, f"{text}here")
    if code.path is not None:
        told.append(f"{code.size:,} ({code.name})")
        if packs_itself(code.text) or code.is_packed:
            return Verdict(
                name, UNCHECKED, f"{stated}; {', '.join(told)}: perhaps packed otherwise"
            )
    return Verdict(name, FAILS, f"{stated}, but {', '.join(told)}")


def check_cap(record: FieldRecord, code: Code) -> Verdict:
    """Model and code against 16,000,000 bytes, by the logs and as shipped."""
    name = "cap"
    sums = []
    for run in record.claimed_runs:
        for log in record.logs_with(run):
            total = claimed_total(record, log)
            if total is not None:
                sums.append((*total, log))
    if not sums:
        return claimed_cap(name, record)
    total, line, log = max(sums, key=lambda each: each[0])
    text = f"{total:,} ({log.where(line)}) of {CAP:,}"
    model = log.count("packed bytes", "bytes")
    if total <= CAP:
        shipped = shipped_total(log, code)
        if shipped is not None and shipped > CAP:
            text += f"; model and {code.name} as shipped are {shipped:,}"
            counts_packed = "compressed" in log.code_bytes or packs_itself(code.text)
            if counts_packed:
                text += ", which counts its code compressed: as shipped it would be over"
            return Verdict(name, UNCHECKED if counts_packed else FAILS, text)
        return claimed_cap(name, record) if over_in_claims(record) else Verdict(name, HOLDS, text)
    if model is not None and code.path is not None and model[0] + code.size <= CAP:
        count = counted_code(log)
        told = f"{text}; model and {code.name} as shipped are {model[0] + code.size:,}"
        if code.unpacked is not None or (count and code.explained(count[0][0])):
            return Verdict(name, HOLDS, told)
        if unpacks(code.text):
            return Verdict(name, UNCHECKED, f"{told}; {code.how_packed}")
    claim = record.claims.first(TOTALS)
    value = 0 if claim is None else int(claim.value)
    if 0 < value <= CAP and record.claims.discloses(value, total):
        told = f"{text}; {value:,} ({claim.where}) is claimed, and README.md names both"
        return Verdict(name, UNCHECKED, told)
    return Verdict(name, FAILS, text)


def claimed_total(record: FieldRecord, log: FieldLog) -> tuple[int, int] | None:
    """The total of a log that submission.json states, of several packings, else the last one."""
    stated = {int(claim.value) for claim, _, _ in claimed_totals(record)}
    for each in reversed(log.facts.get("total", [])):
        value = int(each.values["bytes"].replace(",", ""))
        if value in stated:
            return value, each.line
    return log.total_bytes


def shipped_total(log: FieldLog, code: Code) -> int | None:
    """The packed model of a log with the script as shipped; None if one is not known."""
    model = log.count("packed bytes", "bytes")
    if model is None or code.path is None:
        return None
    return model[0] + code.size


def over_in_claims(record: FieldRecord) -> list[Claim]:
    """The totals over the cap that submission.json states of the record's seeds."""
    claims = totals_of_record(record)
    claims += [seed.first(TOTALS) for seed in record.claims.seeds.values()]
    return [claim for claim in claims if claim is not None and claim.value > CAP]


def claimed_cap(name: str, record: FieldRecord) -> Verdict:
    """The cap by what submission.json states, where no log says more."""
    over = over_in_claims(record)
    if over:
        told = ", ".join(f"{int(claim.value):,} ({claim.where})" for claim in over)
        return Verdict(name, FAILS, f"{told} of {CAP:,}")
    claim = record.claims.first(TOTALS)
    if claim is not None:
        text = f"{int(claim.value):,} ({claim.where}) of {CAP:,}"
        return Verdict(name, UNCHECKED, f"{text}: no log states the total")
    return Verdict(name, UNSTATED, "neither logs nor submission.json state the total")


def check_artifact(record: FieldRecord) -> Verdict:
    """Whether the score itself can be proven."""
    names = ", ".join(path.name for path in record.artifacts)
    if names:
        text = f"{names}: its script does not read artifacts as ours does, so that it would have to"
        return Verdict("artifact", UNCHECKED, f"{text} be run as a program, on its own data")
    return Verdict("artifact", UNCHECKED, "none is here: only with one could the score be proven")


# ---- Track
def check_track(record: FieldRecord, code: Code) -> Verdict:
    """A, a fixed predictor, or B, which adapts while it scores, by logs and submission.json."""
    name = "track"
    for run in record.runs:
        scored = run.scored or (run.log.finals[-1] if run.log.finals else None)
        if scored is not None and adapts(scored.label):
            place = f"{scored.label}, {run.log.where(scored.line)}"
            return Verdict(name, HOLDS, f"B: adapts while it scores ({place})")
        packed = run.log.last("packed bytes")
        for stated in run.log.facts.get("adapted", []):
            if packed is not None and stated.line > packed.line:
                place = run.log.where(stated.line)
                return Verdict(name, HOLDS, f"B: adapts while it scores ({place})")
        for stated in run.log.facts.get("switched on", []):
            if SWITCHES.fullmatch(stated.values["name"]):
                place = f"{stated.values['name']}, {run.log.where(stated.line)}"
                return Verdict(name, HOLDS, f"B: adapts while it scores ({place})")
    if record.claims.flag("score_first_ttt"):
        return Verdict(name, HOLDS, "B: score_first_ttt (submission.json compliance)")
    if not record.runs:
        return Verdict(name, UNSTATED, "there is no log to tell A from B")
    text = "A: nothing in the logs adapts while it scores"
    for run in record.runs:
        for stated in run.log.facts.get("adapted", [])[:1]:
            text += f"; what adapts before packing ({run.log.where(stated.line)}), and on which "
            return Verdict(name, HOLDS, f"{text}tokens, is in the script")
    return Verdict(name, HOLDS, text)


def adapts(label: str) -> bool:
    """Whether a score's label is that of a pass that adapts."""
    return any(word in label.lower() for word in ADAPTING) and "pre_ttt" not in label.lower()


def places_to_look_at(record: FieldRecord, code: Code) -> list[str]:
    """Places in the script, for a reader: no verdicts."""
    if code.path is None:
        return []
    return places(code.text, code.name)
