"""Sums in one fixed order: the same bits on 1, 2, 4, ... ranks (`run.reduction=exact`).

Everything that is summed over the batch is formed per lane and summed over lanes by `exchange.group.TreeSum`, whose
upper levels are the ranks. No wrapper touches the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rkdo_dist.exchange import group
from rkdo_dist.exchange.columns import ExactColumns
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.persistent import Restricted
from rkdo_dist.field.tiled import field_normaliser, log_sum, value_and_gradient
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


class Exact(Strategy):
    """Per-lane gradients and one tree; see `Strategy`."""

    def __init__(
        self,
        encoder: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        runtime: Runtime,
        clip: float | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, runtime, clip)
        self.model = encoder
        self._reduce: group.ExactAllReduce | None = None
        self._summed: list[Tensor] = []
        self._finite: list[Tensor] = []
        self._batch = 0

    def field(
        self, lanes: Sequence[Pair], objective: Objective, at: Position, labels: Tensor | None = None
    ) -> LossAndGradient:
        """The field loss, formed per lane."""
        if objective.recursion == "persistent" and objective.pairing == "joint":
            return of_points(self.field(*as_points(lanes, objective), at))
        self._batch = batch = sum(len(u) for u, _ in lanes) * self._runtime.world
        relational = self.relational_for(objective)
        if relational is not None:
            gradients, sums = relational.field(lanes, objective, ExactColumns(), merged=False)
            return LossAndGradient([(u / batch, v / batch) for u, v in gradients], sums)
        return exact_field(lanes, objective, at.first_lane, self.persistent, labels, self.learns_temperature)

    def mean(self, sums: Tensor) -> Tensor:
        """Lanes' sums, added in tree order."""
        return group.tree_sum(sums.clone()) / self._batch

    def backward(self, outputs: Iterator[Pair], field: LossAndGradient) -> None:
        """One backward pass per lane, added up in lane order."""
        gradients: group.TreeSum[list[Tensor]] = group.TreeSum(len(field.gradients))
        self._finite = []
        for weights, lane in zip(field.gradients, outputs, strict=True):
            embeddings, pushed = with_graph(lane, self._scaled(weights))
            found = torch.autograd.grad(embeddings, self._parameters, pushed, materialize_grads=True)
            self._finite.append(sum_of_all(found))  # finite only if everything in it is
            gradients.add(list(found))
        self._summed = gradients.total()

    def exchange(self, statistics: Sequence[Tensor]) -> Exchanged:
        """Sum over ranks, gradients into the vector that the parameters' gradients are views of."""
        norm = norm_of_all(self._sum_gradients())
        return Exchanged(self._sum_statistics(statistics), torch.isfinite(torch.stack(self._finite)), norm)

    def _sum_gradients(self) -> list[Tensor]:
        sizes = [p.numel() for p in self._parameters]
        if self._reduce is None:
            self._reduce = group.ExactAllReduce(sum(sizes), self._parameters[0].detach())
        torch.cat([g.flatten() for g in self._summed], out=self._reduce.vector)
        self._summed = []
        parts = self._reduce.reduce().split(sizes)
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return list(parts)

    def _sum_statistics(self, lanes: Sequence[Tensor]) -> Tensor:
        local = group.tree_sum(torch.stack(list(lanes)))
        return group.tree_sum(group.all_gather_rows(local[None]))


def exact_field(
    lanes: Sequence[Pair],
    objective: Objective,
    first_lane: int,
    persistent: PersistentField | None = None,
    labels: Tensor | None = None,
    temperature: bool = False,
) -> LossAndGradient:
    """Loss and embedding gradients, formed per lane against the columns of the whole global batch (collective).

    Parameter gradients are then to be SUMMED over all lanes of all ranks. Computed in float32 at least.

    Args:
        lanes: embeddings (m, d) of this rank's lanes, without graph.
        objective: resolved for this step.
        first_lane: global number of this rank's first lane.
        persistent: rows of all samples, which supervise and, if they persist, recur then; for an objective of rows.
        labels: (b,) of this rank's samples, in lane order, for objectives that need them.
        temperature: whether to give the derivative by tau0 too.

    Returns:
        `sums` are sums over each lane, (lanes,).
    """
    count, m = len(lanes), lanes[0][0].shape[0]
    columns = ExactColumns()
    columns_u, columns_v = columns.gather(torch.stack([torch.cat([pair[k] for pair in lanes]) for k in (0, 1)]))
    everyones = None if labels is None else group.all_gather_rows(labels)
    rows = persistent if objective.supervisor == "rows" else None
    supervisors: Sequence[Restricted | None] = [None] * count if rows is None else rows.supervisors(lanes, objective)

    first_rows, normaliser = [(first_lane + i) * m for i in range(count)], None
    if objective.normaliser == "field":
        own = [
            log_sum(objective, u, v, columns_u, columns_v, row) for (u, v), row in zip(lanes, first_rows, strict=True)
        ]
        normaliser = field_normaliser(group.all_gather_rows(torch.stack(own)), len(columns_u) * len(objective.slices))
    results = []
    trees: dict[str, group.TreeSum[Tensor]] = {}
    for i, (u, v) in enumerate(lanes):
        result = value_and_gradient(
            objective,
            u,
            v,
            columns_u,
            columns_v,
            first_rows[i],
            everyones,
            supervisor=supervisors[i],
            temperature=temperature,
            log_normaliser=normaliser,
        )
        for name, part in (("u", result.columns_u), ("v", result.columns_v)):
            if part is not None:
                trees.setdefault(name, group.TreeSum(count)).add(part)
        results.append(result)
    home = dict(zip(trees, columns.send_home(torch.stack([tree.total() for tree in trees.values()])), strict=True))
    du = [r.rows_u + home["u"][i * m : (i + 1) * m] if "u" in home else r.rows_u for i, r in enumerate(results)]
    dv = [r.rows_v + home["v"][i * m : (i + 1) * m] if "v" in home else r.rows_v for i, r in enumerate(results)]

    sums = {"loss": torch.stack([r.loss.double() for r in results])}
    sums |= {name: torch.stack([r.parts[name].double() for r in results]) for name in results[0].parts}
    slopes = [r.temperature for r in results if r.temperature is not None]
    if slopes:
        sums["temperature_slope"] = torch.stack(slopes)
    if rows is not None:
        sums |= rows.recur(lanes, columns_v, objective)
    batch = len(columns_u)
    known = {} if everyones is None else {"ideal": objective.at_ideal(batch, everyones)}
    return LossAndGradient([(a / batch, b / batch) for a, b in zip(du, dv, strict=True)], sums, known)
