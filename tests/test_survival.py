"""Runs that are killed, stopped or out of disk: what survives, what is said, and that nothing false is final."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE, tiny_settings
from test_end_to_end import SCRIPT, TINY_RUN, Done, environment_with, run, run_here  # noqa: F401, a fixture
from test_training import Time, make_trainer  # noqa: F401, a fixture

import train_gpt
from train_gpt import ARTIFACT_NAME, Evaluator, UserError

# Late QAT from step 120 on, an average from 100 on; a checkpoint after every step or two.
LONG_RUN = dict(
    TINY_RUN,
    ITERATIONS="150",
    WARMDOWN_ITERS="100",
    SWA_EVERY="10",
    CHECKPOINT_EVERY="1e-9",
    RUN_ID="it",
)


def begin(folder: Path, *, ranks: int = 0, **changes: str) -> subprocess.Popen:
    """The script as a process that is not waited for, in a group of its own."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT)],
        cwd=folder,
        start_new_session=True,
        env=environment_with(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Until a checkpoint of this step or a later one is there."""
    deadline = time.monotonic() + 100
    while True:
        steps = [int(path.name.split(".step")[1][:8]) for path in folder.glob("logs/*.checkpoint")]
        if max(steps, default=-1) >= step:
            return
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, each in a group of its own, the ranks in order."""
    table = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    return sorted(
        int(pid) for pid, parent in map(str.split, table.splitlines()) if int(parent) == process.pid
    )


def send(number: int, pids: list[int]) -> None:
    """A signal to processes, of which some may have ended because others did."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end(process: subprocess.Popen, number: int, folder: Path) -> Done:
    """Send all of a run's processes a signal, at once; what it said."""
    send(number, [*(ranks_of(process) if "-m" in process.args else ()), process.pid])
    out, err = process.communicate(timeout=60)
    return Done(folder, process.returncode, out, err)


def scores(done: Done) -> list[str]:
    assert done.status == 0, done.err
    assert len(done.final_lines()) == 2
    return done.final_lines()


@pytest.fixture(scope="module")
def options(data_folder) -> dict[str, str]:
    return dict(LONG_RUN, DATA_PATH=str(data_folder))


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Done:
    """A run that nothing stopped, without checkpoints."""
    return run(tmp_path_factory.mktemp("whole"), **{**options, "CHECKPOINT_EVERY": "0"})


@pytest.fixture(scope="module")
def killed(options, tmp_path_factory) -> Path:
    """The folder of a run that was killed after step 40."""
    folder = tmp_path_factory.mktemp("killed")
    process = begin(folder, **options)
    wait_for_step(process, folder, 40)
    assert "final_" not in end(process, signal.SIGKILL, folder).out
    return folder


@pytest.fixture
def left(killed, tmp_path) -> Path:
    """A copy of what the killed run has left."""
    return Path(shutil.copytree(killed, tmp_path / "left"))


# ---- resumed


def test_a_killed_run_ends_as_one_never_stopped(options, whole, left):
    """Killed again in late QAT, when costs of errors are being collected, and once more after training."""
    process = begin(left, **options, RESUME="1")
    wait_for_step(process, left, 125)
    end(process, signal.SIGKILL, left)
    process = begin(left, **options, RESUME="1")
    wait_for_step(process, left, 150)
    end(process, signal.SIGKILL, left)
    done = run(left, **options, RESUME="1")
    assert scores(done) == scores(whole)
    assert (left / ARTIFACT_NAME).read_bytes() == (whole.folder / ARTIFACT_NAME).read_bytes()
    ours, theirs = done.results(), whole.results()
    for key in ("steps", "train_loss", "late_qat_steps", "exported", "tokens", "pre_quantization"):
        if key == "pre_quantization":
            ours[key].pop("seconds"), theirs[key].pop("seconds")
        assert ours[key] == theirs[key], key
    assert (
        len(ours["resumed_at"]) == 3
        and ours["resumed_at"][0] >= 40
        and ours["resumed_at"][-1] == 150
    )
    assert theirs["resumed_at"] == [] and ours["compliance"]["resumed_at"] == ours["resumed_at"]


def test_checkpoints_are_two(killed):
    names = sorted(path.name for path in (killed / "logs").iterdir())
    assert sum(name.endswith(".checkpoint") for name in names) == 2 and "it.txt" in names


def test_resume_alone_goes_on_with_the_last_run_and_its_settings(options, whole, left, data_folder):
    """Nothing but the machine's settings is given again; the log has the source once; checkpoints are gone."""
    done = run(
        left,
        RESUME="1",
        DATA_PATH=str(data_folder),
        COMPILE="0",
        DTYPE="float32",
        DEVICE="cpu",
        MICRO_BATCH_TOKENS=options["MICRO_BATCH_TOKENS"],
    )
    assert scores(done) == scores(whole)
    log = done.log()
    assert (
        log.count(SCRIPT.read_text(encoding="utf-8")) == 1
        and len(re.findall("^resumed at step:", log, re.M)) == 1
    )
    assert (
        {path.name for path in (left / "logs").iterdir()}
        == {"it.txt", "it.json", f"it.{ARTIFACT_NAME}"}
        == {path.name for path in (whole.folder / "logs").iterdir()}
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:1000],
        lambda data: b"",
        lambda data: data[:5000] + bytes(100) + data[5100:],
    ],
)
def test_a_damaged_checkpoint_is_passed_over(options, left, damage, monkeypatch, capsys):
    monkeypatch.chdir(left)
    older, newest = sorted(left.glob("logs/*.checkpoint"))
    expected = older.read_bytes()[32:]
    newest.write_bytes(damage(newest.read_bytes()))
    assert train_gpt.find_checkpoint("it") == train_gpt.find_checkpoint("") == ("it", expected)
    assert f"{newest.relative_to(left)} is cut short or damaged" in capsys.readouterr().err
    older.write_bytes(damage(older.read_bytes()))
    with pytest.raises(UserError, match="no checkpoint of it is whole"):
        train_gpt.find_checkpoint("it")


