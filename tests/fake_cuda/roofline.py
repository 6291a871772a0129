"""Launches, memory traffic and arithmetic of the record preset's micro-step on an H100, without an H100.

    python tests/fake_cuda/roofline.py [--top N] [--qat] [NAME=VALUE of Inductor's configuration ...]

Counts 48 rows of 2,048 positions, forward and backward. A kernel's traffic is the size of what it reads and
writes, each once; what is still in the cache from the kernel before is counted too.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools
from unittest import mock

import checks  # imports what must come before torch
import fake_device
import h100
import torch

BANDWIDTH, ARITHMETIC = 3.35e12, 989e12  # bytes and bfloat16 operations a second
KINDS = ("triton", "product", "attention", "other")


def measure(qat: bool = False, layers: int = 11, **options) -> h100.Compiler:
    """Compile one micro-step, with Inductor's options; the graphs' order is forward, backward."""
    compiler, compile_ = h100.Compiler(**options), torch.compile
    with (
        checks.ranks(),
        fake_device.fake_cuda(),
        compiler,
        mock.patch.object(torch, "compile", functools.partial(compile_, backend=compiler.backend)),
    ):
        settings = {**checks.SETTINGS, "NUM_LAYERS": str(layers)}
        trainer = checks.make_trainer(compiled="graph", settings=settings)
        tokens = torch.zeros(48, 2048, dtype=torch.long)
        grid = checks.train_gpt.row_grid(trainer.model, trainer.settings) if qat else None
        trainer.forward_backward(tokens, tokens.clone(), grid)
    return compiler


def report(compiler: h100.Compiler, top: int) -> str:
    """A table of both graphs, and of the kernels that move most, alike ones together."""
    lines = [
        f"{'':10}{'launches':>9}"
        + "".join(f"{kind:>10}" for kind in KINDS)
        + f"{'GB':>8}{'ms':>7}{'TFLOP':>8}{'ms':>7}"
    ]
    totals = collections.Counter()
    for graph in compiler.graphs:
        row = collections.Counter(
            graph.launches, launches=graph.launches.total(), bytes=graph.bytes, flops=graph.flops
        )
        totals.update(row)
        lines.append(line("backward" if graph.backward else "forward", row))
    lines += [
        line("both", totals),
        f"shared memory: at most {max(compiler.kernels.values())} bytes of "
        f"{h100.SHARED_MEMORY} in {len(compiler.kernels)} kernels",
    ]
    for graph in compiler.graphs:
        alike = collections.defaultdict(list)
        for each in graph.traffic:
            alike[each.kind, each.operations, each.buffers].append(each.bytes)
        lines += [
            "",
            f"{'backward' if graph.backward else 'forward'}: GB, calls, kind, operations, "
            "buffers of more than 1 MB, < read and > written",
        ]
        for (kind, operations, buffers), sizes in sorted(
            alike.items(), key=lambda pair: -sum(pair[1])
        )[:top]:
            lines.append(
                f"{sum(sizes) / 1e9:7.2f} {len(sizes):4} {kind:9} {operations[:90]}  "
                f"{buffers[:150]}"
            )
    return "\n".join(lines)


def line(name: str, row: collections.Counter) -> str:
    return (
        f"{name:10}{row['launches']:9}"
        + "".join(f"{row[kind]:10}" for kind in KINDS)
        + f"{row['bytes'] / 1e9:8.1f}{1e3 * row['bytes'] / BANDWIDTH:7.1f}"
        + f"{row['flops'] / 1e12:8.2f}{1e3 * row['flops'] / ARITHMETIC:7.1f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("options", nargs="*")
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--qat", action="store_true")
    chosen = parser.parse_args()
    pairs = (pair.split("=", 1) for pair in chosen.options)
    options = {name: ast.literal_eval(value) for name, value in pairs}
    print(report(measure(chosen.qat, chosen.layers, **options), chosen.top))
