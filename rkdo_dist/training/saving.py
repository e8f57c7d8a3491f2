"""Checkpoints and evaluations of a run: written at its position, and read to continue it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from rkdo_dist import checkpoint
from rkdo_dist import config as configuration
from rkdo_dist.config import Config
from rkdo_dist.diagnostics import logger
from rkdo_dist.evaluate import probes
from rkdo_dist.evaluate.evaluation import evaluate_encoder
from rkdo_dist.exchange import group
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.rundir import RunDirectory, RunError
from rkdo_dist.training.job import Job
from rkdo_dist.training.journal import Journal


def save(job: Job, journal: Journal) -> bool:
    """Write a checkpoint of the position, unless this step is already saved (collective); whether it was written."""
    if job.saved == job.position:
        return False
    journal.sync()
    state = job.step.strategy.state()  # collective: shards are gathered
    what = f"saving the checkpoint of step {job.position}"

    def begin() -> Path:
        job.run.require_here()
        return checkpoint.begin(job.run.checkpoints, job.position)

    building = group.on_main(begin, what)
    everyones = Path(group.from_rank_zero(str(building)))
    mine: dict[str, dict[str, Tensor]] = {}
    for kept in job.kept:
        mine |= kept.parts()
    hashed = group.gather_objects(group.together(lambda: checkpoint.write_parts(everyones, mine), what))
    if job.persistent is not None:
        shown = job.persistent.watched(job.position)
        group.on_main(lambda: job.run.write_rows(shown), what)

    def commit() -> None:
        assert building is not None
        parts: checkpoint.Facts = {}
        for some in hashed:
            parts.update(some)  # type: ignore[call-overload]
        extra = {
            **job.facts(),
            "configuration": configuration.decisive_tree(job.config),
            "skipped_in_a_row": job.skipped_in_a_row,
            "early_stop": job.early_stop.state(),
            "collapse": job.collapse.state(),
            **({} if job.snapshots is None else {"snapshots": job.snapshots.state()}),
            "loss_scale": state.loss_scale,
            "launch": job.runtime.launch,
            "arithmetic": job.arithmetic(),
        }
        checkpoint.commit(building, state.model, state.optimizer, extra, job.config.train.keep_checkpoints, parts)
        job.run.saved(job.position)

    group.on_main(commit, what)
    job.saved = job.position
    return True


def restore(job: Job) -> None:
    """Continue from the newest complete checkpoint of the run, if it has one (collective).

    Raises:
        ValueError: on every rank, if no checkpoint is whole (that it is this run's own, `RunDirectory.claim` has seen
            to), or it does not fit; RankError with several ranks.
    """
    found = newest_checkpoint(job.run, job.runtime)
    if found is not None:
        group.together(lambda: _continue(job, found), "loading the checkpoint")


def _continue(job: Job, found: checkpoint.Checkpoint) -> None:
    assert found.optimizer is not None  # `save` writes it
    job.encoder.load_state_dict(found.model)
    checkpoint.tensors_to_optimizer(found.optimizer, job.optimizer, job.encoder.named_parameters())
    for kept in job.kept:
        kept.restore(found)
    job.position = job.saved = found.step
    job.skipped_in_a_row = found.extra["skipped_in_a_row"]
    job.early_stop.restore(found.extra.get("early_stop", {}))
    job.collapse.restore(found.extra.get("collapse", {}))
    if job.collapse.noticed is not None:
        job.run.remark(job.collapse.message)
    if job.snapshots is not None:
        job.snapshots.restore(found.extra.get("snapshots", {}))
    job.before = found.extra


def branch(job: Job) -> None:
    """Begin with the last weights and the optimizer's state of the run that `run.branch` names, under own settings
    (collective).

    Steps, data order, rows and averages begin anew, the average with those weights. A run that has a checkpoint of its
    own continues from that (`restore`) and does not look at the other run again.

    Raises:
        RunError: if there is no such run, it is not complete, or its encoder or optimizer is another; RankError with
            several ranks.
    """
    config = job.config
    if config.run.branch == "none" or newest_checkpoint(job.run, job.runtime) is not None:
        return
    source = RunDirectory(Path(config.run.branch.replace("{seed}", str(config.run.seed))))

    def require_complete() -> None:
        if source.status()["status"] != "complete":
            raise RunError(
                f"run.branch={source.path}: that run is not complete; continue it first with run.resume=auto"
            )

    group.together(require_complete, "looking at run.branch")
    found = newest_checkpoint(source, job.runtime)
    group.together(lambda: _begin_with(job, source, found), "looking at run.branch")


def _begin_with(job: Job, source: RunDirectory, found: checkpoint.Checkpoint | None) -> None:
    if found is None or found.optimizer is None:
        raise RunError(f"run.branch={source.path}: that run has no checkpoint any more")
    own = [{key: value for key, value in group.items() if key != "params"} for group in job.optimizer.param_groups]
    try:
        job.encoder.load_state_dict(found.model)
        checkpoint.tensors_to_optimizer(found.optimizer, job.optimizer, job.encoder.named_parameters())
    except (RuntimeError, ValueError) as error:
        raise RunError(f"run.branch={source.path} has another encoder or optimizer: {error}") from None
    for parameters, settings in zip(job.optimizer.param_groups, own, strict=True):
        parameters.update(settings)
    if job.average is not None:
        job.average.model.load_state_dict(found.model)


def newest_checkpoint(run: RunDirectory, runtime: Runtime) -> checkpoint.Checkpoint | None:
    """The newest complete checkpoint of a run, the same on every rank (collective); if it is not the newest, rank zero
    says why.

    Raises:
        CheckpointError: on every rank, if there are some and none is complete.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", checkpoint.CheckpointWarning)
        found = checkpoint.load_latest(run.checkpoints, together=True)
    if runtime.is_main:
        for warning in said:
            logger.warning("%s", warning.message)
    return found


def own_checkpoint(run: RunDirectory, config: Config, runtime: Runtime) -> checkpoint.Checkpoint:
    """The newest checkpoint of a run that is to be looked at, not continued; the same on every rank (collective).

    Raises:
        RunError: if there is none, or it is not this run's own.
    """
    found = newest_checkpoint(run, runtime)
    if found is None:
        raise RunError(f"{run.path} has no checkpoint yet: train it first")
    group.together(lambda: run.refuse_foreign(found, config), "comparing the checkpoint with config.yaml")
    return found


def evaluate(job: Job, journal: Journal) -> bool:
    """Evaluate the encoder as it is now, or its average (collective); False if that was done at this step already."""
    which = job.config.evaluate.weights
    if group.from_rank_zero(job.run.evaluated(job.position, which)):
        return False
    with _evaluated(job) as encoder:
        evaluate_encoder(
            job.config, job.runtime, job.index, job.run, encoder, job.position, journal.console, job.metrics
        )
    journal.evaluated(job.position, job.run.evaluations / f"{job.position}.json")
    return True


def probe(job: Job) -> dict[str, float | None]:
    """The probes of the encoder as it is now, or of its average; the same on every rank (collective)."""
    with _evaluated(job) as encoder:
        return probes.probe(job.config, job.runtime, job.index, encoder)


@contextlib.contextmanager
def _evaluated(job: Job) -> Iterator[Any]:
    """The encoder that `evaluate.weights` says, whole on this rank (collective)."""
    with job.step.strategy.whole() as trained:
        yield job.average.model if job.config.evaluate.weights == "ema" and job.average is not None else trained
