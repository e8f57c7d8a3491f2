"""Running statistics of batch norm: updated once per step, from all micro-batches, for any world size.

Batch norm normalises a micro-batch by that forward's own statistics, so training does not depend on who
computes which micro-batch. Its *running* statistics, which evaluation uses, do: torch updates them at every
forward, on each rank separately, and twice when a forward is repeated. `BatchStatistics` takes over: it
keeps the running statistics out of the forward, returns each forward's sums to be added over micro-batches
(lanes) in a fixed order, and updates the running statistics once by the whole step's mean and variance.

What is combined. Each lane gives, per channel, the number of elements, their sum and their sum of squares
(derived from that forward's mean and variance), in float64. The step's statistics are those of all lanes'
elements pooled:

    mean = S1 / N,    variance = (S2 - N mean^2) / (N - 1)        (unbiased, as torch's running variance is)

By the law of total variance this is the variance within lanes plus the variance between their means, so the
evaluated network sees activations of the variance it was trained with. The mean of the lanes' variances is
off in both directions when lanes are small: too small where a lane's elements are alike (the two views of an
image, the pixels of a channel), too large in deep layers, whose input earlier batch norms have centred lane
by lane. With a single lane the result is torch's own update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rkdo_dist.exchange.transfer import upload


class BatchStatistics:
    """Takes over the running statistics of every batch norm in `module` (see the module's docstring).

    One step of L lanes, on one rank or spread over many:

        for each lane:
            with statistics.collecting():
                out = module(x)
            sums.append(statistics.take())       # then add up over lanes, in lane order
        statistics.update(tree_sum(torch.stack(sums)))  # once per step, the same on every rank
        for each lane, when activations were not kept:
            with statistics.discarding():
                module(x)                        # the repeated forward leaves no trace

    Where a step forwards its views apart, each view is a forward of its own, as in plain torch: collect and
    update once per view, in order. Batch norms in evaluation mode and those with
    `track_running_stats=False` are left alone; `momentum=None` (the cumulative average) is respected.

    Args:
        module: any module; its batch norms may be moved to another device or dtype later, together.

    Attributes:
        size: length of the vector of `take` and `update`, 3 x the number of tracked channels; 0 without
            batch norm.
        counts: elements per channel that each batch norm saw in the forward collected last.

    Raises:
        ValueError: if `module` holds torch's SyncBatchNorm, which exchanges statistics between ranks
            itself.
    """

    def __init__(self, module: nn.Module) -> None:
        for name, part in module.named_modules():
            if isinstance(part, nn.SyncBatchNorm):
                raise ValueError(f"{name} is a SyncBatchNorm, which depends on the ranks; use BatchNorm")
        self._norms: list[Any] = [  # Any: torch types the buffers as optional, and they are not here
            m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats
        ]
        self._module = module
        self._channels = [m.num_features for m in self._norms]
        self._firsts = [sum(self._channels[:i]) for i in range(len(self._channels))]
        self.size = 3 * sum(self._channels)
        self._by_channel: dict[Any, Tensor] = {}  # numbers of batch norms, repeated for their channels, on the device
        self.counts: list[int] = []
        self._collected: tuple[Tensor, list[int]] | None = None
        self._active = False

    @contextmanager
    def collecting(self, counts: list[int] | None = None) -> Iterator[None]:
        """While open, ONE training forward leaves its statistics for `take`; running statistics stay.

        Args:
            counts: `self.counts` after another forward of images of this shape: a compiled one does not count.

        Raises:
            RuntimeError: if opened inside another `collecting` or `discarding`, or if a batch norm runs
                twice while it is open (the second use would hide the first).
        """
        with self._swapped() as collected:
            self.counts, counting = (collected[1], self._norms) if counts is None else (counts, [])
            hooks = [m.register_forward_pre_hook(_counter(self.counts, i)) for i, m in enumerate(counting)]
            self._collected = collected[0], self.counts
            try:
                yield
            except BaseException:
                self._collected = None
                raise
            finally:
                for hook in hooks:
                    hook.remove()

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """While open, training forwards leave no trace in the running statistics.

        Raises:
            RuntimeError: if opened inside another `collecting` or `discarding`.
        """
        with self._swapped():
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While open, the module is in evaluation mode, but its batch norms that train normalise as in training.

        Each forward by its own statistics, without a trace in the running ones: a teacher's forward.
        """
        was = self._module.training
        self._module.train()
        training = [norm for norm in self._norms if norm.training]  # those of frozen parts are not
        self._module.eval()
        saved = [(norm, _swap(norm, [None, None, None], norm.momentum)) for norm in training]
        for norm in training:
            norm.training = True
        try:
            yield
        finally:
            for norm, values in saved:
                _swap(norm, *values)
            self._module.train(was)

    def take(self) -> Tensor:
        """The sums of the forward just collected, to be added over lanes; in or after `collecting`.

        Returns:
            (3C,) float64 on the module's device, C the number of tracked channels: element counts, sums,
            sums of squares. Zeros for batch norms that the forward did not use or that are in evaluation
            mode.

        Raises:
            RuntimeError: if no training forward has been collected since the last call.
        """
        scratch, counts = self._collected or (torch.empty(0), [])
        if self._collected is None or (not any(counts) and any(m.training for m in self._norms)):
            raise RuntimeError("nothing to take: run a forward inside `collecting()` first")
        self._collected = None
        if not self._norms:
            return scratch.double().flatten()
        mean, variance = scratch.double()
        n = self._spread(counts, mean.device)
        return torch.cat([n, n * mean, n * mean.square() + (n - 1) * variance])

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """Move the running statistics once, by the pooled statistics of all lanes.

        running <- (1 - momentum) running + momentum pooled, and `num_batches_tracked` grows by one. Batch
        norms that no lane used stay as they are. Do not call it for a step that is skipped as non-finite.

        Args:
            sums: (3C,) float64, the vectors of `take` added over the lanes (and ranks) of the step.

        Raises:
            ValueError: for another shape.
        """
        if sums.shape != (self.size,):
            raise ValueError(f"batch statistics have shape ({self.size},), got {tuple(sums.shape)}")
        if not self._norms:
            return
        n, first, second = sums.double().view(3, -1)
        mean = first / n.clamp(min=1)
        variance = (second - first * mean).clamp(min=0) / (n - 1).clamp(min=1)
        # All batch norms at once: a few operators, however many there are.
        used = n > 0
        tracked = [m.num_batches_tracked for m in self._norms]
        once = used.long()
        torch._foreach_add_(tracked, [once[first] for first in self._firsts])
        running = [m.running_mean for m in self._norms] + [m.running_var for m in self._norms]
        before = torch.cat(running, out=n.new_empty(2 * len(mean))).view(2, -1)
        share = self._share(tracked, n.device)
        moved = (1 - share) * before + share * torch.stack([mean, variance])
        after = torch.where(used, moved, before).to(running[0].dtype)
        torch._foreach_copy_(running, [x for row in after.unbind() for x in row.split(self._channels)])

    def _spread(self, numbers: Sequence[float], device: torch.device) -> Tensor:
        """One number of every batch norm at each of its channels, float64; kept, as they are the same at every step."""
        key = (*numbers, device)
        if key not in self._by_channel:
            by_norm = torch.tensor(numbers, dtype=torch.float64)
            self._by_channel[key] = upload(by_norm.repeat_interleave(torch.tensor(self._channels)), device)
        return self._by_channel[key]

    def _share(self, tracked: list[Tensor], device: torch.device) -> Tensor:
        """The share of the step in the running statistics of each channel."""
        momenta = [norm.momentum for norm in self._norms]
        share = self._spread([-1.0 if momentum is None else momentum for momentum in momenta], device)
        if None not in momenta:
            return share
        steps = torch.stack(tracked).double()[self._spread(range(len(tracked)), device).long()]
        return torch.where(share < 0, 1 / steps.clamp(min=1), share)

    @contextmanager
    def _swapped(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Give training batch norms new buffers and momentum 1: a forward leaves its own statistics there.

        The buffers are new each time: autograd keeps a reference to those of a forward, and writing to them
        again before its backward would be an error.

        Yields:
            (2, C) means and unbiased variances, still zero, and the element counts per batch norm, still
            zero.
        """
        if self._active:
            raise RuntimeError("`collecting` and `discarding` cannot be nested")
        self._active = True
        saved = []
        try:
            scratch, counts = self._new_scratch(), [0] * len(self._norms)
            means, variances = (s.split(self._channels) for s in scratch)
            for norm, mean, variance in zip(self._norms, means, variances, strict=True):
                if norm.training:
                    saved.append((norm, _swap(norm, [mean, variance, None], 1.0)))
            yield scratch, counts
        finally:
            for norm, values in saved:
                _swap(norm, *values)
            self._active = False

    def _new_scratch(self) -> Tensor:
        if not self._norms:
            return torch.zeros(2, 0, device=next((p.device for p in self._module.parameters()), None))
        like = {(m.running_mean.device, m.running_mean.dtype) for m in self._norms}
        if len(like) > 1:
            raise ValueError(f"batch norms must share one device and dtype, got {sorted(map(str, like))}")
        return self._norms[0].running_mean.new_zeros(2, sum(self._channels))


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _swap(norm: Any, buffers: list[Tensor | None], momentum: float | None) -> tuple[list[Tensor | None], float | None]:
    """Put others in the place of a batch norm's own, and return these; past `setattr`, which is slow."""
    own = norm._buffers
    before = [own[name] for name in _BUFFERS], norm.momentum
    own.update(zip(_BUFFERS, buffers, strict=True))
    norm.__dict__["momentum"] = momentum
    return before


def _counter(counts: list[int], i: int) -> Callable[[nn.Module, Any], None]:
    """A forward pre-hook that records how many elements per channel batch norm `i` sees in training."""

    def hook(norm: nn.Module, inputs: Any) -> None:
        if norm.training:
            if counts[i]:
                raise RuntimeError("a batch norm ran twice while collecting; collect one forward at a time")
            counts[i] = inputs[0].numel() // inputs[0].shape[1]

    return hook
