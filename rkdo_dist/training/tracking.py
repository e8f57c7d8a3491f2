"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases and MLflow, through Accelerate's classes.

Rank zero only. The step of the run is the step of every point, so a continued run goes on where its checkpoint was:
TensorBoard discards what a killed run wrote after its last checkpoint, W&B continues the run of the same id, MLflow
the run with the same tag, from the first step that it does not have (trained again, a step has the same numbers).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    WandBTracker,
    get_available_trackers,
)

from rkdo_dist.addresses import shown_arguments
from rkdo_dist.web import waiting

PROJECT = "rkdo_dist"
_TAG = "rkdo_dist.run"  # of a run in MLflow
# A silent server holds a run for two minutes at most; by MLflow's own defaults for more than 20.
_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
_EXTRAS = {"mlflow": "mlflow"}  # of other trackers "tracking"


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
        extras = ",".join(dict.fromkeys(_EXTRAS.get(name, "tracking") for name in missing))
        raise TrackerError(
            f"run.trackers names {', '.join(missing)}, which is not installed: "
            f"pip install 'rkdo_dist[{extras}]', or leave it out of run.trackers"
        )


class Trackers:
    """The trackers of one run.

    Args:
        names: "tensorboard", "wandb", "mlflow".
        run: the run directory; TensorBoard writes to `tensorboard/` in it, W&B to `wandb/`, MLflow to `mlflow/`.
        step: steps already in the run.
        settings: the configuration by dotted key, for the tables of runs of W&B and MLflow.

    Raises:
        TrackerError: if one cannot start.
    """

    def __init__(self, names: Sequence[str], run: Path, step: int, settings: dict[str, Any]) -> None:
        self._trackers: list[GeneralTracker] = []
        self._logged = 0  # steps that MLflow has
        for name in names:
            try:
                with shown_arguments(), waiting(f"{name} (run.trackers)"):
                    if name == "mlflow":
                        tracker, self._logged = _mlflow(run, settings)
                    else:
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
            if tracker.name != "mlflow" or step > self._logged or prefix != "train/":
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
    os.environ.setdefault("WANDB_SILENT", "true")  # one progress display, and it is ours
    return WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        id=_identity(run),
        dir=str(run),
        config=settings,
        mode=os.environ.get("WANDB_MODE", "offline"),
        resume="allow",
    )


def _mlflow(run: Path, settings: dict[str, Any]) -> tuple[GeneralTracker, int]:
    """In the run directory unless MLFLOW_TRACKING_URI says otherwise; and the last step that this run has there."""
    import mlflow

    for name, value in _MLFLOW_PATIENCE.items():
        os.environ.setdefault(name, value)
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # no server and no data base is needed for one run
        mlflow.set_tracking_uri((run.resolve() / "mlflow").as_uri())
    tags = {_TAG: _identity(run)}
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    found = []
    if experiment is not None:
        condition = f"tags.`{_TAG}` = '{tags[_TAG]}'"
        found = client.search_runs([experiment.experiment_id], condition, max_results=1)
    known = found[0].info.run_id if found else None
    tracker = MLflowTracker(PROJECT, run_id=known, run_name=run.name, tags=tags)
    tracker.start()
    if known is None:
        tracker.store_init_configuration(settings)
        return tracker, 0
    return tracker, max((metric.step for metric in client.get_metric_history(known, "train/learning_rate")), default=0)


def _identity(run: Path) -> str:
    return hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:16]
