"""One training run on this rank: its parts and its position."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from rkdo_dist import __version__, parts
from rkdo_dist import config as configuration
from rkdo_dist.checkpoint import Kept
from rkdo_dist.config import Config
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.order import rank_lanes
from rkdo_dist.data.partners import Partners
from rkdo_dist.data.shards import check_shards
from rkdo_dist.data.stream import Batch, MicroBatch, lane_stream
from rkdo_dist.data.views import Views
from rkdo_dist.encoders import Encoder
from rkdo_dist.evaluate.evaluation import Metric
from rkdo_dist.exchange import group
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.schedules import learning_rate
from rkdo_dist.ranks import messages
from rkdo_dist.ranks.arithmetic import arithmetic
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.training.average import WeightAverage
from rkdo_dist.training.collapse import Collapse
from rkdo_dist.training.compiled import compiled
from rkdo_dist.training.early_stop import EarlyStop
from rkdo_dist.training.facts import Facts, Told
from rkdo_dist.training.persistent import PersistentField, make_persistent
from rkdo_dist.training.relation import RelationalField, make_relational
from rkdo_dist.training.snapshot import Snapshots, make_snapshots
from rkdo_dist.training.step import TEACHER, Step, StepSettings
from rkdo_dist.training.strategy import Update
from rkdo_dist.training.supervision import Sampled, make_sampled, supervisor_rows
from rkdo_dist.training.temperature import LearnedTemperature


@dataclasses.dataclass
class Job:
    """Parts and position of a run, made by `build`.

    Attributes:
        steps_per_epoch, total_steps: length of the run.
        persistent: rows of all samples that supervise, if there are any.
        sampled: draws the samples whose views are the second ones, if supervisors are delivered so.
        snapshots: of the encoder, which make the rows that are drawn of, if it is its own teacher so.
        average: of the encoder's weights, with `train.ema`.
        relational: what a recursion with restart keeps, if it is of that kind.
        temperature: with `field.learn_temperature`.
        before: what the checkpoint continued from tells beside tensors; empty if none.
        position: steps done. With the configuration it is all that is needed to continue.
        saved: position of the newest checkpoint.
        skipped_in_a_row: steps before the position that were not finite.
        metrics: further scores of evaluations, by name.
        collapse: watches the loss.
        kernel: of the field, in words (`ranks.agreement.agreed_kernel`).
        compiled: the encoder's training pass, with `train.compile`.
        step: encoder and strategy; from `begin` on, they own weights and optimizer state.
    """

    config: Config
    runtime: Runtime
    index: ShardIndex
    run: RunDirectory
    steps_per_epoch: int
    total_steps: int
    encoder: Encoder
    optimizer: torch.optim.Optimizer
    views: Views
    average: WeightAverage | None
    relational: RelationalField | None
    temperature: LearnedTemperature | None
    early_stop: EarlyStop
    before: dict[str, Any] = dataclasses.field(default_factory=dict)
    position: int = 0
    saved: int = 0
    skipped_in_a_row: int = 0
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    persistent: PersistentField | None = None
    sampled: Sampled | None = None
    collapse: Collapse = dataclasses.field(default_factory=Collapse)
    snapshots: Snapshots | None = None
    kernel: str = "eager"
    compiled: nn.Module | None = None
    step: Step = dataclasses.field(init=False)

    @property
    def kept(self) -> list[Kept]:
        """What is kept from step to step beside weights and optimizer."""
        return [x for x in (self.persistent, self.average, self.relational, self.temperature) if x is not None]

    def supervise(self) -> None:
        """Make the rows that supervise, and what draws of them (collective).

        Raises:
            ValueError: on every rank, if they do not fit the data.
        """
        config, index = self.config, self.index
        rows = supervisor_rows(config, self.runtime, index, self.encoder, self.views)
        device, what = self.runtime.device, "making the rows that supervise"
        self.snapshots = group.together(lambda: make_snapshots(config, self.runtime, index, self.views), what)
        if self.snapshots is not None:
            rows = self.snapshots.first()
        self.persistent = group.together(lambda: make_persistent(config, index, device, rows), what)
        store = None if self.persistent is None else self.persistent.store
        self.sampled = group.together(lambda: make_sampled(config, index, store), what)

    def compile(self) -> None:
        """Compile the encoder's training pass, if that was asked for (collective).

        Raises:
            ValueError: on every rank, if this launch or this machine cannot.
        """
        train = self.config.train
        if not train.compile:
            return
        both = train.views == "together" and (self.relational is None or self.relational.relation.own_keys)
        shape = (train.lane_size * (1 + both), 3, self.views.size, self.views.size)
        self.compiled = compiled(self.encoder, shape, self.runtime)

    def begin(self) -> None:
        """Hand weights and optimizer to the step's strategy (collective)."""
        settings = StepSettings(
            seed=self.config.run.seed,
            reduction=self.runtime.reduction,
            recompute=self.config.train.recompute,
            views_together=self.config.train.views == "together",
            exchange="ring" if self.config.run.reduction == "ring" else "gather",
            clip=self.config.train.clip_gradient,
            learn_temperature=self.temperature is not None,
        )
        self.step = Step(
            self.encoder,
            self._view,
            self.runtime,
            settings,
            self.optimizer,
            self.persistent,
            self.average,
            self.relational,
            self.compiled,
        )
        self.step.strategy.load_scale(self.before.get("loss_scale", {}))

    def _view(self, images: torch.Tensor, ids: torch.Tensor, epoch: int, view: int) -> torch.Tensor:
        views = self.views
        if view == TEACHER and self.relational is not None:
            if self.relational.relation.view == "plain":
                return views.plain(images)
            views = views.weak() if self.relational.relation.view == "weak" else views
        return views(images, ids, self.config.run.seed, epoch, view)

    def stream(self) -> Iterator[Batch]:
        """This rank's lanes of the global batch for every step from the position to the end (see `begin_epoch`)."""
        return self._read(None if self.sampled is None else self.sampled.open(self.config.data.workers))

    def _read(self, partners: Partners | None) -> Iterator[Batch]:
        train, data = self.config.train, self.config.data
        first_epoch, start_step = divmod(self.position, self.steps_per_epoch)
        epochs = self.epochs - first_epoch
        if epochs <= 0:
            return
        stream = lane_stream(
            self.index,
            data.split,
            seed=self.config.run.seed,
            all_lanes=train.lanes,
            micro_batch=train.lane_size,
            lanes=rank_lanes(train.lanes, self.runtime.rank, self.runtime.world),
            epoch=first_epoch,
            start_step=start_step,
            epochs=epochs,
            steps_per_epoch=self.steps_per_epoch,
            window=data.shuffle_buffer,
            size=data.image_size,
            workers=data.workers,
            on_corrupt=data.on_corrupt,
            pin_memory=self.runtime.device.type == "cuda",
            partners=partners,
        )
        try:
            yield from itertools.islice(stream, self.total_steps - self.position)
        finally:
            stream.close()

    @property
    def draws_next(self) -> bool:
        """Whether samples are drawn when the step of this position is done, because an epoch begins then."""
        return self.sampled is not None and (self.position + 1) % self.steps_per_epoch == 0

    def begin_epoch(self) -> None:
        """Draw the samples of the epoch that the position lies in, if any are and the run goes on (collective)."""
        if self.sampled is None or self.position >= self.total_steps:
            return
        epoch = self.position // self.steps_per_epoch
        if self.snapshots is not None and self.persistent is not None and self.snapshots.due(epoch):
            with self.step.strategy.whole() as encoder:
                self.snapshots.take(epoch, encoder, self.persistent.store)
        self.sampled.begin(epoch)

    def objective(self, step: int) -> Objective:
        """The objective of a step (its temperature may follow the training clock, or be learned)."""
        known = parts.make_objective(self.config, step / self.total_steps, self.total_steps / self.steps_per_epoch)
        return known if self.temperature is None else known.with_temperature(self.temperature.value)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up, however they are given."""
        train = self.config.train
        return train.warmup_steps if train.warmup_epochs is None else round(train.warmup_epochs * self.steps_per_epoch)

    def set_learning_rate(self, step: int) -> None:
        """Set the learning rate of a step, a function of the step alone."""
        train = self.config.train
        rate = learning_rate(train.schedule, train.peak_rate, step, self.total_steps, self.warmup_steps)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate

    def told(self, batch: Batch, stop: int, unread: bool) -> Told:
        """Facts of this rank's host on a step, for the others."""
        return Told(
            stop=stop,
            replaced=sum(micro.skipped for micro in _with_seconds(batch)),
            warned=messages.current().waiting,
            unread=unread,
            digests=b"".join(_digest(lane) for lane in batch.lanes),
        )

    def record(self, epoch: int, objective: Objective, facts: Facts, update: Update, seconds: float) -> dict[str, Any]:
        """The line of metrics.jsonl for the step just done."""
        found = {} if update.not_finite else dict(facts.parts)
        varies = self.relational is not None and self.relational.takes_part(objective)
        varies |= objective.supervisor == "rows"
        ideal = None if varies else objective.at_ideal(self.config.train.global_batch, facts.labels)
        placed = {
            "loss": None if update.not_finite else facts.loss,
            "loss_at_uniform": found.pop("uniform", None),
            "loss_at_ideal": found.pop("ideal", ideal),
        }
        return {
            "step": self.position,
            "epoch": epoch,
            **placed,
            **found,
            **({"collapsed": True} if self.collapse.add(self.position, *placed.values()) else {}),
            **({} if self.snapshots is None else self.snapshots.facts),
            **({"skipped": update.skipped} if update.skipped else {}),
            **({} if update.loss_scale is None else {"loss_scale": update.loss_scale}),
            **({"replaced_samples": facts.replaced} if self.config.data.on_corrupt == "skip" else {}),
            "gradient_norm": update.gradient_norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "objective": objective.name,
            "temperature": objective.temperatures[-1],
            "coupling": objective.coupling,
            "batch_digest": facts.digest,
            "seconds": round(seconds, 6),
            "pairs_per_second": round(self.config.train.global_batch / seconds, 3),
        }

    @property
    def epochs(self) -> int:
        """Epochs of the run, the last perhaps not whole."""
        return -(-self.total_steps // self.steps_per_epoch)

    @property
    def epoch_ended(self) -> bool:
        """Whether the step just done was the last of its epoch."""
        return self.position > 0 and self.position % self.steps_per_epoch == 0

    def checkpoint_due(self) -> bool:
        """Whether `train.checkpoint_every` steps have passed since the last time."""
        every = self.config.train.checkpoint_every
        return every is not None and self.position % every == 0

    def probe_due(self) -> bool:
        """Whether probes were asked for and it is their turn: every so many steps, or once an epoch and at the end."""
        every, asked = self.config.evaluate.probe_every, self.config.evaluate.probes
        turn = self.epoch_ended or self.position == self.total_steps if every is None else self.position % every == 0
        return bool(asked) and turn

    def evaluation_due(self) -> bool:
        """Whether an epoch has just ended after which an evaluation was asked for, and the run goes on."""
        train = self.config.train
        epochs = self.position // self.steps_per_epoch
        if not self.epoch_ended or self.position >= self.total_steps:
            return False
        return epochs in train.evaluate_at or (train.evaluate_every is not None and epochs % train.evaluate_every == 0)

    def arithmetic(self) -> dict[str, str]:
        """What the bits of the run depend on besides (`ranks.arithmetic`)."""
        return {**arithmetic(self.runtime.device), "encoder": "eager" if self.compiled is None else "compiled"}

    def facts(self) -> dict[str, Any]:
        """Facts that decide the result, for environment.json and for the comparison between ranks."""
        return {
            "settings": configuration.digest(self.config),
            "data": self.index.digest(),
            "version": __version__,
            "seed": self.config.run.seed,
        }


def _with_seconds(batch: Batch) -> list[MicroBatch]:
    return [micro for lane in batch.lanes for micro in (lane, lane.second) if micro is not None]


def _digest(lane: MicroBatch) -> bytes:
    """SHA-256 of a lane's keys, those of second views included."""
    keys = lane.keys if lane.second is None else [*lane.keys, *lane.second.keys]
    return hashlib.sha256("\n".join(keys).encode()).digest()


def build(
    config: Config,
    runtime: Runtime,
    index: ShardIndex,
    run: RunDirectory,
    *,
    backbone: nn.Module | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Job:
    """Build the parts of a run at its beginning.

    Args:
        backbone: a module in place of `encoder.backbone`.
        metrics: further scores of evaluations, by name.

    Raises:
        ValueError: for any setting that does not fit the data or the ranks.
    """
    parts.check_data(config, index)
    steps_per_epoch, total_steps = parts.run_length(config, index)
    if config.data.on_corrupt == "abort":
        check_shards(index, config.data.split)
    parts.require_labels(config, index)
    views = parts.make_views(config, index)
    encoder = parts.make_encoder(config, backbone=backbone).to(runtime.device)
    encoder.check_image_size(views.size)
    decay = configuration.decay_of(config)
    return Job(
        config,
        runtime,
        index,
        run,
        steps_per_epoch,
        total_steps,
        encoder,
        parts.make_optimizer(config, encoder),
        views,
        None if decay is None else WeightAverage(encoder, decay),
        make_relational(config, index, runtime.device),
        LearnedTemperature(config) if config.field.learn_temperature else None,
        EarlyStop(config.train.early_stop_slope, config.train.early_stop_window),
        metrics=metrics or {},
    )
