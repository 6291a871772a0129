"""What can be known of the CUDA path without a GPU: python checks.py NAME, silent if all is well.

The record preset runs on fake tensors: a missing transfer, a shape that does not fit, a type that a kernel
would refuse or a graph too many shows, wrong numbers do not. test_without_gpu.py calls what is named check_*.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from unittest import mock

import fake_device  # first of all, see there
import flash_attn_interface
import numpy as np
import torch
import torch.distributed as dist
from fake_device import UniformProducts
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

import train_gpt
from train_gpt import Evaluator, Runtime, Trainer

# Of the record preset's micro-step, forward and backward; lower them when the code gets better.
LAUNCHES, TRAFFIC = 350, 100e9
# QUANT=fit would need to know the gradients.
SETTINGS = dict(PRESET="record", INT5_MLP="1", WARMUP_STEPS="1")


class Rows:
    """Training rows that are all alike."""

    rows, length = 1 << 20, 2048

    def row(self, position: int) -> np.ndarray:
        return np.zeros(self.length + 1, dtype=np.int64)


def quiet(line: str, console: bool = True) -> None:
    """A log that keeps nothing."""


def make_trainer(
    rank: int = 0, world_size: int = 8, settings: dict = SETTINGS, **changes
) -> Trainer:
    """A trainer of the record preset as it would be on one of `world_size` H100s."""
    settings = train_gpt.settings_from(settings)[0]
    runtime = Runtime(
        **{
            **dict(
                rank=rank,
                world_size=world_size,
                device=torch.device("cuda", 0),
                dtype=torch.bfloat16,
                attention="flash3",
            ),
            **changes,
        }
    )
    return Trainer(train_gpt.build_model(settings, runtime), settings, runtime, quiet, Rows(), 0)


@contextlib.contextmanager
def ranks():
    """Eight ranks of which this process is one, and the others are silent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def check_step() -> None:
    """Forward, backward and optimizer without late QAT and with it, and all products in bfloat16."""
    with ranks(), fake_device.fake_cuda(), UniformProducts() as products:
        trainer = make_trainer()
        trainer.warm_up()
        assert {dtype for _, dtype in products.counts} == {torch.bfloat16}, products.counts
        assert products.counts["flash_forward", torch.bfloat16] == 2 * 11
        trainer.step(1.0)
        assert (trainer.plan.rows, trainer.plan.micro_steps) == (48, 1)
        fit = train_gpt.Fit(trainer.coded)
        fit.observe()
        fit.observe()
        assert {x.device.type for x in fit.rows + fit.columns} == {"cuda"} and fit.samples == 1
        assert all(
            p.grad.device == p.device == trainer.runtime.device for p in trainer.model.parameters()
        )
        make_trainer(rank=7).optimizer.step(1, 1.0)  # this rank has no matrices of some shapes


def check_sdpa() -> None:
    """The same with torch's attention, on one GPU."""
    with fake_device.fake_cuda(), UniformProducts():
        make_trainer(
            world_size=1, attention="sdpa", settings={**SETTINGS, "NUM_LAYERS": "2"}
        ).warm_up()


def refused(trainer: Trainer, name: str, replacement) -> bool:
    """Whether a step fails for its types where a function of train_gpt is another."""
    tokens = torch.zeros(2, 2048, dtype=torch.long)
    try:
        with mock.patch.object(train_gpt, name, replacement):
            trainer.forward_backward(tokens, tokens, None)
    except TypeError:
        return True
    return False


def check_types() -> None:
    """Queries and keys reach attention in bfloat16, even where rms_norm returns float32, as it does under
    autocast since torch 2.12; and a function that mixes types would be noticed."""
    with fake_device.fake_cuda(), UniformProducts():
        trainer = make_trainer(world_size=1, settings={**SETTINGS, "NUM_LAYERS": "2"})
        assert not refused(trainer, "linear", train_gpt.linear)
        assert refused(trainer, "linear", lambda x, weight: x @ weight.T)
        flash_attn_interface.RECEIVED.clear()
        with torch.autocast("cuda", torch.bfloat16):
            bare_norm = functools.partial(torch.nn.functional.rms_norm, normalized_shape=(64,))
            assert (
                bare_norm(torch.zeros(2, 64, device="cuda", dtype=torch.bfloat16)).dtype
                == torch.float32
            )
            assert not refused(trainer, "norm", train_gpt.norm)
            assert set(flash_attn_interface.RECEIVED) == {(torch.bfloat16,) * 3}
            assert refused(
                trainer, "norm", lambda x: torch.nn.functional.rms_norm(x, (x.size(-1),))
            )


def check_graphs() -> None:
    """One graph to train, one with late QAT, one for each way to evaluate, without breaks; later steps need no
    other. There are as many for two layers as for eleven."""
    counter, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile

    def backend(module, inputs, options=None):  # options are Inductor's
        return counter(module, inputs)

    with (
        ranks(),
        fake_device.fake_cuda(),
        mock.patch.object(torch, "compile", functools.partial(compile_, backend=backend)),
    ):
        trainer = make_trainer(compiled="graph", settings={**SETTINGS, "NUM_LAYERS": "2"})
        evaluator = Evaluator(trainer.settings, trainer.runtime, None, quiet)
        trainer.warm_up()
        evaluator.warm_up(trainer.model)
        assert counter.frame_count == 4, counter.frame_count
        with torch.compiler.set_stance("fail_on_recompile"):
            trainer.warm_up()
            evaluator.warm_up(trainer.model)
    assert counter.frame_count == 4 and not counters["graph_break"], counters["graph_break"]


def check_code() -> None:
    """Inductor and Triton write and assemble the code of a micro-step for an H100, within known bounds."""
    import roofline  # needs triton

    compiler = roofline.measure()
    print(roofline.report(compiler, top=12))
    assert [graph.backward for graph in compiler.graphs] == [False, True]
    assert 0 < max(compiler.kernels.values()) <= 232_448
    assert sum(graph.launches.total() for graph in compiler.graphs) <= LAUNCHES
    assert sum(graph.bytes for graph in compiler.graphs) <= TRAFFIC


if __name__ == "__main__":
    globals()[f"check_{sys.argv[1]}"]()
