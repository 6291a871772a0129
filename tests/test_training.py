"""The trainer: late QAT, also compiled; what is exported; batches; clock; warm-up; determinism."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt
from conftest import LOOPED, VOCAB_SIZE, quiet, stir, tiny_model, tiny_settings, write_shard
from train_gpt import (
    IGNORED,
    BatchPlan,
    ByteTable,
    Evaluator,
    Fit,
    Grid,
    Run,
    Runtime,
    Settings,
    StepPlan,
    Trainer,
    TrainingRows,
    UserError,
    build_model,
    coded_parameters,
    dequantize,
    find_shards,
    load_tokenizer,
    load_validation,
    quantize,
    row_grid,
)


@pytest.fixture
def make_trainer(data_folder):
    """make_trainer(log, runtime, **changes): a Trainer of a tiny model on real text."""

    def make(log=quiet, runtime: Runtime | None = None, **changes) -> Trainer:
        runtime = runtime or Runtime()
        settings = tiny_settings(vocab_size=VOCAB_SIZE, **changes)
        files = find_shards(data_folder, "train")
        data = TrainingRows(files, settings.train_seq_len, settings.seed, VOCAB_SIZE)
        return Trainer(build_model(settings, runtime), settings, runtime, log, data, 0)

    return make


def plan_at(scale: float, **phases: bool) -> StepPlan:
    """A step of this scale, in which only these phases are on."""
    return StepPlan(scale=scale, momentum=0.9, **phases)


def weights_of(trainer: Trainer) -> list[Tensor]:
    """A copy of all parameters."""
    return [p.detach().clone() for p in trainer.model.parameters()]


def trained(trainer: Trainer) -> tuple[list[float], list[Tensor]]:
    """Run to the end; the loss of every step and the final weights."""
    losses = []
    step = trainer.step

    def recording(plan: StepPlan) -> Tensor:
        loss = step(plan)
        losses.append(float(loss))
        return loss

    trainer.step = recording
    trainer.run(None)
    return losses, weights_of(trainer)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Equal to the bit."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


def same_grid(first: Grid, second: Grid) -> bool:
    """The same steps of the same matrices, to the bit."""
    return first.keys() == second.keys() and all(same(first[n], second[n]) for n in first)


# ---- The clock


class Time:
    """A clock that moves only when it is told to, in place of train_gpt.time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(train_gpt, "time", types.SimpleNamespace(perf_counter=self.read))

    def read(self) -> float:
        """The seconds so far."""
        return self.now


def test_validation_during_training_is_outside_of_the_clock(make_trainer, monkeypatch):
    clock = Time(monkeypatch)
    calls = []
    trainer = make_trainer(iterations=7, val_loss_every=2, max_wallclock_seconds=100.0)
    step = trainer.step

    def slow_step(plan: StepPlan) -> Tensor:
        clock.now += 3.0
        return step(plan)

    def validate(steps: int, seconds: float) -> None:
        clock.now += 1000.0
        calls.append((steps, seconds))

    trainer.step = slow_step
    trainer.run(validate)
    assert calls == [(2, 6.0), (4, 12.0), (6, 18.0)]
    assert trainer.clock.seconds == 21.0 and trainer.steps == 7


def seconds_of_runs(trainer: Trainer, limits: np.ndarray) -> list[float]:
    """The seconds of training of a run with each of these limits."""
    found = []
    for limit in limits:
        trainer.steps = 0
        trainer.clock.seconds = 0.0
        trainer.reserve = 0.0
        settings = dataclasses.replace(trainer.settings, max_wallclock_seconds=limit)
        trainer.schedule = train_gpt.Schedule(settings)
        trainer.run(None)
        found.append(trainer.clock.seconds)
    return found


