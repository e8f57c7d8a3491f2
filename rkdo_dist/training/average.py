"""Exponential moving average of the encoder's weights (`train.ema`), as of MoCo's and BYOL's second encoder.

After every step that has moved the weights, a tensor of the average becomes decay * itself + (1 - decay) * the
encoder's: parameters and batch norm's running statistics alike. Buffers that are not floating point (counts) are
copied. It begins with the encoder's first weights and is kept in float32 on every rank. A step is the same on every
rank, so the average is too, and no rank asks another.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rkdo_dist.checkpoint import AVERAGE, Checkpoint
from rkdo_dist.exchange import group


class WeightAverage:
    """The average of an encoder's weights over the steps.

    Args:
        encoder: on its device, with its first weights.
        decay: in [0, 1]: 0 is the encoder itself, 1 stays with the first weights.

    Attributes:
        model: a copy of the encoder with the averaged weights, in evaluation mode and without gradient: it embeds
            images as the encoder does.

    Raises:
        ValueError: if the encoder cannot be copied.
    """

    def __init__(self, encoder: nn.Module, decay: float) -> None:
        self._encoder, self._decay = encoder, decay
        try:
            self.model = copy.deepcopy(encoder)
        except Exception as error:  # a backbone may hold anything
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"train.ema={decay}: this encoder cannot be copied ({reason}); leave train.ema out"
            ) from error
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def move(self) -> None:
        """Take a step towards the encoder's weights as they are now."""
        pairs = list(zip(_tensors(self.model), _tensors(self._encoder), strict=True))
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        if counts:
            torch._foreach_copy_([mine for mine, _ in counts], [theirs for _, theirs in counts])
        averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(list(averages), list(values), 1 - self._decay)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """See `checkpoint.Kept`."""
        return {AVERAGE: self.model.state_dict()} if group.rank() == 0 else {}

    def restore(self, found: Checkpoint) -> None:
        """See `checkpoint.Kept`."""
        self.model.load_state_dict(found.weights("ema"))


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers in their order, a tied one once."""
    return [*module.parameters(), *module.buffers()]
