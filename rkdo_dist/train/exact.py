"""Sums in one fixed order: the same bits on 1, 2, 4, ... ranks (`run.reduction=exact`).

Everything that is summed over the batch is formed per lane and summed over lanes by `exchange.group.TreeSum`, whose
upper levels are the ranks. No wrapper touches the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rkdo_dist.exchange import group
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.train.field import FieldResult, Views, exact_field
from rkdo_dist.train.strategy import Place, Strategy, require_finite, sum_of_all


class Exact(Strategy):
    """Per-lane gradients and one tree; see `Strategy`."""

    def __init__(self, encoder: nn.Module, optimizer: torch.optim.Optimizer | None, runtime: Runtime) -> None:
        super().__init__(encoder, optimizer, runtime)
        self.model = encoder
        self._reduce: group.ExactAllReduce | None = None
        self._summed: list[Tensor] = []
        self._finite: list[tuple[Tensor]] = []

    def field(
        self, lanes: Sequence[Views], objective: Objective, at: Place, stop: int, labels: Tensor | None = None
    ) -> FieldResult:
        """Formed per lane."""
        return exact_field(lanes, objective, at.first_lane, stop, self.memory, labels)

    def backward(self, outputs: Iterator[Views], field: FieldResult, at: Place) -> None:
        """One backward pass per lane, added up in lane order."""
        gradients: group.TreeSum[list[Tensor]] = group.TreeSum(len(field.gradients))
        self._finite = []
        for weights, lane in zip(field.gradients, outputs, strict=True):
            found = torch.autograd.grad(lane, self._parameters, self._scaled(weights), materialize_grads=True)
            self._finite.append((sum_of_all(found),))  # finite only if everything in it is
            gradients.add(list(found))
        self._summed = gradients.total()

    def exchange(self, at: Place) -> None:
        """Sum over ranks into the vector that the parameters' gradients are views of."""
        if self._scale is None:  # with a loss scale, inf says that the scale was too large
            require_finite(self._finite, "the gradient", at)
        sizes = [p.numel() for p in self._parameters]
        if self._reduce is None:
            self._reduce = group.ExactAllReduce(sum(sizes), self._parameters[0].detach())
        torch.cat([g.flatten() for g in self._summed], out=self._reduce.vector)
        self._summed = []
        parts = self._reduce.reduce().split(sizes)
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def sum_statistics(self, lanes: Sequence[Tensor]) -> Tensor:
        """In tree order, like everything here."""
        local = group.tree_sum([lane.clone() for lane in lanes])
        return group.tree_sum(group.all_gather_rows(local[None]).unbind(0))