def test_the_clock_is_carried_on(options, left):
    """A schedule in seconds that begins where the checkpoint's clock stood: at its end, so it takes few steps."""
    files = sorted(left.glob("logs/*.checkpoint"))
    files[0].unlink()
    state = train_gpt.read_checkpoint(files[1].read_bytes()[32:], torch.device("cpu"))
    state["settings"]["max_wallclock_seconds"], state["clock"]["seconds"] = 1000.0, 999.0
    torch.save(state, left / "state")
    data = (left / "state").read_bytes()
    files[1].write_bytes(train_gpt.hashlib.sha256(data).digest() + data)
    done = run(
        left, **{**options, "MAX_WALLCLOCK_SECONDS": "1000", "CHECKPOINT_EVERY": "0"}, RESUME="1"
    )
    assert len(scores(done)) == 2
    results = done.results()
    assert results["settings"]["max_wallclock_seconds"] == 1000.0
    assert (
        999.0 <= results["train_seconds"] <= 1000.0
        and results["compliance"]["train_under_600s"] is False
    )
    assert state["trainer"]["steps"] <= results["steps"] < 150


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(RESUME="1", ITERATIONS="151"), "ITERATIONS=151 differs from the stored model's 150"),
        (dict(RESUME="1", SEED="5"), "SEED=5"),
        (dict(RESUME="1", RUN_ID=""), None),
        (dict(RUN_ID="it"), "RUN_ID=it is taken"),
        (dict(RESUME="1", ARTIFACT="x.ptz"), "x.ptz"),
        (dict(RESUME="1", RUN_ID="other"), None),
    ],
)
def test_what_can_be_resumed(options, left, changes, word, run_here, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        train_gpt,
        "train_and_score",
        lambda run, checkpoint: run.log(f"began with {len(checkpoint)}"),
    )
    shutil.copytree(left / "logs", run_here_folder(run_here) / "logs")
    done = run_here(**{**options, **changes})
    if word:
        assert done.status == 2 and re.fullmatch(rf"error: .*{word}.*\n", done.err)
    else:  # the last run, whatever it was called; and a name that is new starts
        assert done.status == 0 and ("began with 0" in done.out) == (
            changes.get("RUN_ID") == "other"
        )


def run_here_folder(call) -> Path:
    return call.__closure__[[*call.__code__.co_freevars].index("tmp_path")].cell_contents


def test_resume_without_any_checkpoint_says_so(run_here):  # noqa: F811
    done = run_here(RESUME="1")
    assert done.status == 2 and re.fullmatch(
        r"error: RESUME=1: there is no checkpoint .*\n", done.err
    )


