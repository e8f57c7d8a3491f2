"""t-SNE, exactly: one normaliser of the whole field, against scikit-learn's and openTSNE's own value and gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.manifold import _t_sne
from torch import Tensor

from rkdo_dist.field.affinity import Gaussian, Student
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.supervisors import Listed
from rkdo_dist.field.tiled import value_and_gradient

N, PERPLEXITY = 150, 30.0


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Points, and an untrained map of them (N, 2)."""
    points = load_digits().data[:N]
    return points, np.random.default_rng(0).normal(size=(N, 2)) * 2


def rows(p: np.ndarray) -> Listed:
    """p(j|i) (N, N) with an empty diagonal as rows that list all other columns."""
    others = torch.stack([torch.cat([torch.arange(i), torch.arange(i + 1, N)]) for i in range(N)])
    return Listed.of(others, torch.from_numpy(p).double().gather(1, others), N - 1, 0.0, torch.float64)


def ours(supervisor: Listed, points: np.ndarray, normaliser: str) -> tuple[float, np.ndarray]:
    affinity = Student(degrees_of_freedom=1)
    objective = Objective(
        "t-sne", 1.0, (1.0,), supervisor="rows", affinity=affinity, pairing="points", normaliser=normaliser
    )
    y = torch.from_numpy(points)
    result = value_and_gradient(objective, y, y, y, y, 0, supervisor=supervisor)
    assert result.columns_v is not None
    return float(result.loss) / N, ((result.rows_u + result.columns_v) / N).numpy()


def conditional(points: np.ndarray) -> np.ndarray:
    """p(j|i) of the perplexity, every row 1."""
    squares = ((points[:, None] - points[None]) ** 2).sum(2).astype(np.float32)
    return _t_sne._utils._binary_search_perplexity(squares, PERPLEXITY, 0)


def joint(p: np.ndarray) -> np.ndarray:
    """t-SNE's symmetric P, all entries 1."""
    return (p + p.T) / (p + p.T).sum()


def test_one_normaliser_is_scikit_learns_tsne(digits: Any) -> None:
    points, y = digits
    p = conditional(points)
    flat = np.maximum(joint(p)[np.triu_indices(N, 1)], 1e-300)
    value, gradient = _t_sne._kl_divergence(y.ravel(), flat, 1.0, N, 2, skip_num_points=0)
    gradient = gradient.reshape(N, 2)

    found, slope = ours(rows(joint(p) * N), y, "field")  # the joint P, whose rows have different masses
    assert found == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(slope, gradient, rtol=0, atol=1e-12 * np.abs(gradient).max())

    found, slope = ours(rows(p), y, "field")  # asymmetric rows: the kernel is symmetric, so nothing else is needed
    np.testing.assert_allclose(slope, gradient, rtol=0, atol=1e-12 * np.abs(gradient).max())
    constant = (p / N * np.log(np.maximum(p / N, 1e-300))).sum() - 2 * (flat * np.log(flat)).sum()
    assert found - constant == pytest.approx(value, rel=1e-12)

    _, wrong = ours(rows(p), y, "row")  # control: I-Con's t-SNE is another function
    assert 0.1 < np.linalg.norm(wrong - gradient) / np.linalg.norm(gradient) < 1


def test_one_normaliser_is_opentsnes_gradient_times_four(digits: Any) -> None:
    tsne = pytest.importorskip("openTSNE", reason="openTSNE is not installed")
    points, y = digits
    affinities = tsne.affinity.PerplexityBasedNN(points, perplexity=PERPLEXITY, method="exact", n_jobs=1)
    value, gradient = tsne.tsne.kl_divergence_bh(
        y, affinities.P, dof=1, bh_params={"theta": 0.0}, should_eval_error=True
    )
    found, slope = ours(rows(affinities.P.toarray() * N), y, "field")
    assert found == pytest.approx(value, rel=1e-10)
    np.testing.assert_allclose(slope, 4 * gradient, rtol=0, atol=1e-10 * np.abs(slope).max())


def test_a_normaliser_goes_where_it_is_defined(digits: Any) -> None:
    y = torch.from_numpy(digits[1])
    objective = Objective.of("icon", affinity=Gaussian(), normaliser="field")
    with pytest.raises(ValueError, match="normaliser='field' needs log_normaliser"):
        value_and_gradient(objective, y[:5], y[:5], y, y, 0)
    with pytest.raises(ValueError, match="normaliser must be row for recursion='in_batch'"):
        Objective.of("rkdo", normaliser="field")
    far: Tensor = y.float() * 1e4  # all pairs are so far apart that exp(l) is 0 in float32
    result = value_and_gradient(objective, far, far + 1e3, far, far + 1e3, 0)
    assert torch.isfinite(result.loss)
    assert torch.isfinite(result.rows_u).all()
