"""Memory of a rank for one step, from what can be counted and from two small forward passes.

The bytes that autograd keeps of a forward pass are affine in the number of images and, where a network takes images of
any size, in their area: two numbers of small images are measured.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.exchange import group
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.machine import all_bytes
from rkdo_dist.training.persistent import has_bank, has_points, rows_bytes
from rkdo_dist.training.shape import StepShape, shape_of
from rkdo_dist.training.trial import in_precision, without_trace

_MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1, "lars": 1}
_PROBES = (2, 4)  # images; batch norm of vectors needs two
_SIDES = (64, 128)  # pixels, for images that are larger


def kept_bytes(forward: Callable[[Tensor], Tensor], images: Tensor, encoder: nn.Module) -> int:
    """Bytes that autograd keeps of one forward pass for the backward pass, without parameters and buffers.

    Args:
        forward: images (n, 3, S, S) to embeddings, with gradient.
        encoder: whose parameters and buffers do not count, as they are there anyway.
    """
    own = {t.untyped_storage()._cdata for t in (*encoder.parameters(), *encoder.buffers())}
    storages: dict[int, Tensor] = {}  # holds the tensors, so that no storage's place is used twice

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = forward(images)
    del out
    return sum(t.untyped_storage().nbytes() for place, t in storages.items() if place not in own)


def lane_growth(config: Config, runtime: Runtime, index: ShardIndex, encoder: nn.Module) -> Callable[[int], int]:
    """`lane_bytes` of a run, measured now."""
    # Parameters under ZeRO-3 are sharded later: the encoder here is whole.
    return lane_bytes(in_precision(encoder, runtime), encoder, parts.make_views(config, index).size, runtime.device)


def lane_bytes(
    forward: Callable[[Tensor], Tensor], encoder: nn.Module, size: int, device: torch.device
) -> Callable[[int], int]:
    """Activations that one lane keeps, both views of images of `size` pixels, as a function of the micro-batch
    (estimated, see above). The encoder's buffers and random state are as before."""

    def measured(side: int) -> Callable[[int], float]:
        with without_trace(encoder, device):
            found = [kept_bytes(forward, torch.rand(n, 3, side, side, device=device) - 0.5, encoder) for n in _PROBES]
        each = (found[1] - found[0]) / (more - few)
        return lambda micro_batch: found[0] + each * (2 * micro_batch - few)

    few, more = _PROBES
    small, large = _SIDES
    if size > large:
        with contextlib.suppress(ValueError, RuntimeError, AssertionError):  # of networks that take one size alone
            at = measured(small), measured(large)
            area = (size**2 - large**2) / (large**2 - small**2)
            return lambda micro_batch: round(at[1](micro_batch) + area * (at[1](micro_batch) - at[0](micro_batch)))
    whole = measured(size)
    return lambda micro_batch: round(whole(micro_batch))


def needed(config: Config, runtime: Runtime, index: ShardIndex, shape: StepShape, lane: int) -> dict[str, int]:
    """`step_memory` of a run.

    Args:
        shape: of its steps.
        lane: what a lane's activations take.
    """
    size, rows = parts.make_views(config, index).size, 0
    if shape.persistent:
        width = shape.dimension if has_bank(config) else None
        samples = index.split(config.data.split).samples * (2 if has_points(config) else 1)
        rows = rows_bytes(samples, config.field.stored, width, runtime.world)
    averaged = configuration.decay_of(config) is not None
    return step_memory(shape, config.train.optimizer, lane, 3 * size * size, rows, averaged)


