"""What only a GPU can show. Skipped where there is none."""

from __future__ import annotations

import importlib.util
import math

import bench_worker
import pytest
import torch
from conftest import random_tokens, tiny_model, tiny_settings

import train_gpt
from train_gpt import (
    ATTENTION,
    BatchPlan,
    Runtime,
    Trainer,
    TrainingRows,
    WeightAverage,
    find_shards,
)

pytestmark = pytest.mark.cuda
PACKAGES = dict(flash3="flash_attn_interface", flash2="flash_attn")


def runtime(**changes) -> Runtime:
    return Runtime(**{**dict(device=torch.device("cuda", 0), dtype=torch.bfloat16), **changes})


class Rows:
    """Training rows that repeat with a period, so that a short run learns them."""

    rows, length = 64, 24

    def row(self, position: int):
        return (4 + (torch.arange(self.length + 1) + position) % 12).numpy()


def trainer(where: Runtime, **changes) -> Trainer:
    settings = tiny_settings(micro_batch_tokens=96, **changes)
    model = tiny_model(where, stirred=False, **changes).to(where.device)
    return Trainer(model, settings, where, lambda *_, **__: None, Rows(), 0)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_near_the_float32_reference(name):
    if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is not installed")
    if name == "flash3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs an H100")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, 200, heads, 64, device="cuda", generator=generator, requires_grad=True)
        for heads in (8, 4, 4)
    )
    shared_k, shared_v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, shared_k) / 8
    future = torch.ones(200, 200, dtype=torch.bool, device="cuda").triu(1)
    expected = torch.einsum(
        "bhqk,bkhd->bqhd", scores.masked_fill(future, -math.inf).softmax(-1), shared_v
    )
    found = ATTENTION[name](*(x.bfloat16() for x in (q, k, v)))
    assert found.dtype == torch.bfloat16 and (found.float() - expected).abs().max() < 0.03
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for mine, theirs in zip(torch.autograd.grad(found.float().square().sum(), (q, k, v)), wanted):
        assert (mine - theirs).norm() < 0.03 * theirs.norm()


def test_a_training_step_compiles_without_breaks():
    compiled, eager = trainer(runtime(compiled="graph")), trainer(runtime())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for scale in (1.0, 0.05):  # without and with late QAT
        losses = [float(each.step(scale)) for each in (compiled, eager)]
        assert losses[0] == pytest.approx(losses[1], abs=0.03)
    assert compiled.qat_steps == 1 and not torch._dynamo.utils.counters["graph_break"]


def test_a_short_run_ends_where_it_ends_on_the_cpu():
    gpu, cpu = trainer(runtime()), trainer(Runtime())
    losses = [[float(each.step(1.0)) for _ in range(40)] for each in (gpu, cpu)]
    assert losses[0][-1] < losses[0][0] - 1 and losses[0][-1] == pytest.approx(
        losses[1][-1], abs=0.15
    )


def test_a_micro_batch_needs_no_more_than_its_estimate():
    """MICRO_BATCH_TOKENS=0 counts 80 bytes a position, layer and channel, and keeps 40% of memory back."""
    settings = train_gpt.Settings(train_batch_tokens=65536, micro_batch_tokens=16384)
    attention, _ = train_gpt.choose_attention(settings, torch.device("cuda", 0), torch.bfloat16)
    where = runtime(attention=attention)
    model = train_gpt.build_model(settings, where)
    plan = BatchPlan(settings, where)
    assert plan.rows * settings.train_seq_len == 16384
    tokens = random_tokens(plan.rows, settings.train_seq_len, vocab_size=1024).cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(tokens, tokens)[0].backward()
    used = (
        torch.cuda.max_memory_allocated() - before - sum(p.numel() * 4 for p in model.parameters())
    )
    assert used < 16384 * 80 * settings.num_layers * settings.model_dim / 0.6


def test_averages_stay_on_the_device():
    settings = tiny_settings(swa_every=1)
    model, average = tiny_model(runtime()).cuda(), WeightAverage(settings)
    for step in (1, 2):
        average.after_step(step, 0.0, list(model.parameters()))
    assert all(weight.is_cuda and weight.dtype == torch.float32 for weight in average.weights)


