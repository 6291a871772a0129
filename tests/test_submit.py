"""Record folders: made from finished runs, refused, checked, ranked."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import finished_runs
import pytest
import record_text
import submit
from conftest import ROOT
from scipy import stats
from test_end_to_end import TINY_RUN, run

TOOL = ROOT / "records" / "submit.py"
SUFFIXES = (".json", ".txt", ".final_model.int6.ptz")
README = "# Records\n\n<!-- leaderboard -->\nold\n<!-- /leaderboard -->\n\nafter\n"
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


def quick_audit(folder: Path, data: submit.Data, minutes: float) -> int:
    """Those of the auditor's checks that start no worker."""
    command = [
        sys.executable,
        str(ROOT / "records/audit.py"),
        str(folder),
        "--data",
        str(data.folder),
    ]
    return subprocess.run([*command, "--only", "size,log,submission"]).returncode


@pytest.fixture(scope="module")
def finished(data_folder, tmp_path_factory) -> Path:
    """logs/ with one real run, `first` (seed 1337)."""
    folder = tmp_path_factory.mktemp("run")
    done = run(folder, **TINY_RUN, DATA_PATH=str(data_folder), RUN_ID="first", MUON_WD="0.05")
    assert done.status == 0, done.err
    return folder / "logs"


@pytest.fixture(scope="module")
def made(finished, tmp_path_factory) -> tuple[Path, str]:
    """records/ after a submission with the auditor, and what was printed. Of its ten checks those that
    take two processes less; tests/test_audit.py has the others."""
    records = tmp_path_factory.mktemp("made")
    (records / "README.md").write_text(README)
    patch = pytest.MonkeyPatch()
    patch.setattr(submit, "RECORDS", records)
    told = []
    patch.setattr("builtins.print", lambda *words, **_: told.append(" ".join(map(str, words))))
    start, only = subprocess.Popen, ["--only", "size,bytes,targets,score,log,submission"]
    patch.setattr(
        submit.subprocess, "Popen", lambda command, **named: start([*command, *only], **named)
    )
    status = submit.main(
        [
            *ASKED,
            "--github-id",
            "person",
            "--beats",
            "9.5",
            "--minutes",
            "0.15",
            str(finished / "first.json"),
        ]
    )
    patch.undo()
    assert status == 0, told
    return records, "\n".join(told)


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
    monkeypatch.setattr(submit, "run_auditor", quick_audit)
    return folder


def edit(path: Path, *replacements: tuple[str, str]) -> None:
    """Replace texts wherever they stand behind the script's source; each must be there."""
    text = path.read_text(encoding="utf-8")
    head, mark, lines = text.rpartition("=" * 100 + "\n")
    for old, new in replacements:
        assert old in lines, old
        lines = lines.replace(old, new)
    path.write_text(head + mark + lines, encoding="utf-8")


def another_seed(logs: Path, seed: int, better: float = 0.0) -> Path:
    """The first run once more under another seed, so many nats better, with an artifact of its own digest.

    Log and results stay of one mind; the artifact is the first one's with other last bytes."""
    results = json.loads((logs / "first.json").read_text())
    names = [logs / f"seed{seed}{suffix}" for suffix in SUFFIXES]
    for suffix, name in zip(SUFFIXES, names):
        shutil.copy(logs / f"first{suffix}", name)
    data = names[2].read_bytes()
    names[2].write_bytes(data[:-4] + seed.to_bytes(4, "little"))
    score = results["final_int6_sliding_window"]
    share = 1 - better / score["val_loss"]
    changes = [
        ('"seed": 1337', f'"seed": {seed}'),
        (results["artifact_sha256"], finished_runs.digest(names[2])),
    ]
    edit(
        names[0],
        *changes,
        *((repr(score[name]), repr(score[name] * share)) for name in ("val_loss", "val_bpb")),
    )
    line, exact = (
        tuple(
            f"final_int6_sliding_window{mark} val_loss:{score['val_loss'] * times:.{digits}f} "
            f"val_bpb:{score['val_bpb'] * times:.{digits}f}"
            for times in (1, share)
        )
        for mark, digits in (("", 4), ("_exact", 8))
    )
    edit(names[1], *changes, line, exact)
    return names[0]


def refused(capsys, *arguments) -> str:
    """The one line with which a command is refused."""
    status, (_, err) = submit.main([str(argument) for argument in arguments]), capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in err, err
    return errors[0]