def step_memory(
    shape: StepShape, optimizer: str, lane: int, image_bytes: int, rows: int = 0, averaged: bool = False
) -> dict[str, int]:
    """Bytes on a rank at the peak of a step, by purpose; the library's own are not included.

    Args:
        optimizer: `train.optimizer`.
        lane: what a lane's activations take (`lane_bytes`).
        image_bytes: one decoded image, uint8.
        rows: this rank's rows of a persistent field.
        averaged: whether a moving average of the weights is kept.
    """
    local = shape.lanes // shape.world
    stage = int(shape.strategy.removeprefix("zero-")) if shape.strategy.startswith("zero-") else 0
    whole = shape.parameters * 4
    gradients = whole
    if shape.reduction == "exact":
        # The lane's own, the partial sums of the tree, and the exchange's vector and what it receives.
        gradients = whole * (1 + (local & -local).bit_length() + (2 if shape.world > 1 else 1))
    elif shape.strategy == "ddp":
        gradients = whole  # a view of DDP's buckets
    width = shape.dimension * 4
    blocks = 3 * shape.rows if shape.exchange == "ring" else 2 * shape.batch
    return {
        "parameters": whole // (shape.world if stage == 3 else 1),
        **({"average of the weights": whole} if averaged else {}),
        "gradients": gradients // (shape.world if stage >= 2 else 1),
        "optimizer": _MOMENTS[optimizer] * whole // (shape.world if stage else 1),
        "activations": lane * (1 if shape.recompute else local),
        "embeddings and their gradients": 4 * shape.rows * width,
        "columns and their gradients": blocks * shape.column_views * width,
        "images": 2 * shape.rows * image_bytes,
        **({"rows of the persistent field": rows} if rows else {}),
    }


_DECIDED_BY = {
    "parameters": "encoder.backbone",
    "average of the weights": "encoder.backbone",
    "gradients": "encoder.backbone",
    "optimizer": "encoder.backbone",
    "embeddings and their gradients": "encoder.embedding_dim",
    "columns and their gradients": "train.global_batch",
    "images": "data.image_size",
    "rows of the persistent field": "field.stored",
}  # the setting to change first


def require(config: Config, runtime: Runtime, index: ShardIndex, sharing: int) -> None:
    """Refuse a run that this machine's memory can never hold, whatever else runs here: without activations, which are
    estimated only, more than there is at all.

    Args:
        sharing: ranks that share the memory.

    Raises:
        ConfigError: naming the largest part, and the setting that decides it.
    """
    encoder = parts.outline(config.encoder)
    if encoder is None:
        return
    shape = shape_of(config, encoder, parts.make_objective(config, 0.0), runtime.world, runtime.launch)
    need = needed(config, runtime, index, shape, 0)
    total, there = sum(need.values()), all_bytes(runtime.device) // sharing
    if total > there:
        what = max(need, key=lambda name: need[name])
        raise ConfigError(
            f"every process needs {total / 1e9:,.1f} GB at least ({need[what] / 1e9:,.1f} GB for {what}), but "
            f"{'its share of this machine' if runtime.device.type == 'cpu' else runtime.device} has {there / 1e9:,.1f} "
            f"GB: lower {_DECIDED_BY[what]}"
        )


def require_activations(config: Config, runtime: Runtime, index: ShardIndex, encoder: nn.Module, sharing: int) -> None:
    """Refuse a step whose activations alone are more than all memory of this machine, by an estimate.

    Args:
        encoder: not yet sharded.
        sharing: ranks that share the memory.

    Raises:
        ConfigError: naming the settings that decide it.
    """
    try:
        lane = lane_growth(config, runtime, index, encoder)(config.train.lane_size)
    except Exception:  # of any backbone: what is wrong with it, its first step says
        return
    shape = shape_of(config, encoder, parts.make_objective(config, 0.0), runtime.world, runtime.launch)
    need, there = needed(config, runtime, index, shape, lane)["activations"], all_bytes(runtime.device) // sharing
    if need > there:
        where = "its share of this machine" if runtime.device.type == "cpu" else runtime.device
        raise ConfigError(
            f"the activations of a step take about {need / 1e9:,.0f} GB on every process, but {where} has "
            f"{there / 1e9:,.1f} GB: lower data.image_size or train.micro_batch"
            + ("" if shape.recompute else ", or set train.recompute=true")
        )


def sharing(runtime: Runtime) -> int:
    """Ranks that share the memory of this one: on a CPU those of the machine (collective)."""
    hosts = group.gather_objects(socket.gethostname())
    return hosts.count(socket.gethostname()) if runtime.device.type == "cpu" else 1
