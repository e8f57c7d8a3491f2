"""Entry points from a configuration to an exit code: `train` and `evaluate_run`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.console import Terminal
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.diagnostics import Lasting, lasting_output, logger
from rkdo_dist.evaluate.evaluation import EvaluationPlan, Metric, check_metrics, evaluate_encoder
from rkdo_dist.exchange import group
from rkdo_dist.ranks import surroundings
from rkdo_dist.ranks.agreement import code_digest
from rkdo_dist.ranks.signals import Stopped, StopRequest
from rkdo_dist.ranks.surroundings import Surroundings
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.training import callbacks, loop, tracking
from rkdo_dist.training.callbacks import Callbacks
from rkdo_dist.training.job import Job
from rkdo_dist.training.journal import Journal
from rkdo_dist.training.micro_batch import resolved
from rkdo_dist.training.outlook import expectations
from rkdo_dist.training.readiness import made_ready
from rkdo_dist.training.saving import own_checkpoint, restore

RUNS = Path("runs")  # where runs go whose configuration does not say


@dataclasses.dataclass(frozen=True)
class Given:
    """What is given beside a configuration.

    Attributes:
        name: of the configuration, for the directory of a run that names none.
        backbone: a module in place of `encoder.backbone`, which is trained in place.
        open_index: in place of opening `data.source`.
        metrics: further scores of the test split's backbone features, by name.
        callbacks: see `training.callbacks`.
    """

    name: str = "run"
    backbone: nn.Module | None = None
    open_index: Callable[[], ShardIndex] | None = None
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    callbacks: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class Ended:
    """How training has ended: the exit code (0 complete, 75 pre-empted, 130 interrupted) and the run's directory."""

    code: int
    path: Path


def train(config: Config, given: Given | None = None) -> Ended:
    """Train as `config` says, on the ranks that the launcher started.

    A run that is pre-empted or interrupted has a checkpoint of its last step too.

    Raises:
        ValueError: for a mistake in the request, on every rank and before the first step.
    """
    given = given or Given()
    callbacks.check(given.callbacks)
    check_metrics(given.metrics)
    refuse_resume_of_nothing(config, given.name)
    with lasting_output() as output, StopRequest() as stop:
        try:
            return _train(config, given, stop, output)
        except Stopped as stopped:
            logger.info("stopped by a signal before the first step")
            return Ended(stopped.code, Path(config.run.dir))


def _train(config: Config, given: Given, stop: StopRequest, output: Sequence[Lasting]) -> Ended:
    with contextlib.ExitStack() as stack:
        start = stack.enter_context(contextlib.ExitStack())
        start.enter_context(stop.at_once())  # until there is something to finish
        around = stack.enter_context(surroundings.meet(config, open_data=given.open_index))
        stop.last_words = around.ended
        dated = not config.run.dir
        if dated:
            config = _dated(config, given.name)
        run = RunDirectory(config.run.dir)
        stack.callback(run.close)
        if given.backbone is not None:  # its owner may save it: safetensors writes tensors of this layout alone
            stack.callback(given.backbone.to, memory_format=torch.contiguous_format)
        asked, config = config, resolved(config, around.runtime, around.index, run, given.backbone)
        job, plan = _set_up(config, around, run, given)
        around.claimed(run if job.runtime.is_main else None, lambda: job.position)
        job.begin()
        trackers = group.on_main(lambda: _trackers(job, config), "starting run.trackers")
        console = Terminal(stderr=True) if job.runtime.is_main else None
        already = job.position
        label = job.objective(0).name
        journal = Journal(run.metrics, already, job.total_steps, job.epochs, console, label, trackers)
        with journal:
            start.close()
            if dated:
                journal.say(f"run: {run.path}")
            if already:
                journal.say(f"continuing {run.path} at step {already} of {job.total_steps}")
            if asked.train.micro_batch == "auto":
                journal.say(f"train.micro_batch={config.train.micro_batch}, chosen by auto and kept in config.yaml")
            for line in _remarks(job, plan, config):
                journal.say(line)
            around.messages.exchange()
            try:
                code = loop.run(job, journal, stop, Callbacks(given.callbacks, job.encoder))
            except Stopped as stopped:  # on every rank, in an evaluation, before which all is saved
                code = stopped.code
            around.messages.exchange()
            journal.say(_farewell(job, code))
        for lost in {stream.lost for stream in output if stream.lost}:
            run.remark(f"lines for people were lost: {lost}")
        around.ended(code)
        return Ended(code, run.path)


def refuse_resume_of_nothing(config: Config, name: str) -> None:
    """Refuse `run.resume=auto` without `run.dir`: it would begin a run of a new name every time.

    Raises:
        ConfigError: with the newest run of that name, if there is one.
    """
    if config.run.dir or config.run.resume != "auto":
        return
    there = sorted(path.parent for path in RUNS.glob(f"{name}-*/config.yaml"))
    newest = f" (the newest run of {name} is run.dir={there[-1]})" if there else f", e.g. run.dir={RUNS / name}"
    raise ConfigError(f"run.resume=auto continues what run.dir holds, so run.dir must say which run{newest}")


def _dated(config: Config, name: str) -> Config:
    """The configuration with a directory of its own, the same on every rank (collective)."""

    def choose() -> str:
        path = RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
        return str(path if not path.exists() else next(other for other in others if not other.exists()))

    chosen = group.on_main(choose, "choosing run.dir")
    run = dataclasses.replace(config.run, dir=group.from_rank_zero(chosen or ""))
    return dataclasses.replace(config, run=run)


