"""Weights of convolutions are channels last, as images are: gradients, moments and averages lie so too."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.checkpoint import optimizer_to_tensors, tensors_to_optimizer
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks import runtime
from rkdo_dist.training.average import WeightAverage
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.step import Step, StepSettings
from tests.ranks import run_ranks
from tests.strategies import arrays, launched
from tests.test_step import make_view, micro_batch, own

SETTINGS = configuration.change(
    configuration.Config(), ["encoder.backbone=cifar_resnet8", "encoder.embedding_dim=8", "train.optimizer=adam"]
)


def _steps(rank: int, world: int, reduction: str, contiguous: bool, restored_after: int = 2) -> dict[str, Any]:
    """Three steps, of which the last come after optimizer and weights have gone through plain tensors."""
    with launched(reduction), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rt = runtime.start(1, 60, reduction)  # type: ignore[arg-type]
        settings = StepSettings(3, rt.reduction, False, True, "gather")
        encoder = parts.make_encoder(SETTINGS)
        optimizer, begin = parts.make_optimizer(SETTINGS, encoder), 0
        for until in sorted({restored_after, 3}):
            if contiguous:
                encoder.to(memory_format=torch.contiguous_format)
            average = WeightAverage(encoder, 0.5)
            step = Step(encoder, make_view, rt, settings, optimizer, average=average)
            for t in range(begin, until):
                lanes = [micro_batch(t, lane, size=12) for lane in own(rank, world)]
                train_step(step, lanes, Objective.of("rkdo"), 0, t)
            state = step.strategy.state()
            moments = optimizer_to_tensors(optimizer, encoder.named_parameters()).tensors
            layouts = {
                name: {x.stride() for x in (p, p.grad, moments[f"{name}.exp_avg"], moments[f"{name}.exp_avg_sq"], a)}
                for (name, p), a in zip(encoder.named_parameters(), average.model.parameters(), strict=True)
            }
            plain, begin = {name: x.contiguous().clone() for name, x in state.model.items()}, until
            encoder = parts.make_encoder(SETTINGS)
            encoder.load_state_dict(plain)
            optimizer = parts.make_optimizer(SETTINGS, encoder)
            tensors_to_optimizer(state.optimizer, optimizer, encoder.named_parameters())
    texts = [str(warning.message) for warning in said]
    return {
        "weights": arrays(plain),
        "layouts": layouts,
        "strides": sum("Grad strides do not match bucket view strides" in text for text in texts),
    }


def _on_rank(rank: int, world: int) -> list[dict[str, Any]]:
    torch.set_warn_always(True)
    return [_steps(rank, world, "fast", contiguous) for contiguous in (False, True)]


@pytest.mark.filterwarnings("ignore")
def test_ddp_copies_no_gradient_into_another_layout() -> None:
    for ours, control in run_ranks(_on_rank, 2):
        assert ours["strides"] == 0
        assert control["strides"] > 0  # weights that are not laid out so make it warn
        assert all(len(strides) == 1 for strides in ours["layouts"].values())


def test_everything_of_a_weight_has_its_layout_and_a_resume_keeps_the_bits() -> None:
    found = _steps(0, 1, "exact", contiguous=False)
    assert all(len(strides) == 1 for strides in found["layouts"].values())
    assert found["layouts"]["backbone.0.weight"] == {(27, 1, 9, 3)}
    through = _steps(0, 1, "exact", contiguous=False, restored_after=3)
    contiguous = _steps(0, 1, "exact", contiguous=True)
    for name, value in through["weights"].items():
        assert np.array_equal(found["weights"][name], value), name
        assert np.allclose(contiguous["weights"][name], value, rtol=0, atol=1e-5), name
