"""What can be known of the CUDA path without a GPU: python checks.py NAME ..., one after the other.

The record preset runs on fake tensors: a missing transfer, a shape that does not fit, a type that a
kernel would refuse or a graph too many shows, wrong numbers do not. NAME is a key of CHECKS; the
first check that fails ends it with a traceback.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from unittest import mock

# This command lies two folders below train_gpt.py.
sys.path.append(str(Path(__file__).resolve().parents[2]))

# First of all, see there.
import fake_device  # isort: skip

import flash_attn_interface
import torch
from fake_device import UniformProducts
from fake_trainer import ODD, SETTINGS, SHALLOW, make_trainer, quiet, ranks
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_gpt
from train_gpt import AdaptiveEvaluator, Evaluator, StepPlan, Trainer

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
# At most so many launches and bytes in the record preset's micro-step, forward and backward. Lower
# them when the code gets better. Inductor of torch 2.11 fuses less: 363 launches, 112 GB.
LAUNCHES = 350 if TORCH >= (2, 13) else 370
TRAFFIC = 100e9 if TORCH >= (2, 13) else 115e9
# A step of the middle of a run.
STEP = StepPlan(scale=1.0, momentum=0.99)


def check_step() -> None:
    """Forward, backward and optimizer, with and without late QAT; all products in bfloat16."""
    with ranks(), fake_device.fake_cuda(), UniformProducts() as products:
        trainer = make_trainer(ODD)
        trainer.warm_up()
        assert {dtype for _, dtype in products.counts} == {torch.bfloat16}, products.counts
        # Before the loop three visits, then four, with late QAT and without.
        assert products.counts["flash_forward", torch.bfloat16] == 3 + 2 * 4
        trainer.step(STEP)

        fit = train_gpt.Fit(trainer.coded)
        fit.observe()
        fit.observe()
        assert fit.samples == 1
        assert {x.device.type for x in fit.row_costs + fit.column_costs} == {"cuda"}
        for parameter in trainer.model.parameters():
            assert parameter.grad.device == parameter.device == trainer.runtime.device

        # This rank has no matrices of some shapes.
        make_trainer(ODD, rank=7).optimizer.step(scale=1.0, momentum=0.99)
        make_trainer({**ODD, "SPELLING_LR": "0.01"}).optimizer.step(scale=1.0, momentum=0.99)

        # A rank's 48 rows fit an H100 in one pass, with 17 visits too, but no deeper model's.
        for num_loops, expected in (("2", (48, 1)), ("6", (24, 2))):
            settings = train_gpt.settings_from({**SETTINGS, "NUM_LOOPS": num_loops})[0]
            batches = train_gpt.BatchPlan(settings, trainer.runtime)
            assert (batches.micro_batch_rows, batches.micro_steps) == expected


def check_sdpa() -> None:
    """The same with torch's attention, on one GPU.

    Plain products stand for its kernels, since torch asks a real GPU which of these it has.
    """
    plain = sdpa_kernel(SDPBackend.MATH)
    with fake_device.fake_cuda(), UniformProducts(), plain:
        make_trainer(SHALLOW, world_size=1, attention="sdpa").warm_up()


def refused(trainer: Trainer, name: str, replacement) -> bool:
    """Whether a step fails for its types where a function of train_gpt is another."""
    tokens = torch.zeros(2, 2048, dtype=torch.long)
    try:
        with mock.patch.object(train_gpt, name, replacement):
            trainer.forward_backward(tokens, tokens, None)
    except TypeError:
        return True
    return False


def mixing_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A product that leaves the weight in float32."""
    return x @ weight.T