# Late QAT makes the last steps slower than those before; others use the machine too.
@pytest.mark.parametrize("varies", ["late steps are slower", "steps vary by a tenth"])
def test_training_ends_in_time_however_long_its_steps_are(varies, make_trainer, monkeypatch):
    clock = Time(monkeypatch)
    trainer = make_trainer(iterations=1000, warmdown_iters=40, late_qat_threshold=0.1)
    generator = np.random.default_rng(0)

    def step(plan: StepPlan) -> Tensor:
        if varies == "steps vary by a tenth":
            clock.now += 0.25 * generator.lognormal(0.0, 0.1)
        else:
            clock.now += 0.3 if plan.late_qat_due else 0.25
        trainer.steps += 1
        return torch.zeros(())

    trainer.step = step
    limits = np.linspace(10.0, 11.0, 200)
    for limit, seconds in zip(limits, seconds_of_runs(trainer, limits), strict=True):
        assert limit - 0.7 < seconds <= limit + 1e-6


# ---- What is exported


def exported_by(trainer: Trainer) -> tuple[str, list[str]]:
    """What a run exports after training, and the lines of its log."""
    lines = []
    run = types.SimpleNamespace(log=lines.append)
    return Run.load_average(run, trainer), lines


@pytest.mark.parametrize(
    "name, changes",
    [
        ("swa", dict(swa_every=3, swa_start_scale=0.7)),
        ("ema", dict(ema_enabled=True, ema_every=2, ema_decay=0.8, ema_start_scale=0.9)),
    ],
)
def test_exported_weights_are_the_average_of_those_that_training_passed_through(
    make_trainer, name, changes
):
    trainer = make_trainer(**changes)
    initial = [p.detach().clone() for p in trainer.stored]
    last_step = []
    samples = []
    step = trainer.step

    def keeping(plan: StepPlan) -> Tensor:
        loss = step(plan)
        last_step[:] = [p.detach().double() for p in trainer.stored]
        if plan.samples_weights:
            samples.append(list(last_step))
        return loss

    trainer.step = keeping
    trainer.run(None)
    exported, lines = exported_by(trainer)
    assert exported == name and lines == [f"weights: {name} of {len(samples)} samples"]

    decay = 0.8**2 if name == "ema" else 1.0
    factors = [decay ** (len(samples) - 1 - i) for i in range(len(samples))]
    expected = []
    for values in zip(*samples, strict=True):
        total = sum(f * value for f, value in zip(factors, values, strict=True))
        expected.append(total / sum(factors))
    found = [p.detach().double() for p in trainer.stored]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(samples) > 1 and not same([p.detach() for p in trainer.stored], initial)


def test_all_but_mtp_heads_is_exported(make_trainer):
    trainer = make_trainer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    stored = {names[id(p)] for p in trainer.stored}
    assert set(names.values()) - stored == {"mtp.heads"}


@pytest.mark.parametrize(
    "changes",
    [dict(swa_enabled=False), dict(swa_every=1000), dict(ema_enabled=True, ema_start_scale=0.0)],
    ids=str,
)
def test_without_a_sample_the_last_weights_are_exported(make_trainer, changes):
    trainer = make_trainer(iterations=3, **changes)
    _, last = trained(trainer)
    exported, lines = exported_by(trainer)
    assert exported == "last step" and "last step" in lines[0]
    assert same(weights_of(trainer), last)


# ---- Late QAT


@torch.no_grad()
def really_quantized(trainer: Trainer, grid: Grid) -> train_gpt.GPT:
    """A copy of the trainer's model with weights rounded as an artifact rounds them."""
    model = train_gpt.GPT(trainer.settings, Runtime())
    model.load_state_dict(trainer.model.state_dict())
    for name, steps in grid.items():
        parameter = model.get_parameter(name)
        parameter.copy_(dequantize(quantize(parameter, *steps), *steps))
    return model


@pytest.fixture
def graphs(monkeypatch):
    """Runtime compiles whole graphs with a backend that counts them and needs no C++ compiler."""
    torch.compiler.reset()
    # pytest would collect what it says.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    counter = CompileCounterWithBackend("aot_eager")

    def compile_and_count(runtime: Runtime, function, unit: str):
        if runtime.compiled != unit:
            return function
        return torch.compile(function, fullgraph=True, dynamic=False, backend=counter)

    monkeypatch.setattr(Runtime, "compile", compile_and_count)
    yield counter
    torch.compiler.reset()


