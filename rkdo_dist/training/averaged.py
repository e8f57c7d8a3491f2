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
from rkdo_dist.training.persistent import Pair, PersistentField
from rkdo_dist.training.strategy import (
    Exchanged,
    LossAndGradient,
    Position,
    Strategy,
    norm_of_all,
    with_graph,
)


class Averaged(Strategy):
    """A rank's lanes accumulate in `.grad`, the wrapper averages over ranks; see `Strategy`."""

    def _wrapped(self, model: nn.Module) -> nn.Module:
        return self._runtime.wrap(model)

    def _field(
        self, lanes: Sequence[Pair], objective: Objective, at: Position, labels: Tensor | None
    ) -> LossAndGradient:
        """The field loss, formed on all local rows at once."""
        relational = self.relational_for(objective)
        if relational is not None:
            gradients, found = relational.field(lanes, objective, GatheredColumns(), merged=True)
            b, like = sum(len(u) for u, _ in lanes), lanes[0][0].dtype
            gradients = [((u / b).to(like), (v / b).to(like)) for u, v in gradients]
            return LossAndGradient(gradients, {name: x / b for name, x in found.items()})
        rows, settings = self.rows_for(objective), self._settings
        return averaged_field(lanes, objective, settings.exchange, labels, settings.learn_temperature, rows)

    def mean(self, sums: Tensor) -> Tensor:
        """Mean of the ranks' means."""
        return sums.mean(0)

    def backward(self, outputs: Iterator[Pair], field: LossAndGradient) -> None:
        """One averaging over ranks: in the only backward pass, or in the last lane's when embedding again."""
        for parameter in self._parameters:
            parameter.grad = None
        weights = [self._scaled(pair) for pair in field.gradients]
        if not self._settings.recompute:
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
        norm = norm_of_all(gradients)
        return Exchanged(self._sum_statistics(statistics), torch.isfinite(norm), norm)

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
        exchange: how columns travel, "gather" or "ring"; those of rows that persist are gathered.
        labels: (b,) of this rank's samples, in lane order, for objectives that need them.
        temperature: whether to give the derivative by tau0 too.
        rows: of all samples, which supervise and, if they persist, recur then; for an objective of rows.

    Returns:
        `sums` are means over the rank's rows, (1,).
    """
    persists = rows is not None and objective.recursion == "persistent"
    supervisor = None if rows is None else Restricted.cat(rows.supervisors(lanes, objective))
    u, v = (torch.cat([pair[k] for pair in lanes]) for k in (0, 1))
    if exchange == "ring" and not persists:
        du, dv, sums = _around_the_ring(u, v, objective, labels, temperature, supervisor)
        found = {} if rows is None else rows.report(objective)
    else:
        columns, names = GatheredColumns(), objective.column_views
        own = torch.stack([{"u": u, "v": v}[name] for name in names])
        everyone = dict(zip(names, columns.gather(own), strict=True))
        of = (objective, u, v, everyone.get("u", everyone["v"]), everyone["v"], group.rank() * len(u))
        everyones, normaliser = None if labels is None else group.all_gather_rows(labels), None
        if objective.normaliser == "field":
            parts = group.all_gather_rows(log_sum(*of)[None])
            normaliser = field_normaliser(parts, len(everyone["v"]) * len(objective.slices))
        result = value_and_gradient(
            *of, everyones, supervisor=supervisor, temperature=temperature, log_normaliser=normaliser
        )
        gradients = {"u": result.columns_u, "v": result.columns_v}
        home = columns.send_home(torch.stack([x for x in gradients.values() if x is not None]))
        by = {"u": result.rows_u, "v": result.rows_v}
        for name, gradient in zip(names, home, strict=True):
            by[name] = by[name] + gradient
        du, dv = ((x / len(u)).to(u.dtype) for x in by.values())
        sums = {"loss": result.loss, **result.parts}
        if result.temperature is not None:
            sums["temperature_slope"] = result.temperature
        sums = {name: x / len(u) for name, x in sums.items()}
        found = {} if rows is None else rows.recur(lanes, everyone["v"], objective)
    sums |= {name: x.sum() / len(u) for name, x in found.items()}
    sizes = [len(pair[0]) for pair in lanes]
    pairs = list(zip(du.split(sizes), dv.split(sizes), strict=True))
    return LossAndGradient(pairs, {name: x[None] for name, x in sums.items()})


def _around_the_ring(
    u: Tensor,
    v: Tensor,
    objective: Objective,
    labels: Tensor | None,
    temperature: bool,
    supervisor: Restricted | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Gradients by u and v, and means of the loss and its parts; arguments as for `averaged_field`."""
    u, v = u.requires_grad_(), v.requires_grad_()
    loss_of = FieldLoss(objective, exchange="ring", validate=False)  # ranks agree, and facts tell what is not finite
    tau = u.new_full((), objective.temperature, dtype=torch.float64).requires_grad_() if temperature else None
    loss, parts = loss_of(u, v, labels, temperature=tau, parts=True, supervisor=supervisor)
    du, dv, *slope = torch.autograd.grad(loss, (u, v) if tau is None else (u, v, tau), materialize_grads=True)
    sums = {"loss": loss.detach(), **parts}
    return du, dv, sums | ({"temperature_slope": slope[0]} if slope else {})