def test_a_run_that_has_ended_is_not_resumed(options, whole, run_here):  # noqa: F811
    shutil.copytree(whole.folder / "logs", run_here_folder(run_here) / "logs")
    before = {path: path.read_bytes() for path in (run_here_folder(run_here) / "logs").iterdir()}
    done = run_here(**options, RESUME="1")
    assert done.status == 2 and "RUN_ID=it is taken: logs/it.json exists" in done.err
    assert {
        path: path.read_bytes() for path in (run_here_folder(run_here) / "logs").iterdir()
    } == before


@pytest.mark.parametrize("what", ["script", "tokenizer", "data"])
def test_other_code_or_data_does_not_go_on(options, left, what, data_folder, tmp_path):
    folder = Path(shutil.copytree(data_folder, tmp_path / "data"))
    script = shutil.copy(SCRIPT, tmp_path)
    if what == "script":
        Path(script).write_text(
            SCRIPT.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8"
        )
    elif what == "tokenizer":
        (folder / "tokenizer.model").write_bytes(
            (folder / "tokenizer.model").read_bytes() + b"\x9a\x06\x00"
        )
    else:
        shutil.copy(folder / "x_train_000000.bin", folder / "x_train_000001.bin")
    done = subprocess.run(
        [sys.executable, script],
        cwd=left,
        capture_output=True,
        text=True,
        env=environment_with(**{**options, "DATA_PATH": str(folder)}, RESUME="1"),
    )
    assert done.returncode == 2 and re.fullmatch(
        rf"error: RESUME=1: not the {what} with .*\n", done.stderr
    )
    assert len(list(left.glob("logs/*.checkpoint"))) == 2


