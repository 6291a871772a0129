"""What only a GPU can show. Skipped where there is none."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import bench_worker
import train_gpt
from conftest import quiet, random_tokens, tiny_model, tiny_settings
from train_gpt import (
    ATTENTION_BACKENDS,
    AttentionInputs,
    BatchPlan,
    Fit,
    Runtime,
    Settings,
    StepPlan,
    Trainer,
    TrainingRows,
    WeightAverage,
    build_model,
    coded_parameters,
    find_shards,
    pack_under_cap,
    read_artifact,
    stored_settings,
)

pytestmark = pytest.mark.cuda
PACKAGES = dict(flash3="flash_attn_interface", flash2="flash_attn")
# A step before any phase begins, and one of late QAT.
STEP = StepPlan(scale=1.0, momentum=0.95)
LATE_STEP = StepPlan(scale=0.05, momentum=0.95, late_qat_due=True)


def gpu_runtime(**changes) -> Runtime:
    """The first GPU with bfloat16, but for these changes."""
    return Runtime(**{**dict(device=torch.device("cuda", 0), dtype=torch.bfloat16), **changes})


class Rows:
    """Training rows that repeat with a period, so that a short run learns them."""

    num_rows = 64
    length = 24

    def row(self, position: int) -> np.ndarray:
        """Twelve tokens in turn, from another one on at each position."""
        return 4 + (np.arange(self.length + 1) + position) % 12


def make_trainer(runtime: Runtime, **changes) -> Trainer:
    """A trainer of a tiny model."""
    settings = tiny_settings(micro_batch_tokens=96, **changes)
    model = tiny_model(runtime, stirred=False, **changes).to(runtime.device)
    return Trainer(model, settings, runtime, quiet, Rows(), 0)


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    """The losses of so many steps before the warmdown."""
    losses = []
    for step in range(steps):
        plan = StepPlan(scale=1.0, momentum=trainer.schedule.momentum(step))
        losses.append(float(trainer.step(plan)))
    return losses


def attention_by_definition(inputs: AttentionInputs, starts: Tensor) -> Tensor:
    """Causal attention with two queries for each key, in the inputs' type, within segments."""
    length = inputs.queries.size(1)
    keys = inputs.keys.repeat_interleave(2, dim=2)
    values = inputs.values.repeat_interleave(2, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs.queries, keys) / 8
    future = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
    segments = starts.cumsum(1)
    others = segments[:, None, :, None] != segments[:, None, None, :]
    weights = scores.masked_fill(future | others, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


@pytest.mark.parametrize("has_segments", [False, True])
@pytest.mark.parametrize("name", ATTENTION_BACKENDS)
def test_attention_is_near_the_float32_reference(name, has_segments):
    if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is not installed")
    if name == "flash3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs an H100")
    generator = torch.Generator("cuda").manual_seed(0)
    parts = []
    for heads in (8, 4, 4):
        part = torch.randn(2, 200, heads, 64, device="cuda", generator=generator)
        parts.append(part.requires_grad_())
    starts = torch.zeros(2, 200, dtype=torch.bool, device="cuda")
    starts[:, 0] = True
    backend = ATTENTION_BACKENDS[name]
    limits = None
    if has_segments:
        starts[0, 77] = starts[1, 1] = starts[1, 130] = True
        limits = backend.limits_of(starts)
    expected = attention_by_definition(AttentionInputs(*parts), starts)
    halves = [part.bfloat16() for part in parts]
    found = backend.attend(AttentionInputs(*halves, limits))
    assert found.dtype == torch.bfloat16 and (found.float() - expected).abs().max() < 0.03
    theirs = torch.autograd.grad(expected.square().sum(), parts)
    mine = torch.autograd.grad(found.float().square().sum(), parts)
    for found_gradient, gradient in zip(mine, theirs, strict=True):
        assert (found_gradient - gradient).norm() < 0.03 * gradient.norm()


def test_a_training_step_compiles_without_breaks():
    compiled = make_trainer(gpu_runtime(compiled="graph"))
    eager = make_trainer(gpu_runtime())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for plan in (STEP, LATE_STEP):
        found = float(compiled.step(plan))
        assert found == pytest.approx(float(eager.step(plan)), abs=0.03)
    assert compiled.qat_steps == 1 and not torch._dynamo.utils.counters["graph_break"]


def test_a_short_run_ends_where_it_ends_on_the_cpu():
    on_gpu = losses_of(make_trainer(gpu_runtime()), 40)
    on_cpu = losses_of(make_trainer(Runtime()), 40)
    assert on_gpu[-1] < on_gpu[0] - 1
    assert on_gpu[-1] == pytest.approx(on_cpu[-1], abs=0.15)


