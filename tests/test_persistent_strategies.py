"""Persistent rows under every strategy: exact sums, DDP, DeepSpeed ZeRO, recomputation; the same gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rkdo_dist.exchange.store import RowStore
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks import runtime
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.persistent import PersistentField
from rkdo_dist.training.step import Step, StepSettings
from tests.ranks import run_ranks
from tests.strategies import Network, launched
from tests.test_step import LANES, MICRO, make_view, micro_batch, own

STEPS = 4


def train_rows(rank: int, world: int, strategies: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Losses, diagnostics, and the moments of the optimizer and the rows after a few steps of each strategy."""
    found = []
    for strategy, recompute in strategies:
        with launched(strategy):
            rt = runtime.start(1, 60, "fast" if strategy == "fast" else "exact")
            torch.manual_seed(0)
            encoder = Network()
            optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05, momentum=0.9)
            samples = torch.arange(LANES * MICRO)
            memory = PersistentField(
                RowStore(100, 12, 15), "bank", 0.3, lambda step, s=samples: s if step < STEPS else None, rt.device
            )
            settings = StepSettings(3, rt.reduction, recompute, True, "gather")
            step = Step(encoder, make_view, rt, settings, optimizer, memory)
            objective = Objective.persistent(0.5, 0.2)
            results = [
                train_step(step, [micro_batch(t, lane) for lane in own(rank, world)], objective, 0, t)[0]
                for t in range(STEPS)
            ]
            memory.store.finish()
            state = step.strategy.state()
            found.append({
                "losses": [r.loss for r in results],
                "parts": results[-1].parts,
                "moments": {n: t.cpu().numpy().copy() for n, t in state.optimizer.tensors.items()},
                "rows": memory.store.rows.dense().numpy(),
            })  # fmt: skip
    return found


def require_one_process(got: list[dict[str, Any]], right: dict[str, Any]) -> None:
    """Whether rank zero's losses, diagnostics and moments, and all ranks' rows, are those of one process."""
    assert got[0]["losses"] == pytest.approx(right["losses"], rel=1e-5)
    for name, value in right["parts"].items():
        assert got[0]["parts"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, moment in right["moments"].items():
        assert np.linalg.norm(got[0]["moments"][name] - moment) <= 1e-4 * np.linalg.norm(moment), name
    assert np.concatenate([one["rows"] for one in got]) == pytest.approx(right["rows"], abs=1e-5)


def test_ddp_is_one_process() -> None:
    right = train_rows(0, 1, [("exact", False)])[0]
    assert right["parts"]["p_positive"] < 0.9  # rows that have moved
    ways = [("fast", False), ("fast", True)]
    answers = run_ranks(train_rows, 2, ways)
    for k in range(len(ways)):
        require_one_process([answer[k] for answer in answers], right)


@pytest.mark.slow
def test_zero_is_one_process() -> None:
    pytest.importorskip("deepspeed")
    right = train_rows(0, 1, [("exact", False)])[0]
    ways = [("zero-1", False), ("zero-2", True), ("zero-3", False)]
    answers = run_ranks(train_rows, 2, ways, timeout=300)
    for k in range(len(ways)):
        require_one_process([answer[k] for answer in answers], right)
