"""Schedules: end points, monotony, refusal of arguments out of range."""

from __future__ import annotations

import math

import pytest

from rkdo_dist.field import schedules


def test_temperature_falls_linearly_from_tau0() -> None:
    assert schedules.temperature(0.5, 0.1, 0, 3) == 0.5
    assert schedules.temperature(0.5, 0.1, 3, 3) == pytest.approx(0.45)
    assert schedules.temperature(0.5, 0.1, 1, 3) == pytest.approx(0.5 * (1 - 0.1 / 3))


@pytest.mark.parametrize("name", schedules.COUPLING_SCHEDULES)
def test_coupling_stays_between_its_ends(name: str) -> None:
    values = [schedules.coupling(name, 0.8, 0.2, t, 20) for t in range(21)]
    assert values[0] == pytest.approx(0.8)
    assert values[-1] == pytest.approx(0.8 if name == "constant" else 0.2)
    assert values == sorted(values, reverse=True)


def test_coupling_shapes_differ_in_the_middle() -> None:
    middle = {name: schedules.coupling(name, 1.0, 0.0, 5, 20) for name in schedules.COUPLING_SCHEDULES}
    assert middle == pytest.approx(
        {"constant": 1.0, "linear": 0.75, "cosine": 0.5 * (1 + math.cos(math.pi / 4)), "step": 1.0}
    )


def test_coupling_is_zero_before_its_start() -> None:
    values = [schedules.coupling("linear", 0.8, 0.2, t, 20, start=10) for t in (0, 9, 10, 15, 20)]
    assert values == pytest.approx([0, 0, 0.8, 0.5, 0.2])


def test_learning_rate_warms_up_and_ends_low() -> None:
    values = [schedules.learning_rate("cosine", 1.0, t, 100, warmup=10, final=0.1) for t in range(101)]
    assert values[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert values[10] == pytest.approx(1.0)
    assert values[55] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)
    assert schedules.learning_rate("constant", 0.3, 70, 100) == 0.3


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: schedules.temperature(0.0, 0.1, 0, 1), "temperature"),
        (lambda: schedules.temperature(math.nan, 0.1, 0, 1), "temperature"),
        (lambda: schedules.temperature(math.inf, 0.1, 0, 1), "temperature"),
        (lambda: schedules.temperature(0.5, 1.0, 0, 1), "cooling"),
        (lambda: schedules.temperature(0.5, -0.1, 0, 1), "cooling"),
        (lambda: schedules.temperature(0.5, 0.1, 2, 1), "step"),
        (lambda: schedules.temperature(0.5, 0.1, 0, 0), "total"),
        (lambda: schedules.coupling("linear", 1.1, 0.0, 0, 1), "coupling"),
        (lambda: schedules.coupling("linear", 0.5, -0.1, 0, 1), "final"),
        (lambda: schedules.coupling("quadratic", 0.5, 0.5, 0, 1), "quadratic"),
        (lambda: schedules.learning_rate("quadratic", 0.5, 0, 1), "quadratic"),
        (lambda: schedules.learning_rate("cosine", -1, 0, 1), "peak"),
        (lambda: schedules.learning_rate("cosine", 1, 2, 1), "step"),
    ],
)
def test_arguments_out_of_range_are_named(call, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call()
