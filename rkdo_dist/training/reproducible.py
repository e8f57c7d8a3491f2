"""Whether the libraries below can be trusted with an encoder's gradients, found out before the first step."""

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


def check_half_precision(forward: Callable[[Tensor], Tensor], encoder: nn.Module, name: str, size: int) -> None:
    """Under autocast on a CPU, look for convolutions of inputs that are smaller than half their kernel.

    oneDNN leaves the entries of such a weight's gradient that no pixel reaches as they were in memory (PyTorch 2.14,
    bfloat16 and a stride of 2 on one pixel, or 7 x 7 on one or two): any number, not finite in one step of a few.

    Args:
        forward: images (n, 3, S, S) to embeddings, under autocast.
        encoder: whose convolutions are looked at; on a GPU nothing is done.
        name: of its backbone, for the message.
        size: S.

    Raises:
        ValueError: naming the backbone and the layer.
    """
    device = next(encoder.parameters()).device
    if device.type != "cpu":
        return
    small = []

    def look(layer: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        sides = zip(inputs[0].shape[2:], layer.kernel_size, layer.stride, strict=True)
        if any(side < kernel / 2 - (stride == 1) for side, kernel, stride in sides):
            small.append(layer)

    convolutions = {module: path for path, module in encoder.named_modules() if isinstance(module, nn.Conv2d)}
    hooks = [module.register_forward_pre_hook(look) for module in convolutions]
    try:
        with without_trace(encoder, device), torch.no_grad():
            forward(torch.zeros(2, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    if small:
        raise ValueError(
            f"encoder.backbone={name} has a convolution ({convolutions[small[0]]}) whose input is smaller than half "
            f"its kernel at {size} x {size} pixels; its gradient is wrong in half precision on a CPU: train in float32 "
            "(--mixed_precision no), on a GPU, or with a larger data.image_size"
        )
