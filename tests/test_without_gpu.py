"""The CUDA path on a machine without a GPU: each check in a process of its own.

It changes torch, see fake_cuda/one_device.py.
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


def check(name: str) -> None:
    """Fail with the last lines of what the check says if it fails."""
    command = [sys.executable, "-W", "ignore", str(FOLDER / "checks.py"), name]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        pytest.fail(done.stdout[-3000:], pytrace=False)


@pytest.mark.parametrize("name", ["step", "sdpa", "types", "graphs"])
def test_on_fake_tensors(name):
    check(name)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton")
@pytest.mark.skipif(
    torch.__version__ < (2, 11),
    reason="torch 2.9's AOTAutograd refuses to compile functions of fake tensors",
)
def test_code_for_an_h100():
    check("code")
