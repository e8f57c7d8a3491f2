"""One global batch: images to embeddings, embeddings to the field loss, the loss to parameter gradients.

The objective couples every sample of the global batch, so the step has two passes over the micro-batches of this rank
(GradCache, Gao et al. 2021): embed them all; form the loss and its gradient with respect to the embeddings; push each
micro-batch's embedding gradient into the parameters. With `recompute` the first pass keeps no activations and the
second embeds again, so memory holds the activations of one micro-batch only.

`exact`: everything that is summed over the batch is formed per lane and summed in one fixed tree (`exchange.group`).
`fast`: the loss is formed on all local rows at once and gradients are averaged by the wrapper (DDP).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rkdo_dist.data.stream import MicroBatch
from rkdo_dist.exchange import group
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.tiled import value_and_gradient
from rkdo_dist.losses import FieldLoss
from rkdo_dist.normalisation import BatchStatistics
from rkdo_dist.train.runtime import Runtime

# images (m, 3, H, W) uint8, ids (m,), epoch, view -> (m, 3, S, S) float32
MakeView = Callable[[Tensor, Tensor, int, int], Tensor]


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is not finite; raised alike on every rank, before any weight has changed."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step found, the same on every rank.

    Attributes:
        loss: mean over the global batch; None if something was not finite.
        parts: the loss's parts (`field.objectives`), means over the global batch.
        stop: the largest stop code that any rank brought.
        skipped: why there is no gradient; empty when there is one.
    """

    loss: float | None
    parts: dict[str, float]
    stop: int
    skipped: str = ""

    @property
    def finite(self) -> bool:
        """Whether there is a gradient to apply."""
        return not self.skipped


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """How a step is computed; see `config.TrainConfig`, `EncoderConfig` and `RunConfig`."""

    seed: int
    reduction: str
    recompute: bool
    views_together: bool
    exchange: str