def left_in(records: Path) -> list[str]:
    return sorted(path.name for path in records.iterdir())


# ---- a record folder


def test_a_run_becomes_a_record_that_passes_the_audit(made, finished):
    folder = made[0] / "track_pocket/2026-01-02_ATinyOne"
    assert sorted(path.name for path in folder.iterdir()) == [
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


def test_submission_json_has_the_fields_of_the_field_and_the_figures_of_the_run(made, finished):
    stated = json.loads((made[0] / "track_pocket/2026-01-02_ATinyOne/submission.json").read_text())
    results = json.loads((finished / "first.json").read_text())
    score = results["final_int6_sliding_window"]
    assert set(submit.SURVEYED) <= set(stated) and stated["github_id"] == "person"
    assert all(stated[name] == score[name] for name in ("val_bpb", "val_loss"))
    assert stated["val_bpb_std"] is None
    assert stated["bytes_total"] == results["bytes_total"] and stated["seeds"] == [1337]
    figures = stated["seed_results"]["1337"]
    assert all(
        figures[name] == results[name]
        for name in ("steps", "step_avg_ms", "train_seconds", "artifact_sha256")
    )
    assert stated["hardware"].startswith("CPU, ") and stated["compliance"]["three_seeds"] is False
    assert stated["beats"] == dict(
        claimed=9.5,
        p_value=None,
        holds=False,
        nats=pytest.approx(9.5 * score["val_loss"] / score["val_bpb"] - score["val_loss"]),
    )


def test_the_readme_says_what_ran_and_what_it_is_not(made, finished):
    text = (made[0] / "track_pocket/2026-01-02_ATinyOne/README.md").read_text(encoding="utf-8")
    results = json.loads((finished / "first.json").read_text())
    for words in (
        "- **CPU run, not the challenge's hardware (8×H100).**",
        "- **Track pocket is none of the challenge's.**",
        "| MUON_WD | 0.05 | 0.04 |",
        "| MODEL_DIM | 32 | 192 |",
        "| three_seeds | **no** |",
        f"**val_bpb {results['final_int6_sliding_window']['val_bpb']:.4f}** (one seed)",
        "does NOT beat it",
        "- `train_seed1337.log`",
        "backout (#339)",
    ):
        assert words in text, words
    command = re.search(r"^PRESET=pocket SEED=1337 .* python train_gpt\.py$", text, re.M)[0]
    assert " MUON_WD=0.05 " in command and " COMPILE=0 " in command and "RUN_ID" not in command


def test_the_leaderboard_has_the_new_record(made):
    text = (made[0] / "README.md").read_text(encoding="utf-8")
    before, after = README.split("old\n")
    assert text.startswith(before) and text.endswith(after)
    row = next(line for line in text.splitlines() if line.startswith("| 1 |"))
    assert "[a tiny one](track_pocket/2026-01-02_ATinyOne/) | A. Person | 2026-01-02 | 1 |" in row
    assert "old" not in text


def test_requirements_are_the_versions_that_ran(made, finished):
    versions = json.loads((finished / "first.json").read_text())["versions"]
    lines = (made[0] / "track_pocket/2026-01-02_ATinyOne/requirements.txt").read_text().splitlines()
    assert lines[0] == f"# Python {versions['python']}"
    assert f"numpy=={versions['numpy']}" in lines
    assert record_text.requirements_of({"torch": "2.1.0+cpu", "python": "3.11"}) == (
        "# Python 3.11\ntorch==2.1.0  # ran as 2.1.0+cpu\n"
    )


def test_three_seeds_become_one_record(logs, records, capsys):
    paths = [another_seed(logs, 2, 0.01), logs / "first.json", another_seed(logs, 3, 0.03)]
    assert submit.main([*ASKED, *map(str, paths)]) == 0, capsys.readouterr()
    folder = records / "track_pocket/2026-01-02_ATinyOne"
    stated, text = (
        json.loads((folder / "submission.json").read_text()),
        (folder / "README.md").read_text(),
    )
    bpbs = [each["val_bpb"] for each in stated["seed_results"].values()]
    assert stated["seeds"] == [2, 3, 1337] and stated["compliance"]["three_seeds"]
    assert stated["val_bpb"] == statistics.mean(bpbs) and stated["val_bpb_std"] == statistics.stdev(
        bpbs
    )
    assert f"**val_bpb {stated['val_bpb']:.4f}** ± {stated['val_bpb_std']:.4f} (3 seeds)" in text
    assert "| standard deviation |" in text and text.count(" python train_gpt.py\n") == 3


def test_a_folder_that_the_auditor_refuses_is_put_aside(logs, records, capsys, monkeypatch):
    monkeypatch.setattr(submit, "run_auditor", lambda *_: 1)
    arguments = [*ASKED, str(logs / "first.json")]
    assert submit.main(arguments) == 1 and "put aside" in capsys.readouterr().err
    assert [path.name for path in (records / "track_pocket").iterdir()] == [
        "2026-01-02_ATinyOne.refused"
    ]
    assert (records / "README.md").read_text() == README and "No record yet." in submit.leaderboard(
        records
    )
    assert "exists already" in refused(capsys, *arguments)


def test_a_stop_after_the_folder_has_its_name_does_not_deny_it(logs, records, capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "update_leaderboard", stopped)
    assert submit.main([*ASKED, str(logs / "first.json")]) == 130
    assert "2026-01-02_ATinyOne is there; --leaderboard makes the tables" in capsys.readouterr().err


def test_tables_that_cannot_be_made_are_found_out_before_any_work(
    logs, records, capsys, monkeypatch
):
    entry(records, "other", "Odd", val_bpb="good")
    monkeypatch.setattr(submit, "run_auditor", lambda *_: pytest.fail("it worked"))
    assert "cannot be ranked" in refused(capsys, *ASKED, logs / "first.json")
    assert left_in(records) == ["README.md", "track_other"]


@pytest.mark.parametrize("end, status", [(KeyboardInterrupt, 130), (OSError("disk full"), 2)])
def test_what_stops_the_auditor_leaves_nothing(end, status, logs, records, capsys, monkeypatch):
    def stopped(*_):
        raise end

    monkeypatch.setattr(submit, "run_auditor", stopped)
    assert submit.main([*ASKED, str(logs / "first.json")]) == status
    assert left_in(records) == ["README.md"] and capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_ends_the_auditor_and_its_workers(tmp_path, monkeypatch):
    """With a stand-in that starts a worker and waits."""
    (tmp_path / "records").mkdir()
    (tmp_path / "records/audit.py").write_text(
        "import pathlib, subprocess, tempfile\n"
        "worker = subprocess.Popen(['sleep', '60'])\n"
        f"path = pathlib.Path({str(tmp_path / 'told')!r})\n"
        "path.with_suffix('.new').write_text(f'{worker.pid} {tempfile.mkdtemp()}')\n"
        "path.with_suffix('.new').rename(path)\n"
        "worker.wait()\n"
    )
    monkeypatch.setattr(submit, "ROOT", tmp_path)

    def interrupt() -> None:
        while not (tmp_path / "told").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        submit.run_auditor(tmp_path, submit.Data(tmp_path, tmp_path), 1.0)
    worker, folder = (tmp_path / "told").read_text().split()
    assert not Path(folder).exists()
    until = time.monotonic() + 10
    while running(int(worker)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not running(int(worker))


def running(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def test_an_auditor_that_breaks_down_leaves_nothing(logs, records, capsys, monkeypatch, tmp_path):
    (tmp_path / "records/audit.py").write_text("import os; os.abort()")
    monkeypatch.undo()
    monkeypatch.setattr(submit, "RECORDS", records)
    monkeypatch.setattr(submit, "ROOT", tmp_path)
    assert "ended with status -6" in refused(capsys, *ASKED, logs / "first.json")
    assert left_in(records) == ["README.md", "audit.py"]


def test_data_that_cannot_be_audited_leaves_nothing(logs, records, tmp_path, capsys):
    assert "validation shards" in refused(capsys, *ASKED, "--data", tmp_path, logs / "first.json")
    assert left_in(records) == ["README.md"]


# ---- refusals


def spoil(logs: Path, case: str) -> list[Path]:
    """Runs that are no record together."""
    first, second = logs / "first.json", another_seed(logs, 2)
    log, artifact = second.with_suffix(".txt"), second.with_suffix(".final_model.int6.ptz")
    change = dict(
        configuration=[
            ('"muon_wd": 0.05', '"muon_wd": 0.06'),
            ('"qk_gain_init": 1.5', '"qk_gain_init": 2.5'),
        ],
        time=[('"eval_seconds": ', '"eval_seconds": 99')],
        cap=[('"under_cap": true', '"under_cap": false')],
        unfinished=[('"final_int6_sliding_window"', '"x"')],
        versions=[('"torch": "', '"torch": "9')],
    )
    if case == "configuration":
        edit(log, *change[case])
    for old, new in change.get(case, []):
        edit(second, (old, new))
    if case == "code":
        text = log.read_text(encoding="utf-8")
        log.write_text(text.replace("Parameter golf", "Parameter Golf", 1), encoding="utf-8")
    if case == "settings":
        edit(log, ('"muon_wd": 0.05', '"muon_wd": 0.06'))
    if case == "score":
        text = second.read_text()
        bpb = json.loads(text)["final_int6_sliding_window"]["val_bpb"]
        second.write_text(text.replace(repr(bpb), repr(bpb - 0.01)))
    if case == "artifact":
        shutil.copy(first.with_suffix(".final_model.int6.ptz"), artifact)
    if case == "cut artifact":
        artifact.write_bytes(artifact.read_bytes()[:-1])
    if case.startswith("no "):
        {"no log": log, "no artifact": artifact, "no results": second}[case].unlink()
    if case == "cut source":
        log.write_text("step:1/2 train_loss:1\n")
    return (
        [first, first] if case == "twice" else [first, log] if case == "a log" else [first, second]
    )


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
        ("unfinished", "it has no final_int6_sliding_window"),
        ("twice", "seed 1337 is there twice"),
        ("cut source", "does not begin with the script's source"),
        ("no log", "seed2.txt is missing"),
        ("no artifact", "seed2.final_model.int6.ptz is missing"),
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
        ("bytes_total", None),
    ],
)
def test_results_of_other_types_end_in_one_line(name, value, logs, records, capsys):
    results = json.loads((logs / "first.json").read_text())
    (logs / "first.json").write_text(
        json.dumps({**results, name: value, "under_cap": name != "bytes_total"})
    )
    assert "first.json" in refused(capsys, *ASKED, logs / "first.json")
    assert left_in(records) == ["README.md"]


def test_the_challenges_track_is_for_its_hardware_and_text(logs, records, capsys, monkeypatch):
    arguments = ["--track", "10min_16mb", *ASKED[2:], logs / "first.json"]
    assert "not the challenge's hardware (8×H100)" in refused(capsys, *arguments)
    monkeypatch.setattr(finished_runs, "hardware", lambda log: "8×NVIDIA H100 80GB HBM3")
    assert "not on the challenge's FineWeb" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "lines, named",
    [
        (
            "world_size:8 (threads:4)\ndevice:cuda:0 (NVIDIA H100 80GB HBM3)",
            "8×NVIDIA H100 80GB HBM3",
        ),
        ("world_size:1 (threads:2)\ndevice:cpu (no CUDA)", "CPU, 2 threads"),
        (
            "world_size:2 (threads:1)\ndevice:cpu (asked for)",
            "CPU, 1 threads in each of 2 processes",
        ),
        ("nothing", "UNKNOWN, unknown threads"),
    ],
)
def test_the_hardware_is_what_the_log_says(lines, named, tmp_path):
    (tmp_path / "a.txt").write_text(f"{'=' * 100}\n{lines}\n")
    log = submit.Log(tmp_path / "a.txt")
    assert finished_runs.hardware(log) == named
    foreign = any("hardware" in reason for reason in finished_runs.foreign_to_challenge(log))
    assert foreign is ("H100" not in named)


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
        ("--luck", "1", "--help"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, value, words, logs, records, capsys):
    assert words in refused(capsys, *ASKED, logs / "first.json", option, value)
    assert left_in(records) == ["README.md"]