def test_a_micro_batch_needs_no_more_than_its_estimate():
    """MICRO_BATCH_TOKENS=0 counts 80 bytes a position, layer and channel, and keeps 40% back."""
    settings = Settings(vocab_size=1024, train_batch_tokens=65536, micro_batch_tokens=16384)
    attention, _ = train_gpt.choose_attention(settings, torch.device("cuda", 0), torch.bfloat16)
    runtime = gpu_runtime(attention=attention)
    model = build_model(settings, runtime)
    batches = BatchPlan(settings, runtime)
    assert batches.micro_batch_rows * settings.train_seq_len == 16384
    tokens = random_tokens(batches.micro_batch_rows, settings.train_seq_len, vocab_size=1024).cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(tokens, tokens)[0].backward()
    gradients = sum(p.numel() * 4 for p in model.parameters())
    used = torch.cuda.max_memory_allocated() - before - gradients
    assert used < 16384 * 80 * settings.num_layers * settings.model_dim / 0.6


def test_averages_stay_on_the_device():
    model = tiny_model(gpu_runtime()).cuda()
    average = WeightAverage()
    for _ in range(2):
        average.add(list(model.parameters()), 0.9)
    for weight in average.weights:
        assert weight.is_cuda and weight.dtype == torch.float32


def record_trainer(runtime: Runtime, folder: Path, **changes) -> Trainer:
    """The record preset on the given shards, whose vocabulary is smaller."""
    s = Settings(vocab_size=1024, **changes)
    data = TrainingRows(find_shards(folder, "train"), s.train_seq_len, s.seed, s.vocab_size)
    return Trainer(build_model(s, runtime), s, runtime, quiet, data, 0)


def best_runtime() -> Runtime:
    """What a run would choose here."""
    device = torch.device("cuda", 0)
    settings = Settings()
    dtype, _ = train_gpt.choose_dtype(settings, device)
    attention, _ = train_gpt.choose_attention(settings, device, dtype)
    return gpu_runtime(dtype=dtype, attention=attention, compiled="graph")


def test_fifty_steps_of_the_record_preset_lose_as_they_do_on_the_cpu(data_folder):
    changes = dict(train_batch_tokens=2048, micro_batch_tokens=2048)
    on_gpu = torch.tensor(losses_of(record_trainer(best_runtime(), data_folder, **changes), 50))
    on_cpu = torch.tensor(losses_of(record_trainer(Runtime(), data_folder, **changes), 50))
    # It learns, and the one as the other.
    assert on_cpu[-5:].mean() < on_cpu[:5].mean() - 1
    assert (on_gpu - on_cpu)[:5].abs().max() < 0.05
    assert (on_gpu[-10:].mean() - on_cpu[-10:].mean()).abs() < 0.15


def test_step_time_share_of_the_peak_and_memory_of_the_record_preset(data_folder, capsys):
    """A rank's part of a step on 8 GPUs; prints what it finds."""
    trainer = record_trainer(best_runtime(), data_folder, train_batch_tokens=98304)
    trainer.warm_up()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.utils.counters.clear()
    started = torch.cuda.Event(enable_timing=True)
    ended = torch.cuda.Event(enable_timing=True)
    started.record()
    for _ in range(10):
        loss = trainer.step(STEP)
    ended.record()
    ended.synchronize()
    # Of ten steps, in milliseconds.
    seconds = started.elapsed_time(ended) / 1e4
    flops = bench_worker.flops_per_token(trainer.model, trainer.settings) * 98304 / seconds
    peak = bench_worker.peak_flops(trainer.runtime.device) or math.nan
    memory = torch.cuda.max_memory_allocated()
    with capsys.disabled():
        print(
            f"\n{torch.cuda.get_device_name()}: {1000 * seconds:.1f} ms for 98,304 tokens in "
            f"{trainer.batches.micro_steps} passes, {flops / 1e12:.0f} TFLOP/s, "
            f"mfu {flops / peak:.3f}, {memory / 2**30:.1f} GiB"
        )
    assert math.isfinite(float(loss)) and memory < trainer.runtime.memory_bytes()
    # All were compiled in the warm-up.
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def fitted_on(device: str, settings: Settings) -> tuple[train_gpt.Grid, bytes]:
    """Steps and an artifact of the same model and the same gradients, computed on a device."""
    model = train_gpt.GPT(settings, Runtime()).to(device)
    model.load_state_dict(tiny_model(quant="fit").state_dict())
    fit = Fit(coded_parameters(model, "fit"))
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        for weight in fit.parameters:
            weight.grad = torch.randn(weight.shape, generator=generator).to(device)
        fit.observe()
    fit.finish()
    manifest = dict(tokenizer="", settings=stored_settings(settings, "model", "evaluation"))
    return fit.grid(-4.0), pack_under_cap(model, settings, manifest, 6000, fit)


def test_steps_are_fitted_on_the_gpu_as_on_the_cpu():
    """The same costs give the same steps; a few codes differ; both artifacts fit the budget."""
    settings = tiny_settings(quant="fit", zstd_level=3)
    expected_grid, on_cpu = fitted_on("cpu", settings)
    grid, on_gpu = fitted_on("cuda", settings)
    read_artifact(on_gpu, "an artifact")
    assert max(len(on_cpu), len(on_gpu)) <= 6000 and abs(len(on_cpu) - len(on_gpu)) < 120
    for name, expected in expected_grid.items():
        for found, steps in zip(grid[name], expected, strict=True):
            assert (found.cpu() == steps).float().mean() > 0.9, name
