"""A temperature that is learned (`field.learn_temperature`): its logarithm is a trained scalar, as in CLIP (Radford et
al. 2021, section 2.5), which starts at `field.temperature` and never takes the temperature below 0.01.

The loss gives its derivative by the temperature as one more mean over the global batch, so every rank learns it with
the facts of the step and moves the scalar by itself, on the host, in float64. It is beside the encoder, not in it: no
wrapper and no shard knows of it. Its optimizer is of the run's kind and has the run's learning rate, but no decay.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rkdo_dist import parts
from rkdo_dist.checkpoint import Checkpoint, OptimizerState, optimizer_to_tensors, tensors_to_optimizer
from rkdo_dist.config import LEAST_TEMPERATURE, Config
from rkdo_dist.exchange import group

PART = "temperature"  # of a checkpoint


class LearnedTemperature(nn.Module):
    """tau0 of a run's objective, the same on every rank.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        initial = config.field.value("temperature")
        self.logarithm = nn.Parameter(torch.tensor(math.log(initial), dtype=torch.float64))
        self._optimizer = parts.make_optimizer(config, self)
        self._optimizer.param_groups[0]["weight_decay"] = 0.0

    @property
    def value(self) -> float:
        """tau0 of the next step."""
        return math.exp(float(self.logarithm.detach()))

    @torch.no_grad()
    def move(self, slope: float, rate: float) -> None:
        """One step of the optimizer.

        Args:
            slope: derivative of the step's loss by tau0.
            rate: the learning rate of the step.
        """
        self.logarithm.grad = torch.full_like(self.logarithm, slope * self.value)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self.logarithm.clamp_(min=math.log(LEAST_TEMPERATURE))

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """See `checkpoint.Kept`."""
        moments = optimizer_to_tensors(self._optimizer, self.named_parameters()).tensors
        return {PART: {**self.state_dict(), **moments}} if group.rank() == 0 else {}

    def restore(self, found: Checkpoint) -> None:
        """See `checkpoint.Kept`."""
        groups = optimizer_to_tensors(self._optimizer, self.named_parameters()).groups
        state = found.part(PART)
        self.load_state_dict({"logarithm": state.pop("logarithm")})
        tensors_to_optimizer(OptimizerState(state, groups, {}), self._optimizer, self.named_parameters())
