"""One global batch: images to embeddings, embeddings to the field loss, the loss to parameter gradients and weights.

The objective couples every sample of the global batch, so the step has two passes over the micro-batches of this rank
(GradCache, Gao et al. 2021): embed them all; form the loss and its gradient with respect to the embeddings; push each
micro-batch's embedding gradient into the parameters. With `recompute` the first pass keeps no activations and the
second embeds again, so memory holds the activations of one micro-batch only.

How gradients are summed, over lanes and over ranks, and how weights move is the strategy's business (`train.strategy`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rkdo_dist.batch_norm import BatchStatistics
from rkdo_dist.data.stream import MicroBatch
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.train.averaged import Averaged
from rkdo_dist.train.exact import Exact
from rkdo_dist.train.field import Views
from rkdo_dist.train.persistent import PersistentField
from rkdo_dist.train.stopwatch import COMPUTE, DATA, EXCHANGE, FIELD, OPTIMIZER, phase
from rkdo_dist.train.strategy import NonFiniteError, Place, Strategy, require_finite

__all__ = ["NonFiniteError", "Step", "StepResult", "StepSettings"]

# images (m, 3, H, W) uint8, ids (m,), epoch, view -> (m, 3, S, S) float32
MakeView = Callable[[Tensor, Tensor, int, int], Tensor]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step found, the same on every rank.

    Attributes:
        loss: mean over the global batch; None if something was not finite.
        parts: the loss's parts (`field.objectives`), means over the global batch.
        stop: the largest stop code that any rank brought.
        skipped: why no weight moved; empty when they did.
        loss_scale: what half precision's gradients were multiplied by; None without loss scaling.
    """

    loss: float | None
    parts: dict[str, float]
    stop: int
    skipped: str = ""
    loss_scale: float | None = None


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """How a step is computed; see `config.TrainConfig`, `EncoderConfig` and `RunConfig`."""

    seed: int
    reduction: str
    recompute: bool
    views_together: bool
    exchange: str


