"""Record folders: made from finished runs, refused, put aside, checked."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import audit
import challenge
import faulty_scripts
import submit
from audit_processes import Processes
from conftest import ROOT
from files import digest
from finished_runs import ARTIFACT_SUFFIX
from leaderboard import ADAPTS, MARKERS, leaderboard
from record_check import SURVEYED
from run_logs import LABELS, SEPARATOR
from tiny_record import QUICK, finished_run
from tiny_runs import PATIENCE

TOOL = ROOT / "records" / "submit.py"
SLIDING = LABELS["sliding"]
README = f"# Records\n\n{MARKERS[0]}\nold\n{MARKERS[1]}\n\nafter\n"
ASKED = [
    "--track",
    "pocket",
    "--name",
    "a tiny one",
    "--author",
    "A. Person",
    "--date",
    "2026-01-02",
]
FOLDER = "track_pocket/2026-01-02_ATinyOne"


def auditor(*checks: str) -> Callable:
    """A run_auditor that makes these checks in this process."""

    def run_auditor(folder: Path, data: submit.Data, minutes: float) -> int:
        options = ["--data", str(data.folder), "--tokenizer", str(data.tokenizer), *QUICK]
        return audit.main([str(folder), *options, "--only", ",".join(checks)])

    return run_auditor


@pytest.fixture(scope="module")
def finished(data_folder) -> Path:
    """logs/ with one real run, `first` (seed 1337)."""
    return finished_run(data_folder)


@pytest.fixture(scope="module")
def made(finished, tmp_path_factory) -> tuple[Path, str]:
    """records/ after a submission, and what was printed."""
    records = tmp_path_factory.mktemp("made")
    (records / "README.md").write_text(README)
    told = io.StringIO()
    options = ["--github-id", "person", "--beats", "9.5"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(submit, "RECORDS", records)
        patch.setattr(Processes, "wait_for", faulty_scripts.answer_here)
        checks = ("size", "bytes", "targets", "score", "log", "submission")
        patch.setattr(submit, "run_auditor", auditor(*checks))
        status = submit.main([*ASKED, *options, str(finished / "first.json")])
    assert status == 0, told.getvalue()
    return records, told.getvalue()


@pytest.fixture
def logs(finished, tmp_path) -> Path:
    """A copy of the run, to be doctored."""
    return Path(shutil.copytree(finished, tmp_path / "run/logs"))


@pytest.fixture
def records(tmp_path, monkeypatch) -> Path:
    """An empty records/, and of the auditor what is quick."""
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "README.md").write_text(README)
    monkeypatch.setattr(submit, "RECORDS", folder)
    checks = ("size", "log", "submission", "record")
    monkeypatch.setattr(submit, "run_auditor", auditor(*checks))
    return folder


@pytest.fixture
def folder(made, records, tmp_path) -> Path:
    """A copy of the record, to be doctored."""
    return Path(shutil.copytree(made[0] / FOLDER, tmp_path / "record"))


def edit(path: Path, *replacements: tuple[str, str]) -> None:
    """Replace texts wherever they stand behind the script's source; each must be there."""
    text = path.read_text(encoding="utf-8")
    source, mark, lines = text.rpartition(f"{SEPARATOR}\n")
    for old, new in replacements:
        assert old in lines, old
        lines = lines.replace(old, new)
    path.write_text(source + mark + lines, encoding="utf-8")


def another_seed(logs: Path, seed: int, better: float = 0.0) -> Path:
    """The first run once more under another seed, so many nats better.

    Its artifact is the first one's with other last bytes, so that it has a digest of its own. Log
    and results stay of one mind.
    """
    results = json.loads((logs / "first.json").read_text())
    path, log, artifact = (
        logs / f"seed{seed}{suffix}" for suffix in (".json", ".txt", ARTIFACT_SUFFIX)
    )
    shutil.copy(logs / "first.json", path)
    shutil.copy(logs / "first.txt", log)
    data = (logs / f"first{ARTIFACT_SUFFIX}").read_bytes()
    artifact.write_bytes(data[:-4] + seed.to_bytes(4, "little"))
    changes = [
        ('"seed": 1337', f'"seed": {seed}'),
        (results["artifact_sha256"], digest(artifact)),
    ]
    edit(path, *changes)
    edit(log, *changes)
    score = results[SLIDING]
    share = 1 - better / score["val_loss"]
    for name in ("val_loss", "val_bpb"):
        edit(path, (repr(score[name]), repr(score[name] * share)))
    for label, digits in ((SLIDING, 4), (f"{SLIDING}_exact", 8)):
        before, after = (
            f"{label} val_loss:{score['val_loss'] * times:.{digits}f} "
            f"val_bpb:{score['val_bpb'] * times:.{digits}f}"
            for times in (1, share)
        )
        edit(log, (before, after))
    return path


