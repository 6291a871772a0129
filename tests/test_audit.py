"""The auditor: an honest record passes every check, a planted fault fails those that it must."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import audit
import audit_text
import audit_worker
import faulty_scripts
from audit_command import status_of, strict
from audit_judges import judge_score, share_that_proves
from audit_processes import Processes
from audit_text import Text
from audit_verdicts import ArtifactAudit
from audit_worker import is_time
from case_operators import OPERATORS
from challenge import CAP
from checks import Check, print_table
from conftest import ROOT, documents, write_shard
from corpora import read_tokens, train_of_kind, write_dataset
from faulty_scripts import doctor, faulty_script
from run_logs import LABELS, Log
from runs import environment_with
from tiny_record import ARTIFACT, LOG, QUICK, Record, honest_record
from tiny_runs import PATIENCE
from tokenizer import BYTE_TOKENIZER

TOOL = ROOT / "records" / "audit.py"
ROWS = [
    "files",
    "fields",
    "seeds",
    "statistics",
    "size",
    "runs alone",
    "byte count",
    "every target once",
    "causality",
    "normalization",
    "score",
    "decompression",
    "log",
    "submission",
]


@pytest.fixture(scope="module")
def honest(data_folder) -> Record:
    return honest_record(data_folder)


@pytest.fixture
def record(honest, tmp_path) -> Record:
    """A copy of the honest record, to be doctored."""
    return Record(Path(shutil.copytree(honest.folder, tmp_path / "record")), honest.data)


@pytest.fixture
def without_processes(monkeypatch) -> None:
    """The auditor's workers run in this process, where nothing stops a script."""
    monkeypatch.setattr(Processes, "wait_for", faulty_scripts.answer_here)