def test_one_thing_is_done_at_a_time(records, capsys):
    for arguments in ([], ["--leaderboard", "a.json"], ["--check", str(records), "--leaderboard"]):
        assert "--check FOLDER, or --leaderboard" in refused(capsys, *arguments)


# ---- statistics


def test_the_p_value_is_that_of_the_t_test_in_nats():
    bpbs, losses = [1.120, 1.122, 1.121], [1.8900, 1.8934, 1.8917]
    per_bpb = sum(losses) / sum(bpbs)
    limit, mean = 1.1364 * per_bpb - 0.005, sum(losses) / 3
    t = (mean - limit) / (statistics.stdev(losses) / math.sqrt(3))
    claim = record_text.compare_with(1.1364, bpbs, losses)
    assert claim.p_value == pytest.approx(stats.t.cdf(t, 2), rel=1e-9) and claim.holds
    assert claim.nats == pytest.approx(1.1364 * per_bpb - mean)
    # Student's t with two degrees of freedom has this distribution function
    assert claim.p_value == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), rel=1e-6)


def test_a_lead_of_less_than_five_thousandths_of_a_nat_is_none():
    losses = [1.8900, 1.8901, 1.8899]
    ahead = [
        record_text.compare_with(1.0 + lead / 1.89, [1.0] * 3, losses) for lead in (0.0049, 0.0056)
    ]
    assert [claim.holds for claim in ahead] == [False, True] and ahead[0].p_value > 0.5