def trained_to(trainer: train_gpt.Trainer, steps: int) -> bytes:
    """Go on to this step, as CHECKPOINT_EVERY would; what is then written."""
    file = io.BytesIO()
    for step in range(trainer.steps, steps):
        trainer.losses.append(trainer.step(1 - step / 13))
    trainer.check_losses()
    torch.save(trainer.state(), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(ema_enabled=True),
        dict(quant="rows", int5_mlp="1"),
        dict(tie_embeddings=False),
        dict(swa_enabled=False),
        dict(mtp_num_heads=0, bigram_vocab_size=0, memory_tokens=0),
        dict(late_qat_threshold=0.0),
        dict(micro_batch_tokens=24, train_batch_tokens=72),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_state_that_was_written_and_read_is_all_that_counts(make_trainer, changes, device):  # noqa: F811
    """Stopped before and after an average, costs of errors and late QAT have begun."""
    where = train_gpt.Runtime(device=torch.device(device))

    def fresh() -> train_gpt.Trainer:
        trainer = make_trainer(runtime=where, **{"late_qat_threshold": 0.2, **changes})
        trainer.warm_up()
        return trainer

    whole = fresh()
    expected = trained_to(whole, 13)
    for stop in (1, 6, 11, 12):
        first, second = fresh(), fresh()
        second.load(train_gpt.read_checkpoint(trained_to(first, stop), where.device))
        assert second.steps == stop and second.train_loss == first.train_loss
        found = trained_to(second, 13)
        if device == "cpu":
            assert same(
                *(train_gpt.read_checkpoint(data, where.device) for data in (found, expected))
            )
        else:  # sums on a GPU are in no fixed order
            assert second.train_loss == pytest.approx(whole.train_loss, abs=1e-3)


def same(one, other) -> bool:
    """Whether two states are the same to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_without_checkpoints_nothing_is_written_or_gathered(make_trainer):  # noqa: F811
    trainer = make_trainer(iterations=3)
    trainer.state = trainer.optimizer.muon.momenta = lambda: pytest.fail("a state was taken")
    trainer.run(None)
    assert trainer.steps == 3


# ---- several ranks


def test_two_ranks_resume_as_two_and_as_one(options, tmp_path_factory):
    changes = {**options, "ITERATIONS": "90", "WARMDOWN_ITERS": "85"}
    whole = run(tmp_path_factory.mktemp("whole"), ranks=2, **{**changes, "CHECKPOINT_EVERY": "0"})
    folder = tmp_path_factory.mktemp("two")
    process = begin(folder, ranks=2, **changes)
    wait_for_step(process, folder, 10)
    send(
        signal.SIGTERM, [process.pid, *ranks_of(process)]
    )  # torchrun passes it on: twice, as from schedulers
    assert "stopped by SIGTERM" in process.communicate(timeout=60)[1]
    alone = Path(shutil.copytree(folder, tmp_path_factory.mktemp("one") / "copy"))
    two = run(folder, ranks=2, **changes, RESUME="1")
    assert scores(two) == scores(whole) and two.results()["resumed_at"][0] >= 10
    one = run(alone, **changes, RESUME="1").results()
    assert one["world_size"] == 1 and one["steps"] == 90
    for label in ("pre_quantization", "final_int6_roundtrip", "final_int6_sliding_window"):
        assert abs(one[label]["val_bpb"] - whole.results()[label]["val_bpb"]) < 2e-3


def test_ranks_agree_on_a_clock_that_began_with_different_openings(make_trainer):  # noqa: F811
    """Seconds of opening the shards, the loader's, are rank 0's on every rank."""
    asked = []

    class Asking(train_gpt.Runtime):
        def from_main(self, value):
            asked.append(value)
            return 7.0 if isinstance(value, float) else value

    seconds = []

    class Stop(Exception):
        pass

    run = train_gpt.Run.__new__(train_gpt.Run)
    trainer = make_trainer(iterations=3)
    run.settings, run.runtime, run.train_files, run.code_bytes = (
        trainer.settings,
        Asking(),
        trainer.data.files,
        0,
    )
    run.log, run.results, run.identity = lambda *_, **__: None, dict(stages={}), {}
    run.evaluator = types.SimpleNamespace(warm_up=lambda model: None)

    def stage(name, function, *arguments):
        if name == "training":
            seconds.append(function.__self__.clock.seconds)
            raise Stop
        value = function(*arguments)
        run.results["stages"][name] = 0.123
        return value

    run.stage = stage
    with pytest.raises(Stop):
        run.train(b"")
    assert seconds == [7.0] and 0.123 in asked


def test_a_signal_to_one_rank_stops_all(monkeypatch):
    """Rank 0's seconds and the largest signal, by one sum of maxima; a rank adds no seconds of its own."""
    sent = []

    def all_reduce(tensor, operation, group):
        sent.append(tensor.clone())
        tensor.copy_(
            torch.maximum(tensor, torch.tensor([5.0, float(signal.SIGTERM)], dtype=torch.float64))
        )

    monkeypatch.setattr(train_gpt.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(train_gpt.STOP, "number", 0)
    clock = train_gpt.Clock(train_gpt.Runtime(rank=1, world_size=2))
    clock.started = time.perf_counter() - 1000
    assert clock.read() == 5.0 and clock.stopped == train_gpt.STOP.number == signal.SIGTERM
    assert sent[0].tolist() == [0.0, 0.0]


def test_a_rank_that_dies_takes_the_others_down(options, tmp_path):
    process = begin(tmp_path, ranks=2, **{**options, "ITERATIONS": "100000"})
    wait_for_step(process, tmp_path, 5)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGKILL)
    started = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 60 and process.returncode != 0
    assert "Signal 9 (SIGKILL)" in err and "final_" not in out
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)


