"""How many images a loader worker reads here in a second, beside the pairs that the encoder of a process takes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
from torch import nn

from rkdo_dist import parts
from rkdo_dist.config import Config
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.stream import lane_stream
from rkdo_dist.exchange import group
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.trial import in_precision, without_trace

_STEPS, _PAIRS = 4, 8  # of reading; of a pass on a CPU, which is as fast with few


def advice(config: Config, runtime: Runtime, index: ShardIndex, encoder: nn.Module) -> str:
    """One sentence: the rates of the slowest rank, and the workers that they ask for (collective)."""
    rates: list[tuple[float, float]] = group.gather_objects(  # type: ignore[assignment]
        group.together(
            lambda: (images_a_second(config, index), pairs_a_second(config, runtime, index, encoder)),
            "measuring a loader worker",
        )
    )
    images, pairs = (min(column) for column in zip(*rates, strict=True))
    need = max(1, math.ceil(pairs / images))
    return (
        f"one worker reads {images:,.0f} images/s here, the encoder takes {pairs:,.0f} pairs/s of a process: "
        f"data.workers={need} ({config.data.workers} now)"
    )


def images_a_second(config: Config, index: ShardIndex) -> float:
    """Of this process's time, once the first batch is there; partners of sampled delivery are left out."""
    train, data = config.train, config.data
    stream = lane_stream(
        index,
        data.split,
        seed=config.run.seed,
        all_lanes=train.lanes,
        micro_batch=train.lane_size,
        lanes=range(1),
        epochs=_STEPS + 1,
        window=data.shuffle_buffer,
        size=data.image_size,
        on_corrupt=data.on_corrupt,
    )
    with contextlib.closing(stream):
        return train.lane_size / min(_seconds(lambda: next(stream)) for _ in range(_STEPS + 1))


def pairs_a_second(config: Config, runtime: Runtime, index: ShardIndex, encoder: nn.Module) -> float:
    """Of the encoder alone, forward and backward."""
    size, device, forward = parts.make_views(config, index).size, runtime.device, in_precision(encoder, runtime)
    pairs = config.train.lane_size if device.type == "cuda" else min(_PAIRS, config.train.lane_size)

    def step() -> None:
        torch.autograd.grad(forward(images).float().sum(), [p for p in encoder.parameters() if p.requires_grad])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with without_trace(encoder, device):
        images = torch.rand(2 * pairs, 3, size, size, device=device) - 0.5
        seconds = min(_seconds(step, time.perf_counter) for _ in range(2))
    return pairs / seconds


def _seconds(action: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    began = clock()
    action()
    return clock() - began
