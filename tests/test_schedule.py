"""What changes during a run, and when: each phase of the schedule, and averages of the weights."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import LOOPED, tiny_settings
from train_gpt import PRESETS, Schedule, Settings, StepPlan, WeightAverage

# ---- Progress and scale


def scales_by_steps(s: Settings) -> list[float]:
    """The scale of every step of a run that ends by its steps."""
    schedule = Schedule(s)
    plans = [schedule.plan(step, schedule.progress(step, 0.0)) for step in range(s.iterations)]
    return [plan.scale for plan in plans]


def test_schedule_by_steps_is_constant_then_linear_to_zero():
    s = tiny_settings(iterations=100, warmdown_iters=40)
    expected = [1.0] * 60 + [(100 - step) / 40 for step in range(60, 100)]
    np.testing.assert_allclose(scales_by_steps(s), expected)
    # Without a limit on time, seconds count nothing.
    schedule = Schedule(s)
    assert schedule.progress(99, 1e6) < 1.0 == schedule.progress(100, 0.0)


def test_schedule_without_warmdown_stays_constant():
    assert scales_by_steps(tiny_settings(iterations=10, warmdown_iters=0)) == [1.0] * 10


def simulate(s: Settings, step_seconds: float) -> tuple[list[StepPlan], float]:
    """The plans of a run whose steps take so long each, and when it ends."""
    schedule = Schedule(s)
    plans = []
    seconds = 0.0
    progress = schedule.progress(0, seconds)
    while progress < 1.0:
        plans.append(schedule.plan(len(plans), progress))
        seconds += step_seconds
        progress = schedule.progress(len(plans), seconds)
    return plans, seconds


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("steps", [1, 2, 5, 37, 400, 6642])
def test_schedule_by_clock_ends_in_time_whatever_the_length(preset, steps):
    s = Settings(**PRESETS[preset])
    plans, seconds = simulate(s, s.max_wallclock_seconds / (steps + 0.5))
    scales = [plan.scale for plan in plans]
    assert len(scales) == steps and seconds <= s.max_wallclock_seconds
    assert scales[0] == 1.0 and sorted(scales, reverse=True) == scales and scales[-1] > 0
    down = sum(scale < 1.0 for scale in scales)
    expected = min(s.warmdown_iters, s.warmdown_fraction * steps)
    assert abs(down - expected) <= 2
    if steps > 5:
        assert scales[-1] < max(3 / expected, 1.001 * s.min_lr)
        # Linear, down to the least.
        falling = [scale for scale in scales[-down:] if scale > s.min_lr]
        falls = -np.diff(falling)
        np.testing.assert_allclose(falls, falls.mean(), rtol=0.05)


def test_schedule_by_clock_still_obeys_iterations():
    s = dataclasses.replace(Settings(), iterations=50, warmdown_iters=20, min_lr=0.0)
    plans, seconds = simulate(s, 1.0)
    assert len(plans) == 50 and seconds == 50.0
    scales = [plan.scale for plan in plans]
    np.testing.assert_allclose(scales[-20:], [n / 20 for n in range(20, 0, -1)])


def test_a_run_ends_where_less_than_the_reserve_is_left():
    schedule = Schedule(dataclasses.replace(Settings(), max_wallclock_seconds=100.0))
    assert schedule.progress(50, 90.0) < 1.0
    assert schedule.progress(50, 90.0, reserve=9.9) < 1.0
    assert schedule.progress(50, 90.0, reserve=10.1) == 1.0
    # Nor is it less than a step takes on average.
    assert schedule.progress(5, 90.0) == 1.0


# ---- Phases: each starts and ends where its setting says

# Of 100 steps the last 40 are warmdown, in which step n has the scale (100 - n) / 40.
RUN = dict(iterations=100, warmdown_iters=40)


def plans_of(**changes) -> list[StepPlan]:
    """The plan of every step of RUN."""
    s = tiny_settings(**{**RUN, **changes})
    schedule = Schedule(s)
    return [schedule.plan(step, step / 100) for step in range(100)]


def steps_in(phase: str, **changes) -> list[int]:
    """The steps of RUN in which a phase is on."""
    return [step for step, plan in enumerate(plans_of(**changes)) if getattr(plan, phase)]


def test_a_plan_has_the_scale_and_the_momentum_of_its_step():
    s = tiny_settings(**RUN)
    schedule = Schedule(s)
    for step, plan in enumerate(plans_of()):
        assert plan.scale == schedule.remaining(step, step / 100)
        assert plan.momentum == schedule.momentum(step)


def test_the_least_scale_holds_up_the_end_of_the_warmdown_and_no_phase():
    least = plans_of(min_lr=0.25, late_qat_threshold=0.1)
    plain = plans_of(late_qat_threshold=0.1)
    assert [plan.scale for plan in least] == [max(plan.scale, 0.25) for plan in plain]
    assert [plan.late_qat_due for plan in least] == [plan.late_qat_due for plan in plain]
    assert [plan.samples_costs for plan in least] == [plan.samples_costs for plan in plain]
    assert [plan.samples_weights for plan in least] == [plan.samples_weights for plan in plain]


def test_loops_begin_at_their_share_of_the_run():
    looped = dict(**LOOPED, late_qat_threshold=0.1)
    assert steps_in("looped", **looped, enable_looping_at=0.35) == list(range(35, 100))
    assert steps_in("looped", **looped, enable_looping_at=0.0) == list(range(100))
    assert steps_in("looped", num_loops=0) == list(range(100))
    # Late QAT waits for them: else it would need a graph without them.
    assert steps_in("late_qat_due", **looped, enable_looping_at=0.99) == [99]


def test_momentum_rises_linearly_during_its_warm_up():
    changes = dict(muon_momentum_warmup_start=0.8, muon_momentum=0.9)
    momenta = [p.momentum for p in plans_of(**changes, muon_momentum_warmup_steps=4)]
    np.testing.assert_allclose(momenta, [0.8, 0.825, 0.85, 0.875] + [0.9] * 96)
    momenta = [p.momentum for p in plans_of(**changes, muon_momentum_warmup_steps=0)]
    np.testing.assert_allclose(momenta, [0.9] * 100)


@pytest.mark.parametrize(
    "threshold, first",
    [
        (0.0, 100),
        (0.01, 100),
        (0.1, 97),
        (0.35, 87),
        # The scale of step 80 is 0.5, which is not under 0.5.
        (0.5, 81),
        (1.0, 61),
    ],
)
def test_late_qat_is_due_from_its_threshold_to_the_end(threshold, first):
    assert steps_in("late_qat_due", late_qat_threshold=threshold) == list(range(first, 100))


@pytest.mark.parametrize(
    "changes, phases",
    [
        (dict(late_qat_threshold=0.0), [(True, False)]),
        (dict(late_qat_threshold=0.1), [(True, False), (True, True)]),
        (dict(late_qat_threshold=0.0, **LOOPED), [(False, False), (True, False)]),
        (dict(late_qat_threshold=0.1, **LOOPED), [(False, False), (True, False), (True, True)]),
        (dict(late_qat_threshold=0.0, **LOOPED, enable_looping_at=0.0), [(True, False)]),
    ],
    ids=str,
)
def test_each_kind_of_step_that_can_come_has_a_graph_of_its_own(changes, phases):
    assert Schedule(tiny_settings(**changes)).phases() == phases
    seen = {(plan.looped, plan.late_qat_due) for plan in plans_of(**changes)}
    assert seen == set(phases)


def test_costs_are_sampled_near_the_end_if_steps_are_fitted():
    assert Schedule.COSTS_START_SCALE == 0.2
    assert steps_in("samples_costs", quant="fit") == list(range(93, 100))
    assert steps_in("samples_costs", quant="rows") == []


@pytest.mark.parametrize(
    "changes, name, steps",
    [
        # Every fourth step in which the scale is under 0.25.
        (dict(swa_every=4, swa_start_scale=0.25), "swa", [91, 95, 99]),
        (dict(swa_every=1, swa_start_scale=0.1), "swa", [97, 98, 99]),
        (dict(swa_every=30, swa_start_scale=1.0), "swa", [89]),
        (dict(swa_every=1, swa_start_scale=0.0), "swa", []),
        (dict(swa_every=1000, swa_start_scale=1.0), "swa", []),
        (dict(ema_enabled=True, ema_every=10, ema_start_scale=0.5), "ema", [89, 99]),
        # EMA, if it is on, is taken in the place of SWA.
        (
            dict(ema_enabled=True, ema_every=20, ema_start_scale=2.0, swa_every=1),
            "ema",
            [19, 39, 59, 79, 99],
        ),
        (dict(swa_enabled=False, swa_every=1, swa_start_scale=1.0), "none", []),
    ],
)
def test_weights_are_sampled_when_the_average_says_so(changes, name, steps):
    assert Schedule(tiny_settings(**RUN, **changes)).average == name
    assert steps_in("samples_weights", **changes) == steps


def test_phases_follow_the_clock_where_it_ends_the_run():
    """A run of 40 steps by its clock, of which 0.6 are warmdown."""
    s = dataclasses.replace(
        Settings(**PRESETS["entry_339"]),
        late_qat_threshold=0.25,
        swa_every=1,
        swa_start_scale=0.5,
        quant="fit",
    )
    plans, _ = simulate(s, s.max_wallclock_seconds / 40.5)
    for phase, threshold in (
        ("late_qat_due", 0.25),
        ("samples_weights", 0.5),
        ("samples_costs", 0.2),
    ):
        on = [getattr(plan, phase) for plan in plans]
        assert on == [plan.scale < threshold for plan in plans]
        # It starts once, and stays.
        assert on == sorted(on) and 0 < sum(on) < 20


def test_a_phase_of_a_plan_is_off_unless_it_is_said():
    plan = StepPlan(scale=1.0, momentum=0.9)
    assert not (plan.late_qat_due or plan.samples_costs or plan.samples_weights)


def test_every_part_of_a_plan_is_tested_here():
    """A new phase needs a test that says where it starts and ends."""
    tested = (
        "scale",
        "momentum",
        "looped",
        "late_qat_due",
        "samples_costs",
        "samples_weights",
        "average_decay",
    )
    assert StepPlan._fields == tested


# ---- Averages


def averaged(s: Settings, values: list[Tensor]) -> WeightAverage:
    """The average of a parameter that has these values after the steps of a run."""
    schedule = Schedule(s)
    average = WeightAverage()
    parameter = torch.nn.Parameter(torch.zeros_like(values[0]))
    for step, value in enumerate(values):
        parameter.data.copy_(value)
        plan = schedule.plan(step, step / len(values))
        if plan.samples_weights:
            average.add([parameter], plan.average_decay)
    return average


def passing_values(steps: int, size: float) -> list[Tensor]:
    """Random weights after each step; the first six are initial ones, far away."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.full((5,), size) for _ in range(6)]
    while len(values) < steps:
        values.append(torch.randn(5, generator=generator) + 3)
    return values


