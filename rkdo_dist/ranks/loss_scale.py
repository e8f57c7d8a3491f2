"""Loss scaling for fp16: gradients that would vanish in half precision are computed larger, and divided afterwards.

One scale for all ranks and every strategy, so that an overflow is the same decision everywhere and a checkpoint carries
the scale from one strategy to another. The rule is torch's GradScaler's (Micikevicius et al. 2018, section 3.2): halve
after an overflow, double after a number of steps without one. Scales are powers of two, so dividing again is exact.
"""

from __future__ import annotations

SMALLEST = 2.0**-14  # an overflow below this scale is not due to the scale: the gradient itself is broken


class LossScale:
    """The number that embedding gradients are multiplied by.

    Args:
        scale, growth_factor, backoff_factor, growth_interval: as those of `torch.amp.GradScaler` (its init_scale).

    Attributes:
        scale: for the next step.
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.scale = scale
        self._growth, self._backoff, self._interval = growth_factor, backoff_factor, growth_interval
        self._since = 0

    def update(self, overflow: bool) -> None:
        """Adapt the scale after a step, with or without an overflow."""
        if overflow:
            self.scale *= self._backoff
            self._since = 0
            return
        self._since += 1
        if self._since >= self._interval:
            self.scale *= self._growth
            self._since = 0

    @property
    def exhausted(self) -> bool:
        """Whether overflows have driven the scale so low that another cause must be behind them."""
        return self.scale < SMALLEST

    def state(self) -> dict[str, float]:
        """For the checkpoint, JSON-able."""
        return {"scale": self.scale, "steps_since_overflow": self._since}

    def load(self, state: dict[str, float]) -> None:
        """Continue from `state`."""
        self.scale, self._since = state["scale"], int(state["steps_since_overflow"])
