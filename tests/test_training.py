"""Optimizers, schedule, averages, late QAT under a compiler, batches, warm-up and determinism."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import types

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, random_tokens, stir, tiny_model, tiny_settings, write_shard
from torch import Tensor

import train_gpt
from train_gpt import (
    IGNORED,
    BatchPlan,
    Fit,
    Muon,
    Optimizer,
    Runtime,
    Settings,
    Trainer,
    TrainingRows,
    UserError,
    WeightAverage,
    coded_parameters,
    dequantize,
    newton_schulz,
    progress_at,
    quantize,
    row_grid,
    scale_at,
)


def quiet(line: str, console: bool = True) -> None:
    """A log that keeps nothing."""


@pytest.fixture
def make_trainer(data_folder):
    """make_trainer(log, runtime, **changes): a Trainer of a tiny model on real text."""

    def make(log=quiet, runtime: Runtime = Runtime(), **changes) -> Trainer:
        settings = tiny_settings(vocab_size=VOCAB_SIZE, **changes)
        files = train_gpt.find_shards(data_folder, "train")
        data = TrainingRows(files, settings.train_seq_len, settings.seed, VOCAB_SIZE)
        return Trainer(train_gpt.build_model(settings, runtime), settings, runtime, log, data, 0)

    return make


def trained(trainer: Trainer) -> tuple[list[float], list[Tensor]]:
    """Run to the end; the loss of every step and the final weights."""
    losses, step = [], trainer.step

    def recording(scale: float) -> Tensor:
        loss = step(scale)
        losses.append(float(loss))
        return loss

    trainer.step = recording
    trainer.run(None)
    return losses, [p.detach().clone() for p in trainer.model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Equal to the bit."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


# ---- Routing of parameters


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(tie_embeddings=False),
        dict(
            mtp_num_heads=0,
            memory_tokens=0,
            smear_enabled=False,
            bigram_vocab_size=0,
            backout_enabled=False,
        ),
    ],
    ids=["on", "untied", "off"],
)
def test_every_parameter_is_in_exactly_one_group(changes):
    model = tiny_model(**changes)
    optimizer = Optimizer(model, tiny_settings(**changes), Runtime())
    by_muon = [p for members, *_ in optimizer.muon.groups for p in members]
    by_adamw = [p for group in optimizer.adamw.param_groups for p in group["params"]]
    counts = collections.Counter(map(id, by_muon + by_adamw))
    assert counts == {id(p): 1 for p in model.parameters()}
    matrices = {
        id(p)
        for name, p in model.named_parameters()
        if name == "bigram.projection"
        or (name.startswith("blocks.") and p.ndim == 2 and not name.endswith("mix"))
    }
    assert {id(p) for p in by_muon} == matrices


def test_a_parameter_without_a_role_is_an_error():
    model = tiny_model()
    model.forgotten = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises((AssertionError, KeyError)):
        Optimizer(model, tiny_settings(), Runtime())


def test_every_parameter_moves_in_one_step():
    model = tiny_model(tie_embeddings=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, tiny_settings(tie_embeddings=False), Runtime())
    tokens = random_tokens(2, 25)
    model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    optimizer.step(0, 1.0)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    assert not any(p.grad.any() for p in model.parameters())


def test_weight_decay_is_decoupled_and_spares_the_memory_tokens():
    """With gradients of zero only the decay is left: lr * decay of each weight."""
    settings = tiny_settings(
        matrix_lr=0.1, muon_wd=0.5, adam_wd=0.25, tied_embed_lr=0.2, scalar_lr=0.3, head_lr=0.4
    )
    model = tiny_model()
    optimizer = Optimizer(model, settings, Runtime())
    factors = collections.defaultdict(
        lambda: 1 - 0.5 * 0.3 * 0.25, memory=1.0, mtp_heads=1 - 0.5 * 0.4 * 0.25
    )
    by_muon = {id(p) for members, *_ in optimizer.muon.groups for p in members}
    factors.update(
        {name: 1 - 0.5 * 0.1 * 0.5 for name, p in model.named_parameters() if id(p) in by_muon}
    )
    factors.update(dict.fromkeys(("embedding", "bigram.table"), 1 - 0.5 * 0.2 * 0.25))
    expected = {name: p.detach() * factors[name] for name, p in model.named_parameters()}
    optimizer.step(0, 0.5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), expected[name], msg=lambda text: f"{name}: {text}"
        )
    assert torch.equal(model.memory, expected["memory"])


# ---- Muon


@pytest.mark.parametrize("rows, columns", [(32, 32), (96, 32), (32, 96), (64, 48), (1, 8)])
def test_newton_schulz_makes_matrices_about_orthogonal(rows, columns):
    torch.manual_seed(rows + columns)
    u, _, v = torch.linalg.svd(torch.randn(5, rows, columns), full_matrices=False)
    values = (
        torch.logspace(0, -1.5, min(rows, columns))
        * torch.tensor([1e-3, 1.0, 50.0, 7.0, 0.1])[:, None]
    )
    out = newton_schulz(u * values[:, None, :] @ v, 5, torch.float32)
    found = torch.linalg.svdvals(out)
    assert out.shape == (5, rows, columns) and found.min() > 0.6 and found.max() < 1.3
    rotated = (
        u.transpose(1, 2) @ out @ v.transpose(1, 2)
    )  # diagonal, if the singular vectors stayed
    torch.testing.assert_close(
        rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), atol=2e-3, rtol=0
    )
    assert rotated.diagonal(dim1=1, dim2=2).min() > 0.6


def test_newton_schulz_in_bfloat16_is_about_orthogonal_too():
    torch.manual_seed(0)
    found = torch.linalg.svdvals(newton_schulz(torch.randn(4, 32, 96), 5, torch.bfloat16).float())
    assert found.min() > 0.6 and found.max() < 1.3


def test_newton_schulz_of_a_batch_is_that_of_each_matrix():
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 16) * torch.tensor([1.0, 1e-4, 1e4])[:, None, None]
    one_by_one = torch.cat([newton_schulz(matrix[None], 5, torch.float32) for matrix in matrices])
    torch.testing.assert_close(newton_schulz(matrices, 5, torch.float32), one_by_one)
    assert torch.equal(newton_schulz(torch.zeros(1, 4, 4), 5, torch.float32), torch.zeros(1, 4, 4))


def plain_muon(
    weight: Tensor, gradients: list[Tensor], lrs: list[float], momenta: list[float], decay: float
) -> Tensor:
    """Muon of one matrix as published: momentum, Nesterov, five iterations, scaled step."""
    velocity = torch.zeros_like(weight)
    for gradient, lr, momentum in zip(gradients, lrs, momenta):
        velocity = momentum * velocity + (1 - momentum) * gradient
        x = (1 - momentum) * gradient + momentum * velocity
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
        weight = (
            weight * (1 - lr * decay) - lr * math.sqrt(max(1, weight.size(0) / weight.size(1))) * x
        )
    return weight


def test_muon_equals_a_plain_implementation_for_each_matrix():
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 8), (8, 24), (8, 8)]
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    gradients = [[torch.randn(shape) for _ in range(4)] for shape in shapes]
    lrs, momenta = [0.1, 0.2, 0.05, 0.01], [0.85, 0.9, 0.95, 0.95]
    expected = [plain_muon(w.detach(), g, lrs, momenta, 0.3) for w, g in zip(weights, gradients)]
    muon = Muon(weights, tiny_settings(muon_wd=0.3), Runtime())
    for step in range(4):
        for weight, its_gradients in zip(weights, gradients):
            weight.grad = its_gradients[step].clone()
        muon.step(lrs[step], momenta[step])
    torch.testing.assert_close([w.detach() for w in weights], expected, rtol=1e-4, atol=1e-4)


def test_momentum_warms_up_and_learning_rates_follow_the_scale(monkeypatch):
    settings = tiny_settings(
        muon_momentum_warmup_start=0.8, muon_momentum=0.9, muon_momentum_warmup_steps=4
    )
    optimizer = Optimizer(tiny_model(), settings, Runtime())
    calls = []
    monkeypatch.setattr(optimizer.muon, "step", lambda lr, momentum: calls.append((lr, momentum)))
    for step in (0, 1, 4, 9):
        optimizer.step(step, 0.5)
    np.testing.assert_allclose(calls, [(0.0125, m) for m in (0.8, 0.825, 0.9, 0.9)])
    rates = {group["kind"]: group["lr"] for group in optimizer.adamw.param_groups}
    assert rates == dict(
        bigram_table=0.0175, embedding=0.0175, memory=0.0175, vector=0.0125, mtp_head=0.004
    )


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e3])
def test_clip_shortens_the_whole_gradient_to_the_limit_and_no_further(monkeypatch, limit):
    model, seen = tiny_model(), []
    optimizer = Optimizer(model, tiny_settings(grad_clip_norm=limit), Runtime())
    tokens = random_tokens(2, 25)
    (model(tokens[:, :-1], tokens[:, 1:])[0] / 40).backward()
    before = [p.grad.clone() for p in model.parameters()]
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in before]))
    assert 0.01 < norm < 100
    monkeypatch.setattr(
        optimizer.muon, "step", lambda *at: seen.extend(p.grad.clone() for p in model.parameters())
    )
    optimizer.step(0, 1.0)
    factor = limit / norm if limit == 1e-3 else 1.0
    torch.testing.assert_close(seen, [gradient * factor for gradient in before], rtol=1e-3, atol=0)


# ---- Schedule


def test_schedule_by_steps_is_constant_then_linear_to_zero():
    s = tiny_settings(iterations=100, warmdown_iters=40)
    scales = [scale_at(s, step, progress_at(s, step, 1e6)) for step in range(100)]
    np.testing.assert_allclose(scales, [1.0] * 60 + [(100 - step) / 40 for step in range(60, 100)])
    assert progress_at(s, 99, 0.0) < 1.0 == progress_at(s, 100, 0.0)


def test_schedule_without_warmdown_stays_constant():
    s = tiny_settings(iterations=10, warmdown_iters=0)
    assert [scale_at(s, step, progress_at(s, step, 0.0)) for step in range(10)] == [1.0] * 10


def simulate(s: Settings, step_seconds: float) -> tuple[list[float], float]:
    """Scales of a run whose steps take so long each, and when it ends."""
    scales, seconds = [], 0.0
    while (progress := progress_at(s, len(scales), seconds)) < 1.0:
        scales.append(scale_at(s, len(scales), progress))
        seconds += step_seconds
    return scales, seconds


@pytest.mark.parametrize("preset", ["record", "pocket"])
@pytest.mark.parametrize("steps", [1, 2, 5, 37, 400, 6642])
def test_schedule_by_clock_ends_in_time_whatever_the_length(preset, steps):
    s = Settings(**train_gpt.PRESETS[preset])
    scales, seconds = simulate(s, s.max_wallclock_seconds / (steps + 0.5))
    assert len(scales) == steps and seconds <= s.max_wallclock_seconds
    assert scales[0] == 1.0 and sorted(scales, reverse=True) == scales and scales[-1] > 0
    down = sum(scale < 1.0 for scale in scales)
    expected = min(s.warmdown_iters, s.warmdown_fraction * steps)
    assert abs(down - expected) <= 2
    if steps > 5:
        assert scales[-1] < 3 / expected
        falls = -np.diff(scales[-down:])
        np.testing.assert_allclose(falls, falls.mean(), rtol=0.05)  # linear


def test_schedule_by_clock_still_obeys_iterations():
    s = dataclasses.replace(Settings(), iterations=50, warmdown_iters=20)
    scales, seconds = simulate(s, 1.0)
    assert len(scales) == 50 and seconds == 50.0
    np.testing.assert_allclose(scales[-20:], [n / 20 for n in range(20, 0, -1)])


class Time:
    """A clock that moves only when it is told to, in place of train_gpt.time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(train_gpt, "time", types.SimpleNamespace(perf_counter=lambda: self.now))


