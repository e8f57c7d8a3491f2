"""The paper's early stopping: end a run when L(t) no longer falls (Martin 2025, section 6.2.4, item 3).

The geometric decay of the loss flattens once L(t) comes near the least value that the model can attain, so the slope of
L(t) says when to stop. The losses are the journal's: means over the global batch, the same on every rank, so every rank
decides alike without asking the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any


class EarlyStop:
    """Watches the last losses of a run.

    Args:
        slope: stop when the loss falls by less than this per step; None never stops.
        window: over how many of the last steps the slope is taken.
    """

    def __init__(self, slope: float | None, window: int) -> None:
        self._slope, self._window = slope, window
        self._kind = ""
        self._losses: deque[float] = deque(maxlen=window)

    def add(self, kind: str, loss: float | None) -> None:
        """Record a step: its objective and its loss, None for a step that was skipped.

        Losses of different objectives are different functions, so a change of objective begins a new window.
        """
        if loss is None:
            return
        if kind != self._kind:
            self._kind = kind
            self._losses.clear()
        self._losses.append(loss)

    @property
    def reached(self) -> bool:
        """Whether a whole window is recorded and the loss fell by less than the given slope per step in it."""
        return self._slope is not None and len(self._losses) == self._window and -slope(self._losses) < self._slope

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, to continue with exactly the same decisions (numbers and text only)."""
        return {"kind": self._kind, "losses": list(self._losses)} if self._slope is not None else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._kind = state.get("kind", "")
        self._losses = deque(state.get("losses", ()), maxlen=self._window)


def slope(values: Sequence[float] | deque[float]) -> float:
    """Least-squares slope of n >= 2 equally spaced values, per step; sums in the order of the steps."""
    n = len(values)
    middle, mean = (n - 1) / 2, sum(values) / n
    products = sum((t - middle) * (value - mean) for t, value in enumerate(values))
    return products / (n * (n * n - 1) / 12)
