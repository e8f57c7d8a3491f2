"""Stopwatch of a step: exclusive seconds by phase.

A stopwatch is put around the functions of a step from outside (`Stopwatch.timed`); training is not aware of it. Phases
nest: an inner one stops the outer one's clock. Every collective is a phase of its own, "exchange" (the clock of
`measure.ledger`), so waiting for slower ranks counts as exchange, wherever it happens. On an accelerator each change of
phase waits for the device: measured steps are a little slower than others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

DATA, COMPUTE, FIELD, EXCHANGE, OPTIMIZER = "data", "forward/backward", "field", "exchange", "optimizer"
PHASES = (DATA, COMPUTE, FIELD, EXCHANGE, OPTIMIZER)  # what is left of a step is "other"


class Stopwatch:
    """Seconds by phase.

    Args:
        device: waited for at every change of phase, unless it is a CPU.

    Attributes:
        seconds: by phase, growing.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._device = device
        self._running: list[str] = []
        self._since = 0.0

    def split(self) -> dict[str, float]:
        """The seconds since the last call, by phase."""
        self._book()
        found, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return found

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """While open, time is booked on `name`."""
        self._book()
        self._running.append(name)
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    def timed(self, owner: Any, name: str, phase: str) -> None:
        """Book on `phase`, from now on, what the function `name` of the object `owner` takes."""
        function = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            with self.phase(phase):
                return function(*arguments, **options)

        setattr(owner, name, call)

    def _book(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
