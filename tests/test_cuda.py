"""What only a GPU can show. Skipped where there is none."""
from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from conftest import random_tokens, tiny_model, tiny_settings

import train_gpt
from train_gpt import ATTENTION, BatchPlan, Runtime, Trainer, WeightAverage

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
    q, k, v = (torch.randn(2, 200, heads, 64, device="cuda", generator=generator, requires_grad=True)
               for heads in (8, 4, 4))
    shared_k, shared_v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, shared_k) / 8
    future = torch.ones(200, 200, dtype=torch.bool, device="cuda").triu(1)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -math.inf).softmax(-1), shared_v)
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
    assert losses[0][-1] < losses[0][0] - 1 and losses[0][-1] == pytest.approx(losses[1][-1], abs=0.15)


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
    used = torch.cuda.max_memory_allocated() - before - sum(p.numel() * 4 for p in model.parameters())
    assert used < 16384 * 80 * settings.num_layers * settings.model_dim / 0.6


def test_averages_stay_on_the_device():
    settings = tiny_settings(swa_every=1)
    model, average = tiny_model(runtime()).cuda(), WeightAverage(settings)
    for step in (1, 2):
        average.after_step(step, 0.0, list(model.parameters()))
    assert all(weight.is_cuda and weight.dtype == torch.float32 for weight in average.weights)