def call(*words: str | Path, folder: Path) -> subprocess.CompletedProcess:
    """Call the auditor as people do."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment_with(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )


# ---- What is honest
def test_an_honest_record_passes_every_check(honest, tmp_path):
    """With processes of their own. A reader can decode what --keep leaves with nothing else."""
    table = tmp_path / "table.json"
    kept = tmp_path / "kept"
    options = [*QUICK, "--data", honest.data, "--json", table, "--keep", kept]
    done = call(TOOL, honest.folder, *options, folder=tmp_path)
    assert done.returncode == 0, done
    assert re.findall(r"^(.+?) +PASS  ", done.stdout, re.M) == ROWS
    rows = json.loads(table.read_text())
    said = [row for row in rows if row["passed"] is None]
    assert [row["name"] for row in said] == ["pytorch_version"]
    rows = [row for row in rows if row not in said]
    assert [row["name"] for row in rows] == ROWS
    assert all(row["passed"] is True and row["figure"] in done.stdout for row in rows)

    elsewhere = tmp_path / "elsewhere" / "carried"
    shutil.copytree(kept, elsewhere)
    text = audit_text.Text(honest.data / "tokenizer.model")
    everything = text.decode(audit_text.read_validation(honest.data))
    carried = {path.name for path in elsewhere.rglob("*") if path.is_file()}
    assert carried > {"audit.py", "coded.bin", "tokenizer.model", ARTIFACT, "train_gpt.py"}
    assert not any(b"_val_" in name.encode() for name in carried)
    done = call("audit.py", "--worker", "decode", folder=elsewhere)
    assert done.returncode == 0 and "error" not in (elsewhere / "result.json").read_text(), done
    decoded = (elsewhere / "decoded.txt").read_bytes()
    assert len(decoded) > 20 and decoded in everything


def test_an_artifact_alone_passes_what_can_be_checked(honest, tmp_path, without_processes):
    model = tmp_path / "model.ptz"
    shutil.copy(honest.folder / ARTIFACT, model)
    options = ["--script", honest.script, "--only"]
    found = honest.audit(*options, "size,score,log,submission", path=model)
    assert found.verdicts == {"size": "PASS", "score": "-", "log": "-"}
    assert found.status == 0
    # The log names the artifact's sha256.
    shutil.copy(honest.log, tmp_path / "model.txt")
    found = honest.audit(*options, "size,log", path=model)
    assert (found.status, found.verdicts) == (0, {"size": "PASS", "log": "PASS"})


def test_a_log_is_found_by_the_digest_in_it(honest, tmp_path):
    (tmp_path / "logs").mkdir()
    shutil.copy(honest.folder / ARTIFACT, tmp_path / "logs" / ARTIFACT)
    shutil.copy(honest.script, tmp_path)
    shutil.copy(honest.log, tmp_path / "logs/mine.txt")
    (tmp_path / "logs/another.txt").write_text("no log of it")
    found = honest.audit("--only", "size,log", path=tmp_path / "logs" / ARTIFACT)
    assert (found.status, found.verdicts) == (0, {"size": "PASS", "log": "PASS"})


# ---- Planted faults
OTHER_LOSSES = faulty_scripts.OTHER_LOSSES
OTHER_SUM = faulty_scripts.OTHER_SUM
# A fault, the checks that are asked for, and those of them that must fail.
FAULTS = {
    "a SmearGate that looks ahead": (
        faulty_scripts.LOOKS_AHEAD,
        "causality,normalization,decompression,bytes",
        {"causality", "decompression"},
    ),
    "probabilities that sum to more than one": (
        OTHER_LOSSES.replace("CHANGED", "losses * 0.9"),
        "causality,normalization,decompression",
        {"normalization", "decompression"},
    ),
    "losses of the first places left out": (
        OTHER_LOSSES.replace("CHANGED", "losses * (positions >= 4)"),
        "normalization,targets",
        {"normalization"},
    ),
    "a byte table that counts bytes that are not there": (
        faulty_scripts.MORE_BYTES,
        "bytes,targets,normalization",
        {"byte count"},
    ),
    "a tail that is not scored": (
        faulty_scripts.NO_TAIL,
        "targets,bytes,normalization",
        {"every target once", "byte count", "log"},
    ),
    "windows that are scored twice": (
        faulty_scripts.TWICE,
        "targets,causality",
        {"every target once"},
    ),
    "memory tokens in the places of targets": (
        OTHER_SUM.replace("CHANGED", "losses * (positions >= 4)"),
        "alone,targets,causality",
        {"runs alone", "every target once"},
    ),
    "nothing": (
        "",
        "alone,bytes,targets,causality,normalization,decompression",
        set(),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, record, without_processes):
    """The doctored script, its log and its submission agree; just the right checks fail."""
    planted, asked, expected = FAULTS[fault]
    doctor(record, planted)
    assert record.failed(*asked.split(","), "log", "submission", "size") == expected


def test_one_byte_over_the_cap_is_too_many(record):
    room = CAP - record.total()
    with open(record.script, "a") as file:
        file.write("#" * room)
    assert record.failed("size") == set()
    with open(record.script, "a") as file:
        file.write("#")
    assert record.failed("size") == {"size"}


def test_a_log_may_lower_the_cap(record):
    name = '"artifact_max_bytes": '
    lines = record.lines()
    assert f"{name}16000000" in lines
    record.write_log(lines.replace(f"{name}16000000", f"{name}{record.total() - 1}"))
    assert record.failed("size", "log") == {"size", "log"}


def claim(record: Record, share: float) -> None:
    """Have log and submission say so much of the score, with all that follows from it."""
    label = LABELS["sliding"]
    claimed = Log(record.log).score(label)
    bpb = claimed.val_bpb * share
    loss = claimed.val_loss * share
    lines = record.lines()
    for name, digits in ((label, 4), (f"{label}_exact", 8)):
        stated = f"{name} val_loss:{loss:.{digits}f} val_bpb:{bpb:.{digits}f}"
        lines, times = re.subn(rf"^{name} val_loss:\S+ val_bpb:\S+", stated, lines, flags=re.M)
        assert times == 1
    record.write_log(lines)
    record.write()


def test_a_better_score_in_log_and_submission_is_caught(record, without_processes):
    claim(record, 0.997)
    assert record.failed("score", "log", "submission", whole=True) == {"score"}


# Nats are lower where the auditor scores windows, and honest wherever it looks at one of them; or
# they are in all of its processes.
LOWER_NATS = """
import audit_worker
from audit_candidate import own_losses as honest_losses


def own_losses(*arguments):
    nats = honest_losses(*arguments)
    if CASE:
        nats = 0.9 * nats
    return nats