def _set_up(config: Config, around: Surroundings, run: RunDirectory, given: Given) -> tuple[Job, EvaluationPlan]:
    """Everything that can fail because of the request fails here, on every rank alike."""
    job, plan = made_ready(config, around, run, given.backbone, given.metrics)
    rt, index = around.runtime, around.index
    source = group.together(lambda: other_run(config), "looking at run.resume")
    data = index.digest()
    group.on_main(lambda: run.claim(config, source, data, job.total_steps), "claiming run.dir")
    group.together(run.check_shared, "looking at run.dir")
    if config.run.resume != "never":
        restore(job)
    changed_by = {callbacks.name_of(one) for one in given.callbacks if getattr(one, "changes_results", False)}
    if rt.is_main:
        run.write_environment({
            **job.facts(),
            "world_size": rt.world,
            "device": str(rt.device),
            **rt.launch,
            "arithmetic": job.arithmetic(),
            "kernel": job.kernel,
            "fused_optimizer": bool(job.optimizer.defaults.get("fused")),
            "threads": config.run.threads,
            "image_size": job.views.size,
            "peak_learning_rate": config.train.peak_rate,
            "code": code_digest(),
            "started_at_step": job.position,
            "callbacks": [callbacks.name_of(one) for one in given.callbacks],
            "changed_by": sorted(changed_by | _changed_before(run, job.position)),
        })  # fmt: skip
    return job, plan


def _changed_before(run: RunDirectory, position: int) -> set[str]:
    """Callbacks that changed results before a run was continued."""
    return set(run.environment().get("changed_by", ())) if position else set()


def other_run(config: Config) -> RunDirectory | None:
    """The run that `run.resume` names, None for "auto" and "never".

    Raises:
        RunError: if there is no run with these settings.
    """
    if config.run.resume in ("auto", "never"):
        return None
    source = RunDirectory(Path(config.run.resume))
    source.refuse_changes(config)
    return source


def _trackers(job: Job, config: Config) -> tracking.Trackers | None:
    if not config.run.trackers:
        return None
    settings = configuration.flatten(configuration.without_secrets(config))
    return tracking.Trackers(config.run.trackers, job.run.path, job.position, settings)


def _remarks(job: Job, plan: EvaluationPlan, config: Config) -> list[str]:
    """Remarks on strategy and precision for the user, once."""
    rt, lines = job.runtime, [*job.index.notes]
    if plan.note is not None:
        lines.append(plan.note)
    lines += expectations(config, job.index.split(config.data.split).samples, job.steps_per_epoch)
    train = config.train
    if train.scale_lr != "none":
        lines.append(
            f"learning rate {train.peak_rate:g}: train.learning_rate={train.learning_rate:g} for 256 samples, "
            f"train.scale_lr={train.scale_lr} for train.global_batch={train.global_batch}"
        )
    if job.warmup_steps > job.total_steps:
        lines.append(
            f"the warm-up of {job.warmup_steps} steps is longer than the run of {job.total_steps}: the learning rate "
            f"never reaches {train.peak_rate:g} (train.warmup_steps, train.warmup_epochs)"
        )
    if rt.reduction != config.run.reduction:
        lines.append(
            f"{rt.strategy} (DeepSpeed) sums gradients in its own order, so run.reduction={rt.reduction} is in effect: "
            "bits depend on the number of processes"
        )
    numbers, before = job.arithmetic(), job.before.get("arithmetic", {})
    other = ", ".join(f"{k}: {v} -> {numbers.get(k)}" for k, v in before.items() if numbers.get(k) != v)
    if other:
        lines.append(
            f"the checkpoint was made by other arithmetic ({other}): the run goes on, but not with the same bits"
        )
    launch = job.before.get("launch", rt.launch)
    changed = ", ".join(f"{key}: {launch[key]} -> {now}" for key, now in rt.launch.items() if launch[key] != now)
    if changed:
        lines.append(f"the checkpoint was written under another launch ({changed}); its whole state is carried over")
    return lines


def _farewell(job: Job, code: int) -> str:
    if code:
        return f"stopped after step {job.position} of {job.total_steps}; continue with run.resume=auto"
    return f"done: {job.run.path}"


def evaluate_run(directory: Path, overrides: Sequence[str] = ()) -> None:
    """Evaluate the newest complete checkpoint of a run and write `evaluations/<step>.json`.

    Args:
        directory: a run directory.
        overrides: changes to settings that do not affect the run's results (evaluate.*, data.source, ...).

    Raises:
        ValueError: if there is no run, no checkpoint, or a setting that would change the run.
    """
    run = RunDirectory(directory)
    config = run.config(overrides)
    if configuration.decisive(config) != configuration.decisive(run.config()):
        raise ConfigError(
            "only settings that do not change the run can be overridden here (evaluate.*, data.source, ...)"
        )
    code = any(override.partition("=")[0] == "encoder.backbone" for override in overrides)
    with StopRequest() as stop, contextlib.closing(run), contextlib.ExitStack() as stack:
        start = stack.enter_context(contextlib.ExitStack())
        start.enter_context(stop.at_once())  # until the ranks evaluate together, and stop together
        around = stack.enter_context(surroundings.meet(config))
        rt, index = around.runtime, around.index
        group.on_main(run.lock, f"locking {run.path}")
        encoder = parts.make_encoder(config, pretrained=False, code=code).to(rt.device)
        found = own_checkpoint(run, config, rt)
        encoder.load_state_dict(found.weights(config.evaluate.weights))
        start.close()
        evaluate_encoder(config, rt, index, run, encoder, found.step, Terminal(stderr=True) if rt.is_main else None)