# The scale of step n is (30 - n) / 30.
SLOPE = dict(iterations=30, warmdown_iters=30, warmdown_fraction=1.0)


def test_swa_is_the_mean_of_its_samples_in_float32():
    values = passing_values(30, 1e6)
    average = averaged(tiny_settings(**SLOPE, swa_every=2, swa_start_scale=0.8), values)
    kept = [values[step].double() for step in range(7, 30, 2)]
    assert average.samples == len(kept) == 12 and average.weights[0].dtype == torch.float32
    expected = sum(kept) / len(kept)
    torch.testing.assert_close(average.weights[0].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("every", [1, 3])
def test_ema_is_its_definition_without_bias(every):
    values = passing_values(30, 1e9)
    ema = dict(ema_enabled=True, ema_decay=0.9, ema_every=every, ema_start_scale=0.8)
    average = averaged(tiny_settings(**SLOPE, **ema), values)
    kept = [values[step].double() for step in range(7, 30) if (step + 1) % every == 0]
    decay = 0.9**every
    weights = [decay ** (len(kept) - 1 - i) for i in range(len(kept))]
    expected = sum(w * v for w, v in zip(weights, kept, strict=True)) / sum(weights)
    assert average.samples == len(kept) > 5
    torch.testing.assert_close(average.weights[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_ema_may_span_a_share_of_the_run_however_long_it_is():
    for iterations in (50, 100):
        changes = dict(ema_enabled=True, ema_every=5, ema_span=0.1, iterations=iterations)
        schedule = Schedule(tiny_settings(**changes))
        for step in (0, iterations // 2):
            decay = schedule.plan(step, step / iterations).average_decay
            # After a tenth of the run, the weight of a sample is a factor e less.
            assert decay ** (0.1 * iterations / 5) == pytest.approx(math.exp(-1))
    assert all(plan.average_decay == 1.0 for plan in plans_of(swa_enabled=True, ema_span=0.1))


def test_an_average_without_samples_replaces_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    average = WeightAverage()
    assert not average.load_into([parameter]) and parameter.tolist() == [1, 1, 1]
    average.add([torch.nn.Parameter(torch.full((3,), 2.0))], 1.0)
    assert average.load_into([parameter]) and parameter.tolist() == [2, 2, 2]


def test_an_average_goes_on_from_its_state():
    values = [torch.nn.Parameter(torch.randn(4)) for _ in range(6)]
    whole = WeightAverage()
    first = WeightAverage()
    for value in values[:3]:
        whole.add([value], 0.9)
        first.add([value], 0.9)
    second = WeightAverage()
    second.load_state(first.state())
    for value in values[3:]:
        whole.add([value], 0.9)
        second.add([value], 0.9)
    assert second.samples == 6 and torch.equal(whole.weights[0], second.weights[0])
