"""Experiment trackers beside metrics.jsonl: TensorBoard and Weights & Biases, through Accelerate's tracker classes.

Rank zero only. The step of the run is the step of every point, so a continued run goes on where its checkpoint was:
TensorBoard discards what a killed run wrote after its last checkpoint, W&B continues the run of the same id.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker, get_available_trackers

PROJECT = "rkdo_dist"


class TrackerError(ValueError):
    """A tracker that was asked for cannot be used; the message says what to install or set."""


def check(names: Sequence[str]) -> None:
    """Check that these trackers can be used here.

    Raises:
        TrackerError: naming those that are not installed.
    """
    installed = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    missing = [name for name in names if name not in installed]
    if missing:
        raise TrackerError(
            f"run.trackers names {', '.join(missing)}, which is not installed: "
            "pip install 'rkdo_dist[tracking]', or leave it out of run.trackers"
        )


class Trackers:
    """The trackers of one run.

    Args:
        names: "tensorboard", "wandb".
        run: the run directory; TensorBoard writes to `tensorboard/` in it, W&B to `wandb/`.
        step: steps already in the run.
        settings: the configuration by dotted key, for W&B's table of runs.

    Raises:
        TrackerError: if one cannot start.
    """

    def __init__(self, names: Sequence[str], run: Path, step: int, settings: dict[str, Any]) -> None:
        self._trackers: list[GeneralTracker] = []
        for name in names:
            try:
                tracker = _tensorboard(run, step) if name == "tensorboard" else _wandb(run, settings)
                tracker.start()
            except Exception as error:  # whatever a third party raises, before the first step
                self.close()
                raise TrackerError(f"run.trackers: {name} does not start: {error}") from error
            self._trackers.append(tracker)

    def log(self, step: int, values: dict[str, Any], prefix: str = "") -> None:
        """Write the numbers among `values` at `step`, each under `prefix` + its key; the rest is left out."""
        numbers = {
            prefix + key: value
            for key, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
        }
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        """Finish every tracker, whatever the others do."""
        with contextlib.ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.finish)
            self._trackers = []


def _tensorboard(run: Path, step: int) -> GeneralTracker:
    options = {"purge_step": step + 1} if (run / "tensorboard").is_dir() else {}
    return TensorBoardTracker("tensorboard", run, **options)


def _wandb(run: Path, settings: dict[str, Any]) -> GeneralTracker:
    """Offline unless WANDB_MODE says otherwise; `wandb sync RUN/wandb/*` uploads later."""
    identity = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:16]
    os.environ.setdefault("WANDB_SILENT", "true")  # one progress display, and it is ours
    return WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        id=identity,
        dir=str(run),
        config=settings,
        mode=os.environ.get("WANDB_MODE", "offline"),
        resume="allow",
    )
