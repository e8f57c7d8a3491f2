"""What a strategy is: how gradients get from lanes to parameters, and how weights move.

A step (`train.step`) asks its strategy, in this order: `field` (embeddings to the loss and its gradient with respect to
them), `backward` (that gradient into the parameters), `exchange` (between ranks), `update` (weights). Strategies:

- `train.exact`: everything summed in one fixed order, the same bits on any number of ranks;
- `train.averaged`: one process, or Accelerate's wrapper (DDP) averages over ranks;
- `train.zero`: DeepSpeed's ZeRO, which shards optimizer state (1), gradients (2), parameters (3).

Another (FSDP, say) is another file like these, chosen in `train.step`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rkdo_dist.checkpoint import OptimizerState, optimizer_to_tensors
from rkdo_dist.exchange import group
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.train.field import FieldResult, Views
from rkdo_dist.train.persistent import PersistentField


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is not finite; raised alike on every rank, before any weight has changed."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Position of a global batch, and the global number of this rank's first lane."""

    epoch: int
    step: int
    first_lane: int


@dataclasses.dataclass(frozen=True)
class Update:
    """What became of a gradient, the same on every rank.

    Attributes:
        overflow: whether half precision overflowed under its loss scale, so that no weight moved.
        loss_scale: the scale this step was computed with; None without loss scaling.
    """

    overflow: bool = False
    loss_scale: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything of a run that a strategy owns, whole, in float32 and by global names.

    Attributes:
        model: parameters and buffers.
        optimizer: moments and hyper-parameters.
        loss_scale: its state (JSON-able); empty without loss scaling.
    """

    model: dict[str, Tensor]
    optimizer: OptimizerState
    loss_scale: dict[str, float]


class Strategy(abc.ABC):
    """One way to a gradient of the global batch. Every method is collective: all ranks call it alike.

    Args:
        encoder: images to unit-norm embeddings; the same float32 weights on every rank.
        optimizer: over the encoder's parameters; None leaves the gradient in `.grad` and no weight moves.
        runtime: ranks, device, precision.

    Attributes:
        model: what embeds training lanes (the encoder, or a wrapper of it).
        memory: the rows of a persistent field, if there is one.
    """

    model: nn.Module
    memory: PersistentField | None = None

    def __init__(self, encoder: nn.Module, optimizer: torch.optim.Optimizer | None, runtime: Runtime) -> None:
        self._encoder, self._optimizer, self._runtime = encoder, optimizer, runtime
        self._parameters = [p for p in encoder.parameters() if p.requires_grad]
        self._scale = runtime.loss_scale

    @abc.abstractmethod
    def field(
        self, lanes: Sequence[Views], objective: Objective, at: Place, stop: int, labels: Tensor | None = None
    ) -> FieldResult:
        """The loss over the global batch and its gradient with respect to this rank's embeddings.

        Args:
            lanes: embeddings (m, d) of both views of each of this rank's lanes, without graph.
            stop: this rank's stop code.
            labels: (b,) of this rank's samples, in lane order, for objectives that need them.
        """

    @abc.abstractmethod
    def backward(self, outputs: Iterator[Views], field: FieldResult, at: Place) -> None:
        """Push the embedding gradients into the parameters.

        Args:
            outputs: the lanes' embeddings with their graph, in lane order; asking for one may compute it.
        """

    @abc.abstractmethod
    def exchange(self, at: Place) -> None:
        """Bring gradients of all ranks together.

        Raises:
            NonFiniteError: if the gradient is not finite and no loss scale explains it.
        """

    @abc.abstractmethod
    def sum_statistics(self, lanes: Sequence[Tensor]) -> Tensor:
        """The sum of batch statistics over all lanes of all ranks."""

    def update(self, at: Place) -> Update:
        """Move the weights by the gradient in `.grad`, unless half precision overflowed.

        Raises:
            NonFiniteError: if the gradient is not finite and no loss scale explains it.
        """
        if self._scale is None:
            if self._optimizer is not None:
                self._optimizer.step()
            return Update()
        scale = self._scale.scale
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        overflow = bool(group.all_reduce_max(float(not torch.isfinite(sum_of_all(gradients)))))
        if not overflow:
            torch._foreach_mul_(gradients, 1 / scale)
            if self._optimizer is not None:
                self._optimizer.step()
        return self._scaled_update(overflow, scale, at)

    def state(self) -> TrainState:
        """The whole state; tensors on ranks other than zero must not be relied on."""
        assert self._optimizer is not None
        optimizer = optimizer_to_tensors(self._optimizer, self._encoder.named_parameters())
        return TrainState(dict(self._encoder.state_dict()), optimizer, self.scale_state())

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        """The encoder with all its current float32 weights on this rank, for evaluation."""
        yield self._encoder

    def scale_state(self) -> dict[str, float]:
        """State of the loss scale, empty without one."""
        return {} if self._scale is None else self._scale.state()

    def load_scale(self, state: dict[str, float]) -> None:
        """Continue with the loss scale of a checkpoint; without one in it, or here, nothing happens."""
        if self._scale is not None and state:
            self._scale.load(state)

    def _scaled_update(self, overflow: bool, scale: float, at: Place) -> Update:
        """Adapt the loss scale to what has happened at `scale`."""
        assert self._scale is not None
        self._scale.update(overflow)
        if self._scale.exhausted:
            raise NonFiniteError(f"the gradient of step {at.step + 1} is not finite at any loss scale, now {scale:g}")
        return Update(overflow, scale)

    def _scaled(self, weights: Views) -> Views:
        """Embedding gradients times the loss scale: half precision loses small gradients otherwise."""
        if self._scale is None:
            return weights
        return weights[0] * self._scale.scale, weights[1] * self._scale.scale


def sum_of_all(tensors: Sequence[Tensor]) -> Tensor:
    """A scalar that is finite only if every element is (and their sum does not overflow)."""
    return torch.stack([t.sum() for t in tensors]).sum()


def require_finite(lanes: Sequence[Sequence[Tensor]], what: str, at: Place) -> None:
    """Raise on every rank if any tensor of any rank's lanes is not finite, naming rank and lane (collective)."""
    mine = torch.stack([torch.stack([torch.isfinite(x).all() for x in tensors]).all() for tensors in lanes])
    everyone = group.all_gather_rows(mine.to(torch.uint8)).tolist()
    broken = [number for number, fine in enumerate(everyone) if not fine]
    if broken:
        rank, first = broken[0] // len(lanes), broken[0]
        raise NonFiniteError(f"{what} of step {at.step + 1} is not finite (rank {rank}, lane {first})")
