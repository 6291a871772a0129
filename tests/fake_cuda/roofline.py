"""Launches, memory traffic and arithmetic of the record preset's micro-step on an H100.

    python tests/fake_cuda/roofline.py [--top N] [--qat] [--before-loops] [--vocabulary N] \
        [NAME=VALUE ...]

It needs no H100. NAME=VALUE is a setting, or one of Inductor's options. It counts 48 rows of 2,048
positions, forward and backward. A kernel's traffic is the size of what it reads and writes, each
once; what is still in the cache from the kernel before is counted too.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools
import sys
from pathlib import Path
from unittest import mock

# This command lies two folders below train_gpt.py.
sys.path.append(str(Path(__file__).resolve().parents[2]))

# Before torch, see there.
import fake_device  # isort: skip

import fake_trainer
import h100
import torch

import train_gpt

# Bytes a second, and bfloat16 operations a second.
BANDWIDTH = 3.35e12
ARITHMETIC = 989e12
KINDS = ("triton", "product", "attention", "other")


def measure(
    qat: bool = False,
    looped: bool = True,
    settings: dict[str, str] | None = None,
    **options,
) -> h100.Compiler:
    """Compile one micro-step, with Inductor's options; the graphs' order is forward, backward."""
    # To pad the 12 channels of the attention gates, the compiler would time products on the GPU.
    compiler = h100.Compiler(**{"shape_padding": False, **options})
    compile_with_it = functools.partial(torch.compile, backend=compiler.backend)
    replaced = mock.patch.object(torch, "compile", compile_with_it)
    with fake_trainer.ranks(), fake_device.fake_cuda(), compiler, replaced:
        environment = {
            **fake_trainer.SETTINGS,
            "VOCAB_SIZE": "1024",
            **(settings or {}),
        }
        trainer = fake_trainer.make_trainer(environment, compiled="graph")
        tokens = torch.zeros(48, 2048, dtype=torch.long)
        grid = train_gpt.row_grid(trainer.model, trainer.settings) if qat else None
        trainer.forward_backward(tokens, tokens.clone(), grid, looped)
    return compiler


def pass_name(graph: h100.Graph) -> str:
    """Which pass a graph is."""
    return "backward" if graph.backward else "forward"


def line(name: str, row: collections.Counter) -> str:
    """A row of the table: launches, and traffic and arithmetic with the time that each takes."""
    cells = [f"{name:10}{row['launches']:9}"]
    cells += [f"{row[kind]:10}" for kind in KINDS]
    cells.append(f"{row['bytes'] / 1e9:8.1f}{1e3 * row['bytes'] / BANDWIDTH:7.1f}")
    cells.append(f"{row['flops'] / 1e12:8.2f}{1e3 * row['flops'] / ARITHMETIC:7.1f}")
    return "".join(cells)


def table(compiler: h100.Compiler) -> list[str]:
    """A row for each graph and one for both."""
    kinds = "".join(f"{kind:>10}" for kind in KINDS)
    lines = [f"{'':10}{'launches':>9}{kinds}{'GB':>8}{'ms':>7}{'TFLOP':>8}{'ms':>7}"]
    totals = collections.Counter()
    for graph in compiler.graphs:
        row = collections.Counter(graph.launches)
        row.update(launches=graph.launches.total(), bytes=graph.bytes, flops=graph.flops)
        totals.update(row)
        lines.append(line(pass_name(graph), row))
    lines.append(line("both", totals))
    return lines


def largest_kernels(graph: h100.Graph, top: int) -> list[str]:
    """The kernels that move most, alike ones together."""
    alike = collections.defaultdict(list)
    for each in graph.traffic:
        alike[each.kind, each.operations, each.buffers].append(each.bytes)
    lines = [
        f"{pass_name(graph)}: GB, calls, kind, operations, buffers of more than 1 MB, "
        "< read and > written"
    ]
    by_bytes = sorted(alike.items(), key=lambda pair: -sum(pair[1]))
    for (kind, operations, buffers), sizes in by_bytes[:top]:
        lines.append(
            f"{sum(sizes) / 1e9:7.2f} {len(sizes):4} {kind:9} {operations[:90]}  {buffers[:150]}"
        )
    return lines


def report(compiler: h100.Compiler, top: int) -> str:
    """A table of both graphs, and each graph's largest kernels."""
    lines = table(compiler)
    lines.append(
        f"shared memory: at most {max(compiler.kernels.values())} bytes of "
        f"{h100.SHARED_MEMORY} in {len(compiler.kernels)} kernels"
    )
    for graph in compiler.graphs:
        lines += ["", *largest_kernels(graph, top)]
    return "\n".join(lines)


def main() -> None:
    """Measure as the command line says, and print the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("options", nargs="*")
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--qat", action="store_true")
    parser.add_argument("--before-loops", action="store_true")
    chosen = parser.parse_args()
    settings = {"VOCAB_SIZE": str(chosen.vocabulary)}
    options = {}
    for pair in chosen.options:
        name, value = pair.split("=", 1)
        if name.isupper():
            settings[name] = value
        else:
            options[name] = ast.literal_eval(value)
    compiler = measure(chosen.qat, not chosen.before_loops, settings, **options)
    print(report(compiler, chosen.top))


if __name__ == "__main__":
    main()
