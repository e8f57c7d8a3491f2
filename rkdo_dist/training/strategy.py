"""Strategies: how gradients get from lanes to parameters, and how weights move.

A step (`training.loop`) asks its strategy, in this order: `field` (embeddings to the loss and its gradient with respect
to them), `backward` (that gradient into the parameters), `exchange` (between ranks), `update` (weights). Strategies:

- `training.exact`: everything summed in one fixed order, the same bits on any number of ranks;
- `training.averaged`: one process, or Accelerate's wrapper (DDP) averages over ranks;
- `training.zero`: DeepSpeed's ZeRO, which shards optimizer state (1), gradients (2), parameters (3).

Another (FSDP, say) is another file like these, chosen in `training.step`.
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
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.persistent import Pair, PersistentField
from rkdo_dist.training.relation import RelationalField


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Options of a step; see `config.TrainConfig`, `EncoderConfig` and `RunConfig`."""

    seed: int
    reduction: str
    recompute: bool
    views_together: bool
    exchange: str
    clip: float | None = None
    learn_temperature: bool = False


@dataclasses.dataclass(frozen=True)
class Position:
    """Position of a global batch in the run, and the global number of this rank's first lane."""

    epoch: int
    step: int
    first_lane: int


@dataclasses.dataclass(frozen=True)
class LossAndGradient:
    """The field loss of a step on this rank.

    Attributes:
        gradients: for each of this rank's lanes, what to push through its embeddings.
        sums: "loss" and its parts (`field.objectives`), vectors whose entries `Strategy.mean` puts together.
    """

    gradients: list[Pair]
    sums: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """Results of the exchange between ranks besides gradients.

    Attributes:
        statistics: batch statistics summed over all lanes of all ranks, one row per forward.
        finite: bool, whether this rank's gradients are: one for each lane, or a scalar where lanes are mixed already.
        norm: of the global batch's gradient, times the loss scale, a scalar; None where it is not known yet.
    """

    statistics: Tensor
    finite: Tensor
    norm: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Update:
    """Outcome of an update of the weights, the same on every rank.

    Attributes:
        skipped: why no weight moved; empty when they did.
        not_finite: whether that is a number that is not finite and no loss scale explains.
        loss_scale: what half precision's gradients were multiplied by; None without loss scaling.
        gradient_norm: Euclidean norm of the gradient of all weights before clipping; None if it is not finite.
    """

    skipped: str = ""
    not_finite: bool = False
    loss_scale: float | None = None
    gradient_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run that a strategy owns, unsharded, in float32 and by global names.

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
        settings: how to compute.
        persistent: the rows of a persistent field, if there is one.
        relational: what a recursion with restart keeps, if there is one; not under DeepSpeed.
        compiled: embeds in the encoder's place, with its parameters and buffers, in training; None: the encoder does.

    Attributes:
        model: what embeds training lanes (the encoder, compiled or not, or a wrapper of it).
    """

    def __init__(
        self,
        encoder: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        runtime: Runtime,
        settings: StepSettings,
        persistent: PersistentField | None = None,
        relational: RelationalField | None = None,
        compiled: nn.Module | None = None,
    ) -> None:
        self._encoder, self._optimizer, self._runtime, self._settings = encoder, optimizer, runtime, settings
        self._persistent, self._relational = persistent, relational
        self._parameters = [p for p in encoder.parameters() if p.requires_grad]
        self._scale = runtime.loss_scale
        self.model = self._wrapped(encoder if compiled is None else compiled)

    def _wrapped(self, model: nn.Module) -> nn.Module:
        """What embeds training lanes with `model` and takes part in the exchange of its gradients."""
        return model

    def rows_for(self, objective: Objective) -> PersistentField | None:
        """The rows of a persistent field, if the objective of a step asks for them."""
        return self._persistent if objective.supervisor == "rows" else None

    def relational_for(self, objective: Objective) -> RelationalField | None:
        """What a recursion with restart keeps, if the objective of a step asks for it."""
        return self._relational if self._relational is not None and self._relational.takes_part(objective) else None

    def field(
        self, lanes: Sequence[Pair], objective: Objective, at: Position, labels: Tensor | None = None
    ) -> LossAndGradient:
        """The loss over the global batch and its gradient with respect to this rank's embeddings; with a learned
        temperature also the derivative by tau0, as the sum "temperature_slope".

        Args:
            lanes: embeddings (m, d) of both views of each of this rank's lanes, without graph.
            labels: (b,) of this rank's samples, in lane order, for objectives that need them.
        """
        if objective.recursion == "persistent" and objective.pairing == "joint":
            return of_points(self._field(*as_points(lanes, objective), at, None))
        return self._field(lanes, objective, at, labels)

    @abc.abstractmethod
    def _field(
        self, lanes: Sequence[Pair], objective: Objective, at: Position, labels: Tensor | None
    ) -> LossAndGradient:
        """`field`, whose rows that persist are those of the lanes as they are."""

    @abc.abstractmethod
    def backward(self, outputs: Iterator[Pair], field: LossAndGradient) -> None:
        """Push the embedding gradients into the parameters.

        Args:
            outputs: the lanes' embeddings with their graph, in lane order; asking for one may compute it. A view that
                has none is left out.
        """

    @abc.abstractmethod
    def exchange(self, statistics: Sequence[Tensor]) -> Exchanged:
        """Sum gradients and batch statistics (one tensor per lane) over all ranks."""

    @abc.abstractmethod
    def mean(self, sums: Tensor) -> Tensor:
        """Means (K,) over the global batch, from what `field` has found on all ranks: (R, K) float64, in rank order."""

    def update(self, at: Position, overflow: str, norm: float | None) -> Update:
        """Move the weights by the gradient in `.grad`, unless it is not finite.

        A gradient whose norm |g| is above `clip` is multiplied by clip / (|g| + 1e-6), as torch and DeepSpeed do.

        Args:
            overflow: the gradient that is not finite, in words (of `Facts`); empty if all are.
            norm: of the gradient as it is in `.grad`, times the loss scale; None if the strategy has not told it.
        """
        if overflow and self._scale is None:
            return Update(overflow, not_finite=True)
        scale = 1.0 if self._scale is None else self._scale.scale
        norm = None if norm is None or overflow else norm / scale
        if not overflow:
            factor = 1 / scale
            clip = self._settings.clip
            if clip is not None and norm is not None and norm + 1e-6 > clip:
                factor *= clip / (norm + 1e-6)
            if factor != 1:
                torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], factor)
            if self._optimizer is not None:
                self._optimizer.step()
        return Update(gradient_norm=norm) if self._scale is None else self._scaled_update(bool(overflow), at, norm)

    def discard(self) -> None:
        """Drop the gradient of a step that is not finite; no weight moves."""
        return

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

    def _scaled_update(self, overflow: bool, at: Position, norm: float | None) -> Update:
        """Adapt the loss scale after a step."""
        assert self._scale is not None
        scale = self._scale.scale
        self._scale.update(overflow)
        if self._scale.exhausted:
            return Update(f"the gradient of step {at.step + 1} is not finite at any loss scale, now {scale:g}", True)
        why = f"half precision overflowed at loss scale {scale:g}" if overflow else ""
        return Update(why, loss_scale=scale, gradient_norm=norm)

    def _scaled(self, weights: Pair) -> Pair:
        """Embedding gradients times the loss scale: half precision loses small gradients otherwise."""
        if self._scale is None:
            return weights
        return weights[0] * self._scale.scale, weights[1] * self._scale.scale


def with_graph(outputs: Pair, weights: Pair) -> tuple[list[Tensor], list[Tensor]]:
    """The embeddings that have a graph (a teacher's keys have none), and what to push through them."""
    kept = [(x, w) for x, w in zip(outputs, weights, strict=True) if x.requires_grad]
    return [x for x, _ in kept], [w for _, w in kept]


def norms_of_all(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor: finite if all of its elements are (and none is above 1e19 in float32)."""
    return torch.stack(torch._foreach_norm(list(tensors)))


def norm_of_all(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all elements, a float64 scalar on their device."""
    return torch.linalg.vector_norm(norms_of_all(tensors).double())


def as_points(lanes: Sequence[Pair], objective: Objective) -> tuple[list[Pair], Objective]:
    """Both views of a lane as rows and as columns of one, for rows that persist under joint pairing."""
    points = [torch.cat(pair) for pair in lanes]
    return [(x, x) for x in points], dataclasses.replace(objective, pairing="points")


def of_points(field: LossAndGradient) -> LossAndGradient:
    """The gradients of lanes from those of their points."""
    gradients = [(rows + columns).chunk(2) for rows, columns in field.gradients]
    return dataclasses.replace(field, gradients=[(u, v) for u, v in gradients])
