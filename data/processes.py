"""Processes of the commands in this folder: workers, stopping by a signal, and a folder that belongs to one
process alone."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from commands import BadInput
from tqdm import tqdm

STOPPING = signal.SIGINT, signal.SIGTERM


# ---- Workers
def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_worker() -> None:
    """End this process with its parent, which cannot stop it when it is killed itself."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    tqdm.set_lock(
        threading.RLock()
    )  # its own lock is between processes and outlives one that is killed


class Workers:
    """Calls functions in `jobs` processes, with 1 in this one; an error in the context kills them."""

    def __init__(self, jobs: int):
        self.jobs, self.others = jobs, set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(jobs, context, prepare_worker) if jobs > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, error: type | None, *more: object) -> None:
        if self.pool:
            for process in set(multiprocessing.active_children()) - self.others if error else ():
                process.kill()
            self.pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable, item: object) -> object:
        # A terminal sends its signals to every process. Only the parent shall react: the mask is inherited.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            return self.pool.submit(function, item)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def map(self, function: Callable, items: Iterable) -> Iterator:
        """The results in the order of the items, of which two for each process are under way."""
        if not self.pool:
            yield from map(function, items)
            return
        pending = collections.deque()
        try:
            for item in items:
                pending.append(self.submit(function, item))
                if len(pending) > 2 * self.jobs:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise BadInput(
                "a process was killed from outside, maybe for lack of memory: try fewer --jobs"
            ) from error


# ---- Signals and locks
class Stopped(KeyboardInterrupt):
    """By the signal whose number is its argument."""


def stop(number: int, frame: object) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals wait until this block is done."""
    caught = []
    before = {
        number: signal.signal(number, lambda found, frame: caught.append(found))
        for number in STOPPING
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in caught[:1]:
        signal.raise_signal(number)


def lock(workspace: Path) -> int:
    """Create the folder, or take what a dead process left; return the descriptor that holds its lock. The
    system frees the lock when this process ends, however it ends. Waits while another process has it."""
    while True:
        workspace.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it was removed by the process that had it
            held = os.open(workspace / "lock", os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(
                    f"{workspace.name}: another process is building this, waiting for it",
                    file=sys.stderr,
                )
                fcntl.flock(held, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(held), os.stat(workspace / "lock")):
                    return held
            os.close(held)


def clear(workspace: Path) -> None:
    """Remove all that is in it but its lock."""
    for path in set(workspace.iterdir()) - {workspace / "lock"}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def own_workspace(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, of this process alone, removed at the end. It holds what a process that was
    killed has left there."""
    workspace = folder.with_name(f".{folder.name}-partial")
    held = lock(workspace)
    try:
        yield workspace
    finally:
        with uninterrupted():
            with contextlib.suppress(OSError):  # the next one that has it removes the rest
                clear(workspace)
                os.unlink(workspace / "lock")  # last: no other process may enter before
                os.rmdir(workspace)
            os.close(held)


def run(command: Callable[[], int | None]) -> int:
    """Call a command; return its exit status, which is 0 if it returns none, after one line if it failed or
    was stopped by a signal."""
    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        return command() or 0
    except BadInput as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        tqdm.write(f"error: {where}{error.strerror or error}", file=sys.stderr)
    except ImportError as error:
        tqdm.write(
            f"error: {error.name or error} is not installed: pip install -r data/requirements.txt",
            file=sys.stderr,
        )
    except KeyboardInterrupt as stopped:
        tqdm.write("interrupted: nothing half done is left", file=sys.stderr)
        return 128 + (stopped.args or STOPPING)[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 2
