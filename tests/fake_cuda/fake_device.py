"""CUDA tensors on a machine without CUDA: shapes, types and devices, but no numbers. Import it before torch.

It changes the process that imports it, so use it in one of its own. It needs g++ and a torch without CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def build() -> Path:
    """The shared library, built once for each torch and each state of the source, in the user's cache."""
    source = HERE / "fake_cuda.cpp"
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    key = hashlib.sha256(
        source.read_bytes()
        + str(torch_folder).encode()
        + importlib.metadata.version("torch").encode()
    ).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fake_cuda_{os.getuid()}" / f"{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(mode=0o700, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")  # several processes may build at once
    libraries = torch_folder / "lib"
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-shared",
            "-fPIC",
            "-w",
            str(source),
            "-o",
            str(partial),
            f"-I{torch_folder / 'include'}",
            f"-L{libraries}",
            "-lc10",
            "-ltorch_cpu",
            f"-Wl,-rpath,{libraries}",
        ],
        check=True,
    )
    os.replace(partial, library)
    return library


if "torch" in sys.modules:
    raise ImportError("fake_device must come before torch, which asks for a device but once")
if not ctypes.CDLL(str(build())).pretend_cuda():
    raise ImportError("torch has found another device")
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

# What Inductor asks of the device, from the data sheet of the H100 SXM.
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    type="cuda",
    index=0,
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    is_integrated=0,
    gcnArchName="",
)
PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "flash_forward",
    "flash_backward",
}


class UniformProducts(TorchDispatchMode):
    """Refuses a product of two types, as CUDA's kernels do and fake ones do not; counts the others."""

    def __init__(self):
        super().__init__()
        self.counts: dict[tuple[str, torch.dtype], int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name.removesuffix("_backward") in PRODUCTS or name in PRODUCTS:
            found = [
                x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 1
            ]
            factors = found[:2] if "mm" in name else found[:3]
            if len(set(factors)) > 1:
                raise TypeError(f"{name} of {' and '.join(map(str, factors))}")
            self.counts[name, factors[0]] = self.counts.get((name, factors[0]), 0) + 1
        return function(*args, **(kwargs or {}))


def apply_to_fakes(module: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
    """Module._apply for fake tensors, whose storage cannot be exchanged: with new parameters."""
    for child in module.children():
        apply_to_fakes(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            values = function(parameter.detach())
            module._parameters[name] = torch.nn.Parameter(values, parameter.requires_grad)
    module._buffers.update(
        {
            name: buffer if buffer is None else function(buffer)
            for name, buffer in module._buffers.items()
        }
    )
    return module


@contextlib.contextmanager
def fake_cuda():
    """Everything inside is on fake tensors, and CUDA seems to be there."""
    with contextlib.ExitStack() as stack:
        for target, attribute, value in (
            (torch.nn.Module, "_apply", apply_to_fakes),
            (torch.Tensor, "pin_memory", lambda self: self),
            (torch.cuda, "get_device_properties", lambda device=None: H100),
            (torch.cuda, "synchronize", lambda device=None: None),
            # without these two, autocast would say that there is no CUDA, and do nothing
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        ):
            stack.enter_context(mock.patch.object(target, attribute, value))
        # autograd's thread for a device would look for the device
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        yield
