"""The training pass of an encoder, compiled by torch.compile before the first step (`train.compile`).

Lanes have one shape, so there is one graph. It has the encoder's own parameters and buffers: what is saved, averaged
and evaluated is the encoder itself, which stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rkdo_dist.batch_norm import BatchStatistics
from rkdo_dist.exchange import group
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.trial import without_trace


def compiled(encoder: nn.Module, shape: tuple[int, ...], runtime: Runtime) -> nn.Module:
    """A module that computes what `encoder` does in training; the first rank of each node compiles, others find its
    files in the cache (collective).

    Args:
        encoder: in training mode; its buffers, gradients and torch's random state are as before.
        shape: (n, 3, S, S), of the images of a lane.
        runtime: device, precision, and whether ranks must compute the same bits.

    Raises:
        ValueError: with the reason, in one line, on every rank.
    """
    if runtime.zero_stage:
        raise ValueError(
            f"train.compile=true: {runtime.strategy} (DeepSpeed) hooks into the encoder's modules, which a compiled "
            "graph passes by; leave train.compile out, or launch without DeepSpeed"
        )
    # Dropout draws what it draws without compiling, and in exact mode no kernel is chosen by the clock.
    options: dict[str, Any] = {"fallback_random": True, "deterministic": runtime.reduction == "exact"}
    model: Any = torch.compile(encoder, dynamic=False, options=options)
    trained = [p for p in encoder.parameters() if p.requires_grad]

    def trial() -> None:
        images = torch.zeros(shape, device=runtime.device).contiguous(memory_format=torch.channels_last)
        try:
            with without_trace(encoder, runtime.device), torch.enable_grad():
                with runtime.autocast(), BatchStatistics(encoder).discarding():
                    embeddings = model(images)
                torch.autograd.grad(embeddings.sum(), trained, allow_unused=True)
        except Exception as error:  # of any part of a compiler
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(
                f"train.compile=true: the encoder cannot be compiled ({reason.strip()[:300]}): torch.compile "
                "needs a C++ compiler (g++); leave train.compile out otherwise"
            ) from error

    first = group.on_node()[0] == 0
    group.together(lambda: trial() if first else None, "compiling the encoder")
    group.together(lambda: None if first else trial(), "compiling the encoder")
    return model