def test_an_error_on_one_rank_is_shown(options, data_folder, tmp_path):
    """A token outside of the vocabulary in every row that the second rank sees first."""
    folder = Path(shutil.copytree(data_folder, tmp_path / "data"))
    shard = folder / "x_train_000000.bin"
    data = bytearray(shard.read_bytes())
    data[1024:] = b"\xff\xff" * ((len(data) - 1024) // 2)
    shard.write_bytes(data)
    done = run(tmp_path, ranks=2, **{**options, "DATA_PATH": str(folder)})
    assert (
        done.status != 0
        and "token 65535 is outside of VOCAB_SIZE" in done.err
        and "final_" not in done.out
    )


# ---- stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends_the_run(options, whole, tmp_path, number):
    changes = {**options, "CHECKPOINT_EVERY": "1000"}
    process = begin(tmp_path, **changes)
    for line in process.stdout:
        if line.startswith("step:10/"):
            break
    done = end(process, number, tmp_path)
    assert done.status == 128 + number and len(done.err.splitlines()) == 1
    assert done.err.startswith(f"error: stopped by {number.name}; RESUME=1 goes on")
    assert len(list(tmp_path.glob("logs/*.checkpoint"))) == 1 and "final_" not in done.out
    if number == signal.SIGTERM:
        again = run(tmp_path, **changes, RESUME="1")
        assert scores(again) == scores(whole) and again.results()["resumed_at"][0] >= 10


def test_a_signal_ends_a_run_without_checkpoints_at_once(options, tmp_path):
    process = begin(tmp_path, **{**options, "CHECKPOINT_EVERY": "0", "ITERATIONS": "100000"})
    for line in process.stdout:
        if line.startswith("step:10/"):
            break
    done = end(process, signal.SIGINT, tmp_path)
    assert done.status == 130 and re.fullmatch(r"error: stopped by SIGINT; .*\n", done.err)
    assert not list(tmp_path.glob("logs/*.checkpoint")) and "final_" not in done.out


@pytest.mark.parametrize(
    "line", ["preset:", "", "model_params:", "late_qat_steps:", "artifact:", "stage:reading"]
)
def test_two_signals_at_once_are_one_line_at_any_moment(options, tmp_path, line):
    """As some launchers send them; in the middle of anything but training."""
    process = begin(tmp_path, **{**options, "CHECKPOINT_EVERY": "0", "ITERATIONS": "20"})
    for text in process.stdout if line else ():
        if text.startswith(line):
            break
    time.sleep(0.01 if line else 2.5)
    os.kill(process.pid, signal.SIGTERM)
    done = end(process, signal.SIGINT, tmp_path)
    assert (
        done.status in (130, 143, -2, -15, 0) and "Traceback" not in done.err
    )  # a shell calls -2 130
    if done.status not in (0, -15):  # it came too late, or before Python was there
        assert (
            re.fullmatch(r"error: stopped by SIG(TERM|INT); .*\n", done.err)
            and "final_" not in done.out
        )


def test_a_signal_is_held_while_a_step_is_done(monkeypatch):
    stop, now = train_gpt.StopSignals(), [100.0]
    monkeypatch.setattr(train_gpt.time, "monotonic", lambda: now[0])
    stop.hold(True)
    stop.receive(signal.SIGTERM, None)
    stop.receive(signal.SIGINT, None)  # at once: a launcher
    assert stop.number == signal.SIGTERM
    now[0] += 6
    with pytest.raises(KeyboardInterrupt):  # later: a person
        stop.receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop.hold(False)


# ---- no room, no folder, no package


def test_a_logs_folder_that_is_a_file_is_said_before_training(options, run_here):  # noqa: F811
    (run_here_folder(run_here) / "logs").write_text("mine")
    done = run_here(**options)
    assert done.status == 2 and re.fullmatch(
        r"error: cannot write \d+ bytes into .*logs: File exists\n", done.err
    )
    assert (
        run_here_folder(run_here) / "logs"
    ).read_text() == "mine" and "train_loss" not in done.out


def test_a_folder_that_cannot_be_written_is_said_before_training(options, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write anywhere")
    done = run(tmp_path, **options)
    assert (
        done.status == 2
        and re.fullmatch(r"error: .*Permission denied\n", done.err)
        and not done.out
    )


def small_files(size: int):
    """Limit this process's files, as a full disk would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    "size, changes",
    [
        (1_000_000, {}),
        (
            17_000_000,
            dict(ARTIFACT_MAX_BYTES="1000000", VOCAB_SIZE=str(VOCAB_SIZE), MODEL_DIM="256"),
        ),
    ],
)
def test_a_full_disk_is_said_before_training(options, tmp_path, size, changes):
    """Too little for the artifact; and enough for it, but not for checkpoints."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment_with(**{**options, **changes}),
        preexec_fn=lambda: small_files(size),
    )
    assert done.returncode == 2 and re.fullmatch(
        r"error: cannot write \d+ bytes into .*: File too large\n", done.stderr
    )
    assert "train_loss" not in done.stdout and not list(tmp_path.glob("*.ptz"))


def test_a_disk_that_fills_up_does_not_end_the_training(options, whole, run_here, monkeypatch):  # noqa: F811
    write = train_gpt.write_atomically

    def full(path: Path, *parts: bytes) -> None:
        if path.suffix == ".checkpoint":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *parts)

    monkeypatch.setattr(train_gpt, "write_atomically", full)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done = run_here(**options)
    torch.set_num_threads(threads)
    assert scores(done) == scores(whole)
    assert re.search(
        r"^warning: it\.step\d+\.checkpoint was not written: No space left on device$",
        done.out,
        re.M,
    )


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").mkdir()
    monkeypatch.chdir(tmp_path)
    log = train_gpt.Log("x", train_gpt.Runtime())
    log.file = open("/dev/full", "w", buffering=1)
    log("step:1")
    assert capsys.readouterr().out == "step:1\n"


