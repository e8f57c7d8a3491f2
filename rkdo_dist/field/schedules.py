"""Schedules of temperature, coupling and learning rate: stateless functions of plain numbers.

The value at a step depends on the step alone, so a resumed run needs no schedule state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rkdo_dist.field.presets import CLOCKS

COUPLING_SCHEDULES = ("constant", "linear", "cosine", "step")
LEARNING_RATE_SCHEDULES = ("constant", "cosine")
LEAST = 1e-30  # of what logits are divided by: further down they leave float32


def temperature(initial: float, cooling: float, step: float, total: float) -> float:
    """Temperature tau(t) = tau0 (1 - beta t / T) (Martin 2025, below eq. 4).

    Args:
        initial: tau0 > 0.
        cooling: beta in [0, 1); the last temperature stays above 0.
        step: t in [0, total]: the recursion level (depth clock) or the optimizer step (training clock).
        total: T > 0: the recursion depth or the number of optimizer steps.

    Raises:
        ValueError: if an argument is out of range.
    """
    require_positive("temperature", initial)
    _require_number("cooling", cooling)
    if not 0 <= cooling < 1:
        raise ValueError(f"cooling must lie in [0, 1), so that every temperature stays above 0; got {cooling}")
    return initial * (1 - cooling * _progress(step, total))


def levels(
    depth: int, coupling: float | Sequence[float], initial: float, cooling: float, clock: str, progress: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """tau(0)..tau(D) and alpha(1)..alpha(D) of an in-batch recursion.

    Args:
        depth: D >= 1.
        coupling: one number, or one per level.
        initial, cooling: see `temperature`.
        clock: "depth" or "training".
        progress: share of the training done, in [0, 1].

    Raises:
        ValueError: naming the argument that is out of range.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth must be a whole number >= 1, got {depth!r}")
    if clock not in CLOCKS:
        raise ValueError(f"clock must be one of {', '.join(CLOCKS)}, got {clock!r}")
    require_share("progress", progress)
    if isinstance(coupling, Sequence) and not isinstance(coupling, str):
        couplings = tuple(coupling)
    else:
        couplings = (coupling,) * depth
    if len(couplings) != depth:
        raise ValueError(f"coupling needs one number, or one per level ({depth}), got {len(couplings)}")
    clocked = [t / depth if clock == "depth" else progress for t in range(depth + 1)]
    return tuple(temperature(initial, cooling, done, 1) for done in clocked), couplings


def coupling(schedule: str, initial: float, final: float, step: float, total: float, start: float = 0) -> float:
    """Coupling strength alpha(t) of the recursion (eq. 3); the paper advises large first, annealed later
    (6.2.4).

    Args:
        schedule: "constant" (initial throughout), "linear" and "cosine" (from initial to final between
            `start` and `total`), "step" (initial in the first half of that interval, final in the second).
        initial, final: alpha in [0, 1].
        step: t in [0, total].
        total: T > 0.
        start: the coupling is 0 before this step, because early rows would follow an untrained encoder.

    Returns:
        alpha(t) in [0, 1].

    Raises:
        ValueError: if an argument is out of range or the schedule is unknown.
    """
    require_share("coupling", initial)
    require_share("final", final)
    if schedule not in COUPLING_SCHEDULES:
        raise ValueError(f"unknown coupling schedule {schedule!r}; choose one of {', '.join(COUPLING_SCHEDULES)}")
    _progress(step, total)
    if step < start:
        return 0.0
    done = (step - start) / (total - start) if total > start else 1.0
    shares = {
        "constant": 0.0,
        "linear": done,
        "cosine": 0.5 * (1 - math.cos(math.pi * done)),
        "step": float(done >= 0.5),
    }
    return initial + (final - initial) * shares[schedule]


def learning_rate(
    schedule: str, peak: float, step: float, total: float, warmup: float = 0, final: float = 0.0
) -> float:
    """Learning rate of one optimizer step.

    Args:
        schedule: "constant", or "cosine" (from peak to final over the steps after the warm-up).
        peak: the largest rate, >= 0.
        step: optimizer step counted from 0, in [0, total].
        total: number of optimizer steps, > 0.
        warmup: steps of linear warm-up; step 0 has peak / warmup, so that no step is wasted at rate 0.
        final: rate at the end of "cosine".

    Raises:
        ValueError: if an argument is out of range or the schedule is unknown.
    """
    if schedule not in LEARNING_RATE_SCHEDULES:
        raise ValueError(
            f"unknown learning-rate schedule {schedule!r}; choose one of {', '.join(LEARNING_RATE_SCHEDULES)}"
        )
    if not (peak >= 0 and final >= 0 and warmup >= 0):
        raise ValueError(f"learning rates and warm-up must be >= 0, got peak {peak}, final {final}, warm-up {warmup}")
    _progress(step, total)
    if step < warmup:
        return peak * (step + 1) / warmup if step + 1 < warmup else peak
    if schedule == "constant":
        return peak
    done = (step - warmup) / (total - warmup) if total > warmup else 1.0
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number > 0, and at least `LEAST`."""
    _require_number(name, value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    if value < LEAST:
        raise ValueError(f"{name} must be at least {LEAST:g}, got {value}")


def require_share(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number in [0, 1]."""
    _require_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} must be a number, got {value!r}")


def _progress(step: float, total: float) -> float:
    if not total > 0:
        raise ValueError(f"the total must be > 0, got {total}")
    if not 0 <= step <= total:
        raise ValueError(f"the step must lie in [0, {total}], got {step}")
    return step / total