def float32_norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm as it is under autocast since torch 2.12: in float32."""
    return torch.nn.functional.rms_norm(x.float(), (x.size(-1),))


def check_types() -> None:
    """Queries and keys reach attention in bfloat16, under autocast too; mixed types are noticed."""
    with fake_device.fake_cuda(), UniformProducts():
        trainer = make_trainer(SHALLOW, world_size=1)
        assert not refused(trainer, "linear", train_gpt.linear)
        assert refused(trainer, "linear", mixing_linear)
        flash_attn_interface.RECEIVED.clear()
        with torch.autocast("cuda", torch.bfloat16):
            bare = torch.zeros(2, 64, device="cuda", dtype=torch.bfloat16)
            bare = torch.nn.functional.rms_norm(bare, (64,))
            assert bare.dtype == (torch.float32 if TORCH >= (2, 12) else torch.bfloat16)
            assert not refused(trainer, "norm", train_gpt.norm)
            assert set(flash_attn_interface.RECEIVED) == {(torch.bfloat16,) * 3}
            assert refused(trainer, "norm", float32_norm)


def check_graphs() -> None:
    """One graph to train, one with late QAT, one for each way to evaluate; none breaks.

    Later steps need no other graph.
    """
    # torch 2.9's AOTAutograd refuses graphs whose inputs are fake. Dynamo's part is the same.
    counter = CompileCounterWithBackend("aot_eager" if TORCH >= (2, 11) else "eager")

    def backend(module, inputs, options=None):
        """The counter, which knows none of Inductor's options."""
        return counter(module, inputs)

    compile_with_it = functools.partial(torch.compile, backend=backend)
    replaced = mock.patch.object(torch, "compile", compile_with_it)
    with ranks(), fake_device.fake_cuda(), replaced:
        trainer = make_trainer(SHALLOW, compiled="graph")
        evaluator = Evaluator(trainer.settings, trainer.runtime, None, quiet)
        trainer.warm_up()
        evaluator.warm_up(trainer.model)
        assert counter.frame_count == 5, counter.frame_count
        with torch.compiler.set_stance("fail_on_recompile"):
            trainer.warm_up()
            evaluator.warm_up(trainer.model)
    assert counter.frame_count == 5
    assert not counters["graph_break"], counters["graph_break"]


def check_documents() -> None:
    """Documents are scored and learnt from: one graph for each length of window, in bfloat16."""
    compiler = CompileCounterWithBackend("aot_eager" if TORCH >= (2, 11) else "eager")

    def backend(module, inputs, options=None):
        """The counter, which knows none of Inductor's options."""
        return compiler(module, inputs)

    compile_with_it = functools.partial(torch.compile, backend=backend)
    # How many n-grams occur, fake tokens do not tell.
    of_documents = dict(TTT_BATCH_SIZE="2", TTT_CHUNK_SIZE="1024", TTT_NGRAM_ORDER="0")
    settings = {**SHALLOW, "TTT_ENABLED": "1", **of_documents}
    replaced = mock.patch.object(torch, "compile", compile_with_it)
    with ranks(), fake_device.fake_cuda(), replaced:
        trainer = make_trainer(settings, compiled="graph")
        evaluator = AdaptiveEvaluator(trainer.settings, trainer.runtime, None, quiet)
        evaluator.warm_up(trainer.model)
        # A new learner, of another model, compiles nothing on the clock.
        other = train_gpt.build_model(trainer.settings, trainer.runtime)
        with torch.compiler.set_stance("fail_on_recompile"):
            evaluator.warm_up(other)
    # Windows of 1,024 and 2,048 positions.
    assert compiler.frame_count == 2, compiler.frame_count
    assert not counters["graph_break"], counters["graph_break"]


def check_code() -> None:
    """Inductor and Triton write and assemble a micro-step for an H100, within known bounds."""
    # This needs triton.
    import roofline

    compiler = roofline.measure()
    print(roofline.report(compiler, top=12))
    assert [graph.backward for graph in compiler.graphs] == [False, True]
    assert 0 < max(compiler.kernels.values()) <= 232_448
    assert sum(graph.launches.total() for graph in compiler.graphs) <= LAUNCHES
    assert sum(graph.bytes for graph in compiler.graphs) <= TRAFFIC


CHECKS = dict(
    step=check_step,
    sdpa=check_sdpa,
    types=check_types,
    graphs=check_graphs,
    documents=check_documents,
    code=check_code,
)

if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        CHECKS[chosen]()