def test_one_seed_has_no_p_value():
    assert record_text.compare_with(2.0, [1.0], [1.7])[2:] == (None, False)


# ---- checking


def checked(folder: Path, data_folder: Path, capfd) -> tuple[int, str]:
    status = submit.main(["--check", str(folder), "--data", str(data_folder)])
    return status, "".join(capfd.readouterr())


@pytest.fixture
def folder(made, records, tmp_path) -> Path:
    """A copy of the record, to be doctored."""
    return Path(shutil.copytree(made[0] / "track_pocket/2026-01-02_ATinyOne", tmp_path / "record"))


def test_a_good_folder_passes(folder, data_folder, capfd):
    status, text = checked(folder, data_folder, capfd)
    assert status == 0 and "FAIL" not in text, text
    assert re.findall(r"^(files|fields|seeds|statistics|log|submission) +PASS", text, re.M) == [
        "files",
        "fields",
        "seeds",
        "statistics",
        "log",
        "submission",
    ]
    assert re.search(r"^pytorch_version +-  not checked: \S+: no log names it$", text, re.M)


def test_an_edited_score_fails(folder, data_folder, capfd):
    text = (folder / "submission.json").read_text()
    bpb = json.loads(text)["val_bpb"]
    (folder / "submission.json").write_text(text.replace(repr(bpb), repr(bpb - 0.01)))
    status, text = checked(folder, data_folder, capfd)
    assert status == 1 and re.search(r"^submission +FAIL .*val_bpb", text, re.M), text


