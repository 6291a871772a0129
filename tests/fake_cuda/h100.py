"""Inductor and Triton write and assemble their code for an H100 that is not here. Needs the package triton.

Nothing is launched: `Compiler.backend` is a backend for torch.compile that has the code of a graph written,
keeps what it learns of each kernel, and computes on with fake tensors.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import re
from unittest import mock

import fake_device  # before torch
import torch
import torch._inductor.config
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
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self):
        return torch.cuda


@dataclasses.dataclass
class Traffic:
    """One call of a kernel: what it computes, and the bytes of the buffers that it reads and writes."""

    kind: str  # "triton", "product", "attention" or "other"
    operations: str
    buffers: str  # < read, > written: type and size of those above 1 MiB
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
            line = line.strip()
            if line.startswith("#"):
                continue
            if re.search(r"\b(triton_\w+|combo_\w+)\.run\(", line):
                calls["product" if "triton_tem_" in line or "triton_mm" in line else "triton"] += 1
            elif re.search(r"\bextern_kernels\.\w+\(", line):
                calls["product"] += 1
            elif match := re.search(r"\btorch\.ops\.(\w+)\.(\w+)\.\w+\(", line):
                calls["attention" if "flash" in match[2] else "other"] += 1
        return calls

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.traffic)


def described(node: scheduler.BaseSchedulerNode) -> Traffic | None:
    """What is known of a scheduled node; None for one that launches nothing."""
    accesses = sizes_of_accesses(node)
    if not accesses:
        return None
    origins = [
        origin
        for part in node.get_nodes()
        if part.node is not None
        for origin in part.node.get_origins()
    ]
    names = sorted(
        {
            getattr(origin.target, "_opname", str(origin.target))
            for origin in origins
            if origin.op == "call_function"
        }
    )
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        kind = (
            "attention"
            if any("flash" in name for name in names)
            else "product"
            if any(name.endswith("mm") for name in names)
            else "other"
        )
    else:
        kind = "product" if node.is_template() else "triton"
    writes = {dependency.name for dependency in node.read_writes.writes}
    texts = [
        f"{'>' if name in writes else '<'}{type_of(name)}:{size >> 20}M"
        for name, size in sorted(accesses.items(), key=lambda pair: -pair[1])
        if size > 1 << 20
    ]
    return Traffic(kind, " ".join(names), " ".join(texts), sum(accesses.values()))


def sizes_of_accesses(node: scheduler.BaseSchedulerNode) -> dict[str, int]:
    """Bytes that a node touches of each buffer. This is Inductor's own estimate, except that it takes slices
    for the whole buffers that they are cut from, and a factor of Triton's products for no more than these."""
    if isinstance(node, scheduler.ForeachKernelSchedulerNode):  # several kernels in one launch
        counts = [collections.Counter(sizes_of_accesses(part)) for part in node.snodes]
        return dict(sum(counts, collections.Counter()))
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    parts = collections.defaultdict(dict)  # numbers of elements by buffer and by where they begin
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        for each in getattr(node.node, "inputs", ()):
            if isinstance(each, ir.ReinterpretView):
                parts[each.get_name()][each.layout.offset] = each.get_numel()
    else:
        for each in node.read_writes.reads | node.read_writes.writes:
            if isinstance(each, MemoryDep):
                start, at = (
                    each.index.subs(dict.fromkeys(each.index.free_symbols, 0)),
                    parts[each.name],
                )
                start = int(start) if start.is_Integer else 0
                at[start] = max(at.get(start, 0), each.get_numel())
    for name in accesses.keys() & parts.keys():
        first, *others = (int(numel) for _, numel in sorted(parts[name].items()))
        numel = (
            first if sum(others) <= first else first + sum(others)
        )  # a whole and its parts, or parts
        accesses[name] = min(numel, int(V.graph.get_numel(name))) * V.graph.get_dtype(name).itemsize
    return {name: size for name, size in accesses.items() if size}


def type_of(name: str) -> str:
    """The type of a buffer of the graph that is being compiled."""
    try:
        return str(V.graph.get_dtype(name)).removeprefix("torch.")
    except NotImplementedError:  # it is a group of them
        return "several"


def largest_tiles(cache, name, nodes, layout, generators, key, choices, *_, **__) -> dict:
    """In place of measuring which code for a product is the fastest: Triton's with the largest tiles, which
    can take elementwise work in. On an H100, measurements decide."""

    def elements(choice) -> int:
        return math.prod(
            int(number) for number in re.findall(r"BLOCK_[MN]=(\d+)", choice.description)
        )

    ours = [choice for choice in choices if isinstance(choice, TritonTemplateCaller)]
    return {max(ours, key=elements): 1.0} if ours else {choices[0]: 1.0}


class Compiler:
    """Inductor for an H100; use it inside `with compiler:`, which is inside fake_cuda()."""

    def __init__(self, **options):
        self.options, self.graphs, self.kernels = options, [], {}
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Compiler:
        patch = mock.patch.object
        active = driver._active
        driver.set_active(Driver())
        self.stack.callback(setattr, driver, "_active", active)
        of_worker = dict(current_device=0, get_device_properties=fake_device.H100)
        of_process = dict(
            is_available=True,
            device_count=1,
            is_bf16_supported=True,
            get_compute_capability=90,
            exchange_device=0,
            maybe_exchange_device=0,
            set_device=None,
            synchronize=None,
        )
        for target, answers in (
            (CudaInterface, of_process | of_worker),
            (CudaInterface.Worker, of_worker),
        ):
            for name, value in answers.items():
                answer = staticmethod(lambda *_, value=value, **__: value)
                self.stack.enter_context(patch(target, name, answer))
        for target, name, value in (
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
            (triton_helpers, "set_driver_to_gpu", lambda: None),
            (triton_heuristics.CachingAutotuner, "_make_launchers", self.keep_kernels),
            (AlgorithmSelectorCache, "do_autotuning", largest_tiles),
            (GraphLowering, "codegen", self.keeping_graphs(GraphLowering.codegen)),
        ):
            self.stack.enter_context(patch(target, name, value))
        stream = lambda device: 0  # noqa: E731
        self.stack.enter_context(patch(torch._C, "_cuda_getCurrentRawStream", stream, create=True))
        self.stack.enter_context(
            torch._inductor.config.patch(
                compile_threads=1,
                force_disable_caches=True,
                use_static_triton_launcher=False,
                joint_graph_constant_folding=False,  # it would compute on the device
                benchmark_epilogue_fusion=False,
            )
        )  # and this, too
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    @property
    def keep_kernels(self):
        def make_launchers(autotuner) -> None:
            for result in autotuner.compile_results:
                name, shared = (
                    autotuner.inductor_meta.get("kernel_name"),
                    result.kernel.metadata.shared,
                )
                self.kernels[name] = max(shared, self.kernels.get(name, 0))

        return make_launchers

    def keeping_graphs(self, codegen):
        def wrapped(graph: GraphLowering):
            result = codegen(graph)
            traffic = [each for node in graph.scheduler.nodes if (each := described(node))]
            self.graphs.append(Graph(graph.is_backward, result[0].value, traffic))
            return result

        return wrapped

    def compile_inner(self, module: torch.fx.GraphModule, inputs, **options):
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
        options = {**(options or {}), **self.options}
        return compile_fx(module, inputs, inner_compile=self.compile_inner, config_patches=options)
