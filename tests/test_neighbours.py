"""Nearest neighbours and walks: against dense matrices, exactly, and the same bits whoever computes which tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rkdo_dist.exchange.neighbours import nearest_of_all
from rkdo_dist.exchange.store import RowStore, Shards
from rkdo_dist.field.neighbours import METRICS, mutual, nearest, walked, with_self
from rkdo_dist.field.persistent import Rows
from tests.ranks import run_ranks


def blobs(n: int = 300, d: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def matrix(neighbours: Tensor) -> Tensor:
    """P, dense: even over a sample's neighbours."""
    n = len(neighbours)
    p = torch.zeros(n, n + 1, dtype=torch.float64).scatter_(1, neighbours.long(), 1.0)[:, :n]
    return p / p.sum(1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tile", [17, 4096])
def test_neighbours_are_the_nearest_ones(metric: str, tile: int) -> None:
    x = blobs() + 3  # far from the origin: centred, or euclidean distances lose digits
    found, similarities = nearest(x, 9, metric, tile)
    if metric == "cosine":
        rows = torch.nn.functional.normalize(x.double(), dim=1)
        dense = rows @ rows.T
    else:
        dense = -torch.cdist(x.double(), x.double()).square() / 2
    dense.fill_diagonal_(-torch.inf)
    best = dense.topk(9, dim=1)
    assert torch.equal(found.long(), best.indices)
    assert (similarities - best.values).abs().max() < 1e-5


def test_equally_near_ones_come_by_number_and_a_sample_is_not_its_own_neighbour() -> None:
    found, similarities = nearest(torch.ones(40, 3), 5, tile=16)  # 40 copies
    for i, row in enumerate(found.tolist()):
        assert row == [j for j in range(6) if j != i][:5]
    assert torch.allclose(similarities, torch.ones(()))


@pytest.mark.parametrize("graph", ["all", "mutual"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_walks_are_powers_of_the_graph(graph: str, steps: int) -> None:
    neighbours = nearest(blobs(), 4)[0]
    if graph == "mutual":
        both = matrix(neighbours) > 0
        both &= both.T.clone()
        neighbours = mutual(neighbours)
        assert torch.equal(matrix(neighbours) > 0, both)
    p = matrix(neighbours)
    expected = sum(torch.matrix_power(p, s) for s in range(1, steps + 1))
    assert isinstance(expected, Tensor)
    expected.fill_diagonal_(0)
    expected = expected / expected.sum(1, keepdim=True).clamp(min=1e-300)
    rows = walked(neighbours, steps, most=300)
    assert (rows.dense() - expected).abs().max() < 1e-7
    # What is cut is the smallest: with 12 entries a row of one more step than these keeps its 12 largest.
    if steps == 2:
        kept = walked(neighbours, steps, most=12).dense()
        assert ((kept > 0).sum(1) <= 12).all()
        lost = torch.where(kept > 0, torch.inf, expected).where(kept == 0, torch.zeros(()))
        assert (lost.amax(1) <= torch.where(kept > 0, expected, torch.inf).amin(1) + 1e-7).all()


def test_rows_with_the_sample_itself() -> None:
    neighbours = mutual(nearest(blobs(), 3)[0])
    degree = (neighbours < 300).sum(1)
    assert degree.min() == 0  # some are alone
    rows = with_self(walked(neighbours), range(300), degree)
    graph = matrix(neighbours) > 0
    even = (graph | torch.eye(300, dtype=torch.bool)).double()
    assert (rows.dense() - even / even.sum(1, keepdim=True)).abs().max() < 1e-7
    heavy = with_self(walked(neighbours), range(300), degree, weight=0.3).dense()
    assert torch.allclose(heavy.diagonal(), torch.where(degree > 0, 0.7, 1.0).double(), atol=1e-7)
    assert torch.allclose(heavy.sum(1), torch.ones(300, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(("change", "words"), [
    (lambda x: (x, 300), ["neighbours", "[1, 299]", "300"]),
    (lambda x: (x, 0), ["neighbours", "[1, 299]"]),
    (lambda x: (x.index_fill(0, torch.tensor([5, 7]), torch.nan), 3), ["features", "row 5", "2 rows"]),
])  # fmt: skip
def test_mistakes(change, words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as error:
        nearest(*change(blobs()))
    assert all(word in str(error.value) for word in words)
    with pytest.raises(ValueError, match="walk must be at least 1"):
        walked(torch.zeros(3, 1, dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="metric"):
        nearest(blobs(), 3, "manhattan")


def test_draws_follow_the_rows_and_never_a_column_without_mass() -> None:
    rows = Rows(
        torch.tensor([[3, 1, 9], [0, 9, 9], [2, 8, 0], [4, 9, 9]], dtype=torch.int32),
        torch.tensor([[0.25, 0.25, 0], [1, 0, 0], [0.1, 0.2, 0.1], [0.5, 0, 0]]),
        torch.tensor([0.5, 0, 0.6, 0.5]),
        9,
    )
    count = 200_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # an even grid: shares to 1 / count
    uniform[-1] = 1 - 2.0**-53
    for i, expected in enumerate(rows.dense()):
        drawn = rows.pick(torch.full((count,), i)).draw(uniform)
        assert (torch.bincount(drawn, minlength=9) / count - expected).abs().max() < 1e-4
        assert (expected[drawn] > 0).all()


def of_all(rank: int, world: int, features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    first, stop = Shards(len(features), world).own(rank)
    table = nearest_of_all(torch.from_numpy(features[first:stop]), len(features), k)
    own = range(first, stop)
    rows = with_self(walked(table, 2, 12, own), own, (table[first:stop] < len(features)).sum(1))
    store = RowStore(len(features), 13, rows=rows)
    uniform = torch.rand(len(features), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return table.numpy(), store.draw(uniform).numpy()


def test_any_number_of_ranks_finds_the_same_bits() -> None:
    features = blobs(1000, 24, seed=3).numpy()
    whole = of_all(0, 1, features, 8)
    assert np.array_equal(whole[0], nearest(torch.from_numpy(features), 8)[0].numpy())
    for world in (2, 4):
        for table, drawn in run_ranks(of_all, world, features, 8):
            assert np.array_equal(table, whole[0])
            assert np.array_equal(drawn, whole[1])