def test_validation_during_training_is_outside_of_the_clock(make_trainer, monkeypatch):
    clock, calls = Time(monkeypatch), []
    trainer = make_trainer(iterations=7, val_loss_every=2, max_wallclock_seconds=100.0)
    step = trainer.step

    def slow_step(scale: float) -> Tensor:
        clock.now += 3.0
        return step(scale)

    def validate(steps: int, seconds: float) -> None:
        clock.now += 1000.0
        calls.append((steps, seconds))

    trainer.step = slow_step
    trainer.run(validate)
    assert (
        calls == [(2, 6.0), (4, 12.0), (6, 18.0)]
        and trainer.clock.seconds == 21.0
        and trainer.steps == 7
    )


def test_training_ends_in_time_even_if_late_steps_are_slower(make_trainer, monkeypatch):
    """Late QAT makes the last steps slower than those before."""
    clock, over = Time(monkeypatch), {}
    for limit in np.linspace(20.0, 21.0, 38):
        trainer = make_trainer(
            iterations=1000, max_wallclock_seconds=limit, warmdown_iters=40, late_qat_threshold=0.1
        )

        def step(scale: float, trainer=trainer) -> Tensor:
            clock.now += 0.3 if scale < 0.1 else 0.25
            trainer.steps += 1
            return torch.zeros(())

        trainer.step = step
        trainer.run(None)
        assert trainer.clock.seconds > limit - 0.7
        if trainer.clock.seconds > limit + 1e-6:
            over[round(float(limit), 2)] = round(trainer.clock.seconds - limit, 3)
    assert not over


