"""Fixtures around runs. A test module that takes them says `pytest_plugins = ["run_fixtures"]`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_gpt
from runs import SCRIPT, TINY_RUN, Done, run

NO_NETWORK = """
import socket

def blocked(*arguments, **named):
    raise AssertionError("the network was used")

socket.socket.connect = blocked
socket.socket.connect_ex = blocked
socket.getaddrinfo = blocked
socket.create_connection = blocked
"""


@pytest.fixture
def run_here(monkeypatch, capsys) -> Callable[..., Done]:
    """run_here(folder, **settings): the script in this process, for what needs none of its own."""

    def call(folder: Path, **settings: str) -> Done:
        signals = (signal.SIGINT, signal.SIGTERM)
        handlers = [signal.getsignal(number) for number in signals]
        precision = torch.get_float32_matmul_precision()
        threads = torch.get_num_threads()
        with monkeypatch.context() as patch:
            for field in train_gpt.fields_of():
                patch.delenv(field.name.upper(), raising=False)
            for name, text in settings.items():
                patch.setenv(name, text)
            patch.setattr(sys, "argv", [str(SCRIPT)])
            patch.setattr(train_gpt, "STOP", train_gpt.StopSignals())
            patch.chdir(folder)
            torch.set_num_threads(1)
            try:
                status = train_gpt.main()
            finally:
                torch.set_num_threads(threads)
                torch.set_float32_matmul_precision(precision)
                for number, handler in zip(signals, handlers, strict=True):
                    signal.signal(number, handler)
        return Done(folder, status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def first(data_folder, tmp_path_factory) -> Done:
    """A run that nothing stopped, in a process of its own that may not use the network."""
    block = tmp_path_factory.mktemp("block")
    (block / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    folder = tmp_path_factory.mktemp("first")
    settings = dict(TINY_RUN, DATA_PATH=str(data_folder), RUN_ID="first")
    return run(folder, **settings, PYTHONPATH=str(block))


@pytest.fixture(scope="session")
def two_ranks(data_folder, tmp_path_factory) -> Done:
    """The same run on two ranks."""
    folder = tmp_path_factory.mktemp("two_ranks")
    return run(folder, ranks=2, **TINY_RUN, DATA_PATH=str(data_folder))
