"""records/ablate.py: what it asks for, runs, resumes, divides, computes and refuses."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import ablate
import pytest
from conftest import ROOT
from scipy import stats
from test_end_to_end import TINY_RUN, environment_with
from test_submit import running

import train_gpt

# A script that has train_gpt.py's settings, without torch, and writes at once what a run writes.
HEADER = """from __future__ import annotations
import dataclasses, difflib, functools, json, math, os, subprocess, sys, time, types
from pathlib import Path
torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
FINEWEB, FINEWEB_TOKENIZER = Path("data/fineweb"), Path("data/fineweb.model")
"""
BODY = """
def main():
    s, _ = settings_from(os.environ)
    Path("logs").mkdir()
    log = open(f"logs/{s.run_id}.txt", "x", buffering=1)
    print(Path(__file__).read_text() + "=" * 100, file=log)
    if s.num_layers == 13 and "STANDIN_MENDED" not in os.environ:
        sys.exit(f"error: train_loss is nan at step 7 in {os.getcwd()}")
    if s.num_layers == 14:
        print("at work", flush=True)
        os.kill(os.getpid(), 9)
    if s.seed > 1 and "STANDIN_SECONDS" in os.environ:
        Path("child").write_text(str(subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 60"]).pid))
    print("data:/data tokenizer:/data/tokenizer.model sha256:0123456789abcdef", file=log)
    Path("pid").write_text(str(os.getpid()))
    for step in (1, s.iterations // 2, s.iterations):
        print(f"step:{step}/{s.iterations} train_loss:{9 - step / s.iterations} train_time:1ms", file=log)
        if s.val_loss_every:
            print(f"step:{step}/{s.iterations} val_loss:2.0 val_bpb:{3 - step / s.iterations}", file=log)
        time.sleep(float(os.environ.get("STANDIN_SECONDS", 0)) * (s.seed > 1))
    bpb = 1.8 + 0.01 * (11 - s.num_layers) + 0.001 * s.seed + 1e-5 * s.model_dim * s.seed ** 2
    score = dict(val_loss=2 * bpb, val_bpb=bpb, targets=1000, bytes=2000 + s.vocab_size, seconds=1.0)
    for name in ("final_model.int6.ptz", f"logs/{s.run_id}.final_model.int6.ptz"):
        Path(name).write_bytes(b"artifact")
    results = dict(
        settings=dataclasses.asdict(s), stages=dict(training=2.0), versions=dict(torch="2.0"),
        runtime=["world_size:1", "device:cpu", "dtype:float32", "attention:none"], bytes_total=3_000_000,
        steps=s.iterations, tokens=s.iterations * s.train_batch_tokens, step_avg_ms=1.0, train_seconds=2.0,
        pre_quantization=score, final_int6_roundtrip=score, final_int6_sliding_window=score,
        cores=sorted(os.sched_getaffinity(0)), began=time.time(), environment=dict(os.environ))
    Path(f"logs/{s.run_id}.json").write_text(json.dumps(results))

if __name__ == "__main__":
    main()
"""
BASE = "ITERATIONS=400 VAL_LOSS_EVERY=9"  # of the fixture `first`


class Done(NamedTuple):
    """A call that has ended."""

    folder: Path
    status: int
    out: str
    err: str

    def report(self) -> dict:
        return json.loads((self.folder / "logs/ablations/ablation/ablation.json").read_text())

    def row(self, label: str) -> dict:
        return next(row for row in self.report()["rows"] if row["label"] == label)

    def run(self, name: str) -> dict:
        return json.loads(
            (self.folder / f"logs/ablations/ablation/{name}/logs/{name}.json").read_text()
        )


@pytest.fixture(scope="module")
def standin(tmp_path_factory) -> Path:
    """The path of the quick script."""
    settings = (ROOT / "train_gpt.py").read_text().split("# ---- Settings")[1].split("\n", 1)[1]
    path = tmp_path_factory.mktemp("script") / "standin.py"
    path.write_text(HEADER + settings.split("# ---- Runtime")[0] + BODY)
    return path


def call(folder: Path, *arguments, **environment: str) -> Done:
    """ablate.py in this process, from this folder, with no setting in the environment but these."""
    folder.mkdir(exist_ok=True)
    out, err, handlers = io.StringIO(), io.StringIO(), {x: signal.getsignal(x) for x in (15, 1)}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        for name in set(os.environ) & {field.name.upper() for field in train_gpt.fields_of()}:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
        status = ablate.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return Done(folder, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def first(standin, tmp_path_factory) -> Done:
    """Base, a worse change, one that fails, a group and one with other seeds' spread; three seeds each."""
    return call(
        tmp_path_factory.mktemp("first"),
        "--script",
        standin,
        "--base",
        BASE,
        "NUM_LAYERS=10,13",
        "SWA_ENABLED=0 EMA_ENABLED=1",
        "MODEL_DIM=384",
    )


# ---- what arguments stand for


@pytest.mark.parametrize(
    "arguments, grid, labels",
    [
        (["BACKOUT_ENABLED=0"], False, ["BACKOUT_ENABLED=0"]),
        (["MEMORY_TOKENS=0,32"], False, ["MEMORY_TOKENS=0", "MEMORY_TOKENS=32"]),
        (["EMA_ENABLED=1 SWA_ENABLED=0"], False, ["SWA_ENABLED=0 EMA_ENABLED=1"]),
        (
            ["MATRIX_LR=2e-2,.03 MUON_WD=0"],
            False,
            ["MATRIX_LR=0.02 MUON_WD=0.0", "MATRIX_LR=0.03 MUON_WD=0.0"],
        ),
        (["SEED_=1"], False, None),
        (
            ["QUANT=rows", "MEMORY_TOKENS=0,4"],
            True,
            ["MEMORY_TOKENS=0 QUANT=rows", "MEMORY_TOKENS=4 QUANT=rows"],
        ),
        (["QUANT=rows", "QUANT=fit"], True, None),
        ([], True, []),
    ],
)
def test_arguments_become_changes(arguments, grid, labels):
    reader = ablate.Reader(train_gpt)
    if labels is None:
        with pytest.raises(ablate.BadInput):
            reader.changes(arguments, grid)
    else:
        assert [ablate.label_of(changes) for changes in reader.changes(arguments, grid)] == labels


@pytest.mark.parametrize(
    "text, seeds", [("3", [1, 2, 3]), ("1337,42,7", [1337, 42, 7]), ("42,", [42])]
)
def test_seeds_are_a_number_or_a_list(text, seeds):
    assert ablate.parse_seeds(text) == seeds


def test_a_run_is_named_for_its_change():
    def slug(**changes):
        return ablate.Configuration(changes, {}, {}).slug

    assert slug() == "base" and slug(BACKOUT_ENABLED="0") == "backout_enabled_0"
    assert slug(SWA_ENABLED="0", EMA_ENABLED="1") == "swa_enabled_0+ema_enabled_1"
    assert slug(DATA_PATH="a/b") != slug(DATA_PATH="a_b") and "/" not in slug(DATA_PATH="a/b")


def test_a_grid_that_passes_through_the_base_leaves_that_point_to_the_base(standin, tmp_path):
    ablation = ablate.Ablation(standin, "ITERATIONS=8 MEMORY_TOKENS=4", "tokens", tmp_path / "new")
    found = ablation.configurations(["MEMORY_TOKENS=0,4", "SWA_ENABLED=0,1"], grid=True)
    assert [len(x.changes) for x in found] == [0, 2, 2, 2]


@pytest.mark.parametrize(
    "change, steps",
    [("TRAIN_BATCH_TOKENS=4096", 19200), ("PRESET=record", 100), ("QUANT=rows", 38400)],
)
def test_equal_tokens_scales_the_steps_to_the_batch(standin, tmp_path, change, steps):
    ablation = ablate.Ablation(standin, "ITERATIONS=38400", "tokens", tmp_path / "new")
    [_, changed] = ablation.configurations([change], grid=False)
    assert (
        changed.settings["iterations"] == steps and changed.settings["max_wallclock_seconds"] == 0
    )


@pytest.mark.parametrize(
    "base, change, seconds, steps",
    [
        ("MAX_WALLCLOCK_SECONDS=60", "TRAIN_BATCH_TOKENS=4096", 60, 20000),
        ("", "PRESET=record", 150, 9000),
    ],
)
def test_equal_seconds_leaves_steps_alone_and_keeps_the_clock(
    standin, tmp_path, base, change, seconds, steps
):
    ablation = ablate.Ablation(standin, base, "seconds", tmp_path / "new")
    [_, changed] = ablation.configurations([change], grid=False)
    assert (changed.settings["max_wallclock_seconds"], changed.settings["iterations"]) == (
        seconds,
        steps,
    )


def test_without_iterations_runs_have_equal_seconds(standin, tmp_path):
    """The command of the docstring's first line."""
    done = call(
        tmp_path,
        "--script",
        standin,
        "--seeds",
        "1",
        "BACKOUT_ENABLED=0",
        "MEMORY_TOKENS=0,32",
        "SWA_ENABLED=0 EMA_ENABLED=1",
    )
    assert (
        done.status == 0 and "--equal seconds: runs end by MAX_WALLCLOCK_SECONDS=150\n" in done.err
    )
    assert len(done.report()["runs"]) == 5 and done.report()["equal"] == "seconds"


def test_data_named_relative_to_here_is_found_from_a_runs_folder(standin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/fineweb", "mine"):
        Path(name).mkdir(parents=True)
    Path("data/fineweb.model").touch()
    ablation = ablate.Ablation(standin, "ITERATIONS=4", "tokens", Path("new"))
    assert ablation.base.variables["DATA_PATH"] == str(tmp_path / "data/fineweb")
    assert ablation.base.variables["TOKENIZER_PATH"] == str(tmp_path / "data/fineweb.model")
    Path("mine/tokenizer.model").touch()
    [_, changed] = ablation.configurations(["DATA_PATH=mine"], grid=False)
    assert changed.variables["DATA_PATH"] == changed.changes["DATA_PATH"] == str(tmp_path / "mine")
    assert "TOKENIZER_PATH" not in changed.variables
    shutil.rmtree("data/fineweb")  # then a run takes the demo corpus
    base = "ITERATIONS=4 TOKENIZER_PATH=data/fineweb.model"
    ablation = ablate.Ablation(standin, base, "tokens", Path("new"))
    assert ablation.base.variables["TOKENIZER_PATH"] == str(tmp_path / "data/fineweb.model")


# ---- statistics


def test_welchs_test_is_as_computed_by_hand():
    # means 4 and 8, variances 1 and 4 of three values each: t = -4 / sqrt(5/3), 50/17 degrees of freedom
    low, high, p = ablate.welch([3.0, 4.0, 5.0], [6.0, 8.0, 10.0])
    reach = stats.t.ppf(0.975, 50 / 17) * (5 / 3) ** 0.5
    assert (low, high) == pytest.approx((-4 - reach, -4 + reach))
    assert p == pytest.approx(2 * stats.t.sf(4 / (5 / 3) ** 0.5, 50 / 17))
    assert (
        ablate.welch([1.0], [1.0, 2.0])
        == ablate.welch([1.0, 1.0], [2.0, 2.0])
        == (None, None, None)
    )


def test_holms_adjustment_is_as_computed_by_hand():
    assert ablate.holm([0.04, None, 0.01, 0.03, 0.5]) == pytest.approx(
        [0.09, None, 0.04, 0.09, 0.5]
    )


def test_the_table_holds_what_scipy_says_of_the_runs(first):
    base, changed = first.row("base"), first.row("MODEL_DIM=384")
    ours, theirs = list(changed["val_bpb"].values()), list(base["val_bpb"].values())
    runs = [first.run(f"model_dim_384-seed{seed}") for seed in (1, 2, 3)]
    assert ours == [run["final_int6_sliding_window"]["val_bpb"] for run in runs]
    welch = stats.ttest_ind(ours, theirs, equal_var=False)
    assert changed["p_welch"] == pytest.approx(welch.pvalue)
    assert [changed["low"], changed["high"]] == pytest.approx(list(welch.confidence_interval(0.95)))
    assert changed["p_paired"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert changed["difference"] == pytest.approx(sum(ours) / 3 - sum(theirs) / 3)
    assert changed["deviation"] == pytest.approx(stats.tstd(ours)) and base["difference"] is None
    best = first.row("NUM_LAYERS=10")  # the smallest p of three
    assert best["p_holm"] == pytest.approx(3 * best["p_welch"])


def test_only_seeds_that_both_have_are_compared():
    scores = dict(base={1: 2.0, 2: 2.2, 3: 2.7}, new={2: 2.1, 3: 2.4, 4: 9.0})
    [_, row] = ablate.compare(
        [
            ablate.Outcome(
                "x", {} if label == "base" else {"A": "1"}, seed, "finished", val_bpb=bpb
            )
            for label, group in scores.items()
            for seed, bpb in group.items()
        ]
    )
    assert row.mean == pytest.approx(4.5) and row.difference == pytest.approx(-0.2)
    welch = stats.ttest_ind([2.1, 2.4], [2.2, 2.7], equal_var=False)
    assert row.p_welch == pytest.approx(welch.pvalue) and (row.low + row.high) / 2 == pytest.approx(
        -0.2
    )


def test_a_score_of_another_text_is_not_compared(standin, tmp_path):
    done = call(
        tmp_path, "--script", standin, "--base", "ITERATIONS=4", "--seeds", "1", "VOCAB_SIZE=2048"
    )
    assert done.status == 1 and "another text" in done.report()["runs"][1]["error"]
    assert done.row("VOCAB_SIZE=2048")["mean"] is None


# ---- what is run and written


def test_all_seeds_of_a_change_are_run_seed_by_seed(first):
    names = [
        f"{slug}-seed{seed}"
        for seed in (1, 2, 3)
        for slug in ("base", "num_layers_10", "swa_enabled_0+ema_enabled_1", "model_dim_384")
    ]
    began = [first.run(name)["began"] for name in names]
    assert began == sorted(began)
    assert [run["name"] for run in first.report()["runs"] if run["status"] == "finished"] == names
    assert "0 of them have finished" in first.err and "15/15 runs" in first.err


def test_a_run_that_fails_is_a_row_that_says_so(first):
    assert first.status == 1
    for text in (first.out, (first.folder / "logs/ablations/ablation/ablation.md").read_text()):
        assert "| NUM_LAYERS=13 | failed | failed | failed | - |" in text
    assert (
        "- num_layers_13-seed2: ended with status 1: error: train_loss is nan at step 7 in "
        "logs/ablations/ablation/num_layers_13-seed2\n"
    ) in text


def test_a_run_that_is_killed_is_said_to_be(standin, tmp_path):
    done = call(
        tmp_path, "--script", standin, "--base", "ITERATIONS=4", "--seeds", "1", "NUM_LAYERS=14"
    )
    assert done.status == 1 and done.report()["runs"][1]["error"] == "ended by SIGKILL: at work"


def test_a_report_that_cannot_be_written_stops_no_run(standin, tmp_path, monkeypatch):
    arguments = ["--script", standin, "--base", "ITERATIONS=4", "--seeds", "1", "QUANT=rows"]
    with monkeypatch.context() as patch:
        patch.setattr(
            ablate,
            "write_atomically",
            lambda path, data: (
                path.write_bytes(data)
                if path.name == "plan.json"
                else (_ for _ in ()).throw(OSError("disk full"))
            ),
        )
        done = call(tmp_path, *arguments)
    assert (
        done.status == 2 and "warning: no report could be written: OSError: disk full" in done.err
    )
    assert done.err.endswith("error: disk full\n") and done.run("quant_rows-seed1")
    monkeypatch.setattr(ablate, "draw_curves", lambda *_: 1 / 0)
    done = call(tmp_path, *arguments)
    assert done.status == 2 and "error: the plot cannot be drawn: ZeroDivisionError" in done.err
    assert done.row("QUANT=rows")["mean"]


def test_the_report_names_what_it_was_made_with(first, standin):
    report, text = (
        first.report(),
        (first.folder / "logs/ablations/ablation/ablation.md").read_text(),
    )
    sha256 = hashlib.sha256(standin.read_bytes()).hexdigest()
    assert report["script_sha256"] == sha256 and sha256 in text
    assert report["base"] == dict(ITERATIONS="400", VAL_LOSS_EVERY="9", MAX_WALLCLOCK_SECONDS="0.0")
    for part in (
        "ITERATIONS=400 VAL_LOSS_EVERY=9",
        "device:cpu",
        "torch 2.0",
        "1,000 targets, 3,024 bytes",
        "3 changes are compared",
        "--base 'ITERATIONS=400 VAL_LOSS_EVERY=9' NUM_LAYERS=10,13",
    ):
        assert part in text, part


def test_curves_are_over_tokens(first):
    [run, *_] = first.report()["runs"]
    assert run["val_curve"] == [[2048, 3 - 1 / 400], [409600, 2.5], [819200, 2.0]]
    assert run["train_curve"][-1] == [819200, 8.0]


def test_the_plot_is_a_picture_and_artifacts_are_gone(first):
    folder = first.folder / "logs/ablations/ablation"
    assert (folder / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.ptz")) and not list(folder.rglob("*.partial"))


def test_what_has_finished_is_not_run_again_and_the_rest_is(first, standin, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(first.folder, folder)
    done = call(
        folder,
        "--script",
        standin,
        "--base",
        BASE,
        "--seeds",
        "4",
        "NUM_LAYERS=10,13",
        "--keep-artifacts",
        STANDIN_MENDED="1",
    )
    assert done.status == 0 and "12 runs, 6 of them have finished before" in done.err
    for name in ("base-seed3", "num_layers_10-seed1"):
        assert done.run(name)["began"] == first.run(name)["began"]
    for name in ("base-seed4", "num_layers_13-seed1"):
        assert done.run(name)["began"] > first.run("model_dim_384-seed3")["began"]
    assert len(done.row("NUM_LAYERS=13")["val_bpb"]) == len(done.row("base")["val_bpb"]) == 4
    assert len(done.row("MODEL_DIM=384")["val_bpb"]) == 3  # of the earlier call
    assert len(list(folder.rglob("*.ptz"))) == 2 * (4 + 1 + 1)
    call(folder, "--script", standin, "--base", BASE, "--seeds", "5,")
    assert len(list(folder.rglob("*.ptz"))) == 2 * (
        4 + 1 + 1
    )  # these stay, those of seed 5 are gone


def test_the_plan_is_read_when_the_folder_is_ones_own(standin, tmp_path):
    late = ablate.Ablation(standin, "ITERATIONS=4", "tokens", tmp_path / "logs/ablations/ablation")
    call(tmp_path, "--script", standin, "--base", "ITERATIONS=4", "--seeds", "1", "QUANT=rows")
    with late.claim():
        assert (late.known, late.seeds) == ([{}, {"QUANT": "rows"}], [1])
        assert not ablate.unfinished([late.run(late.base, 1)], late)


def test_an_ablation_is_published_without_private_names(standin, tmp_path, monkeypatch):
    records, data = tmp_path / "records", tmp_path / "some one/data"
    for folder in (records, data):
        folder.mkdir(parents=True)
    (records / "README.md").write_text("<!-- leaderboard -->\n<!-- /leaderboard -->\n")
    for module in (ablate, ablate.sys.modules["submit"]):
        monkeypatch.setattr(module, "RECORDS", records)
    target = records / "track_mine/2026-01-02_Ablation"
    arguments = [
        "--script",
        standin,
        "--base",
        "ITERATIONS=4",
        "--seeds",
        "1",
        "--name",
        "mine",
        "--publish",
        target,
        "NUM_LAYERS=10,13",
        "QUANT=rows",
    ]
    done = call(tmp_path / "run", *arguments, DATA_PATH=str(data))
    assert done.status == 1, done.err
    texts = {path.name: path.read_bytes() for path in target.iterdir()}
    assert set(texts) == {"README.md", "ablation.json", "ablation.png", "train_gpt.py"}
    assert texts["train_gpt.py"] == standin.read_bytes() and target.stat().st_mode & 0o777 == 0o755
    report = texts["README.md"].decode() + texts["ablation.json"].decode()
    assert "NUM_LAYERS=13" in report and "DATA_PATH=data " in report and "some one" not in report
    assert not re.search(r"(?<![\w.])/\w", report) and str(tmp_path) not in report
    assert (
        "- ablation: [mine](track_mine/2026-01-02_Ablation/)" in (records / "README.md").read_text()
    )
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    again = call(tmp_path / "run", *arguments, DATA_PATH=str(data))
    assert again.status == 2 and "exists already" in again.err and again.err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_stopped_stops_its_runs_and_goes_on_when_called_again(
    standin, tmp_path, number
):
    command = ["--script", str(standin), "--base", "ITERATIONS=4", "--seeds", "2"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "records/ablate.py", *command],
        cwd=tmp_path,
        text=True,
        stderr=subprocess.PIPE,
        env=environment_with(STANDIN_SECONDS="60"),
    )
    pid, end = tmp_path / "logs/ablations/ablation/base-seed2/pid", time.monotonic() + 60
    while not (pid.is_file() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped: 1 of 2 runs" in err and "Traceback" not in err
    child = pid.with_name("child")  # it ignores SIGTERM
    assert not running(int(pid.read_text())) and not running(int(child.read_text()))
    [one, two] = json.loads((pid.parents[1] / "ablation.json").read_text())["runs"]
    assert (one["status"], two["status"]) == ("finished", "unfinished")
    done = call(tmp_path, *command)
    assert done.status == 0 and "1 of them have finished" in done.err
    assert len(done.row("base")["val_bpb"]) == 2


def test_gpus_are_counted_as_nvidia_smi_lists_them(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g Device 0: y'\n"
        "echo 'GPU 1: A (UUID: z)'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ablate.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert ablate.visible_gpus() == []


def test_jobs_get_equal_shares_of_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3, 12)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,4,6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert ablate.divide(2, [], on_gpus=False) == [
        ((3, 4, 5, 6), {"OMP_NUM_THREADS": "4"}),
        ((7, 8, 9, 10), {"OMP_NUM_THREADS": "4"}),
    ]
    shares = ablate.divide(2, ["/usr/bin/torchrun", "--standalone"], on_gpus=True)
    assert [share.variables["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0,2", "4,6"]
    assert (
        ablate.divide(50, ["srun"], on_gpus=True) == [((), {})] * 50
    )  # it has machines of its own
    for jobs, gpus in ((10, False), (5, True)):
        with pytest.raises(ablate.BadInput, match="there are only"):
            ablate.divide(jobs, [], gpus)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_jobs_run_at_the_same_time_on_cores_of_their_own(standin, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    done = call(
        tmp_path,
        "--script",
        standin,
        "--base",
        "ITERATIONS=4",
        "--seeds",
        "2,3",
        "--jobs",
        "2",
        STANDIN_SECONDS="0.4",
    )
    two, three = done.run("base-seed2"), done.run("base-seed3")
    assert two["cores"] and three["cores"] and not set(two["cores"]) & set(three["cores"])
    assert two["environment"]["OMP_NUM_THREADS"] == str(len(two["cores"]))
    assert abs(two["began"] - three["began"]) < 1.0


def test_a_launcher_stands_in_front_and_can_carry_the_settings(standin, tmp_path):
    (tmp_path / "launch.sh").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "launch.sh").chmod(0o755)
    launcher = f"./launch.sh env -i LAUNCHED=yes {{env}} {sys.executable}"
    arguments = ["--script", standin, "--seeds", "42,", "--launcher", launcher, "--base"]
    refused = call(tmp_path, *arguments, "ITERATIONS=4")
    assert refused.status == 2 and "PRESET=auto may be another there" in refused.err
    done = call(tmp_path, *arguments, "ITERATIONS=4 PRESET=pocket")
    assert done.status == 0, done.err
    environment = done.run("base-seed42")["environment"]
    assert (
        environment["LAUNCHED"] == "yes"
        and environment["SEED"] == "42"
        and "HOME" not in environment
    )


def test_a_launcher_for_a_remote_shell_has_quoted_words():
    launcher = ["ssh", "one", "cd {folder} && {env} python3"]
    words = ablate.command_of(launcher, Path("t.py"), {"A": "b c"}, Path("/x y"))
    assert words == ["ssh", "one", "cd '/x y' && env 'A=b c' python3", "t.py"]


def test_settings_in_the_environment_are_the_bases(standin, tmp_path):
    done = call(
        tmp_path,
        "--script",
        standin,
        "--seeds",
        "1",
        ITERATIONS="4",
        MODEL_DIM="96",
        SEED="9",
        NUM_LAYER="7",
    )
    assert done.status == 0 and done.run("base-seed1")["settings"]["model_dim"] == 96
    assert "warning: NUM_LAYER is not a setting; did you mean NUM_LAYERS?" in done.err


def test_real_runs_of_train_gpt_are_compared(data_folder, tmp_path):
    settings = {**TINY_RUN, "ITERATIONS": "4", "VAL_LOSS_EVERY": "2", "DATA_PATH": str(data_folder)}
    del settings["MAX_WALLCLOCK_SECONDS"]
    base = " ".join(f"{name}={value}" for name, value in settings.items())
    done = call(tmp_path, "--base", base, "--seeds", "1", "BACKOUT_ENABLED=0", OMP_NUM_THREADS="1")
    assert done.status == 0, done.err
    [one, two] = done.report()["runs"]
    assert one["val_bpb"] != two["val_bpb"] and one["val_bpb"] == done.row("base")["mean"]
    assert [tokens for tokens, _ in one["val_curve"]] == [512, 1024] and one["steps"] == 4
    assert one["data"].startswith(
        f"{data_folder.name} tokenizer:{data_folder.name}/tokenizer.model "
    )
    assert one["val_bytes"] > 0 and one["bytes_total"] > 0
    log = ablate.Log(tmp_path / "logs/ablations/ablation/base-seed1/logs/base-seed1.txt")
    assert log.score("final_int6_sliding_window")["val_bpb"] == pytest.approx(
        one["val_bpb"], abs=1e-8
    )


# ---- what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        ("NUM_LAYER=1", "NUM_LAYER is not a setting; did you mean NUM_LAYERS?"),
        ("backout_enabled=0", "did you mean BACKOUT_ENABLED?"),
        ("FROBNICATE=1", "FROBNICATE is not a setting"),
        ("NUM_LAYERS=many", "NUM_LAYERS=many must be a whole number"),
        ("NUM_HEADS=5", "NUM_HEADS=5: settings: MODEL_DIM=192 must be"),
        ("NUM_LAYERS", "NUM_LAYERS: write NAME=value"),
        ("MEMORY_TOKENS=0,,4", "MEMORY_TOKENS: a value is empty"),
        ("", "an argument is empty"),
        ("QUANT=fit", "QUANT=fit is what the base has"),
        ("QUANT=rows,rows", "QUANT=rows is what QUANT=rows is"),
        ("QUANT=rows QUANT=fit", "QUANT is given twice"),
        ("SEED=3", "use --seeds"),
        ("RUN_ID=x", "every run has its own"),
        ("ITERATIONS=7", "ITERATIONS cannot change"),
        ("TRAIN_BATCH_TOKENS=6144", "1 of its steps of 6,144 tokens are not the base's 8,192"),
        ("MAX_WALLCLOCK_SECONDS=7", "MAX_WALLCLOCK_SECONDS cannot change"),
        ("DATA_PATH=/no/such", "DATA_PATH=/no/such is not a folder"),
    ],
)
def test_a_change_that_cannot_be_is_one_line_before_anything_runs(
    standin, tmp_path, change, message
):
    done = call(tmp_path, "--script", standin, "--base", "ITERATIONS=4", change)
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--equal", "tokens"], "--equal tokens needs ITERATIONS"),
        (["--equal", "bytes"], "--help lists the options"),
        (["--luck"], "--help lists the options"),
        (["--base", "ITERATIONS=4 MAX_WALLCLOCK_SECONDS=9"], "leave it out"),
        (["--base", "ITERATIONS="], "ITERATIONS: a value is empty"),
        (["--base", "SEED=1"], "use --seeds"),
        (
            ["--equal", "seconds", "--base", "MAX_WALLCLOCK_SECONDS=0"],
            "MAX_WALLCLOCK_SECONDS above 0",
        ),
        (["--jobs", "0"], "--jobs 0 must be"),
        (["--seeds", "0"], "--seeds 0: write"),
        (["--seeds", "1,1"], "each once"),
        (["--seeds", "few"], "--seeds few"),
        (["--launcher", "/no/such -n1"], "there is no program /no/such"),
        (["--launcher", "'x"], "No closing quotation"),
        (["--script", "/no/such.py"], "no Python file"),
        (["--script", ROOT / "data/shards.py"], "has no settings_from"),
        (["--script", "{exits}"], "cannot be imported: SystemExit: 3"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(standin, tmp_path, arguments, message):
    exits = standin.with_name("exits.py")
    exits.write_text("raise SystemExit(3)")
    arguments = [exits if x == "{exits}" else x for x in arguments]
    done = call(tmp_path, "--script", standin, *arguments)
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_no_runs_of_another_script_or_base(first, standin, tmp_path):
    edited = tmp_path / "edited.py"
    edited.write_text(standin.read_text() + "# another\n")
    before = (first.folder / "logs/ablations/ablation/plan.json").read_text()
    for script, settings, message in (
        (edited, BASE, "another script_sha256"),
        (standin, BASE + " MODEL_DIM=96", "another base (MODEL_DIM=unset, not 96)"),
    ):
        done = call(first.folder, "--script", script, "--base", settings)
        assert done.status == 2 and message in done.err and "use another --name" in done.err
    assert (first.folder / "logs/ablations/ablation/plan.json").read_text() == before


@pytest.mark.parametrize(
    "file, before, after, message",
    [
        ("base-seed2.json", '"seed": 2', '"seed": 5', "SEED is not as planned"),
        (
            "base-seed2.json",
            '"val_loss_every": 9',
            '"val_loss_every": 8',
            "VAL_LOSS_EVERY is not as planned",
        ),
        ("base-seed2.txt", "import", "import glob,", "its log begins with another script"),
        ("base-seed2.json", '"stages"', '"phases"', "KeyError: 'stages'"),
    ],
)
def test_a_finished_run_that_is_not_as_planned_is_neither_taken_nor_lost(
    first, standin, tmp_path, file, before, after, message
):
    shutil.copytree(first.folder / "logs/ablations/ablation", tmp_path / "own")
    path = tmp_path / "own/base-seed2/logs" / file
    path.write_text(path.read_text().replace(before, after, 1))
    kept = path.read_text()
    done = call(tmp_path, "--script", standin, "--base", BASE, "--out", "own")
    assert done.status == 2 and message in done.err and path.read_text() == kept


@pytest.mark.parametrize(
    "name, content, message",
    [("notes.txt", "mine", "no ablation's folder"), ("plan.json", "{", "plan.json is damaged")],
)
def test_a_folder_with_something_else_is_left_alone(standin, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    done = call(tmp_path, "--script", standin, "--base", "ITERATIONS=4", "--out", tmp_path)
    assert done.status == 2 and message in done.err and (tmp_path / name).read_text() == content


def test_a_folder_with_only_a_lock_is_taken(standin, tmp_path):
    (tmp_path / ".lock").touch()
    done = call(
        tmp_path, "--script", standin, "--base", "ITERATIONS=4", "--seeds", "1", "--out", tmp_path
    )
    assert done.status == 0, done.err


def test_two_do_not_work_in_one_folder(first, standin):
    with open(first.folder / "logs/ablations/ablation/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = call(first.folder, "--script", standin, "--base", BASE, "--seeds", "9,")
    assert done.status == 2 and "is at work here" in done.err