# ---- Averages


def test_swa_is_the_mean_of_its_samples_in_float32():
    s = tiny_settings(swa_every=2, swa_start_scale=0.8)
    parameter = torch.nn.Parameter(torch.full((4,), 1e6))  # initial weights, far away
    average, kept = WeightAverage(s), []
    for step in range(1, 31):
        scale = 1 - step / 31
        if step > 6:
            parameter.data.copy_(torch.randn(4) + 3)
        average.after_step(step, scale, [parameter])
        if scale < 0.8 and step % 2 == 0:
            kept.append(parameter.detach().double())
    assert len(kept) == average.samples == 12 and average.weights[0].dtype == torch.float32
    torch.testing.assert_close(
        average.weights[0].double(), sum(kept) / len(kept), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("every", [1, 3])
def test_ema_is_its_definition_without_bias(every):
    s = tiny_settings(ema_enabled=True, ema_decay=0.9, ema_every=every, ema_start_scale=0.8)
    average, values = WeightAverage(s), []
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.full((5,), 1e9))
    for step in range(1, 31):
        if step > 6:
            parameter.data.copy_(torch.randn(5))
        average.after_step(step, 1 - step / 31, [parameter])
        if step % every == 0 and 1 - step / 31 < 0.8:
            values.append(parameter.detach().double())
    decay = 0.9**every
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values)) / sum(weights)
    assert average.samples == len(values)
    torch.testing.assert_close(average.weights[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        dict(swa_every=3, swa_start_scale=0.7),
        dict(ema_enabled=True, ema_every=2, ema_decay=0.8, ema_start_scale=0.9),
    ],
    ids=["swa", "ema"],
)
def test_exported_weights_are_the_average_of_those_that_training_passed_through(
    make_trainer, changes
):
    trainer, passed, lines = make_trainer(**changes), [], []
    initial = [p.detach().clone() for p in trainer.stored]
    after_step = trainer.average.after_step

    def keeping(step: int, scale: float, parameters) -> None:
        passed.append((step, scale, [p.detach().double() for p in parameters]))
        after_step(step, scale, parameters)

    trainer.average.after_step = keeping
    trainer.run(None)
    lines.append(trainer.average.load_into(trainer.stored))
    every, start, decay = (2, 0.9, 0.8**2) if "ema_every" in changes else (3, 0.7, 1.0)
    samples = [weights for step, scale, weights in passed if step % every == 0 and scale < start]
    factors = [decay ** (len(samples) - 1 - i) for i in range(len(samples))]
    expected = [
        sum(f * w for f, w in zip(factors, column)) / sum(factors) for column in zip(*samples)
    ]
    torch.testing.assert_close(
        [p.detach().double() for p in trainer.stored], expected, rtol=1e-5, atol=1e-6
    )
    name = "ema" if decay < 1 else "swa"
    assert len(samples) > 1 and lines == [f"weights: {name} of {len(samples)} samples"]
    assert {id(p) for p in trainer.stored} == {
        id(p) for name, p in trainer.model.named_parameters() if name != "mtp_heads"
    }
    assert not same([p.detach() for p in trainer.stored], initial)