def refused(capsys, *arguments: str | Path) -> str:
    """The one line with which a command is refused."""
    status = submit.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in said, said
    return errors[0]


def left_in(records: Path) -> list[str]:
    return sorted(path.name for path in records.iterdir())


# ---- A record folder
def test_a_run_becomes_a_record_that_passes_the_audit(made, finished):
    folder = made[0] / FOLDER
    assert left_in(folder) == [
        "README.md",
        "final_model_seed1337.int6.ptz",
        "requirements.txt",
        "submission.json",
        "train_gpt.py",
        "train_seed1337.log",
    ]
    assert left_in(made[0]) == ["README.md", "track_pocket"]
    assert (folder / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert (folder / "train_seed1337.log").read_bytes() == (finished / "first.txt").read_bytes()
    assert folder.stat().st_mode & 0o777 == 0o755
    assert made[1].count("PASS") == 6


def test_submission_json_has_the_fields_of_the_field_and_the_figures_of_the_run(made, finished):
    stated = json.loads((made[0] / FOLDER / "submission.json").read_text())
    results = json.loads((finished / "first.json").read_text())
    score = results[SLIDING]
    assert set(SURVEYED) <= set(stated) and stated["github_id"] == "person"
    assert stated["val_bpb"] == score["val_bpb"] and stated["val_loss"] == score["val_loss"]
    assert stated["val_bpb_std"] is None
    assert stated["bytes_total"] == results["bytes_total"] and stated["seeds"] == [1337]
    figures = stated["seed_results"]["1337"]
    for name in ("steps", "step_avg_ms", "train_seconds", "artifact_sha256"):
        assert figures[name] == results[name]
    assert stated["evaluation_track"] == "A" and stated["compliance"]["no_ttt"] is True
    assert "sliding_val_bpb" not in figures and "adaptation" not in stated
    assert stated["hardware"].startswith("CPU, ") and stated["compliance"]["three_seeds"] is False
    lead = 9.5 * score["val_loss"] / score["val_bpb"] - score["val_loss"]
    beats = dict(claimed=9.5, p_value=None, holds=False, nats=pytest.approx(lead))
    assert stated["beats"] == beats


def test_the_readme_says_what_ran_and_what_it_is_not(made, finished):
    text = (made[0] / FOLDER / "README.md").read_text(encoding="utf-8")
    results = json.loads((finished / "first.json").read_text())
    for words in (
        "- **CPU run, not the challenge's hardware (8×H100).**",
        "- **Track pocket is none of the challenge's.**",
        "| MUON_WD | 0.05 | 0.04 |",
        "| MODEL_DIM | 32 | 128 |",
        "| three_seeds | **no** |",
        f"**val_bpb {results[SLIDING]['val_bpb']:.4f}** (one seed)",
        "does NOT beat it",
        "- `train_seed1337.log`",
        "backout (#339)",
        "partial key offset (modded-nanogpt #169)",
        "skip gates (#1218)",
    ):
        assert words in text, words
    command = re.search(r"^PRESET=pocket SEED=1337 .* python train_gpt\.py$", text, re.M)[0]
    assert " MUON_WD=0.05 " in command and " COMPILE=0 " in command and "RUN_ID" not in command


def test_requirements_are_the_versions_that_ran(made, finished):
    versions = json.loads((finished / "first.json").read_text())["versions"]
    lines = (made[0] / FOLDER / "requirements.txt").read_text().splitlines()
    assert lines[0] == f"# Python {versions['python']}"
    assert f"numpy=={versions['numpy']}" in lines


def test_the_leaderboard_has_the_new_record(made):
    text = (made[0] / "README.md").read_text(encoding="utf-8")
    before, after = README.split("old\n")
    assert text.startswith(before) and text.endswith(after)
    row = next(line for line in text.splitlines() if line.startswith("| 1 |"))
    assert f"[a tiny one]({FOLDER}/) | A. Person | 2026-01-02 | 1 |" in row
    assert "old" not in text


def test_three_seeds_become_one_record(logs, records, capsys):
    paths = [another_seed(logs, 2, 0.01), logs / "first.json", another_seed(logs, 3, 0.03)]
    assert submit.main([*ASKED, *map(str, paths)]) == 0, capsys.readouterr()
    stated = json.loads((records / FOLDER / "submission.json").read_text())
    text = (records / FOLDER / "README.md").read_text()
    bpbs = [result["val_bpb"] for result in stated["seed_results"].values()]
    assert stated["seeds"] == [2, 3, 1337] and stated["compliance"]["three_seeds"]
    assert stated["val_bpb"] == statistics.mean(bpbs)
    assert stated["val_bpb_std"] == statistics.stdev(bpbs)
    assert f"**val_bpb {stated['val_bpb']:.4f}** ± {stated['val_bpb_std']:.4f} (3 seeds)" in text
    assert "| standard deviation |" in text and text.count(" python train_gpt.py\n") == 3


def test_a_folder_that_the_auditor_refuses_is_put_aside(logs, records, capsys, monkeypatch):
    monkeypatch.setattr(submit, "run_auditor", lambda *_: 1)
    arguments = [*ASKED, str(logs / "first.json")]
    assert submit.main(arguments) == 1 and "put aside" in capsys.readouterr().err
    assert left_in(records / "track_pocket") == ["2026-01-02_ATinyOne.refused"]
    assert (records / "README.md").read_text() == README
    assert "No record yet." in leaderboard(records)
    assert "exists already" in refused(capsys, *arguments)


# ---- Track B
def test_a_run_that_adapts_becomes_a_record_of_track_b(data_folder, records, capsys):
    """Its score is that of what adapts; those of track A, of the same artifact, stand beside."""
    path = finished_run(data_folder, adapts=True) / "first.json"
    assert submit.main([*ASKED, str(path)]) == 0, capsys.readouterr()
    results = json.loads(path.read_text())
    stated = json.loads((records / FOLDER / "submission.json").read_text())
    adaptive = results[LABELS["ttt"]]
    assert stated["evaluation_track"] == "B"
    assert stated["adaptation"] == results["compliance"]["adaptation"]
    for figures in (stated, stated["seed_results"]["1337"]):
        assert figures["val_bpb"] == adaptive["val_bpb"] != results[SLIDING]["val_bpb"]
        assert figures["sliding_val_bpb"] == results[SLIDING]["val_bpb"]
    assert stated["compliance"]["no_ttt"] is False
    assert stated["compliance"]["score_first_ttt"] is True
    text = (records / FOLDER / "README.md").read_text(encoding="utf-8")
    score = results[SLIDING]["val_bpb"]
    for words in (
        "**Track B, which adapts while it scores; as a fixed predictor (track A) ",
        f"**val_bpb {adaptive['val_bpb']:.4f}** (one seed)",
        "| seed | val_bpb | val_loss, nats | track A, sliding windows |",
        f"| {score:.4f} |",
        stated["adaptation"].rstrip("."),
    ):
        assert words in text, words
    table = (records / "README.md").read_text(encoding="utf-8")
    assert ADAPTS in table and f"| 1 | {adaptive['val_bpb']:.4f} | {score:.4f} | [a tiny" in table


# ---- What stops it
def raising(error: BaseException | type[BaseException]) -> Callable:
    """A function that raises an error, whatever it is called with."""

    def raise_it(*arguments: object) -> None:
        raise error

    return raise_it


def test_a_stop_after_the_folder_has_its_name_does_not_deny_it(logs, records, capsys, monkeypatch):
    monkeypatch.setattr(submit, "update_leaderboard", raising(KeyboardInterrupt))
    assert submit.main([*ASKED, str(logs / "first.json")]) == 130
    assert f"{FOLDER} is there; --leaderboard makes the tables" in capsys.readouterr().err


def test_tables_that_cannot_be_made_are_found_out_before_any_work(
    logs, records, capsys, monkeypatch
):
    (records / "track_other/odd").mkdir(parents=True)
    (records / "track_other/odd/ablation.json").write_text("[]")
    monkeypatch.setattr(submit, "read_run", raising(AssertionError("it worked")))
    assert "cannot be linked" in refused(capsys, *ASKED, logs / "first.json")
    assert left_in(records) == ["README.md", "track_other"]


def test_a_readme_without_markers_is_found_out_before_any_work(logs, records, capsys, monkeypatch):
    (records / "README.md").write_text("mine")
    monkeypatch.setattr(submit, "read_run", raising(AssertionError("it worked")))
    assert MARKERS[0] in refused(capsys, *ASKED, logs / "first.json")
    assert (records / "README.md").read_text() == "mine" and left_in(records) == ["README.md"]


@pytest.mark.parametrize("end, status", [(KeyboardInterrupt, 130), (OSError("disk full"), 2)])
def test_what_stops_the_auditor_leaves_nothing(end, status, logs, records, capsys, monkeypatch):
    monkeypatch.setattr(submit, "run_auditor", raising(end))
    assert submit.main([*ASKED, str(logs / "first.json")]) == status
    assert left_in(records) == ["README.md"] and capsys.readouterr().err.count("\n") == 1


def test_data_that_cannot_be_audited_leaves_nothing(logs, records, tmp_path, capsys):
    assert "validation shards" in refused(capsys, *ASKED, "--data", tmp_path, logs / "first.json")
    assert left_in(records) == ["README.md"]


# ---- The auditor's process
@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Puts a program into the place of records/audit.py."""
    monkeypatch.setattr(submit, "ROOT", tmp_path)
    (tmp_path / "records").mkdir()

    def install(program: str) -> None:
        (tmp_path / "records/audit.py").write_text(program)

    return install


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_auditor_gets_data_and_minutes_for_each_artifact(status, stand_in, tmp_path):
    stand_in(
        "import json, pathlib, sys, tempfile\n"
        "told = pathlib.Path(sys.argv[0]).with_name('told.json')\n"
        "told.write_text(json.dumps([sys.argv[1:], tempfile.mkdtemp()]))\n"
        f"sys.exit({status})\n"
    )
    for name in ("a.ptz", "b.ptz"):
        (tmp_path / name).touch()
    data = submit.Data(tmp_path / "data", tmp_path / "t.model")
    assert submit.run_auditor(tmp_path, data, 1.5) == status
    arguments, temporary = json.loads((tmp_path / "records/told.json").read_text())
    expected = dict(data=data.folder, tokenizer=data.tokenizer, minutes=1.5)
    options = [text for name, value in expected.items() for text in (f"--{name}", str(value))]
    assert arguments == [str(tmp_path), *options]
    assert not Path(temporary).exists()


def test_an_auditor_that_breaks_down_is_no_verdict(stand_in, tmp_path):
    stand_in("import os; os.abort()")
    with pytest.raises(submit.BadInput, match="ended with status -6"):
        submit.run_auditor(tmp_path, submit.Data(tmp_path, tmp_path), 1.0)


def test_ctrl_c_ends_the_auditor_and_its_workers(stand_in, tmp_path):
    """With a stand-in that starts a worker and waits."""
    told = tmp_path / "told"
    stand_in(
        "import pathlib, subprocess, tempfile\n"
        "worker = subprocess.Popen(['sleep', '3600'])\n"
        f"path = pathlib.Path({str(told)!r})\n"
        "path.with_suffix('.new').write_text(f'{worker.pid} {tempfile.mkdtemp()}')\n"
        "path.with_suffix('.new').rename(path)\n"
        "worker.wait()\n"
    )

    def interrupt() -> None:
        while not told.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        submit.run_auditor(tmp_path, submit.Data(tmp_path, tmp_path), 1.0)
    worker, folder = told.read_text().split()
    assert not Path(folder).exists()
    until = time.monotonic() + PATIENCE
    while is_running(int(worker)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(int(worker))


def is_running(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


# ---- Refusals
CHANGES = dict(
    time=('"eval_seconds": ', '"eval_seconds": 99'),
    cap=('"under_cap": true', '"under_cap": false'),
    unfinished=(f'"{SLIDING}"', '"x"'),
    versions=('"torch": "', '"torch": "9'),
)
CONFIGURATION = [
    ('"muon_wd": 0.05', '"muon_wd": 0.06'),
    ('"qk_gain_init": 1.5', '"qk_gain_init": 2.5'),
]


def spoil(logs: Path, case: str) -> list[Path]:
    """Runs that are no record together."""
    first = logs / "first.json"
    second = another_seed(logs, 2)
    log = second.with_suffix(".txt")
    artifact = second.with_suffix(ARTIFACT_SUFFIX)
    missing = {"no log": log, "no artifact": artifact, "no results": second}
    if case in CHANGES:
        edit(second, CHANGES[case])
    elif case == "configuration":
        edit(log, *CONFIGURATION)
        edit(second, *CONFIGURATION)
    elif case == "code":
        # As many bytes as before.
        text = log.read_text(encoding="utf-8").replace('"""', "'''", 1)
        log.write_text(text, encoding="utf-8")
    elif case == "settings":
        edit(log, CONFIGURATION[0])
    elif case == "score":
        bpb = json.loads(second.read_text())[SLIDING]["val_bpb"]
        edit(second, (repr(bpb), repr(bpb - 0.01)))
    elif case == "artifact":
        shutil.copy(first.with_suffix(ARTIFACT_SUFFIX), artifact)
    elif case == "cut artifact":
        artifact.write_bytes(artifact.read_bytes()[:-1])
    elif case == "cut source":
        log.write_text("step:1/2 train_loss:1\n")
    elif case in missing:
        missing[case].unlink()
    elif case == "twice":
        return [first, first]
    elif case == "a log":
        return [first, log]
    return [first, second]


@pytest.mark.parametrize(
    "case, words",
    [
        (
            "configuration",
            "different configurations: muon_wd (0.06, 0.05), qk_gain_init (2.5, 1.5)",
        ),
        ("code", "not made by the same script"),
        ("settings", "do not agree: the settings differ"),
        ("score", "do not agree: val_bpb is"),
        ("versions", "different versions"),
        ("artifact", "sha256"),
        ("cut artifact", "bytes_model is"),
        ("time", "is over the 600 s"),
        ("cap", "over the cap"),
        ("unfinished", f"it has no {SLIDING}"),
        ("twice", "seed 1337 is there twice"),
        ("cut source", "does not begin with the script's source"),
        ("no log", "seed2.txt is missing"),
        ("no artifact", f"seed2{ARTIFACT_SUFFIX} is missing"),
        ("no results", "seed2.json does not exist"),
        ("a log", "name its logs/<RUN_ID>.json"),
    ],
)
def test_runs_that_are_no_record_are_refused(case, words, logs, records, capsys):
    assert words in refused(capsys, *ASKED, *spoil(logs, case))
    assert left_in(records) == ["README.md"]


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", '{"under_cap": true', "\x00\x01", "null"])
def test_a_file_that_is_no_result_is_refused(text, logs, records, capsys):
    (logs / "first.json").write_text(text)
    assert "first.json" in refused(capsys, *ASKED, logs / "first.json")


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", "1337"),
        ("steps", None),
        ("versions", []),
        ("runtime", 5),
        ("compliance", {}),
        ("train_seconds", "x"),
        ("pre_quantization", 1.0),
        ("settings", []),
        ("late_qat_steps", "many"),
    ],
)
def test_results_of_other_types_end_in_one_line(name, value, logs, records, capsys):
    results = json.loads((logs / "first.json").read_text())
    (logs / "first.json").write_text(json.dumps({**results, name: value}))
    assert "first.json" in refused(capsys, *ASKED, logs / "first.json")
    assert left_in(records) == ["README.md"]


