"""How records/ablate.py carries out runs: the machine, launchers, stopping, other systems."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ablation_runs
import train_gpt
from ablation_runs import command_of, divide, visible_gpus
from commands import BadInput
from conftest import ROOT
from standin import Done, call, write_standin
from tiny_runs import PATIENCE

CAN_CONFINE = hasattr(os, "sched_getaffinity")


@pytest.fixture(scope="module")
def standin(tmp_path_factory) -> Path:
    """The path of the quick script."""
    return write_standin(tmp_path_factory.mktemp("script") / "standin.py")


# ---- Shares of the machine


def test_gpus_are_counted_as_nvidia_smi_lists_them(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho '  MIG 1g Device 0: y'\n"
        "echo 'GPU 1: A (UUID: z)'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == []


def test_jobs_get_equal_shares_of_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3, 12)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,4,6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert divide(2, [], on_gpus=False) == [
        ((3, 4, 5, 6), {"OMP_NUM_THREADS": "4"}),
        ((7, 8, 9, 10), {"OMP_NUM_THREADS": "4"}),
    ]
    shares = divide(2, ["/usr/bin/torchrun", "--standalone"], on_gpus=True)
    assert [share.variables for share in shares] == [
        {"CUDA_VISIBLE_DEVICES": "0,2"},
        {"CUDA_VISIBLE_DEVICES": "4,6"},
    ]


def test_a_launcher_with_machines_of_its_own_is_not_confined():
    assert divide(50, ["srun"], on_gpus=True) == [((), {})] * 50


@pytest.mark.parametrize("jobs, on_gpus, what", [(10, False, "9 cores"), (5, True, "4 GPUs")])
def test_there_are_no_more_jobs_than_cores_or_gpus(monkeypatch, jobs, on_gpus, what):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,4,6")
    with pytest.raises(BadInput, match=f"there are only {what} here"):
        divide(jobs, [], on_gpus)


@pytest.mark.skipif(
    not CAN_CONFINE or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to confine runs to"
)
def test_jobs_run_at_the_same_time_on_cores_of_their_own(standin, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    arguments = ["--script", standin, "--base", "ITERATIONS=4", "--seeds", "2,3", "--jobs", "2"]
    # Each of the runs ends only when the other one is at work too.
    done = call(tmp_path, *arguments, STANDIN_MEETS="base-seed2 base-seed3")
    assert done.status == 0, done.out
    two = done.run("base-seed2")
    three = done.run("base-seed3")
    assert two["cores"]
    assert three["cores"]
    assert not set(two["cores"]) & set(three["cores"])
    assert two["environment"]["OMP_NUM_THREADS"] == str(len(two["cores"]))


# ---- Launchers


def test_a_launcher_stands_in_front_and_can_carry_the_settings(standin, tmp_path):
    (tmp_path / "launch.sh").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "launch.sh").chmod(0o755)
    launcher = f"./launch.sh env -i LAUNCHED=yes {{env}} {sys.executable}"
    arguments = ["--script", standin, "--seeds", "42,", "--launcher", launcher, "--base"]
    refused = call(tmp_path, *arguments, "ITERATIONS=4")
    assert refused.status == 2
    assert "PRESET=auto may be another there" in refused.err

    done = call(tmp_path, *arguments, "ITERATIONS=4 PRESET=pocket")
    assert done.status == 0, done.err
    environment = done.run("base-seed42")["environment"]
    assert environment["LAUNCHED"] == "yes"
    assert environment["SEED"] == "42"
    assert "HOME" not in environment


def test_a_launcher_for_a_remote_shell_has_quoted_words():
    launcher = ["ssh", "one", "cd {folder} && {env} python3"]
    words = command_of(launcher, Path("t.py"), {"A": "b c"}, Path("/x y"))
    assert words == ["ssh", "one", "cd '/x y' && env 'A=b c' python3", "t.py"]


def test_a_launcher_that_splits_nothing_has_plain_words():
    words = command_of(["to", "{folder}", "{env}"], Path("t.py"), {"A": "b c"}, Path("/x y"))
    assert words == ["to", "/x y", "env", "A=b c", "t.py"]


# ---- Stopping


def is_alive(process: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until(holds) -> None:
    """Wait until something holds; fails after a long time."""
    latest = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < latest
        time.sleep(0.05)


@contextlib.contextmanager
def command_at_work(standin: Path, folder: Path) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """ablate.py in a process of its own, when its run of seed 2 is at work, and its arguments.

    That run takes longer than any test, and so does its child, which ignores SIGTERM.
    """
    arguments = ["--script", str(standin), "--base", "ITERATIONS=4", "--seeds", "2"]
    settings = {field.name.upper() for field in train_gpt.fields_of()}
    environment = {name: text for name, text in os.environ.items() if name not in settings}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "records/ablate.py"), *arguments],
        cwd=folder,
        text=True,
        stderr=subprocess.PIPE,
        env={**environment, "STANDIN_SECONDS": "3600"},
    )
    second = folder / "logs/ablations/ablation/base-seed2"
    try:
        wait_until((second / "pid").is_file)
        yield process, arguments
    finally:
        process.kill()
        process.communicate()
        for name in ("pid", "child"):
            with contextlib.suppress(OSError):
                os.kill(int((second / name).read_text()), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_stopped_stops_its_runs_and_goes_on_when_called_again(
    standin, tmp_path, number
):
    with command_at_work(standin, tmp_path) as (process, arguments):
        second = tmp_path / "logs/ablations/ablation/base-seed2"
        at_work = [int((second / name).read_text()) for name in ("pid", "child")]
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        wait_until(lambda: not any(map(is_alive, at_work)))
    assert process.returncode == 130
    assert "stopped: 1 of 2 runs" in err
    assert "Traceback" not in err
    [one, two] = json.loads((second.parent / "ablation.json").read_text())["runs"]
    assert (one["status"], two["status"]) == ("finished", "unfinished")

    done = call(tmp_path, *arguments)
    assert done.status == 0
    assert "1 of them have finished" in done.err
    assert len(done.row("base")["val_bpb"]) == 2


def test_nothing_starts_in_the_folder_of_a_run_whose_command_was_killed(standin, tmp_path):
    with command_at_work(standin, tmp_path) as (process, arguments):
        process.kill()
        process.wait()
        done = call(tmp_path, *arguments)
    assert done.status == 2
    assert "a run it left, is at work here" in done.err


# ---- Systems without what Linux has


def test_a_system_without_groups_affinity_or_hangup_runs_too(standin, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "killpg")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(signal, "SIGKILL")
    arguments = ["--script", standin, "--base", "ITERATIONS=4", "--seeds", "2", "--jobs", "1"]
    done: Done = call(tmp_path, *arguments)
    assert done.status == 0, done.err


def test_a_system_without_groups_ends_a_run_and_what_it_started(monkeypatch):
    commands = []
    monkeypatch.delattr(os, "killpg")
    monkeypatch.setattr(
        ablation_runs.subprocess, "run", lambda command, **_: commands.append(command)
    )
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        ablation_runs.ask_to_end(process)
        ablation_runs.kill(process)
    assert commands == [["taskkill", "/PID", str(process.pid), "/T", "/F"]] * 2


def test_cores_are_counted_where_the_system_does_not_say_which(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert ablation_runs.usable_cores() == [0, 1, 2]
