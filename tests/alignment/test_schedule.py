"""Weights as functions of the step: exact values, exact ends."""

import json
import math
from dataclasses import fields

import pytest

from diffusers_srepa.alignment import registry
from diffusers_srepa.alignment.registry import build_schedule
from diffusers_srepa.alignment.schedule import (
    Constant,
    CosineDecay,
    HardStop,
    LinearDecay,
    Product,
    WarmUp,
    as_schedule,
)
from diffusers_srepa.errors import ConfigurationError


SCHEDULES = [
    Constant(0.5),
    Constant(0.0),
    LinearDecay(end=100, initial=2.0, final=0.5, begin=20),
    LinearDecay(end=100),
    CosineDecay(end=100, initial=0.5),
    HardStop(step=250, value=0.5),
    WarmUp(num_steps=40, value=2.0),
    Product((WarmUp(10), CosineDecay(end=100), HardStop(60), 0.5)),
]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.5), {0: 0.5, 1e9: 0.5}),
        (LinearDecay(end=100), {0: 1.0, 25: 0.75, 99.5: 0.005, 100: 0.0, 1000: 0.0}),
        (LinearDecay(end=100, initial=2.0, final=0.5, begin=20), {0: 2.0, 20: 2.0, 60: 1.25, 100: 0.5, 101: 0.5}),
        (LinearDecay(end=10, initial=0.0, final=1.0), {0: 0.0, 5: 0.5, 10: 1.0}),
        (CosineDecay(end=100), {0: 1.0, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 100: 0.0}),
        (CosineDecay(end=300, begin=100, initial=0.5, final=0.1), {99: 0.5, 200: 0.3, 300: 0.1}),
        (HardStop(step=250, value=0.5), {0: 0.5, 249: 0.5, 249.9: 0.5, 250: 0.0, 400: 0.0}),
        (WarmUp(num_steps=40, value=2.0), {0: 0.0, 10: 0.5, 40: 2.0, 41: 2.0}),
        (Product((WarmUp(10), LinearDecay(end=100), 0.5)), {0: 0.0, 5: 0.2375, 50: 0.25, 100: 0.0}),
    ],
)
def test_values(schedule, values):
    for step, value in values.items():
        assert schedule(step) == pytest.approx(value, abs=1e-12)
        assert isinstance(schedule(step), float)


@pytest.mark.parametrize("schedule", [LinearDecay(end=77, initial=0.3), CosineDecay(end=77, initial=0.3)])
def test_decays_reach_both_ends_exactly(schedule):
    assert schedule(0) == 0.3 and schedule(77) == 0.0 and schedule(76) > 0


@pytest.mark.parametrize(
    ("schedule", "stop_step"),
    [
        (Constant(0.5), None),
        (Constant(0.0), 0),
        (LinearDecay(end=100), 100),
        (LinearDecay(end=100, final=0.1), None),
        (LinearDecay(end=100, initial=0.0, final=0.0), 0),
        (CosineDecay(end=50), 50),
        (HardStop(step=250), 250),
        (HardStop(step=250, value=0.0), 0),
        (WarmUp(num_steps=40), None),
        (Product((WarmUp(10), CosineDecay(end=100), HardStop(60))), 60),
        (Product((WarmUp(10), 0.5)), None),
    ],
)
def test_the_end_is_known_and_lies_exactly_where_the_weight_becomes_zero_for_good(schedule, stop_step):
    assert schedule.stop_step == stop_step
    if stop_step is None:
        assert not schedule.stopped(1e9)
        return
    assert schedule.stopped(stop_step) and schedule(stop_step) == 0
    assert all(schedule(step) == 0 for step in range(stop_step, stop_step + 200))
    if stop_step > 0:
        assert not schedule.stopped(stop_step - 1) and schedule(stop_step - 1) > 0


def literal(schedule):
    """What a configuration file says for a schedule."""
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
    if isinstance(schedule, Product):
        values = {"factors": [literal(factor) for factor in schedule.factors]}
    names = {schedule_type: name for name, schedule_type in registry.SCHEDULES.items()}
    return {"name": names[type(schedule)]} | values


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_json_and_back(schedule):
    restored = build_schedule(json.loads(json.dumps(literal(schedule))))
    assert restored == schedule
    assert [restored(step) for step in range(300)] == [schedule(step) for step in range(300)]


def test_numbers_lists_and_products_make_schedules():
    assert as_schedule(2) == Constant(2)
    assert build_schedule(0.5) == Constant(0.5)
    assert build_schedule([{"name": "warm_up", "num_steps": 10}, 0.5]) == Product((WarmUp(10), Constant(0.5)))
    assert 0.5 * HardStop(3) == HardStop(3) * 0.5 == Product((HardStop(3), Constant(0.5)))
    schedule = HardStop(3)
    assert build_schedule(schedule) is schedule


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: as_schedule(-0.5), "-0.5"),
        (lambda: as_schedule(float("nan")), "nan"),
        (lambda: as_schedule(math.inf), "inf"),
        (lambda: as_schedule("high"), "'high'"),
        (lambda: as_schedule(None), "None"),
        (lambda: LinearDecay(end=10, begin=10), "begin must come before end"),
        (lambda: LinearDecay(end=10.5), "whole number"),
        (lambda: HardStop(step=-1), "whole number"),
        (lambda: WarmUp(num_steps=0), "at least 1"),
        (lambda: Product(()), "no factors"),
        (lambda: build_schedule({"name": "linear_decay"}), "needs the argument 'end'"),
        (lambda: build_schedule({"name": "linear_decy", "end": 3}), "did you mean 'linear_decay'"),
        (lambda: build_schedule({"name": "hard_stop", "steps": 3}), "did you mean 'step'"),
        (lambda: build_schedule({"name": "product", "factor": [1]}), "did you mean 'factors'"),
        (lambda: build_schedule({"step": 3}), "has no name"),
    ],
)
def test_refuses_what_is_no_weight(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