def test_no_cap_claims_no_disk(options, run_here, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train_gpt, "train_and_score", lambda run, checkpoint: None)
    assert run_here(**{**options, "ARTIFACT_MAX_BYTES": str(10**20)}).status == 0


def test_checkpoints_are_those_of_one_run(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.chdir(tmp_path)
    names = [
        f"{run}.step0000000{step}.checkpoint"
        for run in ("a", "a.step1", "a[b]")
        for step in (3, 5, 4)
    ]
    for name in names:
        (tmp_path / "logs" / name).touch()
    for at, run_id in enumerate(("a", "a.step1", "a[b]")):
        found = [path.name for path in train_gpt.checkpoints_of(run_id)]
        assert found == [names[3 * at + i] for i in (1, 2, 0)]


def test_a_file_that_could_not_be_written_leaves_none(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_bytes(b"before")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_gpt.os, "fsync", full)
    with pytest.raises(OSError):
        train_gpt.write_atomically(target, b"after")
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("package", ["zstandard", "sentencepiece"])
def test_a_missing_package_is_one_line(package, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ImportError(\"No module named '{package}'\")")
    done = run(tmp_path, **TINY_RUN, PYTHONPATH=str(tmp_path))
    assert done.status == 1 and done.out == ""
    assert done.err == f"error: No module named '{package}': pip install -r requirements.txt\n"


# ---- what must not look like a score


def test_the_first_loss_that_is_no_number_is_named_with_the_last_good_one(make_trainer):  # noqa: F811
    trainer, seen = make_trainer(train_log_every=10, iterations=20), []
    step = trainer.step

    def breaking(scale: float) -> torch.Tensor:
        if trainer.steps == 7:
            with torch.no_grad():
                trainer.model.blocks[1].mlp.up[0, 0] = math.nan
        seen.append(step(scale))
        return seen[-1]

    trainer.step = breaking
    saved = []
    with pytest.raises(UserError, match="nan at step 8") as error:
        trainer.run(None, saved.append)
    assert f"the last good one was {float(seen[6]):.4f}" in str(error.value) and trainer.steps == 10


def test_no_checkpoint_holds_a_diverged_model(make_trainer):  # noqa: F811
    trainer, saved = make_trainer(train_log_every=0, iterations=20, checkpoint_every=1e-9), []
    step = trainer.step

    def breaking(scale: float) -> torch.Tensor:
        return step(scale) * (math.nan if trainer.steps == 4 else 1.0)

    trainer.step = breaking
    with pytest.raises(UserError, match="nan at step 4; the last good one was"):
        trainer.run(None, lambda state: saved.append(state["trainer"]["steps"]))
    assert saved == [1, 2, 3]
    train_gpt.STOP.held = False


@pytest.mark.parametrize("fault", ["crash", "nan"])
def test_a_failed_evaluation_leaves_no_final_line(
    options, whole, run_here, monkeypatch, fault, data_folder
):  # noqa: F811
    score = Evaluator.score

    def failing(self, model, tokens, name):
        if name == "sliding" and fault == "crash":
            raise RuntimeError("planted")
        if name == "sliding":
            model.embedding.data[3:9] = math.nan
        return score(self, model, tokens, name)

    monkeypatch.setattr(Evaluator, "score", failing)
    done = run_here(
        ARTIFACT=str(whole.folder / ARTIFACT_NAME),
        DATA_PATH=str(data_folder),
        COMPILE="0",
        DEVICE="cpu",
        DTYPE="float32",
    )
    assert done.status == (1 if fault == "crash" else 2) and not re.search(
        r"final_int6\S* val", done.out
    )
    assert ("planted" if fault == "crash" else "evaluation failed: ") in done.err
    assert not list(done.folder.glob("logs/*.json"))


# ---- the compliance block


def test_the_summary_says_what_was_checked(whole):
    results = whole.results()
    block = results["compliance"]
    assert json.loads(re.search(r"^compliance:(.*)$", whole.out, re.M)[1]) == block
    assert block["track"] == "A" and block["validation_opened"] == "after packing"
    assert (
        block["train_under_600s"]
        is block["eval_under_600s"]
        is block["artifact_under_16mb"]
        is True
    )
    assert block["targets"] == [results["final_int6_roundtrip"]["targets"]] * 2
    assert block["bytes"] == [results["final_int6_roundtrip"]["bytes"]] * 2
    data = (whole.folder / ARTIFACT_NAME).read_bytes()
    assert block["artifact_sha256"] == train_gpt.hashlib.sha256(data).hexdigest()
    assert f"artifact:{ARTIFACT_NAME} sha256:{block['artifact_sha256']} " in whole.out
    stages = results["stages"]
    assert (
        stages["training"] + stages["opening"] >= results["train_seconds"] > stages["opening"] > 0
    )
    assert (
        block["eval_seconds"]
        == results["eval_seconds"]
        == pytest.approx(
            sum(
                stages[name]
                for name in (
                    "pre_quantization",
                    "reading",
                    "final_int6_roundtrip",
                    "final_int6_sliding_window",
                )
            )
        )
    )


def test_writing_last_is_not_training_and_writing_before_is(make_trainer, monkeypatch):  # noqa: F811
    """A schedule in seconds counts the writes, ends in time all the same, and begins no step it cannot end."""
    clock = Time(monkeypatch)
    for every, limit in ((2.0, 20.0), (100.0, 20.0), (0.5, 11.3)):
        trainer, written = (
            make_trainer(iterations=1000, max_wallclock_seconds=limit, checkpoint_every=every),
            [],
        )

        def step(scale: float, trainer=trainer) -> torch.Tensor:
            clock.now += 0.5
            trainer.steps += 1
            return torch.zeros(())

        def save(state: dict) -> None:
            written.append((state["trainer"]["steps"], state["clock"]["seconds"]))
            clock.now += 1.5

        trainer.step = step
        trainer.run(None, save)
        assert limit - 3 < trainer.clock.seconds <= limit, trainer.clock.seconds
        before = len(written) - (written[-1][0] == trainer.steps)
        assert trainer.clock.seconds >= 0.5 * trainer.steps + 1.5 * before - 1e-9
        assert written[-1][0] == trainer.steps


def test_a_resumed_run_knows_that_validation_was_opened(options, tmp_path):
    changes = {**options, "VAL_LOSS_EVERY": "20", "ITERATIONS": "60"}
    process = begin(tmp_path, **changes)
    wait_for_step(process, tmp_path, 60)
    end(process, signal.SIGKILL, tmp_path)
    results = run(tmp_path, **changes, RESUME="1").results()
    assert (
        results["resumed_at"] == [60]
        and results["compliance"]["validation_opened"] == "during training"
    )


def test_passes_during_training_are_said_and_on_no_clock_of_training(options, run_here):  # noqa: F811
    done = run_here(
        **{**options, "VAL_LOSS_EVERY": "40", "CHECKPOINT_EVERY": "0", "ITERATIONS": "41"}
    )
    assert (
        done.status == 0 and done.results()["compliance"]["validation_opened"] == "during training"
    )


def test_an_artifact_that_is_scored_has_no_time_of_training(options, whole, run_here, data_folder):  # noqa: F811
    done = run_here(
        ARTIFACT=str(whole.folder / ARTIFACT_NAME),
        DATA_PATH=str(data_folder),
        COMPILE="0",
        DEVICE="cpu",
        DTYPE="float32",
    )
    block = done.results()["compliance"]
    assert block["train_under_600s"] is block["train_seconds"] is block["resumed_at"] is None
    assert block["eval_under_600s"] is True and block["validation_opened"] == "after packing"


def test_settings_of_a_checkpoint_are_all_but_the_machine():
    fixed = {
        field.name for field in train_gpt.fields_of("model", "training", "artifact", "evaluation")
    }
    assert {"seed", "iterations", "max_wallclock_seconds", "quant", "eval_stride"} <= fixed
    assert not fixed & {
        "micro_batch_tokens",
        "eval_batch_seqs",
        "device",
        "data_path",
        "resume",
        "train_log_every",
    }
    assert tiny_settings(checkpoint_every=0.5).checkpoint_every == 0.5