@pytest.mark.parametrize(
    "name, value",
    [
        ("val_loss", 1.0),
        ("beats", dict(claimed=9.5, nats=1.0, p_value=0.001, holds=True)),
        ("track", "10min_16mb"),
        ("compliance", dict(three_seeds=True)),
        ("seed_results", {"1337": {}}),
        ("compliance", dict(challenge_hardware_and_text=True)),
        ("compliance", dict(no_ttt=False)),
        ("compliance", dict(train_under_600s=False)),
        ("hardware", "8×NVIDIA H100 80GB HBM3"),
    ],
)
def test_what_follows_from_the_seeds_is_computed_again(name, value, folder, data_folder, capfd):
    stated = json.loads((folder / "submission.json").read_text())
    (folder / "submission.json").write_text(json.dumps({**stated, name: value}))
    logs = [submit.Log(folder / "train_seed1337.log")]
    assert submit.audit.guarded("s", submit.check_statistics, stated, logs).passed
    assert (
        submit.audit.guarded("s", submit.check_statistics, {**stated, name: value}, logs).passed
        is False
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("train_seconds", 1.0),
        ("step_avg_ms", 0.01),
        ("eval_time_s", 99.5),
        ("roundtrip_val_bpb", 1.0),
        ("artifact_sha256", "00"),
        ("pre_quant_val_bpb", 1.0),
    ],
)
def test_what_a_seed_is_said_to_have_is_compared_with_its_log(name, value, folder):
    stated = json.loads((folder / "submission.json").read_text())
    logs = [submit.Log(folder / "train_seed1337.log")]
    assert submit.check_seeds(stated, logs).passed
    short = (
        {**stated["seed_results"]["1337"], name: round(stated["seed_results"]["1337"][name], 2)}
        if name != "artifact_sha256"
        else {}
    )
    assert submit.check_seeds(
        {**stated, "seed_results": {"1337": short}}, logs
    ).passed  # fewer decimals
    found = {**stated["seed_results"]["1337"], name: value}
    assert submit.check_seeds({**stated, "seed_results": {"1337": found}}, logs).passed is False
    if name in stated:
        assert submit.check_seeds({**stated, name: value}, logs).passed is False


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


