"""Batch norm over the micro-batches of all ranks: torch's SyncBatchNorm, on any backend.

`torch.nn.SyncBatchNorm` refuses CPU tensors once a process group exists. This one needs only an all-reduce. The k-th
micro-batches of all ranks are normalised together, so the result depends on the number of ranks: it is a setting for
those who know they want it, and needs `run.reduction=fast`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rkdo_dist.exchange import group


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose adjoint is an all-reduce: every rank's loss depends on every rank's summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduced(x.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_reduced(gradients[0].contiguous().clone())


def _all_reduced(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


class SyncBatchNorm(_BatchNorm):
    """Batch norm of (n, C, ...) inputs with statistics over all ranks' inputs, in at least float32.

    Parameters, buffers and their names are those of torch's batch norms. The gradients of all ranks' losses flow
    through the shared statistics, as under the rule of `exchange.group`: SUM over ranks, then DDP's average.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs inputs (n, C, ...), got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, C, ...); every rank must call it equally often."""
        self._check_input_dim(input)
        if not self.training or group.world_size() == 1:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        mean, variance, count = self._statistics(x)
        self._follow(mean, variance, count)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        out = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance (C,) over all ranks, and the number of elements per channel."""
        dims = [0, *range(2, x.dim())]
        elements = x.new_tensor([x.numel() / x.shape[1]])
        sums = _SumOverRanks.apply(torch.cat([x.sum(dims), elements]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        # Centred squares: the difference of two large numbers would lose the variance in float32.
        shape = (1, -1, *(1,) * (x.dim() - 2))
        variance = _SumOverRanks.apply((x - mean.view(shape)).square().sum(dims)) / count
        return mean, variance, count

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics as torch does."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if share is None else share
        assert share is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)


def synchronised(module: nn.Module) -> nn.Module:
    """`module` with every batch norm replaced by `SyncBatchNorm` on the same parameters and buffers."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
            setattr(module, name, _converted(child))
        else:
            synchronised(child)
    return module


def _converted(norm: _BatchNorm) -> SyncBatchNorm:
    new = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.training = norm.training
    return new