@pytest.mark.parametrize(
    "scheme", [dict(quant="rows", int5_mlp="1"), dict(quant="fit")], ids=["rows", "fit"]
)
def test_loops_and_late_qat_fire_in_a_compiled_run_in_a_graph_each(make_trainer, graphs, scheme):
    changes = dict(
        iterations=20,
        warmdown_iters=10,
        late_qat_threshold=0.35,
        num_layers=1,
        num_loops=1,
        loop_start=0,
        loop_end=0,
        mtp_num_heads=0,
        **scheme,
    )
    trainer = make_trainer(runtime=Runtime(compiled="graph"), **changes)
    trainer.warm_up()
    assert graphs.frame_count == 3

    # Each graph gives the loss of the weights that it is meant for.
    initial = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    stir(trainer.model)
    tokens, targets = trainer.batches.batch(trainer.data, 0, 0)
    grid = row_grid(trainer.model, trainer.settings)
    model = trainer.model
    _, early = trainer.loss(model, trainer.coded, None, False, tokens, targets)
    _, looped = trainer.loss(model, trainer.coded, None, True, tokens, targets)
    _, rounded = trainer.loss(model, trainer.coded, grid, True, tokens, targets)
    _, expected = really_quantized(trainer, grid)(tokens, targets)
    assert abs(looped - expected) > 0.01
    assert abs(looped - early) > 0.01
    torch.testing.assert_close(rounded, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(looped, model(tokens, targets)[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(early, model(tokens, targets, looped=False)[1], rtol=1e-6, atol=0)
    trainer.model.load_state_dict(initial)

    # Nothing is compiled again while the clock runs.
    losses, _ = trained(trainer)
    assert graphs.frame_count == 3
    # At scales 0.3, 0.2 and 0.1.
    assert trainer.qat_steps == 3
    eager, _ = trained(make_trainer(**changes))
    np.testing.assert_allclose(losses, eager, rtol=1e-4)


def test_scoring_a_fresh_model_runs_in_the_graphs_of_the_warm_up(data_folder, graphs):
    changes = dict(vocab_size=VOCAB_SIZE, num_layers=2, mtp_num_heads=0, eval_seq_len=16)
    settings = tiny_settings(**changes)
    table = ByteTable(load_tokenizer(data_folder / "tokenizer.model", VOCAB_SIZE))
    tokens = load_validation(find_shards(data_folder, "val"), VOCAB_SIZE)[:200]
    evaluator = Evaluator(settings, Runtime(compiled="graph"), table, quiet)
    eager = Evaluator(settings, Runtime(), table, quiet)
    evaluator.warm_up(tiny_model(**changes))
    # Two lengths of windows.
    assert graphs.frame_count == 2
    model = tiny_model(seed=1, **changes)
    for name in ("plain", "sliding"):
        found = evaluator.score(model, tokens, name).val_loss
        expected = eager.score(model, tokens, name).val_loss
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert graphs.frame_count == 2


def test_late_qat_changes_the_steps_from_its_threshold_on_and_none_before(make_trainer):
    lines = []
    on, _ = trained(make_trainer(log=lines.append, late_qat_threshold=0.35))
    trainer = make_trainer(late_qat_threshold=0.0)
    off, _ = trained(trainer)
    assert on[:17] == off[:17] and on[17] != off[17] and trainer.qat_steps == 0
    assert sum(line.startswith("late_qat:on step:17 scale:0.3") for line in lines) == 1


def test_late_qat_once_begun_goes_on_with_the_same_steps(make_trainer):
    trainer = make_trainer(late_qat_threshold=0.5)
    trainer.step(plan_at(0.6))
    assert trainer.grid is None and trainer.qat_steps == 0
    trainer.step(plan_at(0.4, late_qat_due=True))
    begun = trainer.grid
    # As a clock may say that goes back to a longer run.
    trainer.step(plan_at(0.6))
    trainer.step(plan_at(0.4, late_qat_due=True))
    assert trainer.grid is begun is not None and trainer.qat_steps == 3


def test_late_qat_rounds_to_the_rows_that_the_artifact_will_have(make_trainer):
    trainer = make_trainer(quant="rows")
    expected = row_grid(trainer.model, trainer.settings)
    trainer.step(plan_at(0.05, late_qat_due=True))
    assert same_grid(trainer.grid, expected) and trainer.fit is None
    assert set(expected) == set(coded_parameters(trainer.model, "rows"))


def test_late_qat_rounds_to_the_fitted_steps_that_the_artifact_will_have(make_trainer):
    budget = 3000
    trainer = make_trainer(quant="fit", artifact_max_bytes=budget)
    for scale in (0.19, 0.15, 0.12):
        trainer.step(plan_at(scale, samples_costs=True))
    assert trainer.fit.samples == 2 and trainer.grid is None
    before = weights_of(trainer)
    twin = Fit(trainer.coded)
    twin.load_state(trainer.fit.state())
    twin.finish()
    expected = twin.grid(twin.log2_multiplier(budget))
    trainer.step(plan_at(0.05, late_qat_due=True))
    assert same_grid(trainer.grid, expected)
    assert not same(weights_of(trainer), before)


def test_costs_come_from_the_changes_of_the_gradients_of_their_steps(make_trainer, monkeypatch):
    trainer = make_trainer()
    gradients = []

    def keeping(scale: float, momentum: float) -> None:
        gradients.append({name: p.grad.clone() for name, p in trainer.coded.items()})
        trainer.optimizer.gradients.zero_()

    monkeypatch.setattr(trainer.optimizer, "step", keeping)
    for scale in (1.0, 0.5, 0.2):
        trainer.step(plan_at(scale))
    assert trainer.fit.samples == 0
    for scale in (0.19, 0.1, 0.05):
        trainer.step(plan_at(scale, samples_costs=True))
    assert trainer.fit.samples == 2
    for i, name in enumerate(trainer.coded):
        changes = [gradients[step + 1][name] - gradients[step][name] for step in (3, 4)]
        row_costs = sum((x @ x.T).diagonal() for x in changes)
        torch.testing.assert_close(trainer.fit.row_costs[i], row_costs)
        column_costs = sum(x.T @ x for x in changes)
        torch.testing.assert_close(trainer.fit.column_costs[i], column_costs)
    assert trainer.fit.row_costs[0].any()


def test_gradients_pass_straight_through_the_rounding(make_trainer):
    trainer = make_trainer()
    stir(trainer.model)
    grid = row_grid(trainer.model, trainer.settings)
    tokens, targets = trainer.batches.batch(trainer.data, 0, 0)
    trainer.forward_backward(tokens, targets, grid)
    model = really_quantized(trainer, grid)
    (model(tokens, targets)[0] / trainer.targets_per_step).backward()
    found = [p.grad for p in trainer.model.parameters()]
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


# ---- Batches


@pytest.mark.parametrize("micro_batch", [24, 48, 72])
def test_gradients_do_not_depend_on_the_micro_batch(make_trainer, micro_batch, monkeypatch):
    gradients = []
    losses = []
    micro_steps = []
    for size in (96, micro_batch):
        trainer = make_trainer(micro_batch_tokens=size)
        micro_steps.append(trainer.batches.micro_steps)

        def keeping(scale: float, momentum: float, buffer=trainer.optimizer.gradients) -> None:
            gradients.append(buffer.clone())

        monkeypatch.setattr(trainer.optimizer, "step", keeping)
        losses.append(trainer.step(plan_at(1.0)))
    assert micro_steps == [1, -(-4 // (micro_batch // 24))] and gradients[0].norm() > 0.1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[0], losses[1])


def test_the_gradient_is_that_of_the_mean_loss_of_a_target(make_trainer):
    trainer = make_trainer(mtp_num_heads=0)
    tokens, targets = trainer.batches.batch(trainer.data, 0, 0)
    loss = trainer.forward_backward(tokens, targets, None)
    mean = trainer.model.token_losses(tokens[:, 4:], targets[:, 4:]).mean()
    expected = torch.autograd.grad(mean, list(trainer.model.parameters()))
    torch.testing.assert_close(loss, mean.detach())
    found = [p.grad for p in trainer.model.parameters()]
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-6)


def rows_of_step(
    data: TrainingRows, s: Settings, world_size: int, step: int
) -> tuple[list[tuple[int, ...]], int]:
    """Rows of a step over all ranks, those with targets sorted, and how many filled up."""
    rows = []
    filled = 0
    shapes = set()
    for rank in range(world_size):
        batches = BatchPlan(s, Runtime(rank=rank, world_size=world_size))
        for micro_step in range(batches.micro_steps):
            tokens, targets = batches.batch(data, step, micro_step)
            shapes.add((batches.micro_steps, tokens.shape, targets.shape))
            # What fills up goes through the model too.
            assert tokens.min() >= 0
            for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
                if set(wanted) == {IGNORED}:
                    filled += 1
                else:
                    assert row[1:] == wanted[:-1] and IGNORED not in wanted
                    rows.append((*row, wanted[-1]))
    # Ranks with other shapes would wait for each other for ever.
    assert len(shapes) == 1
    return sorted(rows), filled


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
@pytest.mark.parametrize("micro_batch", [24, 48, 96])
@pytest.mark.parametrize("window_bytes", [2**26, 600])
def test_a_step_has_the_same_rows_for_every_number_of_ranks(
    tmp_path, rows, micro_batch, window_bytes, monkeypatch
):
    monkeypatch.setattr(TrainingRows, "CHUNK_BYTES", 100)
    monkeypatch.setattr(TrainingRows, "WINDOW_BYTES", window_bytes)
    files = []
    for i in range(2):
        files.append(write_shard(tmp_path / f"x_train_{i:06}.bin", np.arange(1000) + 1000 * i))
    s = tiny_settings(train_batch_tokens=24 * rows, micro_batch_tokens=micro_batch)
    data = TrainingRows(files, 24, s.seed, 65536)
    assert (data.num_windows == 1) == (window_bytes > 600)
    for step in (0, 5, 40):
        expected = sorted(tuple(data.row(step * rows + i).tolist()) for i in range(rows))
        assert len(set(expected)) == rows
        for world_size in (1, 2, 3, 8):
            found, filled = rows_of_step(data, s, world_size, step)
            assert found == expected
            assert filled < world_size * max(1, micro_batch // 24) + world_size


def test_memory_decides_the_micro_batch_only_where_nobody_else_does():
    s = Settings(train_batch_tokens=2048 * 64)
    wished = BatchPlan(dataclasses.replace(s, micro_batch_tokens=4096), Runtime())
    assert (wished.micro_batch_rows, wished.micro_steps) == (2, 32)
    fitting = BatchPlan(s, Runtime())
    assert fitting.micro_batch_rows * fitting.micro_steps >= 64 and fitting.micro_steps > 1


# ---- Warm-up and determinism


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_run_after_warm_up_equals_one_without_to_the_bit(make_trainer, threshold):
    runs = []
    for warmup_steps in (0, 3):
        trainer = make_trainer(warmup_steps=warmup_steps, late_qat_threshold=threshold)
        random_state = torch.get_rng_state()
        before = weights_of(trainer)
        trainer.warm_up()
        assert same(weights_of(trainer), before)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert not trainer.optimizer.gradients.any()
        assert trainer.steps == trainer.qat_steps == trainer.average.samples == 0
        assert trainer.grid is None
        runs.append(trained(trainer))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])


def test_warm_up_runs_every_graph(make_trainer):
    trainer = make_trainer(warmup_steps=2, **LOOPED)
    seen = []
    loss = trainer.loss

    def keeping(model, coded, grid: Grid | None, looped: bool, tokens, targets):
        seen.append((looped, grid is not None, tokens.shape))
        return loss(model, coded, grid, looped, tokens, targets)

    trainer.loss = keeping
    trainer.warm_up()
    shape = trainer.batches.batch(trainer.data, 0, 0)[0].shape
    assert seen[:2] == [(False, False, shape)] * 2
    assert seen[2:] == [(True, False, shape)] * 2 + [(True, True, shape)] * 2


def test_runs_with_one_seed_agree_to_the_bit_and_another_seed_differs(make_trainer):
    first = trained(make_trainer(seed=3))
    second = trained(make_trainer(seed=3))
    other = trained(make_trainer(seed=4))
    assert first[0] == second[0] and same(first[1], second[1])
    assert all(a != b for a, b in zip(first[0], other[0], strict=True))


def test_the_seed_reaches_weights_and_data(make_trainer):
    first = make_trainer(seed=3)
    other = make_trainer(seed=4)
    assert not torch.equal(first.model.embedding.weight, other.model.embedding.weight)
    assert first.data.row(0).tolist() != other.data.row(0).tolist()


def test_training_lowers_the_loss(make_trainer):
    changes = dict(iterations=60, warmdown_iters=30, grad_clip_norm=1.0, muon_momentum=0.9)
    losses, _ = trained(make_trainer(**changes))
    assert np.mean(losses[-10:]) < 0.8 * losses[0]
    assert abs(losses[0] - math.log(VOCAB_SIZE)) < 0.2


# ---- Lines of the log, and a loss that is none


@pytest.mark.parametrize("log_every", [1, 0])
def test_a_loss_that_is_no_number_stops_the_run(make_trainer, log_every):
    trainer = make_trainer(train_log_every=log_every, iterations=3)
    step = trainer.step

    def breaking(plan: StepPlan) -> Tensor:
        with torch.no_grad():
            trainer.model.blocks[1].mlp.up[0, 0] = math.nan
        return step(plan)

    trainer.step = breaking
    with pytest.raises(UserError, match="nan.*diverged"):
        trainer.run(None)


def test_the_log_has_the_fields_lines(make_trainer):
    lines = []
    changes = dict(train_log_every=4, iterations=6, late_qat_threshold=0.0)
    make_trainer(log=lines.append, **changes).run(None)
    assert [line.split()[0] for line in lines] == ["step:1/6", "step:4/6", "step:6/6"]
    for line in lines:
        values = dict(part.split(":") for part in line.split())
        assert float(values["train_loss"]) > 1
        milliseconds = float(values["train_time"].removesuffix("ms"))
        average = float(values["step_avg"].removesuffix("ms"))
        steps = int(values["step"].split("/")[0])
        assert abs(average - milliseconds / steps) <= 1


def test_the_log_says_when_the_data_repeats(tmp_path: Path):
    # Ten rows, of which two steps take five each.
    files = [write_shard(tmp_path / "x_train_0.bin", np.arange(24 * 11) % 60)]
    settings = tiny_settings(train_batch_tokens=120, iterations=5, late_qat_threshold=0.0)
    data = TrainingRows(files, 24, 0, 64)
    assert data.num_rows == 10
    lines = []
    model = build_model(settings, Runtime())
    Trainer(model, settings, Runtime(), lines.append, data, 0).run(None)
    repeats = [line for line in lines if line.startswith("data:")]
    assert len(repeats) == 1 and repeats[0].startswith("data: epoch 3:")


@pytest.mark.cuda
def test_a_compiled_gpu_run_counts_its_qat_steps(data_folder):
    settings = tiny_settings(vocab_size=VOCAB_SIZE, late_qat_threshold=0.35, device="cuda")
    with contextlib.ExitStack() as stack:
        stack.callback(torch.compiler.reset)
        runtime = train_gpt.start_runtime(settings)
        data = TrainingRows(find_shards(data_folder, "train"), 24, 0, VOCAB_SIZE)
        trainer = Trainer(build_model(settings, runtime), settings, runtime, quiet, data, 0)
        trainer.warm_up()
        losses, _ = trained(trainer)
    assert trainer.qat_steps == 3 and np.isfinite(losses).all() and losses[-1] < losses[0]