def record(where: Runtime, folder, **changes) -> Trainer:
    """The record preset on the given shards, whose vocabulary is smaller."""
    settings = train_gpt.Settings(**changes)
    data = TrainingRows(
        find_shards(folder, "train"), settings.train_seq_len, settings.seed, settings.vocab_size
    )
    return Trainer(
        train_gpt.build_model(settings, where), settings, where, lambda *_, **__: None, data, 0
    )


def best_runtime() -> Runtime:
    """What a run would choose here."""
    device, settings = torch.device("cuda", 0), train_gpt.Settings()
    dtype, _ = train_gpt.choose_dtype(settings, device)
    return runtime(
        dtype=dtype,
        attention=train_gpt.choose_attention(settings, device, dtype)[0],
        compiled="graph",
    )


def test_fifty_steps_of_the_record_preset_lose_as_they_do_on_the_cpu(data_folder):
    changes = dict(train_batch_tokens=2048, micro_batch_tokens=2048)
    gpu, cpu = (
        record(best_runtime(), data_folder, **changes),
        record(Runtime(), data_folder, **changes),
    )
    losses = torch.tensor([[float(each.step(1.0)) for _ in range(50)] for each in (gpu, cpu)])
    assert losses[1, -5:].mean() < losses[1, :5].mean() - 1  # it learns, and the one as the other
    assert (losses[0] - losses[1])[:5].abs().max() < 0.05
    assert (losses[0, -10:].mean() - losses[1, -10:].mean()).abs() < 0.15


def test_step_time_share_of_the_peak_and_memory_of_the_record_preset(data_folder, capsys):
    """A rank's part of a step on 8 GPUs; prints what it finds."""
    trainer = record(best_runtime(), data_folder, train_batch_tokens=98304)
    trainer.warm_up()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.utils.counters.clear()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(10):
        loss = trainer.step(1.0)
    ended.record()
    ended.synchronize()
    seconds, name = started.elapsed_time(ended) / 1e4, torch.cuda.get_device_name()
    flops = bench_worker.flops_per_token(trainer.model, trainer.settings) * 98304 / seconds
    peak = bench_worker.peak_flops(trainer.runtime.device) or math.nan
    memory = torch.cuda.max_memory_allocated()
    with capsys.disabled():
        print(
            f"\n{name}: {1000 * seconds:.1f} ms for 98,304 tokens in {trainer.plan.micro_steps} passes, "
            f"{flops / 1e12:.0f} TFLOP/s, mfu {flops / peak:.3f}, {memory / 2**30:.1f} GiB"
        )
    assert math.isfinite(float(loss)) and memory < trainer.runtime.memory_bytes()
    assert not torch._dynamo.utils.counters["stats"][
        "unique_graphs"
    ]  # all were compiled in the warm-up


def test_steps_are_fitted_on_the_gpu_as_on_the_cpu():
    """The same sensitivity gives the same steps; codes differ in a few ties; the artifact fits the same budget."""
    settings = tiny_settings(quant="fit", zstd_level=3)
    sizes, grids = [], []
    for device in ("cpu", "cuda"):
        model = train_gpt.GPT(settings, Runtime()).to(device)
        model.load_state_dict(tiny_model(quant="fit").state_dict())
        fit, generator = (
            train_gpt.Fit(train_gpt.coded_parameters(model, "fit")),
            torch.Generator().manual_seed(2),
        )
        for _ in range(5):
            for weight in fit.parameters:
                weight.grad = torch.randn(weight.shape, generator=generator).to(device)
            fit.observe()
        fit.finish()
        manifest = dict(
            tokenizer="",
            settings={
                f.name: getattr(settings, f.name)
                for f in train_gpt.fields_of("model", "evaluation")
            },
        )
        data = train_gpt.pack_under_cap(model, settings, manifest, 6000, fit)
        sizes.append(len(data))
        grids.append(fit.grid(-4.0))
        train_gpt.read_artifact(data, "a")
    assert max(sizes) <= 6000 and abs(sizes[0] - sizes[1]) < 120
    for name, steps in grids[0].items():
        for found, expected in zip(grids[1][name], steps):
            assert (found.cpu() == expected).float().mean() > 0.9, name
