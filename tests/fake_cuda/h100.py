"""Inductor and Triton write and assemble their code for an H100 that is not here. Needs triton.

Nothing is launched: `Compiler.backend` is a backend for torch.compile that has the code of a graph
written, keeps what it learns of each kernel, and computes on with fake tensors.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
from unittest import mock

# Before torch, see there.
import fake_device  # isort: skip

import torch
import torch._inductor.config
from fake_device import answers
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import ir, scheduler
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.select_algorithm import AlgorithmSelectorCache, TritonTemplateCaller
from torch._inductor.virtualized import V
from torch.utils.flop_counter import FlopCounterMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_MEMORY = fake_device.H100.shared_memory_per_block_optin


class Driver:
    """What Triton asks a driver in order to compile."""

    def get_current_target(self) -> GPUTarget:
        """Hopper, with warps of 32 threads."""
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """The only one."""
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_device_interface(self):
        """torch's module for it."""
        return torch.cuda


@dataclasses.dataclass
class Traffic:
    """One call of a kernel: what it computes, and the bytes of the buffers that it touches."""

    # "triton", "product", "attention" or "other"
    kind: str
    operations: str
    # < read, > written: type and size of those above 1 MiB
    buffers: str
    bytes: int


@dataclasses.dataclass
class Graph:
    """What Inductor made of one graph."""

    backward: bool
    code: str
    traffic: list[Traffic]
    flops: int = 0

    @property
    def launches(self) -> collections.Counter:
        """Calls of each kind in the generated code."""
        body = self.code[self.code.index("def call(") :]
        calls = collections.Counter()
        for line in body.splitlines():
            kind = kind_of_call(line.strip())
            if kind:
                calls[kind] += 1
        return calls

    @property
    def bytes(self) -> int:
        """What all its kernels move."""
        return sum(each.bytes for each in self.traffic)


def kind_of_call(line: str) -> str:
    """The kind of the kernel that a line of generated code launches; empty for any other line."""
    if line.startswith("#"):
        return ""
    if re.search(r"\b(triton_\w+|combo_\w+)\.run\(", line):
        is_product = "triton_tem_" in line or "triton_mm" in line
        return "product" if is_product else "triton"
    if re.search(r"\bextern_kernels\.\w+\(", line):
        return "product"
    operator = re.search(r"\btorch\.ops\.(\w+)\.(\w+)\.\w+\(", line)
    if operator:
        return "attention" if "flash" in operator[2] else "other"
    return ""


def operations_of(node: scheduler.BaseSchedulerNode) -> list[str]:
    """The names of the operations of torch that a scheduled node comes from, in order."""
    names = set()
    for part in node.get_nodes():
        if part.node is None:
            continue
        for origin in part.node.get_origins():
            if origin.op == "call_function":
                names.add(getattr(origin.target, "_opname", str(origin.target)))
    return sorted(names)


def kind_of_node(node: scheduler.BaseSchedulerNode, operations: list[str]) -> str:
    """The kind of the kernel that a scheduled node becomes."""
    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        return "product" if node.is_template() else "triton"
    if any("flash" in name for name in operations):
        return "attention"
    if any(name.endswith("mm") for name in operations):
        return "product"
    return "other"


def described(node: scheduler.BaseSchedulerNode) -> Traffic | None:
    """What is known of a scheduled node; None for one that launches nothing."""
    accesses = sizes_of_accesses(node)
    if not accesses:
        return None
    operations = operations_of(node)
    writes = {dependency.name for dependency in node.read_writes.writes}
    texts = []
    for name, size in sorted(accesses.items(), key=lambda pair: -pair[1]):
        if size > 1 << 20:
            sign = ">" if name in writes else "<"
            texts.append(f"{sign}{type_of(name)}:{size >> 20}M")
    return Traffic(
        kind=kind_of_node(node, operations),
        operations=" ".join(operations),
        buffers=" ".join(texts),
        bytes=sum(accesses.values()),
    )


def elements_by_place(node: scheduler.BaseSchedulerNode) -> dict[str, dict[int, int]]:
    """How many elements a node touches of each buffer, by where in the buffer they begin."""
    parts = collections.defaultdict(dict)
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        for each in getattr(node.node, "inputs", ()):
            if isinstance(each, ir.ReinterpretView):
                parts[each.get_name()][each.layout.offset] = each.get_numel()
        return parts
    for each in node.read_writes.reads | node.read_writes.writes:
        if isinstance(each, MemoryDep):
            start = each.index.subs(dict.fromkeys(each.index.free_symbols, 0))
            start = int(start) if start.is_Integer else 0
            at = parts[each.name]
            at[start] = max(at.get(start, 0), each.get_numel())
    return parts


