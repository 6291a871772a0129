"""data/workers.py: workers react to nothing but their parent, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time

import pytest

from commands import BadInput
from workers import Workers, cores


def test_workers_leave_the_signals_to_their_parent():
    with Workers(2) as workers:
        assert list(workers.map(abs, [-1, -2])) == [1, 2]
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        assert list(workers.map(abs, [-3])) == [3]


def test_an_error_does_not_wait_for_what_the_workers_do():
    before = set(multiprocessing.active_children())
    with pytest.raises(KeyError), Workers(2) as workers:
        # Who waits for it is late by an hour.
        workers.submit(time.sleep, 3600)
        raise KeyError
    assert set(multiprocessing.active_children()) <= before


def test_a_worker_that_is_killed_is_bad_input():
    with pytest.raises(BadInput, match="try fewer --jobs"), Workers(2) as workers:
        list(workers.map(os._exit, [1]))


def test_one_job_is_done_in_this_process():
    with Workers(1) as workers:
        assert list(workers.map(abs, [-1, -2])) == [1, 2]
        assert workers.pool is None


def test_there_are_no_more_workers_than_the_system_can_wait_for(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with Workers(100) as workers:
        assert workers.jobs == 61


def test_cores_are_counted_where_a_process_cannot_be_bound_to_some(monkeypatch):
    assert cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1