def test_a_run_over_the_cap_without_its_size_ends_in_one_line(logs, records, capsys):
    (logs / "first.json").write_text(json.dumps(dict(under_cap=False, bytes_total=None)))
    assert "first.json" in refused(capsys, *ASKED, logs / "first.json")


def test_the_challenges_track_is_for_its_hardware_and_text(logs, records, capsys, monkeypatch):
    arguments = ["--track", "10min_16mb", *ASKED[2:], logs / "first.json"]
    assert "not the challenge's hardware (8×H100)" in refused(capsys, *arguments)
    monkeypatch.setattr(challenge, "hardware", lambda log: "8×NVIDIA H100 80GB HBM3")
    assert "not on the challenge's FineWeb" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--track", "../up", "--track ../up"),
        ("--track", "", "--track"),
        ("--name", " ?! ", "--name"),
        ("--date", "2026-13-01", "--date"),
        ("--date", "20260101", "--date"),
        ("--author", " ", "author"),
        ("--beats", "0", "--beats"),
        ("--beats", "nan", "--beats"),
        ("--beats", "much", "--beats"),
        ("--tokenizer", __file__, "is not the tokenizer"),
        ("--tokenizer", "absent.model", "is not a file"),
        ("--luck", "1", "--help"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, value, words, logs, records, capsys):
    assert words in refused(capsys, *ASKED, logs / "first.json", option, value)
    assert left_in(records) == ["README.md"]


