"""Training from Python: `train` with a model, data, metrics and callbacks of one's own, and the `Run` it returns."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.data.datasets import given_index
from rkdo_dist.encoders import is_code
from rkdo_dist.evaluate.evaluation import Metric
from rkdo_dist.export.pretrained import PretrainedEncoder, load_encoder
from rkdo_dist.history import History
from rkdo_dist.ranks.arithmetic import as_before
from rkdo_dist.ranks.relaunch import missing_ranks
from rkdo_dist.ranks.signals import INTERRUPTED
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.training import main as training
from rkdo_dist.training.main import Given


class Run:
    """A run, as its directory tells it. Made by `train`, or of any run directory: `Run("runs/first")`.

    Args:
        path: the run directory.
        exit_code: how `train` ended it: 0 complete, 75 pre-empted (continue it with run.resume=auto). None for a run
            that was not trained here.

    Attributes:
        path, exit_code: as given.
    """

    def __init__(self, path: str | Path, exit_code: int | None = None, *, backbone: str | nn.Module | None = None):
        self.path, self.exit_code, self._backbone = Path(path), exit_code, backbone

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, exit_code={self.exit_code})"

    @property
    def history(self) -> History:
        """All numbers of the run: `records` of metrics.jsonl, a `curve(name)` by step, and more.

        Raises:
            ValueError: if it is not a run directory, or a file of it is damaged.
        """
        return RunDirectory(self.path).history()

    @property
    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Scores by step, rising; see docs/evaluate.md for their names."""
        return self.history.evaluations

    @property
    def status(self) -> str:
        """ "running", "complete", "preempted", "interrupted" or "failed"."""
        return str(RunDirectory(self.path).status()["status"])

    def load_encoder(self) -> PretrainedEncoder:
        """The encoder of the newest checkpoint in evaluation mode, a copy of its own; as `rkdo_dist.load_encoder`."""
        given = self._backbone
        return load_encoder(self.path, backbone=copy.deepcopy(given) if isinstance(given, nn.Module) else given)


def train(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    encoder: nn.Module | str | None = None,
    data: Dataset | Mapping[str, Dataset] | str | Path | None = None,
    objective: str | None = None,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Sequence[Any] = (),
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Train an encoder: what `rkdo train` does, with the same bits, on the ranks that a launcher has started.

    The process group, signals, torch's random state and its number of threads are as before when it returns.

    Args:
        config: a YAML file; or settings, nested ({"train": {"epochs": 5}}) or dotted ({"train.epochs": 5}).
        encoder: a module that maps images (n, 3, H, W) to features (n, f) and is trained in place, its own weights
            being the first ones, which must be the same on every rank; or a name as `encoder.backbone`. The
            projection head is added to it and is part of the run, not of the module.
        data: a torch `Dataset` (see docs/data.md for its items), or {"train": ..., "test": ...}; or anything that
            `data.source` takes.
        objective: as `field.objective`; its parameters are the settings of the section `field`.
        metrics: by name, functions of the test split's backbone features (n, f) float32 and labels (n,) int64 (-1:
            none) that return a number. Every evaluation calls them and stores the number under the name.
        callbacks: see `Callback`.
        settings: further settings, which take the place of those in `config`.

    Returns:
        The run. Its directory is `run.dir`, or by default runs/NAME-DATE-TIME with the name of the file (or "run").

    Raises:
        ValueError: for a mistake in the request, on every rank and before the first step, in one line; for a metric
            that fails or returns no number.
        KeyboardInterrupt: after Ctrl-C, when the step is finished and saved.
        RuntimeError: for a callback that fails, naming it; for ranks that disagree.
    """
    _refuse_imported_again()
    _refuse_missing_ranks()
    for argument, value in (("settings", settings), ("metrics", metrics)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{argument} must be a mapping by name, got {type(value).__name__}")
    if not isinstance(callbacks, Sequence):
        raise ConfigError(f"callbacks must be a list, got {type(callbacks).__name__}")
    loaded, name = _configuration(config, settings)
    overrides, backbone, open_index = {}, None, None
    if isinstance(encoder, nn.Module):
        backbone = encoder
        overrides["encoder.backbone"] = f"python:{type(encoder).__name__}"
    elif encoder is not None:
        overrides["encoder.backbone"] = _text("encoder", encoder, "a torch.nn.Module or the name of a backbone")
    if isinstance(data, str | Path):
        overrides["data.source"] = str(data)
    elif data is not None:
        overrides["data.source"] = f"python:{type(data).__name__}"
    if objective is not None:
        overrides["field.objective"] = _text("objective", objective, "the name of an objective; see field.* as well")
    loaded = configuration.with_values(loaded, overrides)
    if data is not None and not isinstance(data, str | Path):
        workers = loaded.data.workers > 0

        def open_index() -> Any:
            return given_index(data, workers=workers)

    given = Given(name, backbone, open_index, dict(metrics or {}), tuple(callbacks))
    with _as_before():
        parts.check(loaded)
        ended = training.train(loaded, given)
    if ended.code == INTERRUPTED:
        raise KeyboardInterrupt
    named = loaded.encoder.backbone
    return Run(ended.path, ended.code, backbone=backbone or (named if is_code(named) else None))


def _configuration(
    config: str | Path | Mapping[str, Any] | Config, settings: Mapping[str, Any] | None
) -> tuple[Config, str]:
    """The configuration, and its name for a directory."""
    if isinstance(config, str | Path):
        loaded, name = configuration.load(config), Path(config).stem
    elif isinstance(config, Mapping):
        loaded, name = configuration.with_values(Config(), config), "run"
    elif isinstance(config, Config):
        loaded, name = config, "run"
    else:
        raise ConfigError(f"config must be a YAML file or a mapping of settings, got {type(config).__name__}")
    return configuration.with_values(loaded, settings or {}), name


def _text(argument: str, value: Any, wanted: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{argument} must be {wanted}, got {type(value).__name__}")
    return value


def _refuse_imported_again() -> None:
    """Loader processes import the script that has started them, which must not train there."""
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        raise RuntimeError(
            "rkdo_dist.train was called while a loader process imported the script: put the call under `if __name__ == "
            '"__main__":`, or use data.workers=0'
        )


def _refuse_missing_ranks() -> None:
    """`accelerate launch` without an accelerator starts one process, whatever number was asked for."""
    extra = missing_ranks()
    if extra is not None and extra[-1] != "--nproc-per-node=1":
        raise ConfigError(
            "`accelerate launch` has started one process where several were asked for, as it does without an "
            "accelerator: add --multi_gpu (it works on CPUs too), or use torchrun"
        )


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Leave torch's random state, number of threads and choice of algorithms as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), as_before():
        yield
