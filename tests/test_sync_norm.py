"""Batch norm over all ranks equals torch's batch norm over the joined batch, gradients and running statistics too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rkdo_dist.sync_norm import SyncBatchNorm, synchronised
from tests.ranks import run_ranks

ROWS = (5, 3)  # different numbers of rows on the ranks


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(ROWS), 4, 6, 6, generator=generator, dtype=torch.float64) * 3 + 7


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3), nn.BatchNorm1d(3)
    ).double()


def passes(module: nn.Module, x: torch.Tensor, steps: int = 2) -> dict[str, np.ndarray]:
    for _ in range(steps):
        module.zero_grad()
        out = module(x)
        (out.square() * torch.arange(1.0, 4.0, dtype=x.dtype)).sum().backward()
    found = {f"gradient of {n}": p.grad for n, p in module.named_parameters()} | dict(module.named_buffers())
    return {n: t.numpy().copy() for n, t in found.items()}


def _on_a_rank(rank: int, world: int, convert: bool) -> dict[str, np.ndarray]:
    module = synchronised(network()) if convert else network()
    mine = inputs().split(ROWS)[rank]
    found = passes(module, mine)
    for name in [n for n in found if n.startswith("gradient")]:
        total = torch.from_numpy(found[name])
        torch.distributed.all_reduce(total)
        found[name] = total.numpy()
    return found


def close(found: dict[str, np.ndarray], whole: dict[str, np.ndarray]) -> bool:
    # The gradient of a bias before a batch norm is 0 but for rounding: hence an absolute tolerance too.
    return all(np.allclose(found[n], whole[n], rtol=1e-10, atol=1e-11) for n in whole)


def test_two_ranks_equal_the_joined_batch() -> None:
    whole = passes(network(), inputs())
    assert all(close(found, whole) for found in run_ranks(_on_a_rank, 2, True))


def test_plain_batch_norm_does_not() -> None:
    whole = passes(network(), inputs())
    assert not any(close(found, whole) for found in run_ranks(_on_a_rank, 2, False))


def test_one_process_is_torchs_own() -> None:
    module = synchronised(network())
    assert sum(isinstance(m, SyncBatchNorm) for m in module.modules()) == 2
    plain, found = passes(network(), inputs()), passes(module, inputs())
    assert all(np.array_equal(plain[n], found[n]) for n in plain)
    assert list(module.state_dict()) == list(network().state_dict())


def test_inputs_of_one_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match="dimensions"):
        SyncBatchNorm(3)(torch.ones(3))