def test_one_thing_is_done_at_a_time(records, capsys):
    for arguments in ([], ["--leaderboard", "a.json"], ["--check", str(records), "--leaderboard"]):
        assert "--check FOLDER, or --leaderboard" in refused(capsys, *arguments)


def test_the_command_refuses_in_one_line():
    done = subprocess.run(
        [sys.executable, str(TOOL), "absent.json", *ASKED], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done


# ---- Checking a folder
def checked(folder: Path, data_folder: Path, capfd) -> tuple[int, str]:
    status = submit.main(["--check", str(folder), "--data", str(data_folder)])
    return status, "".join(capfd.readouterr())


def test_a_good_folder_passes(folder, data_folder, capfd):
    status, text = checked(folder, data_folder, capfd)
    assert status == 0 and "FAIL" not in text, text
    passed = re.findall(r"^(\w+) +PASS  ", text, re.M)
    assert passed == ["files", "fields", "seeds", "statistics", "size", "log", "submission"]
    assert re.search(r"^pytorch_version +-  not checked: \S+: no log names it$", text, re.M)


def test_an_edited_score_fails(folder, data_folder, capfd):
    bpb = json.loads((folder / "submission.json").read_text())["val_bpb"]
    edit(folder / "submission.json", (f'"val_bpb": {bpb!r}', f'"val_bpb": {bpb - 0.01!r}'))
    status, text = checked(folder, data_folder, capfd)
    assert status == 1 and re.search(r"^submission +FAIL .*val_bpb", text, re.M), text


def test_a_failure_before_the_audit_counts(folder, data_folder, capfd):
    stated = json.loads((folder / "submission.json").read_text())
    stated["compliance"]["no_ttt"] = False
    (folder / "submission.json").write_text(json.dumps(stated))
    status, text = checked(folder, data_folder, capfd)
    assert status == 1 and re.search(r"^statistics +FAIL .*no_ttt", text, re.M), text
    assert re.search(r"^submission +PASS", text, re.M), text


def test_a_missing_log_fails(folder, data_folder, capfd):
    (folder / "train_seed1337.log").unlink()
    status, text = checked(folder, data_folder, capfd)
    assert status == 1 and "Traceback" not in text
    assert re.search(r"^train_seed<N>.log +FAIL +missing", text, re.M), text


def test_a_missing_artifact_fails_and_the_log_is_still_checked(folder, data_folder, capfd):
    (folder / "final_model_seed1337.int6.ptz").unlink()
    status, text = checked(folder, data_folder, capfd)
    assert status == 1 and re.search(r"^an artifact +FAIL +missing", text, re.M), text
    assert re.search(r"^log of seed 1337 +PASS", text, re.M)


def test_an_empty_folder_is_no_record(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "is no record folder" in refused(capsys, "--check", tmp_path / "empty")


def test_any_folder_of_the_field_is_checked_as_the_auditor_does(capfd):
    foreign = ROOT / "tests/field_records/two_gpus"
    assert submit.main(["--check", str(foreign)]) == 1
    told = capfd.readouterr().out
    assert audit.main([str(foreign)]) == 1
    assert capfd.readouterr().out == told
    assert re.search(r"^hardware +does not hold", told, re.M)


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    assert "name a record folder" in refused(capsys, "--check", tmp_path / "absent")
