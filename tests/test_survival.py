"""Runs that are killed, stopped or out of disk: what survives, and that nothing false is final."""

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
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest
import torch

import train_gpt
from conftest import LANES, LOOPED, VOCAB_SIZE
from runs import (
    MACHINE,
    SCRIPT,
    TINY_RUN,
    Done,
    is_one_error,
    run,
    run_signalled,
    send_together,
    signals_at,
)
from train_gpt import ARTIFACT_NAME, Evaluator, Runtime, StepPlan, StopSignals, Trainer, UserError
from trainers import ManualClock, build_trainer

pytest_plugins = ["run_fixtures"]


@pytest.fixture(scope="module")
def options(data_folder) -> dict[str, str]:
    """The tiny run, whose average begins at step 23, late QAT at 26 and samples of costs at 28.

    It writes a checkpoint after every step.
    """
    return dict(TINY_RUN, CHECKPOINT_EVERY="1e-9", RUN_ID="it", DATA_PATH=str(data_folder))


@pytest.fixture(scope="module")
def killed(options, tmp_path_factory) -> Done:
    """A run that was killed after step 10."""
    folder = tmp_path_factory.mktemp("killed")
    done = run_signalled(folder, "checkpoint:it.step00000010", "SIGKILL", **options)
    assert done.status == -9
    assert not done.score_lines()
    return done


@pytest.fixture
def left(killed, tmp_path) -> Path:
    """A copy of what the killed run has left."""
    return Path(shutil.copytree(killed.folder, tmp_path / "left"))


@pytest.fixture
def fresh_stop(monkeypatch) -> StopSignals:
    """A state of signals that no other test sees."""
    monkeypatch.setattr(train_gpt, "STOP", StopSignals())
    return train_gpt.STOP


def logs_of(folder: Path) -> dict[str, bytes]:
    """All files of a run in logs/, by name."""
    return {path.name: path.read_bytes() for path in (folder / "logs").iterdir()}


# ---- resumed


def test_a_killed_run_ends_as_one_never_stopped(options, first, left, run_here):
    """Killed again in late QAT, while costs are being sampled, and once more after training."""
    again = dict(options, RESUME="1")
    assert run_signalled(left, "checkpoint:it.step00000029", "SIGKILL", **again).status == -9
    assert run_signalled(left, "stage:training", "SIGKILL", **again).status == -9
    done = run_here(left, **again)
    assert done.scores() == first.scores()
    assert (left / ARTIFACT_NAME).read_bytes() == (first.folder / ARTIFACT_NAME).read_bytes()

    ours = done.results()
    theirs = first.results()
    for key in ("steps", "train_loss", "late_qat_steps", "exported", "tokens"):
        assert ours[key] == theirs[key], key
    for key in ("val_loss", "val_bpb", "targets", "bytes"):
        assert ours["pre_quantization"][key] == theirs["pre_quantization"][key], key
    assert ours["resumed_at"] == ours["compliance"]["resumed_at"] == [10, 29, 30]
    assert theirs["resumed_at"] == []


def test_checkpoints_are_two(killed):
    names = [path.name for path in killed.checkpoints()]
    assert names == ["it.step00000009.checkpoint", "it.step00000010.checkpoint"]
    assert set(logs_of(killed.folder)) == {*names, "it.txt"}


def test_resume_alone_goes_on_with_the_last_run_and_its_settings(
    options, first, left, data_folder, run_here
):
    """Nothing but the machine's settings is given again; the log has the source once."""
    # A checkpoint that was being written when the run was killed.
    (left / "logs/it.step00000011.checkpoint.partial").write_bytes(b"half")
    done = run_here(
        left,
        **MACHINE,
        RESUME="1",
        DATA_PATH=str(data_folder),
        MICRO_BATCH_TOKENS=options["MICRO_BATCH_TOKENS"],
    )
    assert done.scores() == first.scores()
    assert done.log().count(SCRIPT.read_text(encoding="utf-8")) == 1
    assert re.findall(r"^resumed at step:\d+", done.log(), re.M) == ["resumed at step:10"]
    assert set(logs_of(left)) == {"it.txt", "it.json", f"it.{ARTIFACT_NAME}"}


