"""The CUDA path on a machine without a GPU: checks in processes of their own.

They change torch, see fake_cuda/one_device.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "fake_cuda"
pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_cuda.py uses it"),
]


def run_checks(*names: str) -> None:
    """Fail with the last lines of what the checks say if one fails."""
    command = [sys.executable, "-W", "ignore", str(FOLDER / "checks.py"), *names]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        pytest.fail(done.stdout[-3000:], pytrace=False)


def test_steps_on_fake_tensors():
    run_checks("step", "sdpa", "types")


def test_graphs_on_fake_tensors():
    run_checks("graphs", "documents")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton")
@pytest.mark.skipif(
    torch.__version__ < (2, 11),
    reason="torch 2.9's AOTAutograd refuses to compile functions of fake tensors",
)
def test_code_for_an_h100():
    run_checks("code")
