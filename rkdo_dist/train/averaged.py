"""Sums in the backend's order: one process, or Accelerate's DDP averages gradients (`run.reduction=fast`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rkdo_dist.exchange import group
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.train.field import FieldResult, Views, averaged_field
from rkdo_dist.train.strategy import NonFiniteError, Place, Strategy, sum_of_all


class Averaged(Strategy):
    """A rank's lanes accumulate in `.grad`, the wrapper averages over ranks; see `Strategy`.

    Args:
        encoder, optimizer, runtime: see `Strategy`.
        exchange: how columns travel, "gather" or "ring".
        recompute: whether `backward` gets outputs that are computed when asked for.
    """

    def __init__(
        self,
        encoder: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        runtime: Runtime,
        exchange: str,
        recompute: bool,
    ) -> None:
        super().__init__(encoder, optimizer, runtime)
        self._exchange, self._recompute = exchange, recompute
        self.model = self._wrap(encoder)

    def _wrap(self, encoder: nn.Module) -> nn.Module:
        """What embeds training lanes and averages their gradients."""
        return self._runtime.wrap(encoder)

    def field(
        self, lanes: Sequence[Views], objective: Objective, at: Place, stop: int, labels: Tensor | None = None
    ) -> FieldResult:
        """Formed on all local rows at once."""
        return averaged_field(lanes, objective, self._exchange, stop, self.memory, labels)

    def backward(self, outputs: Iterator[Views], field: FieldResult, at: Place) -> None:
        """One averaging over ranks: in the only backward pass, or in the last lane's when embedding again."""
        for parameter in self._parameters:
            parameter.grad = None
        weights = [self._scaled(pair) for pair in field.gradients]
        if not self._recompute:
            # One call: calling lane by lane would fire DDP's hooks at the first lane.
            torch.autograd.backward([v for lane in outputs for v in lane], [w for pair in weights for w in pair])
            return
        for number, pair in enumerate(weights):
            last = number == len(weights) - 1
            with contextlib.nullcontext() if last else self._runtime.without_sync(self.model):
                torch.autograd.backward(next(outputs), pair)

    def exchange(self, at: Place) -> None:
        """The wrapper has averaged already; after that every rank has every rank's NaN: there is no place to name."""
        if self._scale is not None:
            return
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if group.all_reduce_max(float(not torch.isfinite(sum_of_all(gradients)))):
            raise NonFiniteError(f"the gradient of step {at.step + 1} is not finite")

    def sum_statistics(self, lanes: Sequence[Tensor]) -> Tensor:
        """In the backend's order."""
        statistics = torch.stack(list(lanes)).sum(0)
        if self._runtime.world > 1:
            torch.distributed.all_reduce(statistics)
        return statistics
