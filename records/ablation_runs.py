"""Carries out the runs of an ablation: shares of the machine, processes, progress, ends."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from ablation_outcomes import Outcome, read_outcome, read_results
from ablation_plan import Ablation, PlannedRun
from commands import BadInput, described, say
from cores import usable_cores
from run_logs import progress

# Seconds from asking a run to end until it is killed. torchrun gives its workers 30.
GRACE = 40.0
# Seconds between looks at the runs, and between reports while others are at work.
LOOK_EVERY = 0.1
REPORT_EVERY = 5.0
# Seconds between updates of the progress bar, in a terminal and in a file.
REDRAW_TERMINAL = 1.0
REDRAW_FILE = 60.0
# The signals that stop a command. Windows has no SIGHUP.
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)

# Writes the report, and returns what came of all runs.
WriteReport = Callable[[], list[Outcome]]


class StoppedRuns(KeyboardInterrupt):
    """The command was stopped while runs were at work; the message says how many have ended."""


# ---- Shares of this machine


class Slot(NamedTuple):
    """A job's share of this machine; without cores it is not confined."""

    cores: tuple[int, ...] = ()
    variables: dict[str, str] = {}


def visible_gpus() -> list[str]:
    """The GPUs that may be used, by CUDA_VISIBLE_DEVICES or by nvidia-smi, without opening any."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return [name for name in names if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return []
    count = len(re.findall(r"^GPU \d+:", listed, re.M))
    return [str(number) for number in range(count)]


def is_torchrun(launcher: list[str]) -> bool:
    """Whether a launcher starts its processes on this machine, as torchrun does."""
    return bool(launcher) and Path(launcher[0]).name in ("torchrun", "torchrun.exe")


def runs_elsewhere(launcher: list[str]) -> bool:
    """Whether a launcher places its runs itself."""
    return bool(launcher) and not is_torchrun(launcher)


def divide(jobs: int, launcher: list[str], on_gpus: bool) -> list[Slot]:
    """A slot for each job: equal shares of GPUs and cores.

    A single job has the whole machine, and a launcher that places its runs itself has its own.
    """
    if jobs == 1 or runs_elsewhere(launcher):
        return [Slot()] * jobs
    cores = usable_cores()
    gpus = visible_gpus() if on_gpus else []
    for things, what in ((cores, "cores"), (gpus, "GPUs")):
        if things and jobs > len(things):
            raise BadInput(f"--jobs {jobs}: there are only {len(things)} {what} here")

    cores_each = len(cores) // jobs
    gpus_each = len(gpus) // jobs
    # torchrun chooses the threads of its workers itself.
    sets_threads = not is_torchrun(launcher) and not os.environ.get("OMP_NUM_THREADS")
    slots = []
    for job in range(jobs):
        variables = {}
        if sets_threads:
            variables["OMP_NUM_THREADS"] = str(cores_each)
        if gpus:
            share = gpus[job * gpus_each : (job + 1) * gpus_each]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(share)
        slots.append(Slot(tuple(cores[job * cores_each : (job + 1) * cores_each]), variables))
    return slots


@contextlib.contextmanager
def confined_to(cores: tuple[int, ...]) -> Iterator[None]:
    """Confine what is started in this context to these cores.

    Nothing changes if there are none, or where the system cannot (macOS, Windows).
    """
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ---- Processes


def command_of(
    launcher: list[str], script: Path, variables: dict[str, str], folder: Path
) -> list[str]:
    """The words that start a run: launcher and script, or this Python and the script.

    A word of the launcher that is {env} becomes several words. Within a longer word, which a shell
    elsewhere splits again, values are quoted.
    """
    if not launcher:
        return [sys.executable, str(script)]
    assigned = ["env", *(f"{name}={value}" for name, value in variables.items())]
    words = []
    for word in launcher:
        if word == "{env}":
            words += assigned
        elif word == "{folder}":
            words.append(str(folder))
        else:
            word = word.replace("{env}", shlex.join(assigned))
            words.append(word.replace("{folder}", shlex.quote(str(folder))))
    return [*words, str(script)]


def has_process_groups() -> bool:
    """Whether the system can signal a process with all that it started: not on Windows."""
    return hasattr(os, "killpg")


def group_options(lock: FileLock) -> dict:
    """How subprocess.Popen starts a run, so that Ctrl-C reaches this process alone.

    Where the system can, the run holds the folder's lock too, for as long as it lives: after this
    process was killed, nothing else starts in the folder while a run of it is at work.
    """
    if not has_process_groups():
        return dict(creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))
    # FileLock has no public name for its descriptor. Without it only the run's hold is lost.
    descriptor = getattr(getattr(lock, "_context", None), "lock_file_fd", None)
    held = [] if descriptor is None else [descriptor]
    return dict(start_new_session=True, pass_fds=held)


def ask_to_end(process: subprocess.Popen) -> None:
    """Ask a run to end, with all that it started; on Windows, which cannot ask, end it."""
    if has_process_groups():
        signal_group(process, signal.SIGTERM)
    else:
        kill_tree(process)


def kill(process: subprocess.Popen) -> None:
    """End a run at once, with all that it started."""
    if has_process_groups():
        signal_group(process, signal.SIGKILL)
    else:
        kill_tree(process)


def signal_group(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a run and all that it started, if any of it is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def kill_tree(process: subprocess.Popen) -> None:
    """End a process and its descendants on Windows, whose taskkill follows them."""
    command = ["taskkill", "/PID", str(process.pid), "/T", "/F"]
    try:
        subprocess.run(command, capture_output=True)
    except OSError:
        process.kill()


class Job(NamedTuple):
    """A run at work."""

    run: PlannedRun
    slot: Slot
    started: float
    process: subprocess.Popen


class Pool:
    """The runs at work, each in a process group, a folder and a slot of its own."""

    def __init__(
        self,
        ablation: Ablation,
        launcher: list[str],
        slots: list[Slot],
        lock: FileLock,
        keep_artifacts: bool,
    ):
        self.ablation = ablation
        self.launcher = launcher
        self.free = list(slots)
        self.lock = lock
        self.keep_artifacts = keep_artifacts
        self.running: list[Job] = []

    def start(self, run: PlannedRun) -> None:
        """Start a run in an empty folder."""
        if run.folder.exists():
            shutil.rmtree(run.folder)
        run.folder.mkdir()
        slot = self.free.pop(0)
        own = {**run.configuration.variables, "SEED": str(run.seed), "RUN_ID": run.name}
        # No setting reaches a run but those that are planned.
        inherited = dict(os.environ)
        for name in self.ablation.reader.fields:
            inherited.pop(name, None)
        with open(run.folder / "console.txt", "wb") as console, confined_to(slot.cores):
            process = subprocess.Popen(
                command_of(self.launcher, self.ablation.script, own, run.folder),
                cwd=run.folder,
                env={**inherited, **slot.variables, **own},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                **group_options(self.lock),
            )
        self.running.append(Job(run, slot, time.monotonic(), process))

    def ended(self) -> list[Outcome]:
        """What came of the runs that have ended since the last call; their slots are free."""
        done = [job for job in self.running if job.process.poll() is not None]
        for job in done:
            self.running.remove(job)
            self.free.append(job.slot)
        return [self.outcome(job) for job in done]

    def outcome(self, job: Job) -> Outcome:
        """What came of a job that has ended. Artifacts of one that has finished are removed."""
        (job.run.folder / "exit_status").write_text(f"{job.process.returncode}\n")
        outcome = read_outcome(job.run, self.ablation)
        if outcome.finished and not self.keep_artifacts:
            for path in job.run.folder.rglob("*.ptz"):
                path.unlink()
        return outcome

    def stop(self) -> None:
        """End what is at work, with all that it started."""
        for end in (ask_to_end, kill):
            for job in self.running:
                end(job.process)
            self.wait(GRACE)
        self.running = []

    def wait(self, seconds: float) -> None:
        """Wait until all runs have ended, at most so long."""
        latest = time.monotonic() + seconds
        while any(job.process.poll() is None for job in self.running):
            if time.monotonic() > latest:
                return
            time.sleep(0.05)


# ---- Progress


def time_left(pool: Pool, waiting: int, outcomes: list[Outcome]) -> str:
    """Hours, minutes and seconds until all have ended, by the runs that have finished."""
    known = [outcome.seconds for outcome in outcomes if outcome.finished]
    if not known:
        return "?"
    mean = statistics.fmean(known)
    now = time.monotonic()
    work = waiting * mean
    for job in pool.running:
        work += max(0.0, mean - (now - job.started))
    seconds = round(work / (len(pool.running) + len(pool.free)))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def at_work(pool: Pool) -> str:
    """The runs at work, each with its last step."""
    return ", ".join(f"{job.run.name} {progress(job.run.log) or '-'}" for job in pool.running)


class Reports:
    """The report while runs are at work: written anew when a run has ended, but not too often.

    One that cannot be written is said to be, and stops no run.
    """

    def __init__(self, write: WriteReport):
        self.write = write
        self.outcomes: list[Outcome] = []
        self.outdated = False
        self.written = 0.0

    def renew(self) -> None:
        """Write the report; `outcomes` stay as they were if that fails."""
        try:
            self.outcomes = self.write()
        except Exception as error:
            say(f"warning: no report could be written: {described(error)}")
        self.outdated = False
        self.written = time.monotonic()

    def renew_if_due(self) -> None:
        """Write the report if it is outdated, unless one was written just now."""
        if self.outdated and time.monotonic() > self.written + REPORT_EVERY:
            self.renew()


def carry_out(pool: Pool, asked: int, waiting: list[PlannedRun], write: WriteReport) -> None:
    """Run what waits, in order, with a progress bar on stderr and reports on the way."""
    from tqdm import tqdm

    reports = Reports(write)
    reports.renew()
    redraw_every = REDRAW_TERMINAL if sys.stderr.isatty() else REDRAW_FILE
    redrawn = 0.0
    with tqdm(
        total=asked,
        initial=asked - len(waiting),
        mininterval=redraw_every,
        bar_format="{n_fmt}/{total_fmt} runs, {elapsed}{desc}",
    ) as bar:
        while waiting or pool.running:
            while waiting and pool.free:
                pool.start(waiting.pop(0))
            time.sleep(LOOK_EVERY)
            for outcome in pool.ended():
                figure = outcome.error
                if outcome.finished:
                    figure = f"val_bpb {outcome.val_bpb:.4f}"
                bar.write(f"{outcome.name}: {figure}", file=sys.stderr)
                bar.update()
                reports.outdated = True
            if pool.running:
                # After the last run the report is written in any case.
                reports.renew_if_due()
            if time.monotonic() > redrawn + redraw_every:
                redrawn = time.monotonic()
                left = time_left(pool, len(waiting), reports.outcomes)
                bar.set_description_str(f", left {left}: {at_work(pool)}")


def supervise(
    pool: Pool, asked: int, waiting: list[PlannedRun], write: WriteReport
) -> list[Outcome]:
    """Carry out what waits, then write the last report; what came of all runs.

    Whatever ends it, no run goes on after it. StoppedRuns after a signal, when the report has all
    that has finished.
    """
    try:
        carry_out(pool, asked, waiting, write)
    except KeyboardInterrupt:
        # To stop takes seconds, and must not be cut short.
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        missing = len(waiting) + len(pool.running)
        pool.stop()
        Reports(write).renew()
        raise StoppedRuns(f"{asked - missing} of {asked} runs have ended") from None
    finally:
        pool.stop()
    return write()


def unfinished(asked: list[PlannedRun], ablation: Ablation) -> list[PlannedRun]:
    """The runs that have not finished.

    Raises BadInput if one that has would be lost, since it is not as planned.
    """
    waiting = []
    for run in asked:
        outcome = read_outcome(run, ablation)
        if outcome.finished:
            continue
        if read_results(run):
            raise BadInput(f"{run.folder} has a finished run, but {outcome.error}: move it away")
        waiting.append(run)
    return waiting
