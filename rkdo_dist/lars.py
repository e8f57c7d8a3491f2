"""LARS: a learning rate of its own for every layer (You, Gitman and Ginsburg 2017, "Large batch training of
convolutional networks", algorithm 1), as SimCLR and BYOL use it.

With w a weight, g its gradient, lambda the weight decay, m the momentum and gamma the learning rate of the step:

    d = g + lambda w
    v <- m v + gamma eta |w| / |d| d         w <- w - v

where |w| or |d| is 0, the ratio eta |w| / |d| is 1. You et al. divide by |g| + lambda |w|; |d| is what SimCLR's and
BYOL's released code has. Parameters of one dimension at most (biases, norms) move by their gradient: ratio 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Stochastic gradient descent with momentum and the trust ratio of LARS.

    Args:
        params: parameters or groups of them; leave out the decay of biases and norms by a group of their own.
        lr: learning rate gamma, > 0.
        weight_decay: lambda, >= 0.
        momentum: m, in [0, 1).
        trust: the trust coefficient eta, > 0.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient. On a device nothing waits for the host."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if parameter.ndim > 1:
                    ratio = group["trust"] * parameter.norm() / direction.norm()
                    direction.mul_(torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0))
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].mul_(group["momentum"]).add_(direction, alpha=group["lr"])
                parameter.sub_(state["momentum_buffer"])
