"""Sums in the backend's order: one process, or Accelerate's DDP averages gradients (`run.reduction=fast`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rkdo_dist.exchange import group
from rkdo_dist.exchange.columns import GatheredColumns
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.persistent import Restricted
from rkdo_dist.field.rows import field_normaliser
from rkdo_dist.field.tiled import log_sum, value_and_gradient
from rkdo_dist.losses import FieldLoss
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.persistent import Pair, PersistentField
from rkdo_dist.training.strategy import (
    Exchanged,
    LossAndGradient,
    Position,
    Strategy,
    as_points,
    norm_of_all,
    of_points,
    sum_of_all,
    with_graph,
)


class Averaged(Strategy):
    """A rank's lanes accumulate in `.grad`, the wrapper averages over ranks; see `Strategy`.

    Args:
        encoder, optimizer, runtime: see `Strategy`.
        exchange: how columns travel, "gather" or "ring".
        recompute: whether `backward` gets outputs that are computed when asked for.
        clip: see `Strategy`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        runtime: Runtime,
        exchange: str,
        recompute: bool,
        clip: float | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, runtime, clip)
        self._exchange, self._recompute = exchange, recompute
        self.model = self._wrap(encoder)

    def _wrap(self, encoder: nn.Module) -> nn.Module:
        """The model that embeds training lanes and averages their gradients."""
        return self._runtime.wrap(encoder)

    def field(
        self, lanes: Sequence[Pair], objective: Objective, at: Position, labels: Tensor | None = None
    ) -> LossAndGradient:
        """The field loss, formed on all local rows at once."""
        if objective.recursion == "persistent" and objective.pairing == "joint":
            return of_points(self.field(*as_points(lanes, objective), at))
        rows = self.persistent if objective.supervisor == "rows" else None
        if rows is not None and objective.recursion == "persistent":
            return averaged_persistent_field(lanes, objective, rows, self.learns_temperature)
        relational = self.relational_for(objective)
        if relational is not None:
            gradients, found = relational.field(lanes, objective, GatheredColumns(), merged=True)
            b, like = sum(len(u) for u, _ in lanes), lanes[0][0].dtype
            gradients = [((u / b).to(like), (v / b).to(like)) for u, v in gradients]
            return LossAndGradient(gradients, {name: x / b for name, x in found.items()})
        return averaged_field(lanes, objective, self._exchange, labels, self.learns_temperature, rows)

    def mean(self, sums: Tensor) -> Tensor:
        """Mean of the ranks' means."""
        return sums.mean(0)

    def backward(self, outputs: Iterator[Pair], field: LossAndGradient) -> None:
        """One averaging over ranks: in the only backward pass, or in the last lane's when embedding again."""
        for parameter in self._parameters:
            parameter.grad = None
        weights = [self._scaled(pair) for pair in field.gradients]
        if not self._recompute:
            # One call: calling lane by lane would fire DDP's hooks at the first lane.
            pushed = [with_graph(*lane) for lane in zip(outputs, weights, strict=True)]
            torch.autograd.backward([x for xs, _ in pushed for x in xs], [w for _, ws in pushed for w in ws])
            return
        for number, pair in enumerate(weights):
            last = number == len(weights) - 1
            with contextlib.nullcontext() if last else self._runtime.without_sync(self.model):
                torch.autograd.backward(*with_graph(next(outputs), pair))

    def exchange(self, statistics: Sequence[Tensor]) -> Exchanged:
        """The wrapper has averaged gradients already, so a NaN of one rank is everywhere; statistics are summed."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        finite = torch.isfinite(sum_of_all(gradients))
        return Exchanged(self._sum_statistics(statistics), finite, norm_of_all(gradients))

    def _sum_statistics(self, lanes: Sequence[Tensor]) -> Tensor:
        statistics = torch.stack(list(lanes)).sum(0)
        if self._runtime.world > 1:
            dist.all_reduce(statistics)
        return statistics


def averaged_field(
    lanes: Sequence[Pair],
    objective: Objective,
    exchange: str,
    labels: Tensor | None = None,
    temperature: bool = False,
    rows: PersistentField | None = None,
) -> LossAndGradient:
    """Loss and embedding gradients of all local rows at once (collective).

    Parameter gradients are then to be summed over a rank's lanes and AVERAGED over ranks.

    Args:
        lanes: embeddings (m, d) of this rank's lanes, without graph.
        objective: resolved for this step.
        exchange: how columns travel, "gather" or "ring".
        labels: (b,) of this rank's samples, in lane order, for objectives that need them.
        temperature: whether to give the derivative by tau0 too.
        rows: of all samples, fixed, for an objective whose supervisor is "rows".

    Returns:
        `sums` are means over the rank's rows, (1,).
    """
    u, v = (torch.cat([pair[k] for pair in lanes]).requires_grad_() for k in (0, 1))
    loss_of = FieldLoss(objective, exchange=exchange, validate=False)  # ranks agree, and facts tell what is not finite
    tau = u.new_tensor(objective.temperature, dtype=torch.float64).requires_grad_() if temperature else None
    supervisor = None if rows is None else Restricted.cat(rows.supervisors(lanes, objective))
    loss, parts = loss_of(u, v, labels, temperature=tau, parts=True, supervisor=supervisor)
    by = (u, v) if tau is None else (u, v, tau)
    du, dv, *slope = torch.autograd.grad(loss, by, materialize_grads=True)
    sizes = [len(pair[0]) for pair in lanes]
    gradients = list(zip(du.split(sizes), dv.split(sizes), strict=True))
    sums = {name: x.detach()[None] for name, x in {"loss": loss, **parts}.items()}
    if slope:
        sums["temperature_slope"] = slope[0][None]
    if rows is not None:
        sums |= {name: x.sum()[None] / len(u) for name, x in rows.report(objective).items()}
    if labels is None:
        return LossAndGradient(gradients, sums)
    everyones = group.all_gather_rows(labels)
    return LossAndGradient(gradients, sums, {"ideal": objective.at_ideal(len(everyones), everyones)})


def averaged_persistent_field(
    lanes: Sequence[Pair], objective: Objective, persistent: PersistentField, temperature: bool = False
) -> LossAndGradient:
    """`averaged_field` with persistent rows as supervisors, which then recur; columns are gathered."""
    supervisor = Restricted.cat(persistent.supervisors(lanes, objective))
    u, v = (torch.cat([pair[k] for pair in lanes]) for k in (0, 1))
    columns, b = GatheredColumns(), len(u)
    everyone = columns.gather(v[None])[0]
    of, normaliser = (objective, u, v, everyone, everyone, group.rank() * b), None
    if objective.normaliser == "field":
        normaliser = field_normaliser(group.all_gather_rows(log_sum(*of)[None]), len(everyone))
    result = value_and_gradient(*of, supervisor=supervisor, temperature=temperature, log_normaliser=normaliser)
    assert result.columns_v is not None
    home = columns.send_home(result.columns_v[None])[0]
    recurred = {name: x.sum() for name, x in persistent.recur(lanes, everyone, objective).items()}
    slope = {} if result.temperature is None else {"temperature_slope": result.temperature}
    sums = {name: (x / b)[None] for name, x in {"loss": result.loss, **result.parts, **recurred, **slope}.items()}
    sizes = [len(pair[0]) for pair in lanes]
    du, dv = ((x / b).to(u.dtype).split(sizes) for x in (result.rows_u, home))
    return LossAndGradient(list(zip(du, dv, strict=True)), sums)
