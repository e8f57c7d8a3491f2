"""Sums in one fixed order: the same bits on 1, 2, 4, ... ranks (`run.reduction=exact`).

Everything that is summed over the batch is formed per lane and summed over lanes by `exchange.group.TreeSum`, whose
upper levels are the ranks. No wrapper touches the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rkdo_dist.exchange import group
from rkdo_dist.exchange.columns import ExactColumns
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.persistent import Restricted
from rkdo_dist.field.rows import FieldRows, computing_dtype, field_normaliser
from rkdo_dist.training.persistent import Pair, PersistentField
from rkdo_dist.training.strategy import (
    Exchanged,
    LossAndGradient,
    Position,
    Strategy,
    norm_of_all,
    norms_of_all,
    with_graph,
)


class Exact(Strategy):
    """Per-lane gradients and one tree; see `Strategy`."""

    _reduce: group.ExactAllReduce | None = None
    _shared: Sequence[Tensor] = ()  # the parameters' shares of its vector
    _summed: Sequence[Tensor] = ()
    _norms: Sequence[Tensor] = ()  # of the gradients of each lane
    _batch = 0

    def _field(
        self, lanes: Sequence[Pair], objective: Objective, at: Position, labels: Tensor | None
    ) -> LossAndGradient:
        """The field loss, formed per lane."""
        self._batch = batch = sum(len(u) for u, _ in lanes) * self._runtime.world
        relational = self.relational_for(objective)
        if relational is not None:
            gradients, sums = relational.field(lanes, objective, ExactColumns(), merged=False)
            return LossAndGradient([(u / batch, v / batch) for u, v in gradients], sums)
        return exact_field(
            lanes, objective, at.first_lane, self.rows_for(objective), labels, self._settings.learn_temperature
        )

    def mean(self, sums: Tensor) -> Tensor:
        """Lanes' sums, added in tree order."""
        return group.tree_sum(sums.clone()) / self._batch

    def backward(self, outputs: Iterator[Pair], field: LossAndGradient) -> None:
        """One backward pass per lane, added up in lane order."""
        gradients: group.TreeSum[list[Tensor]] = group.TreeSum(len(field.gradients))
        norms = []
        for weights, lane in zip(field.gradients, outputs, strict=True):
            embeddings, pushed = with_graph(lane, self._scaled(weights))
            found = torch.autograd.grad(embeddings, self._parameters, pushed, materialize_grads=True)
            norms.append(norms_of_all(found))
            gradients.add(list(found))
        self._summed, self._norms = gradients.total(), norms

    def exchange(self, statistics: Sequence[Tensor]) -> Exchanged:
        """Sum over ranks, gradients into the vector that the parameters' gradients are views of."""
        norm = norm_of_all(self._sum_gradients())
        return Exchanged(self._sum_statistics(statistics), torch.isfinite(torch.stack(list(self._norms))).all(1), norm)

    def _sum_gradients(self) -> Sequence[Tensor]:
        if self._reduce is None:
            sizes = [p.numel() for p in self._parameters]
            self._reduce = group.ExactAllReduce(sum(sizes), self._parameters[0].detach())
            shares = zip(self._parameters, self._reduce.vector.split(sizes), strict=True)
            # Laid out as the parameters (channels last, say): fused optimizers ask for that, and copies are plain.
            self._shared = [share.as_strided(p.shape, torch.empty_like(p).stride()) for p, share in shares]
        torch._foreach_copy_(list(self._shared), list(self._summed))
        self._summed = ()
        self._reduce.reduce()
        for parameter, share in zip(self._parameters, self._shared, strict=True):
            parameter.grad = share
        return self._shared

    def _sum_statistics(self, lanes: Sequence[Tensor]) -> Tensor:
        local = group.tree_sum(torch.stack(list(lanes)))
        return group.tree_sum(group.all_gather_rows(local[None]))


def exact_field(
    lanes: Sequence[Pair],
    objective: Objective,
    first_lane: int,
    rows: PersistentField | None = None,
    labels: Tensor | None = None,
    temperature: bool = False,
) -> LossAndGradient:
    """Loss and embedding gradients, summed per lane, against the columns of the whole global batch (collective).

    Parameter gradients are then to be SUMMED over all lanes of all ranks. Computed in float32 at least.

    Args:
        lanes: embeddings (m, d) of this rank's lanes, without graph.
        objective: resolved for this step.
        first_lane: global number of this rank's first lane.
        rows: of all samples, which supervise and, if they persist, recur then; for an objective of rows.
        labels: (b,) of this rank's samples, in lane order, for objectives that need them.
        temperature: whether to give the derivative by tau0 too.

    Returns:
        `sums` are sums over each lane, (lanes,).
    """
    count, m = len(lanes), lanes[0][0].shape[0]
    views = {name: torch.cat([pair[k] for pair in lanes]) for k, name in enumerate("uv")}
    columns = ExactColumns()
    block = columns.gather(torch.stack([views[name] for name in objective.column_views]))
    block = block.to(computing_dtype(block.dtype))
    batch = block.shape[1]
    everyones = None if labels is None else group.all_gather_rows(labels)
    supervisor = None if rows is None else Restricted.cat(list(rows.supervisors(lanes, objective)))
    pooled = objective.affinity.pool(block, len(block) * batch)
    given = views, batch, first_lane * m, batch, everyones
    field = FieldRows(objective, *given, supervisor=supervisor, temperature=temperature, pooled=pooled, lanes=count)
    if objective.normaliser == "field":
        log_sums = group.all_gather_rows(field.log_sum(block))
        field.normalise_by(field_normaliser(log_sums, batch * len(objective.slices)))
    tree: group.TreeSum[Tensor] = group.TreeSum(count)
    field.fused_by_lane(block, tree.add)
    field.release()
    sums = {"loss": field.loss(), **field.parts()}
    if temperature:
        sums["temperature_slope"] = field.temperature_gradient()  # of the rows' gradients alone, so before the columns'
    for name, home in zip(objective.column_views, columns.send_home(tree.total()), strict=True):
        field.gradients[name] = field.gradients[name] + home if name in field.gradients else home
    if rows is not None:
        sums |= rows.recur(lanes, block[-1], objective)
    gradients = [(field.gradients[name] / batch).split(m) for name in "uv"]
    return LossAndGradient(list(zip(*gradients, strict=True)), sums)
