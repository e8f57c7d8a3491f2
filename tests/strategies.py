"""Several small trainings in one process, each under its own launch: what tests of strategy and precision compare."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from rkdo_dist.checkpoint import OptimizerState, tensors_to_optimizer
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks import runtime
from rkdo_dist.ranks.loss_scale import LossScale
from rkdo_dist.training.average import WeightAverage
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.step import Step, StepSettings
from rkdo_dist.training.strategy import TrainState
from tests.test_step import make_view, micro_batch, own

ZERO = ("zero-1", "zero-2", "zero-3")
ALL = ("exact", "fast", *ZERO)


class Network(nn.Module):
    """Every parameter has a gradient of its own; few sizes divide by a number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 36, 15)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.body(x).float(), dim=1)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "grouped": lambda p: torch.optim.Adam(  # as `train.decay_norms=false` has it
        [
            {"params": [x for x in p if x.ndim > 1], "weight_decay": 0.1},
            {"params": [x for x in p if x.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
    ),
}


@contextmanager
def launched(strategy: str, precision: str = "no") -> Iterator[None]:
    """The environment that a launcher leaves for a strategy, and an Accelerate that has seen nothing yet."""
    from accelerate.state import AcceleratorState

    before = dict(os.environ)
    stage = strategy.removeprefix("zero-") if strategy in ZERO else None
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        if stage:
            zero = {"stage": int(stage)} | ({"stage3_param_persistence_threshold": 0} if stage == "3" else {})
            path = Path(folder) / "ds.json"
            path.write_text(json.dumps({"zero_optimization": zero}))
            os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(path))
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ.clear()
            os.environ.update(before)


@dataclasses.dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        optimizer: of `OPTIMIZERS`; the momentum of "sgd" after one step is the gradient.
        scale: an initial loss scale for computing in float32.
        poison: steps in which an embedding's gradient is infinite, on the last rank only.
        begin: a state to start from.
        wrong: whether to make the well-known mistake of averaging twice.
        objective: name of a preset.
        ema: decay of an average of the weights.
        clip: the largest norm of the gradient.
    """

    strategy: str
    precision: str = "no"
    optimizer: str = "sgd"
    steps: int = 1
    recompute: bool = False
    scale: float | None = None
    poison: tuple[int, ...] = ()
    begin: dict[str, Any] | None = None
    wrong: bool = False
    objective: str = "rkdo"
    ema: float | None = None
    clip: float | None = None


def plain(state: TrainState) -> dict[str, Any]:
    """A state without tensors, to be sent between processes."""
    optimizer = state.optimizer
    return {
        "model": arrays(state.model),
        "tensors": arrays(optimizer.tensors),
        "groups": optimizer.groups,
        "loss_scale": state.loss_scale,
    }


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Copies as NumPy arrays."""
    return {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()}


def train(rank: int, world: int, task: Task) -> dict[str, Any]:
    """Losses, what was skipped, and the state after the first step and at the end."""
    with launched(task.strategy, task.precision):
        rt = runtime.start(1, 60, "fast" if task.strategy == "fast" else "exact")
        if task.scale is not None:
            rt = dataclasses.replace(rt, loss_scale=LossScale(task.scale))
        torch.manual_seed(0)
        encoder = Network().to(memory_format=torch.channels_last)  # as `parts.make_encoder` lays weights out
        optimizer = OPTIMIZERS[task.optimizer](list(encoder.parameters()))
        if task.begin is not None:
            _load(task.begin, encoder, optimizer)
        settings = StepSettings(3, rt.reduction, task.recompute, True, "gather", task.clip, learn_temperature=True)
        average = None if task.ema is None else WeightAverage(encoder, task.ema)
        step = Step(encoder, make_view, rt, settings, optimizer, average=average)
        if task.begin is not None:
            step.strategy.load_scale(task.begin["loss_scale"])
        begin = plain(step.strategy.state())
        dtypes: set[str] = set()
        _interfere(step, task, rank == world - 1, world, dtypes)
        losses, skipped, scales, norms, slopes, states = [], [], [], [], [], []
        for t in range(task.steps):
            lanes = [micro_batch(t % 4, lane) for lane in own(rank, world)]
            facts, update = train_step(step, lanes, Objective.of(task.objective), 0, t)
            skipped.append(update.skipped)
            norms.append(update.gradient_norm)
            if not update.not_finite:
                losses.append(facts.loss)
                slopes.append(facts.temperature_slope)
                scales.append(update.loss_scale)
            if t == 0 or t == task.steps - 1:
                states.append(plain(step.strategy.state()))
        return {
            "launch": rt.launch, "losses": losses, "skipped": skipped, "scales": scales, "begin": begin,
            "norms": norms, "slopes": slopes,
            "first": states[0] if states else begin, "last": states[-1] if states else begin,
            "dtypes": sorted(dtypes),
            "average": {} if average is None else arrays(average.model.state_dict()),
        }  # fmt: skip


def _load(begin: dict[str, Any], encoder: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    encoder.load_state_dict({n: torch.from_numpy(np.array(a)) for n, a in begin["model"].items()})
    tensors = {n: torch.from_numpy(np.array(a)) for n, a in begin["tensors"].items()}
    saved = OptimizerState(tensors, begin["groups"], {})
    tensors_to_optimizer(saved, optimizer, dict(encoder.named_parameters()))


def _interfere(step: Step, task: Task, last_rank: bool, world: int, dtypes: set[str]) -> None:
    """Note what the field loss gets, and break the step from inside as the task says."""
    whole_field = step.strategy.field

    def field(lanes: Any, objective: Any, at: Any, *rest: Any) -> Any:
        dtypes.update(str(view.dtype) for lane in lanes for view in lane)
        found = whole_field(lanes, objective, at, *rest)
        factor = 1 / world if task.wrong else 1.0
        if at.step in task.poison and last_rank:
            factor = float("inf")
        return dataclasses.replace(found, gradients=[(u * factor, v * factor) for u, v in found.gradients])

    step.strategy.field = field  # type: ignore[method-assign]


def session(rank: int, world: int, tasks: list[Task]) -> list[dict[str, Any]]:
    """Several tasks one after the other on the same ranks; only rank zero's states are of use."""
    return [train(rank, world, task) for task in tasks]


def gradients(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """By parameter, the gradient of the first step of a task with the optimizer "sgd"."""
    suffix = ".momentum_buffer"
    return {n.removesuffix(suffix): a for n, a in found["first"]["tensors"].items() if n.endswith(suffix)}
