"""Sums in a fixed order: the same bits for every world size, and controls that show why that is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rkdo_dist.exchange import group
from tests.ranks import RankFailed, exact_all_reduce, run_ranks


def lane_parts(lanes: int, shape: tuple[int, ...] = (37,), seed: int = 0) -> torch.Tensor:
    """Float32 numbers of very different sizes, so that another order of summation shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) * 10.0 ** (lane % 5) for lane in range(lanes)])


@settings(deadline=None, max_examples=50)
@given(exponent=st.integers(0, 4), odd=st.sampled_from([1, 3, 5, 7]), seed=st.integers(0, 1000))
def test_shares_are_subtrees(exponent: int, odd: int, seed: int) -> None:
    lanes = 2**exponent * odd
    whole = group.tree_sum(lane_parts(lanes, seed=seed))
    for w in range(exponent + 1):
        world = 2**w
        share = lanes // world
        parts = lane_parts(lanes, seed=seed)
        sums = [group.tree_sum(parts[r * share : (r + 1) * share]) for r in range(world)]
        assert torch.equal(group.tree_sum(torch.stack(sums)), whole)
    one_by_one: group.TreeSum[torch.Tensor] = group.TreeSum(lanes)
    for part in lane_parts(lanes, seed=seed):
        one_by_one.add(part)
    assert torch.equal(one_by_one.total(), whole)
    assert torch.allclose(whole.double(), sum(p.double() for p in lane_parts(lanes, seed=seed)), rtol=1e-4, atol=1e-1)


def test_a_sum_from_left_to_right_differs() -> None:
    """The control: without a fixed tree the order shows in float32."""
    parts = lane_parts(16)
    plain = parts[0].clone()
    for part in parts[1:]:
        plain = plain + part
    assert not torch.equal(plain, group.tree_sum(parts))


def test_a_sum_counts_its_parts() -> None:
    tree = group.TreeSum(3)
    tree.add(torch.ones(1))
    with pytest.raises(ValueError, match="expected 3 parts, got 1"):
        tree.total()
    with pytest.raises(ValueError, match="at least one"):
        group.TreeSum(0)
    with pytest.raises(ValueError, match="at least one"):
        group.tree_sum(torch.ones(0, 3))


def _reduce(rank: int, world: int, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    share = lanes // world
    mine = slice(rank * share, (rank + 1) * share)
    flat = exact_all_reduce(group.tree_sum(lane_parts(lanes)[mine]))
    rows = group.exact_reduce_scatter(group.tree_sum(lane_parts(lanes, (8, 3))[mine]))
    gathered = group.all_gather_rows(rows)
    return flat.numpy(), rows.numpy(), gathered.numpy()


@pytest.mark.parametrize("world", [2, 4])
def test_any_world_size_gives_the_same_bits(world: int) -> None:
    flat, rows, _ = _reduce(0, 1, 8)
    results = run_ranks(_reduce, world, 8)
    for result in results:
        assert np.array_equal(result[0], flat)
        assert np.array_equal(result[2], rows)
    assert np.array_equal(np.concatenate([r[1] for r in results]), rows)


def _backend_sum(rank: int, world: int, lanes: int) -> np.ndarray:
    share = lanes // world
    total = lane_parts(lanes)[rank * share]
    for part in lane_parts(lanes)[rank * share + 1 : (rank + 1) * share]:
        total = total + part
    torch.distributed.all_reduce(total)
    return total.numpy()


def test_the_backends_sum_depends_on_the_world_size() -> None:
    """The control: accumulate and all-reduce, as everyone does, is not one run on 1, 2 and 4 ranks."""
    one = sum(lane_parts(16)[1:], lane_parts(16)[0]).numpy()
    assert any(not np.array_equal(run_ranks(_backend_sum, w, 16)[0], one) for w in (2, 4))


def _fail_on_one(rank: int, world: int) -> str:
    def check() -> None:
        if rank == 1:
            raise ValueError("the file is missing")

    try:
        group.together(check, "looking")
    except group.RankError as error:
        return str(error)
    return "no error"


def test_an_error_on_one_rank_reaches_all() -> None:
    answers = run_ranks(_fail_on_one, 2)
    assert answers == ["looking failed on 1 of 2 ranks: rank 1: the file is missing"] * 2


def _uneven(rank: int, world: int) -> None:
    group.exact_reduce_scatter(torch.ones(3, 2))


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(RankFailed, match="3 rows do not divide over 2 ranks"):
        run_ranks(_uneven, 2)