@pytest.mark.parametrize(
    "changes",
    [dict(swa_enabled=False), dict(swa_every=1000), dict(ema_enabled=True, ema_start_scale=0.0)],
    ids=str,
)
def test_without_a_sample_the_last_weights_are_exported(make_trainer, changes):
    trainer = make_trainer(iterations=3, **changes)
    last = trained(trainer)[1]
    assert "last step" in trainer.average.load_into(trainer.stored)
    assert same([p.detach() for p in trainer.model.parameters()], last)


# ---- Late QAT


@torch.no_grad()
def really_quantized(trainer: Trainer, grid: train_gpt.Grid) -> train_gpt.GPT:
    """A copy of the trainer's model with weights rounded as an artifact rounds them."""
    model = train_gpt.GPT(trainer.settings, Runtime())
    model.load_state_dict(trainer.model.state_dict())
    for name, steps in grid.items():
        parameter = model.get_parameter(name)
        parameter.copy_(dequantize(quantize(parameter, *steps), *steps))
    return model


@pytest.fixture
def graphs(monkeypatch):
    """Have Runtime compile whole graphs with a backend that counts them and needs no C++ compiler."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    monkeypatch.setattr(
        logging.getLogger("torch.__trace"), "disabled", True
    )  # pytest would collect it
    counter = CompileCounterWithBackend("aot_eager")

    def compile(runtime: Runtime, function, unit: str):
        return (
            torch.compile(function, fullgraph=True, dynamic=False, backend=counter)
            if runtime.compiled == unit
            else function
        )

    monkeypatch.setattr(Runtime, "compile", compile)
    yield counter
    torch.compiler.reset()


@pytest.mark.parametrize(
    "scheme", [dict(quant="rows", int5_mlp="1"), dict(quant="fit")], ids=["rows", "fit"]
)
def test_late_qat_fires_in_a_compiled_run_in_one_more_graph(make_trainer, graphs, scheme):
    changes = dict(
        iterations=20,
        warmdown_iters=10,
        late_qat_threshold=0.35,
        num_layers=1,
        mtp_num_heads=0,
        **scheme,
    )
    trainer = make_trainer(runtime=Runtime(compiled="graph"), **changes)
    trainer.warm_up()
    assert graphs.frame_count == 2
    initial = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    stir(trainer.model)
    tokens, targets = trainer.plan.batch(trainer.data, 0, 0)
    grid = row_grid(trainer.model, trainer.settings)
    plain, rounded = (
        trainer.loss(trainer.model, trainer.coded, x, tokens, targets)[1] for x in (None, grid)
    )
    expected = really_quantized(trainer, grid)(tokens, targets)[1]
    assert abs(plain - expected) > 0.01
    torch.testing.assert_close(rounded, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(plain, trainer.model(tokens, targets)[1], rtol=1e-6, atol=0)
    trainer.model.load_state_dict(initial)
    losses, _ = trained(trainer)
    assert graphs.frame_count == 2  # nothing was compiled again while the clock ran
    assert trainer.qat_steps == 3  # at scales 0.3, 0.2 and 0.1
    eager, _ = trained(make_trainer(**changes))
    np.testing.assert_allclose(losses, eager, rtol=1e-4)


def test_scoring_a_fresh_model_runs_in_the_graphs_of_the_warm_up(data_folder, graphs):
    changes = dict(vocab_size=VOCAB_SIZE, num_layers=2, mtp_num_heads=0, eval_seq_len=16)
    table = train_gpt.ByteTable(
        train_gpt.load_tokenizer(data_folder / "tokenizer.model", VOCAB_SIZE)
    )
    tokens = train_gpt.load_validation(train_gpt.find_shards(data_folder, "val"), VOCAB_SIZE)[:200]
    s = tiny_settings(**changes)
    evaluator, eager = (
        train_gpt.Evaluator(s, Runtime(compiled=unit), table, quiet) for unit in ("graph", "no")
    )
    evaluator.warm_up(tiny_model(**changes))
    assert graphs.frame_count == 2  # two lengths of windows
    model = tiny_model(seed=1, **changes)
    for name in ("plain", "sliding"):
        found, expected = (e.score(model, tokens, name).val_loss for e in (evaluator, eager))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert graphs.frame_count == 2


def test_late_qat_changes_the_steps_from_its_threshold_on_and_none_before(make_trainer):
    lines = []
    on, _ = trained(make_trainer(log=lambda line: lines.append(line), late_qat_threshold=0.35))
    trainer = make_trainer(late_qat_threshold=0.0)
    off, _ = trained(trainer)
    assert on[:17] == off[:17] and on[17] != off[17] and trainer.qat_steps == 0
    assert sum(line.startswith("late_qat:on step:17 scale:0.3") for line in lines) == 1


def test_late_qat_rounds_to_the_steps_that_the_artifact_will_have(make_trainer):
    trainer = make_trainer(quant="rows", late_qat_threshold=0.9)
    expected = row_grid(trainer.model, trainer.settings)
    trainer.step(0.5)
    assert all(
        torch.equal(*pair) for name in expected for pair in zip(trainer.grid[name], expected[name])
    )
    assert set(expected) == set(coded_parameters(trainer.model, "rows")) and trainer.fit is None
    budget = 3000
    trainer = make_trainer(quant="fit", late_qat_threshold=0.1, artifact_max_bytes=budget)
    for scale in (0.19, 0.15, 0.12):
        trainer.step(scale)
    assert trainer.fit.samples == 2 and trainer.grid is None
    before = [p.detach().clone() for p in trainer.model.parameters()]
    twin = Fit(trainer.coded)
    twin.__dict__.update(rows=trainer.fit.rows, columns=trainer.fit.columns)
    twin.finish()
    expected = twin.grid(twin.octaves(budget))
    trainer.step(0.05)
    assert not same([p.detach() for p in trainer.model.parameters()], before)
    assert all(
        torch.equal(*pair) for name in expected for pair in zip(trainer.grid[name], expected[name])
    )


def test_the_sensitivity_comes_from_the_changes_of_the_gradients_near_the_end(
    make_trainer, monkeypatch
):
    trainer, gradients = make_trainer(late_qat_threshold=0.0), []
    monkeypatch.setattr(
        trainer.optimizer,
        "step",
        lambda *_: (
            gradients.append({name: p.grad.clone() for name, p in trainer.coded.items()}),
            trainer.optimizer.gradients.zero_(),
        ),
    )
    for scale in (1.0, 0.5, 0.2, 0.19, 0.1, 0.05):
        trainer.step(scale)
    assert trainer.fit.samples == 2
    for i, name in enumerate(trainer.coded):
        changes = [b[name] - a[name] for a, b in zip(gradients[3:], gradients[4:])]
        torch.testing.assert_close(trainer.fit.rows[i], sum((x @ x.T).diagonal() for x in changes))
        torch.testing.assert_close(trainer.fit.columns[i], sum(x.T @ x for x in changes))
    assert trainer.fit.rows[0].any()


def test_gradients_pass_straight_through_the_rounding(make_trainer):
    trainer = make_trainer()
    stir(trainer.model)
    grid = row_grid(trainer.model, trainer.settings)
    tokens, targets = trainer.plan.batch(trainer.data, 0, 0)
    trainer.forward_backward(tokens, targets, grid)
    model = really_quantized(trainer, grid)
    (model(tokens, targets)[0] / trainer.targets_per_step).backward()
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(
        [p.grad for p in trainer.model.parameters()], expected, rtol=1e-3, atol=1e-5
    )


# ---- Batches


@pytest.mark.parametrize("micro_batch", [24, 48, 72])
def test_gradients_do_not_depend_on_the_micro_batch(make_trainer, micro_batch, monkeypatch):
    gradients, losses, steps = [], [], []
    for size in (96, micro_batch):
        trainer = make_trainer(micro_batch_tokens=size)
        steps.append(trainer.plan.micro_steps)
        monkeypatch.setattr(
            trainer.optimizer,
            "step",
            lambda *at, flat=trainer.optimizer.gradients: gradients.append(flat.clone()),
        )
        losses.append(trainer.step(1.0))
    assert steps == [1, -(-4 // (micro_batch // 24))] and gradients[0].norm() > 0.1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[0], losses[1])


def test_the_gradient_is_that_of_the_mean_loss_of_a_target(make_trainer):
    trainer = make_trainer(mtp_num_heads=0)
    tokens, targets = trainer.plan.batch(trainer.data, 0, 0)
    loss = trainer.forward_backward(tokens, targets, None)
    mean = trainer.model.token_losses(tokens[:, 4:], targets[:, 4:]).mean()
    expected = torch.autograd.grad(mean, list(trainer.model.parameters()))
    torch.testing.assert_close(loss, mean.detach())
    found = [p.grad for p in trainer.model.parameters()]
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-6)


def step_rows(
    data: TrainingRows, s: Settings, world_size: int, step: int
) -> tuple[list[tuple], int]:
    """Rows of a step over all ranks, those with targets sorted, and how many filled up."""
    rows, filled, shapes = [], 0, set()
    for rank in range(world_size):
        plan = BatchPlan(s, Runtime(rank=rank, world_size=world_size))
        for micro_step in range(plan.micro_steps):
            tokens, targets = plan.batch(data, step, micro_step)
            shapes.add((plan.micro_steps, tokens.shape, targets.shape))
            assert tokens.min() >= 0  # what fills up goes through the model too
            for row, wanted in zip(tokens.tolist(), targets.tolist()):
                if set(wanted) == {IGNORED}:
                    filled += 1
                else:
                    assert row[1:] == wanted[:-1] and IGNORED not in wanted
                    rows.append((*row, wanted[-1]))
    assert len(shapes) == 1  # ranks with other shapes would wait for each other for ever
    return sorted(rows), filled


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
@pytest.mark.parametrize("micro_batch", [24, 48, 96])
def test_a_step_has_the_same_rows_for_every_number_of_ranks(tmp_path, rows, micro_batch):
    files = [
        write_shard(tmp_path / f"x_train_{i:06}.bin", np.arange(1000) + 1000 * i) for i in range(2)
    ]
    s = tiny_settings(train_batch_tokens=24 * rows, micro_batch_tokens=micro_batch)
    data = TrainingRows(files, 24, s.seed, 65536)
    for step in (0, 5, 40):
        expected = sorted(tuple(data.row(step * rows + i).tolist()) for i in range(rows))
        assert len(set(expected)) == rows
        for world_size in (1, 2, 3, 8):
            found, filled = step_rows(data, s, world_size, step)
            assert found == expected
            assert filled < world_size * max(1, micro_batch // 24) + world_size


def test_memory_decides_the_micro_batch_only_where_nobody_else_does():
    s = Settings(train_batch_tokens=2048 * 64)
    plan = BatchPlan(s, Runtime())
    wished = BatchPlan(dataclasses.replace(s, micro_batch_tokens=4096), Runtime())
    assert (wished.rows, wished.micro_steps) == (2, 32)
    assert plan.rows * plan.micro_steps >= 64 and plan.micro_steps > 1


# ---- Warm-up and determinism


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_run_after_warm_up_equals_one_without_to_the_bit(make_trainer, threshold):
    runs = []
    for steps in (0, 3):
        trainer = make_trainer(warmup_steps=steps, late_qat_threshold=threshold)
        random_state = torch.get_rng_state()
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.warm_up()
        assert same([p.detach() for p in trainer.model.parameters()], before)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert not trainer.optimizer.gradients.any()
        assert (trainer.steps, trainer.qat_steps, trainer.average.samples, trainer.grid) == (
            0,
            0,
            0,
            None,
        )
        runs.append(trained(trainer))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])


def test_warm_up_runs_every_graph(make_trainer, monkeypatch):
    trainer, seen = make_trainer(warmup_steps=2), []
    loss = trainer.loss
    trainer.loss = lambda model, coded, grid, tokens, targets: (
        seen.append((grid is None, tokens.shape)),
        loss(model, coded, grid, tokens, targets),
    )[1]
    trainer.warm_up()
    shape = trainer.plan.batch(trainer.data, 0, 0)[0].shape
    assert seen == [(True, shape)] * 2 + [(False, shape)] * 2


def test_runs_with_one_seed_agree_to_the_bit_and_another_seed_differs(make_trainer):
    first, second, other = (trained(make_trainer(seed=seed)) for seed in (3, 3, 4))
    assert first[0] == second[0] and same(first[1], second[1])
    assert all(a != b for a, b in zip(first[0], other[0]))


def test_the_seed_reaches_weights_and_data(make_trainer):
    first, other = make_trainer(seed=3), make_trainer(seed=4)
    assert not torch.equal(first.model.embedding, other.model.embedding)
    assert first.data.row(0).tolist() != other.data.row(0).tolist()


def test_training_lowers_the_loss(make_trainer):
    losses, _ = trained(
        make_trainer(iterations=60, warmdown_iters=30, grad_clip_norm=1.0, muon_momentum=0.9)
    )
    assert np.mean(losses[-10:]) < 0.8 * losses[0]
    assert abs(losses[0] - math.log(VOCAB_SIZE)) < 0.2


@pytest.mark.parametrize("log_every", [1, 0])
def test_a_loss_that_is_no_number_stops_the_run(make_trainer, log_every):
    trainer = make_trainer(train_log_every=log_every, iterations=3)
    step = trainer.step

    def breaking(scale: float) -> Tensor:
        with torch.no_grad():
            trainer.model.blocks[1].mlp.up[0, 0] = math.nan
        return step(scale)

    trainer.step = breaking
    with pytest.raises(UserError, match="nan.*diverged"):
        trainer.run(None)


def test_the_log_has_the_fields_lines(make_trainer):
    lines = []
    trainer = make_trainer(
        log=lines.append, train_log_every=4, iterations=6, late_qat_threshold=0.0
    )
    trainer.run(None)
    steps = [line.split()[0] for line in lines]
    assert steps == ["step:1/6", "step:4/6", "step:6/6"]
    for line in lines:
        loss, total, average = line.split()[1:]
        assert float(loss.removeprefix("train_loss:")) > 1
        milliseconds = float(total.removeprefix("train_time:").removesuffix("ms"))
        step = int(line[5])
        assert (
            abs(float(average.removeprefix("step_avg:").removesuffix("ms")) - milliseconds / step)
            <= 1
        )


def test_the_log_says_when_the_data_repeats(tmp_path):
    files = [
        write_shard(tmp_path / "x_train_0.bin", np.arange(24 * 11) % 60)
    ]  # ten rows: five in two steps
    settings, lines = (
        tiny_settings(train_batch_tokens=120, iterations=5, late_qat_threshold=0.0),
        [],
    )
    data = TrainingRows(files, 24, 0, 64)
    assert data.rows == 10
    Trainer(
        train_gpt.build_model(settings, Runtime()), settings, Runtime(), lines.append, data, 0
    ).run(None)
    assert [line.split(":")[1].split()[0] for line in lines if line.startswith("data:")] == [
        "epoch"
    ]
    assert [line for line in lines if "epoch 3" in line]


@pytest.mark.cuda
def test_a_compiled_gpu_run_counts_its_qat_steps(data_folder):
    settings = tiny_settings(vocab_size=VOCAB_SIZE, late_qat_threshold=0.35, device="cuda")
    with contextlib.ExitStack() as stack:
        stack.callback(torch.compiler.reset)
        runtime = train_gpt.start_runtime(settings)
        data = TrainingRows(train_gpt.find_shards(data_folder, "train"), 24, 0, VOCAB_SIZE)
        trainer = Trainer(
            train_gpt.build_model(settings, runtime), settings, runtime, quiet, data, 0
        )
        trainer.warm_up()
        losses, _ = trained(trainer)
    assert trainer.qat_steps == 3 and np.isfinite(losses).all() and losses[-1] < losses[0]