audit_worker.own_losses = own_losses
"""
ONLY_WHERE_SCORED = 'sys._getframe(1).f_code.co_name == "scored_windows"'


@pytest.mark.parametrize(
    "case, word",
    [(ONLY_WHERE_SCORED, "nats, but"), ("True", "bits, but were coded into")],
    ids=["where they are scored", "everywhere"],
)
def test_a_script_that_makes_the_nats_of_windows_lower_is_caught(
    case, word, record, without_processes, monkeypatch
):
    """Log and submission agree with it."""
    monkeypatch.setattr(audit_worker, "own_losses", audit_worker.own_losses)
    record.script.write_text(faulty_script(LOWER_NATS.replace("CASE", case)), encoding="utf-8")
    claim(record, 0.9)
    found = record.audit("--only", "score", "--minutes", "5")
    claimed = re.search(r"claimed (\S+), own (\S+) bpb on all", found.out)
    assert claimed[1] == claimed[2] and found.verdicts == {"score": "FAIL"}, found
    assert word in found.out


@pytest.mark.parametrize(
    "claimed, margin, passed",
    [(2.0, 0.003, None), (2.0, 10.0, True), (1.0, 0.003, False), (1.0, 0.5, False)],
)
def test_a_score_that_is_known_too_little_is_not_proven(claimed, margin, passed):
    """On a sample: a claim inside of the interval, which is wider than what was asked for."""
    bits = np.array([100.0, 220.0, 180.0])
    sizes = np.array([50.0, 100.0, 100.0])
    found = judge_score(claimed, bits, sizes, 1000, 1e-4, margin)
    assert found.passed is passed
    assert ("not known to 0.003" in found.figure) is (passed is None)


def test_not_proven_within_the_time_says_which_time_would_do():
    """So many windows that the interval is as narrow as the margin."""
    bits = np.array([100.0, 220.0, 180.0, 140.0])
    sizes = np.array([50.0, 100.0, 100.0, 70.0])
    found = judge_score(2.0, bits, sizes, 1000, 0.0, 0.01, minutes=2.0)
    wide = float(re.search(r"± (\S+)", found.figure)[1])
    share = share_that_proves(wide, 0.01, 4, 1000)
    narrow = wide * math.sqrt((1 / (4 * share) - 1 / 1000) / (1 / 4 - 1 / 1000))
    assert narrow == pytest.approx(0.01)
    minutes = int(re.fullmatch(r"--minutes (\d+) would do", found.unproven)[1])
    assert minutes == pytest.approx(1.2 * 2.0 * share, rel=0.02)


def test_not_proven_is_not_refuted_and_no_success_in_our_records(capsys):
    check = Check("score", None, "claimed", unproven="--minutes 9 would do")
    assert strict(check) == check and status_of([check]) == 1
    assert strict(Check("log", None, "no log")).passed is False
    assert status_of([Check("log", None, "no log")]) == 0
    print_table([check])
    assert capsys.readouterr().out == "score  NOT PROVEN  claimed; --minutes 9 would do\n"


@pytest.mark.parametrize(
    "elapsed, share, whole, stops",
    [(10, 0.01, 600, False), (31, 0.01, 600, True), (31, 0.1, 600, False), (31, 0.1, 0, True)],
)
def test_all_windows_are_taken_if_they_are_done_within_ten_minutes(elapsed, share, whole, stops):
    job = dict(seconds=30, whole_seconds=whole)
    assert is_time(elapsed, share, job) is stops


def test_all_windows_leave_no_interval():
    found = judge_score(2.0, np.array([100.0, 200.0]), np.array([50.0, 100.0]), 2, 1e-4, 0.003)
    assert found.passed is True and "on all 2 windows" in found.figure


def second_seed(record: Record) -> None:
    """Another seed's log: the first one's, as consistent as one can type it."""
    text = record.read(LOG).replace('"seed": 1337', '"seed": 2')
    (record.folder / "train_seed2.log").write_text(text, encoding="utf-8")
    stated = json.loads(record.read("submission.json"))
    result = stated["seed_results"]["1337"]
    stated.update(seeds=[1337, 2], seed_results={"1337": result, "2": result})
    (record.folder / "submission.json").write_text(json.dumps(stated))
    (record.folder / "README.md").write_text(record.read("README.md") + " and seed 2\n")


def test_a_seed_without_its_artifact_is_not_proven(record):
    """And there is one artifact for two seeds."""
    second_seed(record)
    assert record.failed("log", "submission", more=2) == {"score of seed 2", "submission"}


def test_a_second_log_of_a_seed_is_refused(record):
    shutil.copy(record.log, record.folder / "train_seed1337_rerun.log")
    found = record.audit("--only", "size,submission")
    assert (found.status, found.verdicts) == (2, {})
    assert "train_seed1337_rerun.log" in found.errors[0]


def test_a_submission_may_state_all_digits(record):
    """Those of logs/<RUN_ID>.json, where a log has eight decimals."""
    stated = json.loads(record.read("submission.json"))
    for numbers in (stated, stated["seed_results"]["1337"]):
        numbers["val_bpb"] += 4.321e-9
    (record.folder / "submission.json").write_text(json.dumps(stated))
    assert record.failed("size", "submission") == set()
    stated["seed_results"]["1337"]["val_bpb"] += 2e-8
    (record.folder / "submission.json").write_text(json.dumps(stated))
    assert record.failed("size", "submission") == {"submission"}


def test_the_tracks_of_log_and_settings_are_one(record):
    """A run of a fixed model cannot state that it is of track B, nor what adapts."""
    lines = record.lines()
    assert '"track": "A"' in lines
    for stated in ('"track": "B"', '"track": "A", "adaptation": "all of it"'):
        record.write_log(lines.replace('"track": "A"', stated))
        assert record.failed("size", "log") == {"log"}


def test_what_adapts_is_not_audited_where_nothing_adapts(record, without_processes):
    found = record.audit("--only", "adaptive_score")
    assert (found.status, found.verdicts) == (2, {}) and "is of track A" in found.errors[0]


def test_samples_are_drawn_anew_and_can_be_drawn_again(record, capsys):
    seeds = []
    for arguments in ((), (), ("--seed", "5")):
        words = [str(record.folder), "--data", str(record.data), "--only", "size", *arguments]
        assert audit.main(words) == 0
        seeds.append(re.search(r"--seed (\d+)", capsys.readouterr().err)[1])
    assert seeds[0] != seeds[1] and seeds[2] == "5"


def test_a_record_without_its_log_fails(record):
    record.log.unlink()
    assert record.failed("size", "log", "submission") == {"log", "submission"}


@pytest.mark.parametrize(
    "old, new",
    [
        ('"artifact_max_bytes": 16000000', '"artifact_max_bytes": "none"'),
        (" bytes:", " bytes:x"),
        ("compliance:{", 'compliance:["a", "b"] {'),
        ("val_bpb:", "val_bpb:x"),
    ],
)
def test_a_log_that_makes_no_sense_fails(old, new, record):
    lines = record.lines()
    assert old in lines
    record.write_log(lines.replace(old, new))
    assert "log" in record.failed("size", "log")


def test_an_edited_train_time_is_caught(record):
    lines, times = re.subn(r"^(step:30/30 .*train_time:)", r"\g<1>9", record.lines(), flags=re.M)
    assert times
    record.write_log(lines)
    assert record.failed("log", "submission") == {"log"}


# ---- A script that reaches further than it may
REACHES = [
    'socket.create_connection(("127.0.0.1", 9), timeout=1)',
    f"open({str(ROOT / 'README.md')!r}).read()",
    'subprocess.run(["true"])',
    "list(Path('DATA').iterdir())",
    "open('LEFT', 'w').write('validation text')",
    "list(Path('..').glob('*/data/*'))",
]


def test_a_script_that_reaches_out_is_stopped(record):
    """In a process with the guard. That of each single reach is in test_audit_guard.py."""
    left = record.folder.parent / "left"
    lines = ["import socket", "import subprocess"]
    for reach in REACHES:
        statement = reach.replace("DATA", str(record.data)).replace("LEFT", str(left))
        lines += ["try:", f"    {statement}", "except OSError:", "    pass"]
    record.script.write_text(faulty_script("\n".join(lines)), encoding="utf-8")
    found = record.audit("--only", "alone")
    assert found.verdicts == {"runs alone": "FAIL"} and not left.exists()
    stops = re.search(r"was stopped (\d+) times: socket", found.out)
    assert stops and int(stops[1]) >= len(REACHES), found


def test_a_script_that_ends_silently_fails(record):
    fault = "import os\n\nif __name__ == '__main__':\n    os._exit(0)"
    record.script.write_text(faulty_script(fault), encoding="utf-8")
    found = record.audit("--only", "alone")
    assert (found.status, found.verdicts) == (1, {"runs alone": "FAIL"})
    assert "without a result" in found.out


def test_a_stop_does_not_wait_for_the_score(record, monkeypatch):
    """A process that would compute it for an hour is ended, and the command says one line."""
    started = threading.Event()
    scoring = []

    def wait_for(processes: Processes, name: str, folder: Path) -> None:
        if name == "score":
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            processes.running.append(process)
            scoring.append(process)
            started.set()
            process.wait()
        else:
            assert started.wait(PATIENCE)
            raise KeyboardInterrupt

    monkeypatch.setattr(Processes, "wait_for", wait_for)
    found = record.audit("--only", "score,bytes")
    assert found.status == 130 and found.verdicts == {}
    assert scoring[0].wait(PATIENCE) != 0
    assert found.err.count("\n") == 2, "the seed of the samples, and the stop"


def test_a_stop_ends_the_score_when_all_else_is_done(record, monkeypatch):
    """Ctrl-C comes while nothing but the score is waited for."""
    scoring = []

    def wait_for(processes: Processes, name: str, folder: Path) -> None:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        processes.running.append(process)
        scoring.append(process)
        os.kill(os.getpid(), signal.SIGINT)
        process.wait()

    monkeypatch.setattr(Processes, "wait_for", wait_for)
    monkeypatch.setattr(ArtifactAudit, "checked", lambda audit: {})
    found = record.audit("--only", "score")
    assert found.status == 130 and found.verdicts == {}
    assert scoring[0].wait(PATIENCE) != 0


# ---- What cannot be audited
@pytest.mark.parametrize(
    "case, word",
    [
        ("absent", "does not exist"),
        ("empty", "is no record folder"),
        ("no data", "validation shards"),
        ("damaged data", "tokens in its header"),
        ("another tokenizer's data", "tokens beyond"),
        ("not an artifact", "refuses the artifact"),
        ("unknown check", "--only luck: the checks are"),
        ("no script", "--script"),
        ("no log", "--log"),
        ("no tokenizer", "--tokenizer"),
        ("no time", "--minutes"),
        ("nowhere to write", "--json"),
        ("only a submission", "is not a record folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(case, word, record, tmp_path, without_processes):
    (tmp_path / "empty").mkdir()
    absent = str(tmp_path / "absent" / "file")
    path = record.folder
    data = record.data
    arguments = []
    if case in ("absent", "empty"):
        path = tmp_path / case
    elif case == "no data":
        data = tmp_path / "empty"
    elif case == "damaged data":
        data = Path(shutil.copytree(record.data, tmp_path / "data"))
        shard = data / "x_val_000000.bin"
        shard.write_bytes(shard.read_bytes()[:-1])
    elif case == "another tokenizer's data":
        data = Path(shutil.copytree(record.data, tmp_path / "data"))
        shard = data / "x_val_000000.bin"
        shard.write_bytes(shard.read_bytes()[:-2] + b"\xff\xff")
    elif case == "not an artifact":
        path = record.folder / "README.md"
    elif case == "unknown check":
        arguments = ["--only", "size,luck"]
    elif case == "no time":
        arguments = ["--minutes", "0"]
    elif case == "nowhere to write":
        arguments = ["--json", absent]
    elif case == "only a submission":
        path = record.folder / ARTIFACT
        arguments = ["--only", "submission"]
    else:
        arguments = [f"--{case.split()[1]}", absent]
    found = record.audit(*arguments, "--data", str(data), path=path)
    assert (found.status, found.verdicts, len(found.errors)) == (2, {}, 1), found
    assert re.search(word, found.errors[0]), found
    assert "Traceback" not in found.err


def test_a_tokenizer_that_is_none_is_refused(record):
    found = record.audit("--tokenizer", str(record.script))
    assert found.status == 2 and "no SentencePiece model" in found.errors[0]


def test_data_without_a_tokenizer_is_refused(record, tmp_path, monkeypatch):
    data = Path(shutil.copytree(record.data, tmp_path / "data"))
    (data / "tokenizer.model").unlink()
    monkeypatch.setattr("manifest.default_bases", lambda: (tmp_path,))
    found = record.audit("--data", str(data))
    assert found.status == 2 and "--tokenizer" in found.errors[0]


def test_the_command_refuses_in_one_line(tmp_path):
    done = call(TOOL, tmp_path, "--minutes", "many", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done


def test_help_says_what_the_auditor_can_and_cannot(tmp_path):
    done = call(TOOL, "--help", folder=tmp_path)
    assert done.returncode == 0
    for words in ("--keep", "--worker decode", "So read the script too."):
        assert words in done.stdout


# ---- Which data
@pytest.mark.parametrize("change", [0, 1])
def test_bytes_must_be_those_that_the_manifest_notes(record, tmp_path, without_processes, change):
    """With another tokenizer of the same size the others would agree on a wrong count."""
    data = Path(shutil.copytree(record.data, tmp_path / "mine"))
    size = Log(record.log).score(LABELS["sliding"]).bytes
    (data / "manifest.json").write_text(json.dumps(dict(val=dict(bytes=size + change))))
    found = record.audit("--only", "bytes", "--data", str(data))
    verdict = "FAIL" if change else "PASS"
    assert (found.status, found.verdicts) == (change, {"byte count": verdict})


# ---- Tokenizers of every kind
# With operators in the text itself.
VALIDATION = [*documents()[:10], f"NASA {''.join(OPERATORS)} iOS"]


def record_of_kind(root: Path, kind: str) -> Record:
    """An honest record on shards with case operators, or on shards of bytes."""
    texts = documents()[30:]
    model = BYTE_TOKENIZER
    if kind == "operators":
        model = train_of_kind(root / "t.model", texts, 600, case_operators=True)
    return honest_record(write_dataset(root / f"mine_{kind}", model, texts, VALIDATION))


@pytest.fixture(scope="module")
def with_operators(tmp_path_factory) -> Record:
    return record_of_kind(tmp_path_factory.mktemp("with operators"), "operators")


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory) -> Record:
    return record_of_kind(tmp_path_factory.mktemp("of bytes"), "byte260")


@pytest.mark.parametrize("kind", ["with_operators", "of_bytes"])
def test_an_honest_record_with_any_tokenizer_passes(kind, request, without_processes):
    honest = request.getfixturevalue(kind)
    asked = ("alone", "bytes", "targets", "decompression", "log", "submission")
    assert honest.failed(*asked) == set()
    size = sum(len(text.encode()) for text in VALIDATION)
    figure = f"script {size:,}, log {size:,}, decoded text {size:,} bytes"
    assert figure in honest.audit("--only", "bytes").out


def test_operators_that_count_as_text_are_caught(with_operators, tmp_path, without_processes):
    """The script's log and submission agree with it."""
    folder = shutil.copytree(with_operators.folder, tmp_path / "record")
    planted = Record(folder, with_operators.data)
    doctor(planted, faulty_scripts.OPERATORS_AS_TEXT)
    asked = ("alone", "bytes", "targets", "decompression", "log", "submission")
    assert planted.failed(*asked) == {"runs alone", "byte count", "decompression"}


def test_byte_files_are_what_a_log_must_have_counted(with_operators, tmp_path, without_processes):
    data = Path(shutil.copytree(with_operators.data, tmp_path / "data"))
    record = Record(shutil.copytree(with_operators.folder, tmp_path / "record"), data)
    sizes = Text(data / "tokenizer.model").bytes_of_targets(read_tokens(data / "x_val_000000.bin"))
    write_shard(data / "x_val_bytes_000000.bin", [0, *sizes])
    asked = ("bytes", "targets", "decompression", "log", "submission")
    assert record.failed(*asked) == set()
    # They may say that the text was a little longer before a tokenizer normalized it.
    sizes[40] += 3
    write_shard(data / "x_val_bytes_000000.bin", [0, *sizes])
    assert record.failed("bytes", "targets") == {"byte count"}
    doctor(record, "")
    assert record.failed(*asked) == set()
    # But not of another text.
    write_shard(data / "x_val_bytes_000000.bin", [0, *(2 * sizes)])
    found = record.audit("--only", "bytes")
    assert found.status == 2 and "the byte files are not of these shards" in found.errors[0]
