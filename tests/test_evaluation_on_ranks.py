"""Evaluation where the features are: scikit-learn's scores, and the same ones on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rkdo_dist.evaluate import linear, neighbours, scores
from rkdo_dist.evaluate.features import FrozenFeatures, OwnFeatures, at_rank_zero
from rkdo_dist.evaluate.full_protocol import full_protocol
from rkdo_dist.exchange import group
from tests.ranks import run_ranks

TRAIN, TEST = 1900, 700  # eight blocks and three, the last ones not full


def split(samples: int, classes: int, seed: int, gaps: bool = True) -> FrozenFeatures:
    """Classes that overlap, features of very different scales, one constant, off the origin; some without a label."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(classes, 24))
    labels = draw.integers(classes, size=samples)
    backbone = (0.5 * centres[labels] + draw.normal(size=(samples, 24))) * np.linspace(0.01, 30, 24) + 3
    backbone[:, 5] = 2.5
    embeddings = backbone[:, 10:18] - 3
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    labels = np.where(draw.random(samples) < 0.1, -1, labels) if gaps else labels
    return FrozenFeatures(np.arange(samples), labels, backbone.astype(np.float32), embeddings.astype(np.float32))


def part_of(whole: FrozenFeatures, rank: int, world: int) -> OwnFeatures:
    """This rank's blocks, as they are embedded."""
    rows = torch.arange(len(whole.ids))
    rows = rows[rows // linear.BLOCK % world == rank]
    return OwnFeatures(*(torch.from_numpy(np.asarray(x))[rows] for x in vars(whole).values()))


def evaluate(rank: int, world: int) -> dict[str, Any]:
    found = {}
    for classes in (2, 5):
        train, test = (part_of(split(n, classes, seed), rank, world) for n, seed in ((TRAIN, 0), (TEST, 1)))
        found[classes] = full_protocol(train, test)
        found["fit", classes] = linear._Fit(train.backbone, train.labels).minimise().numpy()
    gathered = at_rank_zero(test, torch.where(test.ids % 3 == 0, test.ids // 3, -1), -(-TEST // 3))
    found["gathered"] = None if gathered is None else vars(gathered)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    return run_ranks(evaluate, 1)[0]


def labelled(some: FrozenFeatures, name: str) -> tuple[np.ndarray, np.ndarray]:
    rows = some.labels >= 0
    return getattr(some, name)[rows], some.labels[rows]


@pytest.mark.parametrize("classes", [2, 5])
def test_the_oracle_is_scikit_learn(alone: dict[Any, Any], classes: int) -> None:
    train, test = split(TRAIN, classes, 0), split(TEST, classes, 1)
    for suffix, name in (("", "embeddings"), ("_backbone", "backbone")):
        of = *labelled(train, name), *labelled(test, name)
        expected = scores.linear_evaluation(*of, standardise=True)
        assert 0.4 < expected < 0.97  # neither chance nor certainty
        assert alone[classes][f"linear_accuracy{suffix}"] == pytest.approx(expected, abs=0.003)
        assert alone[classes][f"knn_accuracy{suffix}"] == scores.knn_accuracy(*of)
    assert alone[classes]["neighbourhood"] == scores.neighbourhood_preservation(*labelled(test, "embeddings"))
    assert alone[classes]["unlabelled"] == int((train.labels < 0).sum() + (test.labels < 0).sum())
    rows = np.arange(0, TEST, 3)
    for name, values in alone["gathered"].items():
        if name != "ids" and classes == 5:
            assert np.array_equal(values, getattr(test, name)[rows])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_gives_the_same_bits(alone: dict[Any, Any], world: int) -> None:
    """Of three blocks of the test split, on four ranks, one rank has none."""
    for rank, found in enumerate(run_ranks(evaluate, world)):
        for classes in (2, 5):
            assert found[classes] == alone[classes]
            assert np.array_equal(found["fit", classes], alone["fit", classes])
        assert (found["gathered"] is None) == (rank > 0)
        for name, values in (found["gathered"] or {}).items():
            assert np.array_equal(values, alone["gathered"][name])


def test_the_gradient_is_that_of_the_formula() -> None:
    """In float64: the mean cross-entropy of standardised features and |W|^2 / (2 n), by autograd; value too."""
    data = split(600, 5, 3)
    fit = linear._Fit(*(torch.from_numpy(x) for x in (data.backbone, data.labels)))
    x, y = (torch.from_numpy(x) for x in labelled(data, "backbone"))
    mean, deviation = x.double().mean(0), x.double().std(0, correction=0)
    x = (x.double() - mean) / torch.where(deviation < 1e-9, 1.0, deviation)
    point = torch.randn(fit.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights, intercepts = point[:-5].view(5, -1), point[-5:]
    loss = torch.nn.functional.cross_entropy(x @ weights.T + intercepts, y) + weights.square().sum() / (2 * len(y))
    loss.backward()
    value, gradient = fit._at(*fit._told(point.detach().numpy()))
    assert value == pytest.approx(loss.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, point.grad, rtol=1e-9, atol=1e-12)


def test_whole_numbers_can_be_added_in_any_order() -> None:
    """The control: floating-point numbers cannot."""
    parts = torch.randn(300, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    unit = linear._unit(parts.sum(0))

    def one_after_another(some: Tensor) -> Tensor:
        total = torch.zeros_like(some[0])
        for part in some:
            total += part
        return total

    assert not torch.equal(one_after_another(parts), one_after_another(parts[order]))
    whole = linear._whole(parts, unit)
    assert torch.equal(one_after_another(whole), one_after_another(whole[order]))
    torch.testing.assert_close(one_after_another(whole).double() * unit, parts.sum(0), rtol=1e-14, atol=0)


def search(rank: int, world: int, left_out: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Near each other and far from the origin, where float32 products alone would misjudge; rank 1 has no queries."""
    draw = np.random.default_rng(0)
    base, queries = ((draw.normal(size=(n, 40)) * 1e-2 + 50).astype(np.float32) for n in (700, 333))
    queries = base if left_out else queries
    own = torch.arange(len(base))[rank::world]
    asked = torch.arange(len(queries))
    asked = asked[:0] if rank == 1 else asked if world == 1 else asked[asked % (world - 1) == max(0, rank - 1)]
    numbers = asked if left_out else None
    of = torch.from_numpy(queries)[asked], torch.from_numpy(base)[own], own, own % 7
    squared, ids, labels = neighbours.nearest(*of, 9, numbers)
    return asked.numpy(), *(x.numpy() for x in (squared, ids, labels))


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_the_search_is_exact(world: int, left_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    base, queries = ((draw.normal(size=(n, 40)) * 1e-2 + 50).astype(np.float32) for n in (700, 333))
    of = (base, base, 9, True) if left_out else (queries, base, 9)
    ids, squared = scores.nearest(*of)
    if world == 1:
        monkeypatch.setattr(neighbours, "TILE", 100)
        monkeypatch.setattr(neighbours, "ROWS", 64)
        monkeypatch.setattr(neighbours, "QUERIES", 200)
        monkeypatch.setattr(neighbours, "_ENTRIES", 1 << 16)
    seen = 0
    for asked, near, which, labels in run_ranks(search, world, left_out) if world > 1 else [search(0, 1, left_out)]:
        assert np.array_equal(which, ids[asked])
        assert np.array_equal(labels, ids[asked] % 7)
        np.testing.assert_allclose(near, squared[asked], rtol=1e-12)
        seen += len(asked)
    assert seen == len(of[0])


def fail(rank: int, world: int) -> list[str]:
    """What each rank is told of one rank's trouble: broken features, and an error in the middle of a fit."""
    train, test = (part_of(split(n, 5, seed), rank, world) for n, seed in ((TRAIN, 0), (TEST, 1)))
    if rank == 1:
        test.embeddings[3, 0] = np.inf
        test.labels[3] = 0
    said = []
    try:
        full_protocol(train, test)
    except group.RankError as error:
        said.append(str(error))
    fit = linear._Fit(train.backbone, train.labels)
    if rank == 1:
        fit._blocks.append("not a block")  # type: ignore[arg-type]
    try:
        fit.minimise()
    except group.RankError as error:
        said.append(str(error))
    return said


def test_trouble_of_one_rank_ends_all() -> None:
    for said in run_ranks(fail, 2):
        assert "rank 1: features of 1 of" in said[0]
        assert "the first is sample 259" in said[0]
        assert "fitting the linear classifier failed on 1 of 2 ranks" in said[1]


def test_one_class_is_refused() -> None:
    some = split(300, 5, 0)
    x, y = torch.from_numpy(some.backbone), torch.from_numpy(some.labels)
    with pytest.raises(ValueError, match="two classes"):
        linear.linear_accuracy(x, y * 0, x, y)