def sizes_of_accesses(node: scheduler.BaseSchedulerNode) -> dict[str, int]:
    """Bytes that a node touches of each buffer.

    This is Inductor's own estimate, except that it takes slices for the whole buffers that they are
    cut from, and a factor of Triton's products for no more than these.
    """
    if isinstance(node, scheduler.ForeachKernelSchedulerNode):
        # Several kernels in one launch.
        total = collections.Counter()
        for part in node.snodes:
            total.update(sizes_of_accesses(part))
        return dict(total)
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    parts = elements_by_place(node)
    for name in accesses.keys() & parts.keys():
        first, *others = (int(numel) for _, numel in sorted(parts[name].items()))
        # Either a whole and its parts, or parts alone.
        numel = first if sum(others) <= first else first + sum(others)
        numel = min(numel, int(V.graph.get_numel(name)))
        accesses[name] = numel * V.graph.get_dtype(name).itemsize
    return {name: size for name, size in accesses.items() if size}


def type_of(name: str) -> str:
    """The type of a buffer of the graph that is being compiled."""
    try:
        return str(V.graph.get_dtype(name)).removeprefix("torch.")
    except NotImplementedError:
        # It is a group of buffers.
        return "several"


def elements_of_tile(choice: TritonTemplateCaller) -> int:
    """Elements of a tile of Triton's code for a product."""
    return math.prod(map(int, re.findall(r"BLOCK_[MN]=(\d+)", choice.description)))


def largest_tiles(cache, name, nodes, layout, generators, key, choices, *_, **__) -> dict:
    """In place of measuring which code for a product is the fastest: that with the largest tiles.

    Triton's code, unlike cuBLAS's, can take elementwise work in. On an H100, measurements decide.
    """
    ours = [choice for choice in choices if isinstance(choice, TritonTemplateCaller)]
    if not ours:
        return {choices[0]: 1.0}
    return {max(ours, key=elements_of_tile): 1.0}


# What torch's interface to the device would ask the driver, in a worker of Inductor's and besides.
OF_WORKER = dict(current_device=0, get_device_properties=fake_device.H100)
OF_PROCESS = dict(
    is_available=True,
    device_count=1,
    is_bf16_supported=True,
    get_compute_capability=90,
    exchange_device=0,
    maybe_exchange_device=0,
    set_device=None,
    synchronize=None,
)


class Compiler:
    """Inductor for an H100; use it inside `with compiler:`, which is inside fake_cuda()."""

    def __init__(self, **options):
        self.options = options
        self.graphs: list[Graph] = []
        # Bytes of shared memory of each kernel.
        self.kernels: dict[str, int] = {}
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Compiler:
        active = driver._active
        driver.set_active(Driver())
        self.stack.callback(setattr, driver, "_active", active)
        for target, values in (
            (CudaInterface, OF_PROCESS | OF_WORKER),
            (CudaInterface.Worker, OF_WORKER),
        ):
            for name, value in values.items():
                self.replace(target, name, staticmethod(answers(value)))
        self.replace(torch.cuda, "get_device_capability", answers((9, 0)))
        self.replace(torch.cuda, "current_device", answers(0))
        self.replace(triton_helpers, "set_driver_to_gpu", answers(None))
        self.replace(triton_heuristics.CachingAutotuner, "_make_launchers", self.keep_kernels())
        self.replace(AlgorithmSelectorCache, "do_autotuning", largest_tiles)
        self.replace(GraphLowering, "codegen", self.keep_graphs(GraphLowering.codegen))
        self.replace(torch._C, "_cuda_getCurrentRawStream", answers(0), create=True)
        configuration = torch._inductor.config.patch(
            compile_threads=1,
            force_disable_caches=True,
            use_static_triton_launcher=False,
            # These two would compute on the device.
            joint_graph_constant_folding=False,
            benchmark_epilogue_fusion=False,
        )
        self.stack.enter_context(configuration)
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    def replace(self, target: object, name: str, value: object, create: bool = False) -> None:
        """Give an attribute another value until the end."""
        self.stack.enter_context(mock.patch.object(target, name, value, create=create))

    def keep_kernels(self):
        """A method of Inductor's tuner that notes kernels where others would be launched."""

        def make_launchers(autotuner) -> None:
            name = autotuner.inductor_meta.get("kernel_name")
            for result in autotuner.compile_results:
                shared = result.kernel.metadata.shared
                self.kernels[name] = max(shared, self.kernels.get(name, 0))

        return make_launchers

    def keep_graphs(self, codegen):
        """Inductor's method that writes a graph's code, which then is kept."""

        def wrapped(graph: GraphLowering):
            result = codegen(graph)
            traffic = [described(node) for node in graph.scheduler.nodes]
            traffic = [each for each in traffic if each is not None]
            self.graphs.append(Graph(graph.is_backward, result[0].value, traffic))
            return result

        return wrapped

    def compile_inner(self, module: torch.fx.GraphModule, inputs, **options):
        """Have the code written; a function that computes without it, on fake tensors."""
        compile_fx_inner(module, inputs, **options)
        graph = self.graphs[-1]

        def run(arguments: list):
            with FlopCounterMode(display=False) as counter:
                outputs = module(*arguments)
            graph.flops = counter.get_total_flops()
            arguments.clear()
            return outputs

        run._boxed_call = True
        return run

    def backend(self, module: torch.fx.GraphModule, inputs, options: dict | None = None):
        """The backend for torch.compile."""
        options = {**(options or {}), **self.options}
        return compile_fx(module, inputs, inner_compile=self.compile_inner, config_patches=options)
