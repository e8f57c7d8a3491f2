"""One training run on this rank: its parts, its position, and what it writes."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rkdo_dist import __version__, checkpoint, parts
from rkdo_dist import config as configuration
from rkdo_dist.config import Config
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.order import rank_lanes
from rkdo_dist.data.shards import check_shards
from rkdo_dist.data.stream import Batch, lane_stream
from rkdo_dist.evaluate.judge import evaluate_encoder
from rkdo_dist.exchange import group
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.schedules import learning_rate
from rkdo_dist.ranks import messages
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.train.early_stop import EarlyStop
from rkdo_dist.train.journal import Journal
from rkdo_dist.train.persistent import make_memory
from rkdo_dist.train.step import NonFiniteError, Step, StepResult, StepSettings
from rkdo_dist.train.strategy import TrainState


class Job:
    """A run, ready for its next step.

    Attributes:
        position: steps done. With the configuration it is all that is needed to go on.
        steps_per_epoch, total_steps: length of the run.
        launch_before: strategy, precision and reduction of the checkpoint continued from; this launch's if none.

    Raises:
        ValueError: for any setting that does not fit the data or the ranks.
    """

    def __init__(self, config: Config, runtime: Runtime, index: ShardIndex, run: RunDirectory) -> None:
        self.config, self.runtime, self.index, self.run = config, runtime, index, run
        self.steps_per_epoch, self.total_steps = parts.run_length(config, index)
        self.objective(0)
        if config.data.on_corrupt == "abort":
            check_shards(index, config.data.split)
        parts.require_labels(config, index)
        self.views = parts.make_views(config, index)
        self.encoder = parts.make_encoder(config).to(runtime.device)
        self.encoder.check_image_size(self.views.size)
        self.optimizer = parts.make_optimizer(config, self.encoder)
        self.position = 0
        self._saved = 0
        self._skipped_in_a_row = 0
        self._loss_scale: dict[str, float] = {}
        self.launch_before = runtime.launch
        self._early_stop = EarlyStop(config.train.early_stop_slope, config.train.early_stop_window)
        self.memory = make_memory(config, index, runtime.device)

    def make_step(self) -> Step:
        """The step, whose strategy owns weights and optimizer state from now on (collective)."""
        settings = StepSettings(
            seed=self.config.run.seed,
            reduction=self.runtime.reduction,
            recompute=self.config.train.recompute,
            views_together=self.config.train.views == "together",
            exchange="ring" if self.config.run.reduction == "ring" else "gather",
        )
        step = Step(self.encoder, self._view, self.runtime, settings, self.optimizer, self.memory)
        step.strategy.load_scale(self._loss_scale)
        self._strategy = step.strategy
        return step

    def _view(self, images: torch.Tensor, ids: torch.Tensor, epoch: int, view: int) -> torch.Tensor:
        return self.views(images, ids, self.config.run.seed, epoch, view)

    def batches(self) -> Iterator[Batch]:
        """This rank's lanes of the global batch for every step from the position to the end."""
        if self.flat:
            return
        first_epoch, start_step = divmod(self.position, self.steps_per_epoch)
        last_epoch = -(-self.total_steps // self.steps_per_epoch)
        if first_epoch >= last_epoch:
            return
        train, data = self.config.train, self.config.data
        stream = lane_stream(
            self.index,
            data.split,
            seed=self.config.run.seed,
            all_lanes=train.lanes,
            micro_batch=train.micro_batch,
            lanes=rank_lanes(train.lanes, self.runtime.rank, self.runtime.world),
            epoch=first_epoch,
            start_step=start_step,
            epochs=last_epoch - first_epoch,
            steps_per_epoch=self.steps_per_epoch,
            window=data.shuffle_buffer,
            size=data.image_size,
            workers=data.workers,
            on_corrupt=data.on_corrupt,
            pin_memory=self.runtime.device.type == "cuda",
        )
        with contextlib.closing(stream):
            for _ in range(self.total_steps - self.position):
                # A rank that cannot read must not leave the others waiting for it.
                yield group.together(lambda: next(stream), "reading the next batch")

    def objective(self, step: int) -> Objective:
        """The objective of a step (its temperature may follow the training clock)."""
        return parts.make_objective(self.config, step / self.total_steps, self.total_steps / self.steps_per_epoch)

    def set_learning_rate(self, step: int) -> None:
        """Set the learning rate of a step, a function of the step alone."""
        train = self.config.train
        rate = learning_rate(train.schedule, train.learning_rate, step, self.total_steps, train.warmup_steps)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate

    def attempt(self, step: Step, batch: Batch, stop: int) -> StepResult:
        """The gradient of a batch; where it is not finite, a result to be skipped, if `train.skip_nonfinite` allows.

        Raises:
            NonFiniteError: on every rank, when too many steps in a row were not finite.
        """
        try:
            result = step(batch.lanes, self.objective(self.position), batch.epoch, self.position, stop)
            self._skipped_in_a_row = 0
        except NonFiniteError as error:
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > self.config.train.skip_nonfinite:
                raise NonFiniteError(
                    f"{error}; no weight was changed. Lower train.learning_rate, or allow some skipped steps in a row "
                    f"with train.skip_nonfinite (now {self.config.train.skip_nonfinite})"
                ) from None
            result = StepResult(None, {}, int(group.all_reduce_max(stop)), str(error))
        return result

    def record(self, batch: Batch, result: StepResult, seconds: float) -> dict[str, Any]:
        """The line of metrics.jsonl for the step just done (collective: the batch's digest comes from every rank)."""
        digest = hashlib.sha256(group.all_gather_rows(self._lane_digests(batch)).cpu().numpy().tobytes())
        parts, objective = dict(result.parts), self.objective(self.position - 1)
        self._early_stop.add(objective.name, result.loss)
        replaced = messages.current().count_and_exchange(sum(lane.skipped for lane in batch.lanes))
        return {
            "step": self.position,
            "epoch": batch.epoch,
            "loss": result.loss,
            "loss_at_uniform": parts.pop("uniform", None),
            "loss_at_ideal": parts.pop("ideal", objective.at_ideal(self.config.train.global_batch)),
            **parts,
            **({"skipped": result.skipped} if result.skipped else {}),
            **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
            **({"replaced_samples": replaced} if self.config.data.on_corrupt == "skip" else {}),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "objective": objective.name,
            "temperature": objective.temperatures[-1],
            "coupling": objective.coupling,
            "batch_digest": digest.hexdigest(),
            "seconds": round(seconds, 6),
            "pairs_per_second": round(self.config.train.global_batch / seconds, 3),
        }

    def _lane_digests(self, batch: Batch) -> torch.Tensor:
        """SHA-256 of each lane's sample keys, (lanes, 32) uint8: little to send, however many samples there are."""
        rows = [list(hashlib.sha256("\n".join(lane.keys).encode()).digest()) for lane in batch.lanes]
        return torch.tensor(rows, dtype=torch.uint8, device=self.runtime.device)

    def due(self, every: int | None) -> bool:
        """Whether `every` steps have passed since the last time."""
        return every is not None and self.position % every == 0

    def evaluation_due(self) -> bool:
        """Whether an epoch has just ended after which an evaluation was asked for, and the run goes on."""
        train = self.config.train
        epochs, rest = divmod(self.position, self.steps_per_epoch)
        if rest or not epochs or self.position >= self.total_steps:
            return False
        return epochs in train.evaluate_at or (train.evaluate_every is not None and epochs % train.evaluate_every == 0)

    @property
    def flat(self) -> bool:
        """Whether the loss no longer falls as `train.early_stop_slope` asks, the same on every rank."""
        return self._early_stop.reached

    def save(self, journal: Journal) -> None:
        """Write a checkpoint of the position, unless that is the last thing done (collective)."""
        if self._saved != self.position:
            journal.sync()
            state = self._strategy.state()  # collective: shards are gathered
            what = f"saving the checkpoint of step {self.position}"
            building = group.together(self._begin, what)
            if self.memory is not None:
                memory, building = self.memory, group.from_rank_zero(building)
                memory.store.finish()
                group.together(lambda: memory.write_parts(building), what)
                shown = memory.snapshot(self.position)
                group.together(lambda: self.run.write_rows(shown) if self.runtime.is_main else None, what)
            group.together(lambda: self._save(building, state), what)
            self._saved = self.position

    def _begin(self) -> Path:
        if not self.runtime.is_main:
            return Path()
        return checkpoint.begin(self.run.checkpoints, self.position)

    def _save(self, building: Path, state: TrainState) -> None:
        if not self.runtime.is_main:
            return
        checkpoint.commit(
            building,
            state.model,
            state.optimizer,
            {
                **self.facts(),
                "configuration": configuration.decisive_tree(self.config),
                "skipped_in_a_row": self._skipped_in_a_row,
                "early_stop": self._early_stop.state(),
                "loss_scale": state.loss_scale,
                "launch": self.runtime.launch,
            },
            keep=self.config.train.keep_checkpoints,
        )
        self.run.saved(self.position)

    def restore(self) -> None:
        """Continue from the newest whole checkpoint of the run, if it has one.

        Raises:
            ValueError: if no checkpoint is whole (that it is this run's own, `RunDirectory.claim` has seen to).
        """
        found = newest_checkpoint(self.run, self.runtime)
        if found is None:
            return
        assert found.optimizer is not None  # `save` writes it
        self.encoder.load_state_dict(found.model)
        checkpoint.tensors_to_optimizer(found.optimizer, self.optimizer, self.encoder.named_parameters())
        if self.memory is not None:
            self.memory.restore(found)
        self.position = self._saved = found.step
        self._skipped_in_a_row = found.extra["skipped_in_a_row"]
        self._early_stop.restore(found.extra.get("early_stop", {}))
        self._loss_scale = found.extra.get("loss_scale", {})
        self.launch_before = found.extra.get("launch", self.runtime.launch)

    def evaluate(self, journal: Journal) -> None:
        """Judge the encoder as it is now, unless that has been done (collective)."""
        if not group.from_rank_zero(self.run.evaluated(self.position)):
            with self._strategy.whole() as encoder:
                evaluate_encoder(
                    self.config, self.runtime, self.index, self.run, encoder, self.position, journal.console
                )
            journal.evaluated(self.position, self.run.evaluations / f"{self.position}.json")

    def facts(self) -> dict[str, Any]:
        """What decides the result, for environment.json and for the comparison between ranks."""
        return {
            "settings": configuration.digest(self.config),
            "data": self.index.digest(),
            "version": __version__,
            "seed": self.config.run.seed,
        }


def newest_checkpoint(run: RunDirectory, runtime: Runtime) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint of a run; if that is not the newest, rank zero says why."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", checkpoint.CheckpointWarning)
        found = checkpoint.load_latest(run.checkpoints)
    if runtime.is_main:
        for warning in said:
            print(f"rkdo: warning: {warning.message}", file=sys.stderr, flush=True)
    return found


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