DAMAGES = {
    "last byte": lambda data: data[:-1],
    "most": lambda data: data[:1000],
    "all": lambda data: b"",
    "hole": lambda data: data[:5000] + bytes(100) + data[5100:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(left, damage, monkeypatch, capsys):
    monkeypatch.chdir(left)
    older, newest = sorted(Path("logs").glob("*.checkpoint"))
    expected = older.read_bytes()[32:]
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    assert train_gpt.find_checkpoint("it") == ("it", expected)
    assert train_gpt.find_checkpoint("") == ("it", expected)
    assert f"{newest} is cut short or damaged" in capsys.readouterr().err
    older.write_bytes(DAMAGES[damage](older.read_bytes()))
    with pytest.raises(UserError, match="no checkpoint of it is whole"):
        train_gpt.find_checkpoint("it")


def test_the_clock_is_carried_on(options, left, run_here):
    """Ten steps took 950 s, says the checkpoint, so that 1000 s are too few for another one."""
    older, newest = sorted((left / "logs").glob("*.checkpoint"))
    older.unlink()
    state = train_gpt.read_checkpoint(newest.read_bytes()[32:], torch.device("cpu"))
    state["settings"]["max_wallclock_seconds"] = 1000.0
    state["trainer"]["seconds"] = 950.0
    file = io.BytesIO()
    torch.save(state, file)
    data = file.getvalue()
    newest.write_bytes(train_gpt.hashlib.sha256(data).digest() + data)
    changes = dict(options, MAX_WALLCLOCK_SECONDS="1000", CHECKPOINT_EVERY="0", RESUME="1")
    done = run_here(left, **changes)
    assert len(done.scores()) == 2
    results = done.results()
    assert results["settings"]["max_wallclock_seconds"] == 1000.0
    assert 950.0 <= results["train_seconds"] <= 1000.0
    assert results["compliance"]["train_under_600s"] is False
    assert results["steps"] == 10


@pytest.fixture
def only_begin(monkeypatch) -> None:
    """Runs that end where training would begin, and say with how large a checkpoint."""

    def begin(this_run: train_gpt.Run, checkpoint: bytes) -> None:
        this_run.log(f"began with {len(checkpoint)} bytes")

    monkeypatch.setattr(train_gpt, "train_and_score", begin)


@pytest.mark.parametrize(
    "changes, pattern",
    [
        (
            dict(RESUME="1", ITERATIONS="31"),
            "ITERATIONS=31 differs from the stored model's 30",
        ),
        (dict(RESUME="1", SEED="5"), "SEED=5"),
        (dict(RUN_ID="it"), "RUN_ID=it is taken"),
        (dict(RESUME="1", ARTIFACT="x.ptz"), r"x\.ptz"),
    ],
    ids=str,
)
def test_what_cannot_be_resumed(options, left, changes, pattern, run_here, only_begin):
    done = run_here(left, **{**options, **changes})
    assert done.status == 2
    assert is_one_error(done.err, pattern)


@pytest.mark.parametrize("run_id, goes_on", [("", True), ("other", False)])
def test_resume_takes_the_last_run_or_begins_a_named_one(
    options, left, run_id, goes_on, run_here, only_begin
):
    done = run_here(left, **{**options, "RESUME": "1", "RUN_ID": run_id})
    assert done.status == 0
    size = int(re.search(r"^began with (\d+) bytes$", done.out, re.M)[1])
    assert (size > 0) == goes_on


def test_resume_without_any_checkpoint_says_so(run_here, tmp_path):
    done = run_here(tmp_path, RESUME="1")
    assert done.status == 2
    assert is_one_error(done.err, "RESUME=1: there is no checkpoint ")


def test_a_run_that_has_ended_is_not_resumed(options, first, run_here, tmp_path):
    shutil.copytree(first.folder / "logs", tmp_path / "logs")
    done = run_here(tmp_path, **{**options, "RUN_ID": "first", "RESUME": "1"})
    assert done.status == 2
    assert is_one_error(done.err, "RUN_ID=first is taken: logs/first.json exists")
    assert logs_of(tmp_path) == logs_of(first.folder)


@pytest.mark.parametrize("what", ["script", "tokenizer", "data"])
def test_other_code_or_data_does_not_go_on(
    options, left, what, data_folder, tmp_path, run_here, monkeypatch
):
    folder = Path(shutil.copytree(data_folder, tmp_path / "data"))
    if what == "script":
        script = tmp_path / "train_gpt.py"
        script.write_bytes(SCRIPT.read_bytes() + b"# changed\n")
        monkeypatch.setattr(train_gpt, "__file__", str(script))
    elif what == "tokenizer":
        # An unknown empty field leaves the pieces as they are.
        tokenizer = folder / "tokenizer.model"
        tokenizer.write_bytes(tokenizer.read_bytes() + b"\x9a\x06\x00")
    else:
        shutil.copy(folder / "x_train_000000.bin", folder / "x_train_000001.bin")
    done = run_here(left, **{**options, "DATA_PATH": str(folder), "RESUME": "1"})
    assert done.status == 2
    assert is_one_error(done.err, f"RESUME=1: not the {what} with ")
    assert len(done.checkpoints()) == 2


def trained_to(trainer: Trainer, steps: int) -> bytes:
    """Go on to this step, as CHECKPOINT_EVERY would; what is then written."""
    while trainer.steps < steps:
        plan = trainer.schedule.plan(trainer.steps, trainer.progress(0.0))
        trainer.unchecked_losses.append(trainer.step(plan))
    trainer.check_losses()
    file = io.BytesIO()
    torch.save(trainer.state(), file)
    return file.getvalue()


def same(one: object, other: object) -> bool:
    """Whether two states are the same to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(ema_enabled=True),
        dict(quant="rows", int5_mlp="1"),
        dict(tie_embeddings=False),
        dict(tie_embeddings=False, spelling_lr=0.01),
        dict(swa_enabled=False),
        dict(mtp_num_heads=0, bigram_vocab_size=0, memory_tokens=0),
        dict(late_qat_threshold=0.0),
        dict(micro_batch_tokens=24, train_batch_tokens=72),
        dict(**LOOPED, **LANES, ema_enabled=True, ema_span=0.3, muon_row_normalize=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_state_that_was_written_and_read_is_all_that_counts(data_folder, changes, device):
    """Stopped before and after an average, costs of errors and late QAT have begun."""
    runtime = Runtime(device=torch.device(device))
    # Rates fall linearly over the whole run.
    falling = dict(iterations=13, warmdown_iters=13, warmdown_fraction=1.0)

    def fresh() -> Trainer:
        settings = {"late_qat_threshold": 0.2, **falling, **changes}
        trainer = build_trainer(data_folder, runtime=runtime, **settings)
        trainer.warm_up()
        return trainer

    def read(data: bytes) -> dict:
        return train_gpt.read_checkpoint(data, runtime.device)

    whole = fresh()
    written = {stop: trained_to(whole, stop) for stop in (1, 6, 11, 12, 13)}
    for stop in (1, 6, 11, 12):
        second = fresh()
        second.load(read(written[stop]))
        assert second.steps == stop
        found = trained_to(second, 13)
        if device == "cpu":
            assert same(read(found), read(written[13]))
        else:
            # Sums on a GPU are in no fixed order.
            assert second.train_loss == pytest.approx(whole.train_loss, abs=1e-3)


def test_without_checkpoints_nothing_is_written_or_gathered(data_folder, monkeypatch):
    trainer = build_trainer(data_folder, iterations=3)
    monkeypatch.setattr(trainer, "state", lambda: pytest.fail("a state was taken"))
    monkeypatch.setattr(
        trainer.optimizer.muon, "momentum_buffers", lambda: pytest.fail("they were gathered")
    )
    trainer.run(None)
    assert trainer.steps == 3


# ---- several ranks


def test_two_ranks_resume_as_two_and_as_one(options, two_ranks, tmp_path, run_here):
    """The launcher is told to end and passes it on to its ranks."""
    folder = tmp_path / "two"
    folder.mkdir()
    stopped = run_signalled(folder, "step:10/", "SIGTERM", target="launcher", ranks=2, **options)
    assert "stopped by SIGTERM" in stopped.err
    assert not stopped.score_lines()
    alone = Path(shutil.copytree(folder, tmp_path / "one"))

    two = run(folder, ranks=2, **options, RESUME="1")
    assert two.scores() == two_ranks.scores()
    assert two.results()["resumed_at"] == [10]
    one = run_here(alone, **options, RESUME="1").results()
    assert one["world_size"] == 1
    assert one["steps"] == 30
    for label in ("pre_quantization", "final_int6_roundtrip", "final_int6_sliding_window"):
        assert abs(one[label]["val_bpb"] - two_ranks.results()[label]["val_bpb"]) < 2e-3


def test_ranks_agree_on_a_clock_that_began_with_different_openings(data_folder):
    """Seconds of opening the shards, the loader's, are rank 0's on every rank."""
    asked = []

    class OtherRank(Runtime):
        """A rank whose rank 0 took 7 seconds for whatever it is asked."""

        def from_main(self, value: object) -> object:
            """Rank 0's value."""
            asked.append(value)
            return 7.0

    class Reached(Exception):
        """Training would begin."""

    class Opening(train_gpt.Run):
        """A run that is about to train; each of its stages takes an eighth of a second."""

        def __init__(self, trainer: Trainer):
            self.settings = trainer.settings
            self.runtime = OtherRank()
            self.tokenizer = train_gpt.ByteTokenizer()
            self.train_files = trainer.data.files
            self.code_bytes = 0
            self.stages = {}
            self.identity = {}
            self.evaluator = types.SimpleNamespace(warm_up=lambda model: None)
            self.adaptive = None

        def open_training(self) -> train_gpt.TrainingRows:
            """The rows, whatever tokenizer made them."""
            return trainer.data

        def log(self, line: str) -> None:
            """Keep nothing."""

        def stage(self, name: str, function: Callable, *arguments: object) -> object:
            """Call the function, and note the same time for all stages."""
            if name == "training":
                raise Reached(function.__self__.clock.seconds)
            self.stages[name] = 0.125
            return function(*arguments)

    trainer = build_trainer(data_folder, iterations=3)
    opening = Opening(trainer)
    with pytest.raises(Reached, match="^7.0$"):
        opening.train(b"")
    assert 0.125 in asked


def test_a_signal_to_one_rank_stops_all(monkeypatch, fresh_stop):
    """Rank 0's seconds and the largest signal, by one maximum over ranks; others add no seconds."""
    sent = []

    def all_reduce(tensor: torch.Tensor, operation: object, group: object) -> None:
        sent.append(tensor.clone())
        tensor.copy_(torch.tensor([5.0, float(SIGTERM)]).maximum(tensor))

    monkeypatch.setattr(train_gpt.dist, "all_reduce", all_reduce)
    clock = train_gpt.Clock(Runtime(rank=1, world_size=2))
    clock.started = -1000.0
    assert clock.read() == 5.0
    assert clock.stopped == fresh_stop.number == SIGTERM
    assert sent[0].tolist() == [0.0, 0.0]


def test_a_rank_that_dies_takes_the_others_down(options, tmp_path):
    """The call returns only once no process writes to its outputs any more: all ranks are gone."""
    changes = dict(options, ITERATIONS="100000", CHECKPOINT_EVERY="0")
    done = run_signalled(tmp_path, "step:10/", "SIGKILL", rank=1, ranks=2, **changes)
    assert done.status != 0
    assert "Signal 9 (SIGKILL)" in done.err
    assert not done.score_lines()


def test_an_error_on_one_rank_is_shown(options, data_folder, tmp_path):
    """A token outside of the vocabulary in the first row that the second rank sees."""
    folder = Path(shutil.copytree(data_folder, tmp_path / "data"))
    files = train_gpt.find_shards(folder, "train")
    rows = train_gpt.TrainingRows(files, 64, 1337, VOCAB_SIZE)
    # Of the four rows of a step, the first two are rank 0's.
    token = rows.epoch.offset + 64 * int(rows.epoch.order[2]) + 20
    shard = folder / "x_train_000000.bin"
    data = bytearray(shard.read_bytes())
    place = 4 * train_gpt.SHARD_HEADER_INTS + 2 * token
    data[place : place + 2] = b"\xff\xff"
    shard.write_bytes(data)
    done = run(tmp_path, ranks=2, **{**options, "DATA_PATH": str(folder)})
    assert done.status != 0
    assert "token 65535 is outside of VOCAB_SIZE" in done.err
    assert not done.score_lines()


# ---- stopped


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends_the_run(options, first, tmp_path, number, run_here):
    changes = dict(options, CHECKPOINT_EVERY="1000")
    with signals_at("step:10/", number):
        done = run_here(tmp_path, **changes)
    assert done.status == 128 + number
    assert is_one_error(done.err, f"stopped by {number.name}; RESUME=1 goes on ")
    assert not done.score_lines()
    # The step during which it came was finished.
    assert [path.name for path in done.checkpoints()] == ["it.step00000011.checkpoint"]
    again = run_here(tmp_path, **changes, RESUME="1")
    assert again.scores() == first.scores()
    assert again.results()["resumed_at"] == [11]


def test_a_signal_ends_a_run_without_checkpoints_at_once(options, tmp_path):
    changes = dict(options, CHECKPOINT_EVERY="0", ITERATIONS="100000")
    done = run_signalled(tmp_path, "step:10/", "SIGINT", **changes)
    assert done.status == 130
    assert is_one_error(done.err, "stopped by SIGINT; ")
    assert not done.checkpoints()
    assert not done.score_lines()


@pytest.mark.parametrize(
    "line",
    [
        "preset:",
        "stage:data",
        "model_params:",
        "stage:warmup_training",
        "step:20/",
        "late_qat_steps:",
        "artifact:",
        "stage:packing",
        "stage:reading",
        "sliding_window 100%",
    ],
)
def test_two_signals_at_once_are_one_line_at_any_moment(options, tmp_path, line, run_here):
    """As some launchers send them."""
    with signals_at(line, SIGTERM, SIGINT):
        done = run_here(tmp_path, **{**options, "CHECKPOINT_EVERY": "0"})
    assert re.search(rf"^{line}", done.out, re.M)
    assert done.status in (130, 143)
    assert is_one_error(done.err, "stopped by SIG(TERM|INT); ")
    assert not done.score_lines()
    assert not list((tmp_path / "logs").glob("*.json"))


def test_two_signals_before_the_settings_are_read_are_one_line(tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(train_gpt, "check_torch_version", lambda: send_together(SIGTERM, SIGINT))
    done = run_here(tmp_path)
    assert done.status in (130, 143)
    assert is_one_error(done.err, "stopped by SIG(TERM|INT); ")
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_signal_is_held_while_a_step_is_done(monkeypatch):
    clock = ManualClock(monkeypatch)
    stop = StopSignals()
    stop.hold()
    stop.receive(SIGTERM, None)
    # At once: a launcher, which is heard once.
    stop.receive(SIGINT, None)
    assert stop.number == SIGTERM
    clock.now += 6
    # Later: a person, who does not want to wait.
    with pytest.raises(KeyboardInterrupt):
        stop.receive(SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop.release()


# ---- no room, no folder


def test_a_logs_folder_that_is_a_file_is_said_before_training(options, run_here, tmp_path):
    (tmp_path / "logs").write_text("mine")
    done = run_here(tmp_path, **options)
    assert done.status == 2
    assert is_one_error(done.err, r"cannot write \d+ bytes into .*logs: File exists")
    assert (tmp_path / "logs").read_text() == "mine"
    assert "train_loss" not in done.out


def test_a_folder_that_cannot_be_written_is_said_before_training(
    options, run_here, tmp_path, monkeypatch
):
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    done = run_here(tmp_path, **options)
    assert done.status == 2
    assert is_one_error(done.err, r"cannot write \d+ bytes into .*: Permission denied")
    assert done.out == ""


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """Limit the size of this process's files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "size, changes",
    [
        (1_000_000, {}),
        (17_000_000, dict(ARTIFACT_MAX_BYTES="1000000", MODEL_DIM="256")),
    ],
    ids=["artifact", "checkpoints"],
)
def test_a_full_disk_is_said_before_training(options, tmp_path, size, changes, run_here):
    """Too little for the artifact; and enough for it, but not for checkpoints."""
    with small_files(size):
        done = run_here(tmp_path, **{**options, **changes})
    assert done.status == 2
    assert is_one_error(done.err, r"cannot write \d+ bytes into .*: File too large")
    assert "train_loss" not in done.out
    assert not list(tmp_path.glob("*.ptz"))


def test_a_disk_that_fills_up_does_not_end_the_training(
    options, first, run_here, tmp_path, monkeypatch
):
    write = train_gpt.write_atomically

    def full(path: Path, *parts: bytes) -> None:
        if path.suffix == ".checkpoint":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *parts)

    monkeypatch.setattr(train_gpt, "write_atomically", full)
    done = run_here(tmp_path, **options)
    assert done.scores() == first.scores()
    warning = r"^warning: it\.step\d+\.checkpoint was not written: No space left on device$"
    assert len(re.findall(warning, done.out, re.M)) == 30


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").mkdir()
    monkeypatch.chdir(tmp_path)
    log = train_gpt.Logger("x", Runtime())
    with open("/dev/full", "w", buffering=1) as log.file:
        log("step:1")
        assert capsys.readouterr().out == "step:1\n"
        # Nothing is left that closing would have to write.
        with contextlib.suppress(OSError):
            log.file.close()


def test_no_cap_claims_no_disk(options, run_here, tmp_path, only_begin):
    assert run_here(tmp_path, **{**options, "ARTIFACT_MAX_BYTES": str(10**20)}).status == 0


def test_checkpoints_are_those_of_one_run(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.chdir(tmp_path)
    runs = ("a", "a.step1", "a[b]")
    for run_id in runs:
        for step in (3, 5, 4):
            Path("logs", train_gpt.checkpoint_name(run_id, step)).touch()
    for run_id in runs:
        found = [path.name for path in train_gpt.checkpoints_of(run_id)]
        assert found == [f"{run_id}.step0000000{step}.checkpoint" for step in (5, 4, 3)]


def test_a_file_that_could_not_be_written_leaves_none(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_bytes(b"before")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train_gpt.write_atomically(target, b"after")
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


# ---- what must not look like a score


def test_the_first_loss_that_is_no_number_is_named_with_the_last_good_one(data_folder):
    trainer = build_trainer(data_folder, train_log_every=10, iterations=20)
    losses = []
    step = trainer.step

    def breaking(plan: StepPlan) -> torch.Tensor:
        if trainer.steps == 7:
            with torch.no_grad():
                trainer.model.blocks[1].mlp.up[0, 0] = math.nan
        losses.append(step(plan))
        return losses[-1]

    trainer.step = breaking
    with pytest.raises(UserError, match="nan at step 8") as error:
        trainer.run(None, lambda state: None)
    assert f"the last good one was {float(losses[6]):.4f}" in str(error.value)
    assert trainer.steps == 10


def test_no_checkpoint_holds_a_diverged_model(data_folder, fresh_stop):
    trainer = build_trainer(data_folder, train_log_every=0, iterations=20, checkpoint_every=1e-9)
    saved = []
    step = trainer.step

    def breaking(plan: StepPlan) -> torch.Tensor:
        loss = step(plan)
        return loss * math.nan if trainer.steps == 4 else loss

    trainer.step = breaking
    with pytest.raises(UserError, match="nan at step 4; the last good one was"):
        trainer.run(None, lambda state: saved.append(state["trainer"]["steps"]))
    assert saved == [1, 2, 3]


@pytest.mark.parametrize(
    "fault, status, words",
    [("crash", 1, "planted"), ("nan", 2, "evaluation failed: ")],
    ids=["crash", "nan"],
)
def test_a_failed_evaluation_leaves_no_final_line(
    first, run_here, tmp_path, monkeypatch, fault, status, words, data_folder
):
    score = Evaluator.score

    def failing(evaluator, model, tokens, name, **how):
        if name == "sliding" and fault == "crash":
            raise RuntimeError("planted")
        if name == "sliding":
            model.embedding.weight.data[3:9] = math.nan
        return score(evaluator, model, tokens, name, **how)

    monkeypatch.setattr(Evaluator, "score", failing)
    artifact = str(first.folder / ARTIFACT_NAME)
    done = run_here(tmp_path, **MACHINE, ARTIFACT=artifact, DATA_PATH=str(data_folder))
    assert done.status == status
    assert words in done.err
    assert not done.score_lines()
    assert not list((tmp_path / "logs").glob("*.json"))


# ---- the compliance block


def test_the_summary_says_what_was_checked(first):
    results = first.results()
    block = results["compliance"]
    assert json.loads(re.search(r"^compliance:(.*)$", first.out, re.M)[1]) == block
    assert block["track"] == "A"
    assert block["validation_opened"] == "after packing"
    assert block["train_under_600s"] is (results["train_seconds"] <= 600)
    assert block["eval_under_600s"] is (results["eval_seconds"] <= 600)
    assert block["artifact_under_16mb"] is True
    assert block["targets"] == [results["final_int6_roundtrip"]["targets"]] * 2
    assert block["bytes"] == [results["final_int6_roundtrip"]["bytes"]] * 2
    data = (first.folder / ARTIFACT_NAME).read_bytes()
    assert block["artifact_sha256"] == train_gpt.hashlib.sha256(data).hexdigest()
    assert f"artifact:{ARTIFACT_NAME} sha256:{block['artifact_sha256']} " in first.out


def test_the_summary_has_both_clocks(first):
    results = first.results()
    stages = results["stages"]
    with_opening = stages["training"] + stages["opening"]
    assert with_opening >= results["train_seconds"] > stages["opening"] > 0
    counted = 0.0
    for name in ("pre_quantization", "reading", "final_int6_roundtrip"):
        counted += stages[name]
    counted += stages["final_int6_sliding_window"]
    assert results["compliance"]["train_seconds"] == results["train_seconds"]
    assert results["compliance"]["eval_seconds"] == results["eval_seconds"]
    assert results["eval_seconds"] == pytest.approx(counted)


@pytest.mark.parametrize("every, limit", [(2.0, 20.0), (100.0, 20.0), (0.5, 11.3)])
def test_writing_last_is_not_training_and_writing_before_is(
    data_folder, monkeypatch, fresh_stop, every, limit
):
    """A schedule in seconds counts the writes, ends in time, and begins no step it cannot end."""
    clock = ManualClock(monkeypatch)
    trainer = build_trainer(
        data_folder, iterations=1000, max_wallclock_seconds=limit, checkpoint_every=every
    )
    written = []

    def step(plan: StepPlan) -> torch.Tensor:
        clock.now += 0.5
        trainer.steps += 1
        return torch.zeros(())

    def save(state: dict) -> None:
        written.append(state["trainer"]["steps"])
        clock.now += 1.5

    trainer.step = step
    trainer.run(None, save)
    assert limit - 3 < trainer.clock.seconds <= limit
    assert written[-1] == trainer.steps
    assert trainer.clock.seconds >= 0.5 * trainer.steps + 1.5 * (len(written) - 1) - 1e-9


def test_a_resumed_run_knows_that_validation_was_opened(options, tmp_path, run_here):
    changes = dict(options, VAL_LOSS_EVERY="10")
    with signals_at("stage:training", SIGTERM):
        assert run_here(tmp_path, **changes).status == 143
    results = run_here(tmp_path, **changes, RESUME="1").results()
    assert results["resumed_at"] == [30]
    assert results["compliance"]["validation_opened"] == "during training"
