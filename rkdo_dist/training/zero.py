"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and parameters (3) sharded over the ranks.

The engine runs in float32 with autocast inside it; micro-batches are backward passes of their own that one `step` ends.
Its state lives in flat shards that depend on the number of ranks and on the stage. What is saved does not: moments are
gathered parameter by parameter and keyed by names, so any number of ranks and any other strategy can go on from them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional

from rkdo_dist.checkpoint import OptimizerState, optimizer_to_tensors
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.averaged import Averaged
from rkdo_dist.training.persistent import Pair
from rkdo_dist.training.strategy import Exchanged, LossAndGradient, Position, TrainState, Update


class Zero(Averaged):
    """A DeepSpeed engine owns weights and optimizer from here on; see `Strategy` and `Averaged`.

    State that the optimizer has already, whole and by parameter, is taken over.
    """

    def _wrapped(self, encoder: nn.Module) -> nn.Module:
        optimizer = self._optimizer
        assert optimizer is not None, "DeepSpeed owns the optimizer"
        self._named = dict(encoder.named_parameters())
        self._trained = {name: p for name, p in self._named.items() if p.requires_grad}  # others have no state
        self._hollow = _hollow(encoder) if self._runtime.zero_stage == 3 else None
        before = optimizer_to_tensors(optimizer, self._named)
        self._groups = before.groups
        optimizer.state.clear()
        encoder.to(memory_format=torch.contiguous_format)  # DeepSpeed sends and flattens no other
        self._engine = self._runtime.sharded(_Autocast(encoder, self._runtime), optimizer, self._settings.clip)
        assert self._engine.optimizer.optimizer is optimizer, "DeepSpeed has put another optimizer in place of ours"
        self._take_over(before)
        return self._engine

    def backward(self, outputs: Iterator[Pair], field: LossAndGradient) -> None:
        """One backward pass, or one per lane when embedding again; the engine averages over ranks.

        The engine takes a scalar, so embedding gradients become the sum of embeddings times gradients. It multiplies
        that once by the loss scale, and divides again when it moves the weights.
        """
        if self._scale is not None:
            self._engine.optimizer.override_loss_scale(self._scale.scale)
        if self._settings.recompute:
            for lane, weights in zip(outputs, field.gradients, strict=True):
                self._engine.backward(_inner([lane], [weights]), scale_wrt_gas=False)
        else:
            self._engine.backward(_inner(list(outputs), field.gradients), scale_wrt_gas=False)

    def exchange(self, statistics: Sequence[Tensor]) -> Exchanged:
        """Statistics alone: the engine exchanges gradients during the backward pass (2, 3) or in its step (1)."""
        return Exchanged(self._sum_statistics(statistics), torch.ones((), device=self._runtime.device))

    def update(self, at: Position, overflow: str, norm: float | None) -> Update:
        """The engine's step, which knows the norm of the gradient and clips it. It leaves the weights alone if the norm
        is not finite on any rank."""
        self._engine.step()
        overflowed = bool(self._engine.optimizer.overflow)
        norm = None if overflowed else float(self._engine.get_global_grad_norm())
        if self._scale is not None:
            return self._scaled_update(overflowed, at, norm)
        if overflowed:
            return Update(f"the gradient of step {at.step + 1} is not finite", not_finite=True)
        return Update(gradient_norm=norm)

    def discard(self) -> None:
        """The engine detects this by itself, and drops what it has accumulated."""
        self._engine.step()
        assert self._engine.optimizer.overflow, "a loss that is not finite has a gradient that is"

    def state(self) -> TrainState:
        """Weights and moments gathered one parameter at a time; rank zero keeps them, on the CPU."""
        optimizer, tensors = self._optimizer, {}
        assert optimizer is not None
        shard_states = list(optimizer.state.values())
        for key in _shaped_keys(optimizer):
            for name, parameter in self._trained.items():
                found = safe_get_full_optimizer_state(parameter, key)
                if self._runtime.is_main:
                    tensors[f"{name}.{key}"] = found.to("cpu", copy=True)
        if shard_states and "step" in shard_states[0]:
            tensors |= {f"{name}.step": shard_states[0]["step"].cpu().clone() for name in self._trained}
        groups = [
            {key: group.get(key, value) if key != "params" else value for key, value in known.items()}
            for known, group in zip(self._groups, optimizer.param_groups, strict=True)
        ]
        groups = [{k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in groups]
        return TrainState(self._weights("cpu"), OptimizerState(tensors, groups, {}), self.scale_state())

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        """The encoder itself, or under stage 3 a copy that holds all weights for as long as the context."""
        if self._hollow is None:
            yield self._encoder
            return
        encoder = copy.deepcopy(self._hollow)
        device = self._runtime.device
        encoder.load_state_dict(self._weights(device, everywhere=True), assign=True)
        yield encoder

    def _weights(self, device: str | torch.device, everywhere: bool = False) -> dict[str, Tensor]:
        """Parameters and buffers by name; parameters that are sharded only on rank zero, or `everywhere`."""
        weights = {name: value.detach().to(device) for name, value in self._encoder.state_dict().items()}
        if self._hollow is not None:
            for name, parameter in self._named.items():
                if parameter.requires_grad:
                    found = safe_get_full_fp32_param(parameter)
                else:  # frozen: sharded like all, but unknown to the optimizer
                    with GatheredParameters([parameter]):
                        found = parameter.detach().clone()
                if everywhere or self._runtime.is_main:
                    weights[name] = found.detach().to(device, copy=True)
        return weights

    def _take_over(self, saved: OptimizerState) -> None:
        """Put whole moments, by name, into the engine's shards, as if it had computed them."""
        optimizer, engine = self._optimizer, self._engine.optimizer
        assert optimizer is not None
        names = list(self._trained)
        keys = sorted({n.rpartition(".")[2] for n in saved.tensors if not n.startswith("#")} - {"step"})
        if not keys:
            return
        stage_3 = self._hollow is not None
        for shard in engine.fp32_partitioned_groups_flat if stage_3 else engine.single_partition_of_fp32_groups:
            optimizer.state[shard] = {key: torch.zeros_like(shard) for key in keys}
            step = saved.tensors.get(f"{names[0]}.step")  # the same for all: every step moves every parameter
            if step is not None:
                optimizer.state[shard]["step"] = step.clone()
        if not stage_3:
            engine._lazy_init_hp_params_optimizer_state()
        for name in names:
            for key in keys:
                value = saved.tensors[f"{name}.{key}"].to(self._runtime.device)
                if stage_3:
                    _set_share(self._named[name], value, key, self._runtime)
                else:
                    safe_set_full_optimizer_state(self._named[name], value, key)


class _Autocast(nn.Module):
    """The encoder under this run's precision: the engine turns off any autocast around itself."""

    def __init__(self, encoder: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.encoder, self._runtime = encoder, runtime

    def forward(self, images: Tensor) -> Tensor:
        with self._runtime.autocast():
            return self.encoder(images)


def _inner(lanes: Sequence[Pair], weights: Sequence[Pair]) -> Tensor:
    """A scalar whose gradient with respect to each embedding is its weight."""
    pairs = [(x, w) for lane, pair in zip(lanes, weights, strict=True) for x, w in zip(lane, pair, strict=True)]
    return torch.stack([(x * w).sum() for x, w in pairs]).sum()


def _shaped_keys(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the state that has a shard's shape (moments); none before the first step."""
    return sorted(
        {
            key
            for shard, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.shape == shard.shape and key != "step"
        }
    )


def _set_share(parameter: nn.Parameter, value: Tensor, key: str, runtime: Runtime) -> None:
    """This rank's share of a whole moment; shares are equally long, the last one padded."""
    length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    padded = functional.pad(value.flatten(), (0, length * runtime.world - value.numel()))
    safe_set_local_optimizer_state(parameter, padded[runtime.rank * length :][:length], key)


def _hollow(encoder: nn.Module) -> nn.Module:
    """A copy of the encoder without memory for its parameters."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in encoder.parameters()}
    return copy.deepcopy(encoder, memo)
