"""CUDA tensors on a machine without a GPU: shapes, types and devices, but no numbers.

Import it before torch, in a process of its own: see one_device.py.
"""

from __future__ import annotations

import contextlib
import types
from unittest import mock

# Before torch.
import one_device  # noqa: F401  # isort: skip

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    """Refuses a product of two types, as CUDA's kernels do and fake ones do not.

    `counts` has how many products there were of each name and type.
    """

    def __init__(self):
        super().__init__()
        self.counts: dict[tuple[str, torch.dtype], int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in PRODUCTS or name.removesuffix("_backward") in PRODUCTS:
            self.check_and_count(name, args, kwargs)
        return function(*args, **(kwargs or {}))

    def check_and_count(self, name: str, args: tuple, kwargs: dict | None) -> None:
        """TypeError unless all factors of a product have one type."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        found = [tensor.dtype for tensor in tensors if tensor.ndim > 1]
        factors = found[:2] if "mm" in name else found[:3]
        if len(set(factors)) > 1:
            raise TypeError(f"{name} of {' and '.join(map(str, factors))}")
        key = name, factors[0]
        self.counts[key] = self.counts.get(key, 0) + 1


def apply_to_fakes(module: torch.nn.Module, function, recurse: bool = True) -> torch.nn.Module:
    """Module._apply for fake tensors, whose storage cannot be exchanged: with new parameters."""
    for child in module.children():
        apply_to_fakes(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            values = function(parameter.detach())
            module._parameters[name] = torch.nn.Parameter(values, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def answers(value):
    """A function that gives this value, whatever it is asked."""

    def answer(*arguments, **named):
        return value

    return answer


def itself(tensor: Tensor) -> Tensor:
    """The tensor: what pin_memory gives of a fake one."""
    return tensor


@contextlib.contextmanager
def fake_cuda():
    """Everything inside is on fake tensors, and CUDA seems to be there."""
    replacements = (
        (torch.nn.Module, "_apply", apply_to_fakes),
        (torch.Tensor, "pin_memory", itself),
        (torch.cuda, "get_device_properties", answers(H100)),
        (torch.cuda, "synchronize", answers(None)),
        # Without these two, autocast would say that there is no CUDA, and do nothing.
        (torch.cuda.amp.common, "amp_definitely_not_available", answers(False)),
        (torch.cuda, "is_bf16_supported", answers(True)),
    )
    with contextlib.ExitStack() as stack:
        for target, attribute, value in replacements:
            stack.enter_context(mock.patch.object(target, attribute, value))
        # Autograd's thread for a device would look for the device.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        yield