class Step:
    """Computes the gradient of the mean loss over a global batch and leaves it in the parameters' `.grad`.

    Args:
        encoder: images to unit-norm embeddings; the same weights on every rank.
        make_view: draws a view of a micro-batch; a pure function, so that it can be called again.
        runtime: ranks, device, precision.
        settings: how to compute.
    """

    def __init__(self, encoder: nn.Module, make_view: MakeView, runtime: Runtime, settings: StepSettings) -> None:
        self._encoder, self._make_view, self._runtime, self._settings = encoder, make_view, runtime, settings
        self._parameters = [p for p in encoder.parameters() if p.requires_grad]
        self._statistics = BatchStatistics(encoder)
        self._reduce: group.ExactAllReduce | None = None
        fast = settings.reduction == "fast"
        self._wrapped = runtime.wrap(encoder) if fast else encoder

    def __call__(
        self, lanes: Sequence[MicroBatch], objective: Objective, epoch: int, step: int, stop: int = 0
    ) -> StepResult:
        """Gradients of one global batch.

        Args:
            lanes: this rank's micro-batches, in lane order.
            objective: resolved for this step.
            epoch, step: position of the batch (step counts from 0), which keys all randomness.
            stop: this rank's stop code, 0 for none.

        Raises:
            NonFiniteError: on every rank, if the loss or the gradient is not finite on any.
        """
        at = _Place(epoch, step, self._runtime.rank * len(lanes))
        if self._settings.reduction == "exact":
            return self._exact(lanes, objective, at, stop)
        return self._fast(lanes, objective, at, stop)

    # --- embeddings -------------------------------------------------------------------------------------------

    def _embed(self, model: nn.Module, lane: MicroBatch, number: int, at: _Place, again: bool = False) -> _Embedded:
        """Embed both views of a lane.

        Randomness inside the encoder (dropout) is keyed by the lane, so doing it `again` repeats the first time,
        except that batch norm's running statistics are left alone.
        """
        device = self._runtime.device
        images, ids = lane.images.to(device, non_blocking=True), lane.ids.to(device, non_blocking=True)
        first, second = (self._make_view(images, ids, at.epoch, view) for view in (0, 1))
        inputs = [torch.cat([first, second])] if self._settings.views_together else [first, second]
        outputs, statistics = [], []
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self._runtime.autocast():
            torch.manual_seed(_lane_seed(self._settings.seed, at.epoch, at.step, at.first_lane + number))
            for x in inputs:
                with self._statistics.discarding() if again else self._statistics.collecting():
                    outputs.append(model(x))
                statistics.append(x.new_zeros(0) if again else self._statistics.take())
        u, v = outputs[0].chunk(2) if self._settings.views_together else outputs
        return _Embedded(u, v, torch.stack(statistics))

    def _first_pass(self, model: nn.Module, lanes: Sequence[MicroBatch], at: _Place) -> list[_Embedded]:
        with torch.set_grad_enabled(not self._settings.recompute):
            return [self._embed(model, lane, number, at) for number, lane in enumerate(lanes)]

    def _second_pass(
        self, model: nn.Module, lane: MicroBatch, number: int, at: _Place, first: _Embedded
    ) -> tuple[Tensor, Tensor]:
        """A lane's embeddings with their graph: kept from the first pass, or computed again."""
        found = self._embed(model, lane, number, at, again=True) if self._settings.recompute else first
        return found.u, found.v

    def _move_statistics(self, summed: Tensor) -> None:
        """Once per step, or once per view where views are forwarded apart, as plain torch would."""
        for sums in summed:
            self._statistics.update(sums)

    # --- exact ------------------------------------------------------------------------------------------------

    def _exact(self, lanes: Sequence[MicroBatch], objective: Objective, at: _Place, stop: int) -> StepResult:
        embedded = self._first_pass(self._encoder, lanes, at)
        _require_finite([e.views() for e in embedded], "an embedding", at)
        field = _exact_field(
            [e.u.detach() for e in embedded], [e.v.detach() for e in embedded], objective, at.first_lane
        )
        rows = field.rows * len(lanes) * self._runtime.world
        loss, parts, code = _lane_means(field.reports, stop, rows)
        _require_finite_loss(loss, at)
        gradients: group.TreeSum[list[Tensor]] = group.TreeSum(len(lanes))
        statistics: group.TreeSum[Tensor] = group.TreeSum(len(lanes))
        finite = []
        for number, lane in enumerate(lanes):
            outputs = self._second_pass(self._encoder, lane, number, at, embedded[number])
            weights = (field.du[number] / rows, field.dv[number] / rows)
            found = torch.autograd.grad(outputs, self._parameters, weights, materialize_grads=True)
            finite.append((_sum_of_all(found),))  # finite only if everything in it is
            gradients.add(list(found))
            statistics.add(embedded[number].statistics)
            embedded[number] = embedded[number].detached()  # frees this lane's graph
        _require_finite(finite, "the gradient", at)
        self._install(gradients.total())
        local = statistics.total()
        self._move_statistics(group.exact_all_reduce(local.flatten()).view_as(local))
        return StepResult(loss, parts, code)

    def _install(self, gradients: list[Tensor]) -> None:
        """Sum over ranks into the vector that the parameters' gradients are views of."""
        if self._reduce is None:
            like = self._parameters[0]
            self._reduce = group.ExactAllReduce(sum(p.numel() for p in self._parameters), like.detach())
        torch.cat([g.flatten() for g in gradients], out=self._reduce.vector)
        parts = self._reduce.reduce().split([p.numel() for p in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    # --- fast -------------------------------------------------------------------------------------------------

    def _fast(self, lanes: Sequence[MicroBatch], objective: Objective, at: _Place, stop: int) -> StepResult:
        for parameter in self._parameters:
            parameter.grad = None
        embedded = self._first_pass(self._wrapped, lanes, at)
        _require_finite([e.views() for e in embedded], "an embedding", at)
        u, v = (torch.cat([e.views()[k].detach() for e in embedded]).requires_grad_() for k in (0, 1))
        local, parts = FieldLoss(objective, exchange=self._settings.exchange)(u, v, parts=True)
        du, dv = torch.autograd.grad(local, (u, v), materialize_grads=True)
        loss, means, code = _rank_means(local.detach(), parts, stop)
        _require_finite_loss(loss, at)
        sizes = [len(e.u) for e in embedded]
        self._fast_backward(lanes, embedded, list(zip(du.split(sizes), dv.split(sizes), strict=True)), at)
# After the averaging every rank has every rank's NaN: there is no place to name.
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if group.all_reduce_max(float(not torch.isfinite(_sum_of_all(gradients)))):
            raise NonFiniteError(f"the gradient of step {at.step + 1} is not finite")
        statistics = torch.stack([e.statistics for e in embedded]).sum(0)
        if self._runtime.world > 1:
            torch.distributed.all_reduce(statistics)
        self._move_statistics(statistics)
        return StepResult(loss, means, code)

    def _fast_backward(
        self,
        lanes: Sequence[MicroBatch],
        embedded: list[_Embedded],
        weights: list[tuple[Tensor, Tensor]],
        at: _Place,
    ) -> None:
        """One averaging over ranks: in the only backward pass, or in the last lane's when embedding again."""
        if not self._settings.recompute:
            outputs = [view for e in embedded for view in e.views()]
            torch.autograd.backward(outputs, [w for pair in weights for w in pair])
            return
        for number, lane in enumerate(lanes):
            last = number == len(lanes) - 1
            with contextlib.nullcontext() if last else self._runtime.without_sync(self._wrapped):
                outputs = list(self._second_pass(self._wrapped, lane, number, at, embedded[number]))
                torch.autograd.backward(outputs, weights[number])


@dataclasses.dataclass(frozen=True)
class _Place:
    """Position of a global batch, and the global number of this rank's first lane."""

    epoch: int
    step: int
    first_lane: int


@dataclasses.dataclass(frozen=True)
class _Embedded:
    """Embeddings (m, d) of a lane's two views, and its batch statistics, one row per forward."""

    u: Tensor
    v: Tensor
    statistics: Tensor

    def views(self) -> tuple[Tensor, Tensor]:
        return self.u, self.v

    def detached(self) -> _Embedded:
        return _Embedded(self.u.detach(), self.v.detach(), self.statistics)


@dataclasses.dataclass(frozen=True)
class _LaneField:
    """The field loss of this rank's lanes: gradients (m, d) of the SUM over all rows, and one report a lane."""

    du: list[Tensor]
    dv: list[Tensor]
    reports: dict[str, Tensor]  # each (lanes,) float64: sums over a lane's rows
    rows: int  # per lane


def _exact_field(u: list[Tensor], v: list[Tensor], objective: Objective, offset: int) -> _LaneField:
    """Loss and embedding gradients, formed per lane against all columns and summed in tree order.

    Args:
        u, v: embeddings (m, d) of this rank's lanes.
        offset: global number of this rank's first lane.
    """
    lanes, m = len(u), u[0].shape[0]
    columns_u, columns_v = group.all_gather_rows(torch.cat(u)), group.all_gather_rows(torch.cat(v))
    results = []
    sums: dict[str, group.TreeSum[Tensor]] = {"u": group.TreeSum(lanes), "v": group.TreeSum(lanes)}
    used = {"u": False, "v": False}
    for i in range(lanes):
        result = value_and_gradient(objective, u[i], v[i], columns_u, columns_v, (offset + i) * m)
        for name, part in (("u", result.columns_u), ("v", result.columns_v)):
            if part is not None:
                sums[name].add(part)
                used[name] = True
        results.append(result)
    home = {n: group.exact_reduce_scatter(sums[n].total()).split(m) if used[n] else None for n in sums}
    du = [r.rows_u if home["u"] is None else r.rows_u + home["u"][i] for i, r in enumerate(results)]
    dv = [r.rows_v if home["v"] is None else r.rows_v + home["v"][i] for i, r in enumerate(results)]
    names = ["loss", *results[0].parts]
    reports = {n: torch.stack([(r.loss if n == "loss" else r.parts[n]).double() for r in results]) for n in names}
    return _LaneField(du, dv, reports, m)


def _lane_means(reports: dict[str, Tensor], stop: int, rows: int) -> tuple[float, dict[str, float], int]:
    """Means over the global batch, added in lane order, and the largest stop code."""
    names = list(reports)
    local = torch.stack([*reports.values(), torch.full_like(reports["loss"], stop)], dim=1)
    everyone = group.all_gather_rows(local).cpu()
    sums = group.tree_sum([row.clone() for row in everyone[:, :-1]])
    means = {name: float(value) / rows for name, value in zip(names, sums, strict=True)}
    return means.pop("loss"), means, int(everyone[:, -1].max())


def _rank_means(loss: Tensor, parts: dict[str, Tensor], stop: int) -> tuple[float, dict[str, float], int]:
    names = list(parts)
    local = torch.stack([loss.double(), *(parts[n].detach().double() for n in names), loss.new_tensor(stop).double()])
    everyone = group.all_gather_rows(local[None]).cpu()
    means = everyone[:, :-1].mean(0).tolist()
    return means[0], dict(zip(names, means[1:], strict=True)), int(everyone[:, -1].max())


def _require_finite(lanes: Sequence[Sequence[Tensor]], what: str, at: _Place) -> None:
    """Raise on every rank if any tensor of any rank's lanes is not finite, naming rank and lane (collective)."""
    mine = torch.stack([torch.stack([torch.isfinite(x).all() for x in tensors]).all() for tensors in lanes])
    everyone = group.all_gather_rows(mine.to(torch.uint8)).tolist()
    broken = [number for number, fine in enumerate(everyone) if not fine]
    if broken:
        rank, first = broken[0] // len(lanes), broken[0]
        raise NonFiniteError(f"{what} of step {at.step + 1} is not finite (rank {rank}, lane {first})")


def _sum_of_all(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.sum() for t in tensors]).sum()


def _require_finite_loss(loss: float, at: _Place) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss of step {at.step + 1} is {loss}")


def _lane_seed(seed: int, epoch: int, step: int, lane: int) -> int:
    """A different 63-bit seed for every micro-batch of a run, whatever rank computes it."""
    mixed = 0
    for part in (seed, epoch, step, lane):
        mixed = ((mixed ^ part) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (2**64 - 1)
        mixed ^= mixed >> 29
    return mixed >> 1
