"""The method, from batch to weights: `train_step` is a step, `steps` the whole run, `run` adds log and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rkdo_dist.data.stream import Batch, MicroBatch
from rkdo_dist.diagnostics import logger
from rkdo_dist.exchange import group
from rkdo_dist.exchange.transfer import upload
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks import messages
from rkdo_dist.ranks.signals import StopRequest
from rkdo_dist.training import facts as facts_of_a_step
from rkdo_dist.training.callbacks import Callbacks
from rkdo_dist.training.facts import Facts, Told
from rkdo_dist.training.job import Job
from rkdo_dist.training.journal import Journal
from rkdo_dist.training.saving import evaluate, probe, save
from rkdo_dist.training.step import Step
from rkdo_dist.training.strategy import Position, Update


class NonFiniteError(ArithmeticError):
    """An embedding, the loss or a gradient is not finite; raised alike on every rank, before any weight has changed."""


def train_step(
    step: Step,
    lanes: Sequence[MicroBatch],
    objective: Objective,
    epoch: int,
    number: int,
    tell: Callable[[], Told] = Told,
) -> tuple[Facts, Update]:
    """One global batch: from images to moved weights (collective).

    Args:
        step: encoder, views and strategy.
        lanes: this rank's micro-batches, in lane order.
        objective: resolved for this step.
        epoch, number: position of the batch (steps count from 0), which keys all randomness.
        tell: returns the facts of this rank's host for the others; called as late as possible.

    Returns:
        The facts of the step and the outcome of the update; the same on every rank.
    """
    strategy, persistent = step.strategy, step.strategy.rows_for(objective)
    at = Position(epoch, number, step.runtime.rank * len(lanes))
    lanes = step.uploaded(lanes)
    labels = torch.cat([x.labels for x in lanes]) if objective.needs_labels else None
    if persistent is not None:
        persistent.begin(number, torch.cat([lane.ids for lane in lanes]))

    relational = strategy.relational_for(objective)
    keys = columns = None
    if relational is not None and not relational.relation.own_keys:
        keys = step.keys(lanes, at, relational.relation.teacher)
        columns = None if relational.relation.columns == "batch" else keys
    embedded = step.embed(lanes, at, columns)
    pairs = [lane.detached().pair() for lane in embedded]
    if relational is not None:
        samples, classes = (torch.cat([getattr(lane, name) for lane in lanes]) for name in ("ids", "labels"))
        relational.begin([v for _, v in pairs] if keys is None else keys, samples, classes)
    field = strategy.field(pairs, objective, at, None if labels is None else upload(labels, step.runtime.device))
    strategy.backward(step.embed_again(lanes, embedded, at), field)
    exchanged = strategy.exchange([lane.statistics for lane in embedded])

    views = torch.stack([view for pair in pairs for view in pair])
    finite = torch.isfinite(views).view(len(pairs), -1).all(1)
    facts = facts_of_a_step.gather(strategy, finite, field, exchanged, tell(), at, labels)
    if facts.not_finite:
        strategy.discard()
        return facts, Update(facts.not_finite, not_finite=True)
    update = strategy.update(at, facts.gradient_not_finite, facts.gradient_norm)
    if not update.skipped:
        for statistics in exchanged.statistics:  # once, or once per view where views are forwarded apart
            step.statistics.update(statistics)
        if persistent is not None:
            persistent.commit()
        if step.average is not None:
            step.average.move()
        if relational is not None:
            relational.commit()
    return facts, update


def steps(job: Job, stop: StopRequest) -> Iterator[tuple[Facts, dict[str, Any]]]:
    """Train from the job's position to its end, one step at a time (collective).

    Yields:
        The facts of each step and its line of metrics.jsonl, after the weights have moved.

    Raises:
        NonFiniteError: on every rank, when more steps in a row than `train.skip_nonfinite` were not finite.
        RankError: on every rank, when one could not read its next batch.
    """
    reading, skips = "reading the next batch", job.config.train.skip_nonfinite
    with contextlib.closing(job.stream()) as stream:  # type: ignore[type-var]
        job.begin_epoch()
        batch = group.together(lambda: next(stream, None), reading)
        while batch is not None and not job.early_stop.reached:
            began = time.perf_counter()
            objective = job.objective(job.position)
            job.set_learning_rate(job.position)
            following: list[group.Attempt[Batch | None]] = []
            ahead = not job.draws_next

            def tell(
                batch: Batch = batch, following: list[group.Attempt[Batch | None]] = following, ahead: bool = ahead
            ) -> Told:
                if ahead:
                    following.append(group.Attempt(lambda: next(stream, None)))  # while the device computes this one
                return job.told(batch, stop.code, ahead and following[0].failed)

            facts, update = train_step(job.step, batch.lanes, objective, batch.epoch, job.position, tell)
            if job.temperature is not None and facts.temperature_slope is not None and not update.skipped:
                job.temperature.move(facts.temperature_slope, job.optimizer.param_groups[0]["lr"])
            job.skipped_in_a_row = job.skipped_in_a_row + 1 if update.not_finite else 0
            if job.skipped_in_a_row > skips:
                raise NonFiniteError(
                    f"{update.skipped}; no weight was changed. Lower train.learning_rate, or allow some skipped steps "
                    f"in a row with train.skip_nonfinite (now {skips})"
                )
            job.position += 1
            job.early_stop.add(objective.name, None if update.not_finite else facts.loss)
            if facts.warned:
                messages.current().exchange()
            yield facts, job.record(batch.epoch, objective, facts, update, time.perf_counter() - began)
            if ahead:
                batch = following[0].result(facts.unread, reading)
            else:
                job.begin_epoch()
                batch = group.together(lambda: next(stream, None), reading)


def run(job: Job, journal: Journal, stop: StopRequest, callbacks: Callbacks) -> int:
    """Train from the job's position to its end, with journal, checkpoints, evaluations and callbacks.

    Returns:
        0 if the run is complete, otherwise the exit code of the stop request (`ranks.signals`); in both cases the last
        step is in a checkpoint.

    Raises:
        Stopped: on every rank, during an evaluation, which a resume begins again.
    """
    if job.evaluation_due():
        _evaluate(job, journal, callbacks)
    with contextlib.closing(steps(job, stop)) as training:  # type: ignore[type-var]
        for facts, record in training:
            if job.probe_due():
                record |= probe(job)
            journal.step(record)
            if "collapsed" in record:
                job.run.remark(job.collapse.message)
                if job.runtime.is_main:
                    logger.warning("%s", job.collapse.message)
            told = callbacks.attempt("on_step", record)
            if facts.stop or job.checkpoint_due() or job.evaluation_due():
                _save(job, journal, callbacks)
            callbacks.raise_failure("on_step", told)
            if job.epoch_ended:
                callbacks.tell("on_epoch", record)
            if facts.stop:
                return facts.stop
            if job.evaluation_due():
                _evaluate(job, journal, callbacks)
    if job.early_stop.reached:
        journal.say(f"step {job.position}: the loss no longer falls by train.early_stop_slope a step; the run ends")
    _save(job, journal, callbacks)
    if job.config.evaluate.at_end:
        _evaluate(job, journal, callbacks)
    return 0


def _save(job: Job, journal: Journal, callbacks: Callbacks) -> None:
    if save(job, journal):
        path = job.run.checkpoints / str(job.position)
        callbacks.tell("on_checkpoint", {"step": job.position, "path": str(path)})


def _evaluate(job: Job, journal: Journal, callbacks: Callbacks) -> None:
    if evaluate(job, journal) and callbacks.told_of("on_evaluation"):
        found = group.on_main(lambda: job.run.evaluation(job.position), "reading the evaluation")
        callbacks.tell("on_evaluation", group.from_rank_zero(found or {}))