def test_an_empty_folder_is_said_line_by_line(tmp_path, records, capfd):
    (tmp_path / "empty").mkdir()
    assert submit.main(["--check", str(tmp_path / "empty")]) == 1
    assert capfd.readouterr().out.count("FAIL  missing from") == 5


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    assert "name a record folder" in refused(capsys, "--check", tmp_path / "absent")


# ---- the leaderboard


def entry(records: Path, track: str, name: str, **changes) -> None:
    folder = records / f"track_{track}" / f"2026-01-02_{name}"
    folder.mkdir(parents=True)
    stated = dict(
        name=name,
        author="a|b",
        date="2026-01-02",
        val_bpb=1.5,
        val_bpb_std=0.001,
        bytes_total=1234567,
        seeds=[1, 2],
        hardware="CPU, 2 threads",
        beats=dict(claimed=1.6, nats=0.1, p_value=0.00123, holds=True),
    )
    (folder / "submission.json").write_text(json.dumps({**stated, **changes}))


def test_records_are_ranked_by_track_and_score(records):
    entry(records, "pocket", "Worse", val_bpb=1.9, beats=None)
    entry(records, "pocket", "Better")
    entry(records, "10min_16mb", "Real", val_bpb=1.1, val_bpb_std=None)
    entry(records, "pocket", "Bad.refused", val_bpb=0.1)
    text = submit.leaderboard(records)
    assert re.findall(r"### Track (\w+)|\[(\w+)\]", text) == [
        ("10min_16mb", ""),
        ("", "Real"),
        ("pocket", ""),
        ("", "Better"),
        ("", "Worse"),
    ]
    assert (
        "| 1 | 1.5000 ± 0.0010 | [Better](track_pocket/2026-01-02_Better/) | a\\|b | 2026-01-02 | 2 | "
        "1,234,567 | CPU, 2 threads | 0.00123 against 1.6 |" in text
    )
    assert "| 1 | 1.1000 | [Real]" in text


def test_ablations_are_linked_below_their_tracks_table(records):
    entry(records, "pocket", "Real")
    for track in ("pocket", "other"):
        (records / f"track_{track}/one").mkdir(parents=True)
        (records / f"track_{track}/one/ablation.json").write_text('{"name": "what helps"}')
    text = submit.leaderboard(records)
    assert text.startswith(
        "### Track other\n\nNo record yet.\n\n"
        "- ablation: [what helps](track_other/one/)\n\n### Track pocket\n"
    )
    assert text.endswith("0.00123 against 1.6 |\n\n- ablation: [what helps](track_pocket/one/)\n")
    (records / "track_other/one/ablation.json").write_text("[]")
    with pytest.raises(submit.BadInput, match="ablation.json cannot be linked"):
        submit.leaderboard(records)


def test_without_records_the_leaderboard_says_so(records):
    assert submit.main(["--leaderboard"]) == 0
    assert (records / "README.md").read_text() == README.replace("old\n", "\nNo record yet.\n\n")
    submit.update_leaderboard(records)
    assert (records / "README.md").read_text() == README.replace("old\n", "\nNo record yet.\n\n")


@pytest.mark.parametrize("changes", [dict(val_bpb="good"), dict(seeds=None), dict(beats=[1])])
def test_a_submission_that_cannot_be_ranked_leaves_the_tables(changes, records, capsys):
    entry(records, "pocket", "Odd", **changes)
    assert "cannot be ranked" in refused(capsys, "--leaderboard")
    assert (records / "README.md").read_text() == README


def test_a_readme_without_markers_is_left_alone(records, logs, capsys):
    (records / "README.md").write_text("mine")
    for arguments in (["--leaderboard"], [*ASKED, logs / "first.json"]):
        assert "<!-- leaderboard -->" in refused(capsys, *arguments)
    assert (records / "README.md").read_text() == "mine" and left_in(records) == ["README.md"]


def test_the_committed_leaderboard_is_what_is_generated():
    before, after = submit.split_readme(ROOT / "records")
    expected = f"{before}\n{submit.leaderboard(ROOT / 'records')}\n{after}"
    assert (ROOT / "records/README.md").read_text(encoding="utf-8") == expected


def test_the_auditor_refuses_a_wrong_option_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["audit.py", "x", "--minutes", "many"])
    assert submit.audit.main() == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_command_refuses_in_one_line():
    done = subprocess.run(
        [sys.executable, str(TOOL), "absent.json", *ASKED], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
