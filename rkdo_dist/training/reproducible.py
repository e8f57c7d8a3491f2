"""Whether an encoder can be trained with deterministic algorithms alone, found out before the first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rkdo_dist.training.trial import without_trace


def check_deterministic(forward: Callable[[Tensor], Tensor], encoder: nn.Module, name: str, size: int) -> None:
    """Embed two images and form the gradient, where only deterministic algorithms are allowed; elsewhere do nothing.

    The encoder's buffers, its gradients and torch's random state are as before.

    Args:
        forward: images (n, 3, S, S) to embeddings, with gradient.
        encoder: whose parameters are trained.
        name: of its backbone, for the message.
        size: S.

    Raises:
        ValueError: naming the backbone and the operator that has no deterministic algorithm.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return
    trained = [p for p in encoder.parameters() if p.requires_grad]
    device = trained[0].device
    try:
        with without_trace(encoder, device), torch.enable_grad():
            images = torch.zeros(2, 3, size, size, device=device)
            torch.autograd.grad(forward(images).sum(), trained, allow_unused=True)
    except RuntimeError as error:
        operator, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise ValueError(
            f"encoder.backbone={name} uses {operator}, which has no deterministic algorithm on {device.type}, so "
            "run.reduction=exact cannot keep its promise: use run.reduction=fast, or another backbone"
        ) from error
