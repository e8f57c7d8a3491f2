"""Collapse, noticed from the loss alone: every sample is embedded at one point, and no sample is told from another.

The learned rows are uniform then, so the loss lies at its value for an encoder that knows nothing. An untrained encoder
is further from that (by 1 to 2 % of the way to an ideal one for a ResNet-8 on digits), and so is one that learns
slowly. The loss is on every rank already: nothing is computed or waited for.
"""

from __future__ import annotations

from typing import Any

from rkdo_dist.history import attained_share

SHARE = 1e-3  # of the way from an encoder that knows nothing to an ideal one
STEPS = 50  # in a row


class Collapse:
    """Watches the losses of a run.

    Attributes:
        noticed: the step at which collapse was noticed, once in a run; None before.
    """

    def __init__(self) -> None:
        self._in_a_row = 0
        self.noticed: int | None = None

    def add(self, step: int, loss: float | None, at_uniform: float | None, at_ideal: float | None) -> bool:
        """Record a step (a skipped one has no loss); whether collapse is noticed at it."""
        share = None
        if loss is not None and at_uniform is not None and at_ideal is not None:
            share = attained_share(loss, at_uniform, at_ideal)
        self._in_a_row = self._in_a_row + 1 if share is not None and abs(share) < SHARE else 0
        if self.noticed is not None or self._in_a_row < STEPS:
            return False
        self.noticed = step
        return True

    @property
    def message(self) -> str:
        """What was noticed, and what to do."""
        return (
            f"collapse at step {self.noticed}: for {STEPS} steps the loss has been where it is for an encoder that "
            "knows nothing, so all samples are embedded at one point (or field.temperature is so high that none is "
            "told from another). Begin again with a lower train.learning_rate or train.weight_decay, or a warm-up, "
            "and see that views.* leave something to tell images by"
        )

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"in_a_row": self._in_a_row, "noticed": self.noticed}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; empty in checkpoints of earlier versions."""
        self._in_a_row, self.noticed = state.get("in_a_row", 0), state.get("noticed")
