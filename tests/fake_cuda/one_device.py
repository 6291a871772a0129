"""Makes torch believe that there is one CUDA device. Import it before torch.

It changes the process that imports it. It needs g++. It works with a torch that was built with CUDA
and with one that was not.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def build() -> Path:
    """The shared library, built once for each torch and each state of the source."""
    source = Path(__file__).resolve().with_name("fake_cuda.cpp")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    version = importlib.metadata.version("torch")
    identity = source.read_bytes() + f"{torch_folder}{version}".encode()
    key = hashlib.sha256(identity).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fake_cuda_{os.getuid()}" / f"{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(mode=0o700, exist_ok=True)
    # Several processes may build at once.
    partial = library.with_suffix(f".{os.getpid()}")
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", str(source), "-o", str(partial)]
    command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    command += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    subprocess.run(command, check=True)
    os.replace(partial, library)
    return library


def pretend() -> None:
    """Load the library before torch, which asks for a device but once."""
    if "torch" in sys.modules:
        raise ImportError("one_device must come before torch")
    # Else torch would ask cuDNN, which is not there, whether it has kernels for attention.
    os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"
    pretend_cuda = ctypes.CDLL(str(build())).pretend_cuda
    pretend_cuda.restype = ctypes.c_bool
    if not pretend_cuda():
        raise ImportError("torch has found another device")

    import torch  # noqa: F401

    # A torch that was built with CUDA has just put its own guard in the place of ours.
    pretend_cuda()


pretend()
