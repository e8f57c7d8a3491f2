"""Passes through an encoder before training, to find out what they take or whether there can be any."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rkdo_dist.ranks.runtime import Runtime


@contextlib.contextmanager
def without_trace(encoder: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards the encoder's buffers and the random state of the CPU and of `device` are as they were."""
    saved = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in encoder.named_buffers():
                buffer.copy_(saved[name])


def in_precision(encoder: nn.Module, runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """The encoder as a function of images (n, 3, S, S), under the run's precision."""

    def forward(images: Tensor) -> Tensor:
        with runtime.autocast():
            return encoder(images)

    return forward