class Step:
    """Computes the gradient of the mean loss over a global batch and moves the weights by it.

    Args:
        encoder: images to unit-norm embeddings; the same weights on every rank.
        make_view: draws a view of a micro-batch; a pure function, so that it can be called again.
        runtime: ranks, device, precision.
        settings: how to compute.
        optimizer: moves the weights; None leaves the gradient in the parameters' `.grad`.
        memory: the rows of a persistent field, for objectives of that kind.

    Attributes:
        strategy: how gradients are summed, and who owns weights and optimizer state.
    """

    def __init__(
        self,
        encoder: nn.Module,
        make_view: MakeView,
        runtime: Runtime,
        settings: StepSettings,
        optimizer: torch.optim.Optimizer | None = None,
        memory: PersistentField | None = None,
    ) -> None:
        self._make_view, self._runtime, self._settings = make_view, runtime, settings
        self._statistics = BatchStatistics(encoder)
        self.strategy = _choose(encoder, optimizer, runtime, settings)
        self.strategy.memory = memory

    def __call__(
        self, lanes: Sequence[MicroBatch], objective: Objective, epoch: int, step: int, stop: int = 0
    ) -> StepResult:
        """One global batch (collective).

        Args:
            lanes: this rank's micro-batches, in lane order.
            objective: resolved for this step.
            epoch, step: position of the batch (step counts from 0), which keys all randomness.
            stop: this rank's stop code, 0 for none.

        Raises:
            NonFiniteError: on every rank, if the loss or the gradient is not finite on any.
        """
        at = Place(epoch, step, self._runtime.rank * len(lanes))
        if self.strategy.memory is not None and objective.recursion == "persistent":
            self.strategy.memory.begin(step, torch.cat([lane.ids for lane in lanes]))
        with phase(COMPUTE):
            embedded = self._first_pass(lanes, at)
            require_finite([e.views() for e in embedded], "an embedding", at)
        with phase(FIELD):
            labels = torch.cat([x.labels for x in lanes]).to(self._runtime.device) if objective.needs_labels else None
            field = self.strategy.field([e.detached().views() for e in embedded], objective, at, stop, labels)
        if not math.isfinite(field.loss):
            raise NonFiniteError(f"the loss of step {at.step + 1} is {field.loss}")
        with phase(COMPUTE):
            self.strategy.backward(self._second_pass(lanes, embedded, at), field, at)
        with phase(EXCHANGE):
            self.strategy.exchange(at)
        with phase(OPTIMIZER):
            update = self.strategy.update(at)
        if update.overflow:
            reason = f"half precision overflowed at loss scale {update.loss_scale:g}"
            return StepResult(field.loss, field.parts, field.stop, reason, update.loss_scale)
        # Once per step, or once per view where views are forwarded apart, as plain torch would.
        with phase(EXCHANGE):
            statistics = self.strategy.sum_statistics([e.statistics for e in embedded])
        for sums in statistics:
            self._statistics.update(sums)
        return StepResult(field.loss, field.parts, field.stop, loss_scale=update.loss_scale)

    def _embed(self, model: nn.Module, lane: MicroBatch, number: int, at: Place, again: bool = False) -> _Embedded:
        """Embed both views of a lane.

        Randomness inside the encoder (dropout) is keyed by the lane, so doing it `again` repeats the first time,
        except that batch norm's running statistics are left alone.
        """
        device = self._runtime.device
        images, ids = lane.images.to(device, non_blocking=True), lane.ids.to(device, non_blocking=True)
        with phase(DATA):
            first, second = (self._make_view(images, ids, at.epoch, view) for view in (0, 1))
        inputs = [torch.cat([first, second])] if self._settings.views_together else [first, second]
        # Convolutions are faster so: 7 % of a ResNet-18's step on CPUs. Values are the same but for rounding.
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        outputs, statistics = [], []
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self._runtime.autocast():
            torch.manual_seed(_lane_seed(self._settings.seed, at.epoch, at.step, at.first_lane + number))
            for x in inputs:
                with self._statistics.discarding() if again else self._statistics.collecting():
                    outputs.append(model(x))
                statistics.append(x.new_zeros(0) if again else self._statistics.take())
        u, v = outputs[0].chunk(2) if self._settings.views_together else outputs
        return _Embedded(u, v, torch.stack(statistics))

    def _first_pass(self, lanes: Sequence[MicroBatch], at: Place) -> list[_Embedded]:
        with torch.set_grad_enabled(not self._settings.recompute):
            return [self._embed(self.strategy.model, lane, number, at) for number, lane in enumerate(lanes)]

    def _second_pass(self, lanes: Sequence[MicroBatch], embedded: list[_Embedded], at: Place) -> Iterator[Views]:
        """Every lane's embeddings with their graph: kept from the first pass, or computed again when asked for."""
        for number, lane in enumerate(lanes):
            kept = embedded[number]
            embedded[number] = kept.detached()  # so that a lane's graph lives no longer than its backward pass
            if self._settings.recompute:
                kept = self._embed(self.strategy.model, lane, number, at, again=True)
            yield kept.views()


def _choose(
    encoder: nn.Module, optimizer: torch.optim.Optimizer | None, runtime: Runtime, settings: StepSettings
) -> Strategy:
    if runtime.zero_stage:
        from rkdo_dist.train.zero import Zero  # imports DeepSpeed

        return Zero(encoder, optimizer, runtime, settings.exchange, settings.recompute)
    if settings.reduction == "exact":
        return Exact(encoder, optimizer, runtime)
    return Averaged(encoder, optimizer, runtime, settings.exchange, settings.recompute)


@dataclasses.dataclass(frozen=True)
class _Embedded:
    """Embeddings (m, d) of a lane's two views, and its batch statistics, one row per forward."""

    u: Tensor
    v: Tensor
    statistics: Tensor

    def views(self) -> Views:
        return self.u, self.v

    def detached(self) -> _Embedded:
        return _Embedded(self.u.detach(), self.v.detach(), self.statistics)


def _lane_seed(seed: int, epoch: int, step: int, lane: int) -> int:
    """A different 63-bit seed for every micro-batch of a run, whatever rank computes it."""
    mixed = 0
    for part in (seed, epoch, step, lane):
        mixed = ((mixed ^ part) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (2**64 - 1)
        mixed ^= mixed >> 29
    return mixed >> 1
