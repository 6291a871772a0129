"""Processes that share work of one kind."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from commands import STOPPING, BadInput
from cores import usable_cores

# Windows waits for 64 things at a time, of which Python needs some itself.
MOST_ON_WINDOWS = 61


def cores() -> int:
    """Return how many cores this process may use."""
    return len(usable_cores())


def prepare_worker() -> None:
    """Make a new worker end with its parent, which alone reacts to signals."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    # A parent that is killed itself cannot stop its workers.
    threading.Thread(target=end_with_parent, daemon=True).start()
    # tqdm's own lock is between processes, and outlives one that is killed.
    tqdm.set_lock(threading.RLock())


def end_with_parent() -> None:
    """Wait for the parent's end, then end this process."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Let processes that are started here begin with the signals of STOPPING blocked.

    A terminal sends its signals to every process, and a worker that has just been started does not
    ignore them yet.
    """
    # Windows has no such mask.
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Workers:
    """Calls functions in `jobs` processes, or with 1 in this one.

    An error in the context kills the processes at once.
    """

    def __init__(self, jobs: int):
        if sys.platform == "win32":
            jobs = min(jobs, MOST_ON_WINDOWS)
        self.jobs = jobs
        self.others = set(multiprocessing.active_children())
        self.pool: ProcessPoolExecutor | None = None
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(jobs, context, prepare_worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, error: type | None, *more: object) -> None:
        if self.pool is None:
            return
        if error is not None:
            for process in set(multiprocessing.active_children()) - self.others:
                process.kill()
        self.pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable, item: object) -> Future:
        """Let a worker call the function with this item."""
        with signals_blocked():
            return self.pool.submit(function, item)

    def map(self, function: Callable, items: Iterable) -> Iterator:
        """Yield the results in the order of the items, of which two a process are under way.

        BadInput if a worker is killed.
        """
        if self.pool is None:
            yield from map(function, items)
            return
        pending: collections.deque[Future] = collections.deque()
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
