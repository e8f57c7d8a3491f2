"""Small networks and their checkpoints, for tests."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from rkdo_dist import checkpoint


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def take_steps(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        torch.manual_seed(i)
        optimizer.zero_grad()
        module(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()


def in_memory() -> tempfile.TemporaryDirectory[str]:
    """A directory in memory where there is one: nothing here depends on how long a disk takes to flush."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


@functools.cache
def content(seed: int) -> tuple[dict[str, Tensor], checkpoint.OptimizerState]:
    """Weights and optimizer after two steps of training."""
    module = network(seed)
    optimizer = torch.optim.Adam(module.parameters())
    take_steps(module, optimizer, range(2))
    return module.state_dict(), checkpoint.optimizer_to_tensors(optimizer, module.named_parameters())


def write(directory: Path, step: int, keep: int = 2, seed: int = 0) -> None:
    """Save a checkpoint of which everything is a function of the step and the seed."""
    model, state = content(seed)
    parts = {"field.0": {"rows": torch.arange(step, step + 7)}}
    checkpoint.save(directory, step, model, state, {"at": step / 3, "of": None}, keep, parts)


def whole(found: checkpoint.Checkpoint | None, step: int, seed: int = 0) -> bool:
    """Whether a checkpoint holds what `write` wrote."""
    if found is None or found.step != step:
        return False
    model, state = content(seed)
    assert found.optimizer is not None
    return (
        same(found.model, model)
        and same(found.optimizer.tensors, state.tensors)
        and found.optimizer.groups == state.groups
        and found.extra == {"at": step / 3, "of": None}
        and same(found.part("field.0"), {"rows": torch.arange(step, step + 7)})
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def quietly(directory: Path) -> checkpoint.Checkpoint | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return checkpoint.load_latest(directory)
