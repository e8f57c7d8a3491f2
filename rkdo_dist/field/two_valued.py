"""The loss of rows of two values: what an objective is at chance level and for ideal embeddings, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def two_valued(
    temperatures: Sequence[float], couplings: Sequence[float], debias: float, columns: int, positives: int, gap: float
) -> float:
    """The sum over levels of KL(p || q) of a row whose positives all have one similarity and all others
    another.

    Args:
        temperatures, couplings, debias: see `objectives.Objective`.
        columns: N, those that take part.
        positives: columns that share the supervisor evenly.
        gap: similarity of the positives minus that of the others.
    """
    if columns < 2 or not 1 <= positives <= columns:
        raise ValueError(
            f"a row needs at least 2 columns and 1 to N positives, got N = {columns}, {positives} positives"
        )
    others = columns - positives

    def learned(temperature: float) -> tuple[float, float]:  # log q of one positive, of one other column
        low = -gap / temperature
        log_sum = math.log(positives + others * math.exp(low))
        return -log_sum, low - log_sum

    share = debias / columns
    p, total, log_q = ((1 - debias) / positives + share, share), 0.0, learned(temperatures[0])
    couplings = couplings or (0.0,)
    for temperature, alpha in zip(temperatures[-len(couplings) :], couplings, strict=True):
        p = tuple((1 - alpha) * old + alpha * math.exp(log) for old, log in zip(p, log_q, strict=True))  # type: ignore[assignment]
        log_q = learned(temperature)
        for count, mass, log in zip((positives, others), p, log_q, strict=True):
            total += count * mass * (math.log(mass) - log) if mass > 0 and count else 0.0
    return total
