"""What the two deliveries do to a row: sampled is its cross-entropy on average, restricted loses its relations."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from rkdo_dist.data.order import partner_draws
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.persistent import BatchColumns, Restricted, restrict
from rkdo_dist.field.tiled import value_and_gradient
from tests.test_supervised_rows import N, rows_of_all

ENTRIES, DRAWS, TAU, D = 3, 2000, 0.5, 5
ROWS = rows_of_all(ENTRIES)
BATCH = torch.tensor([3, 17, 22, 35])
STATIC = Objective.infonce(TAU)


def embeddings() -> tuple[Tensor, Tensor]:
    """Of all samples, of view 1 and of view 2."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.nn.functional.normalize(torch.randn(2, N, D, generator=generator, dtype=torch.float64), dim=2)
    return u, v


def gradient(objective: Objective, columns: Tensor, supervisor: Restricted | None = None) -> np.ndarray:
    """Of the mean loss of the batch with respect to view 1, and to view 2 of all samples that are columns (2, N, D)."""
    u, v = embeddings()
    found = value_and_gradient(objective, u[BATCH], v[columns], u[BATCH], v[columns], 0, supervisor=supervisor)
    assert found.columns_v is not None
    by_sample = torch.zeros(2, N, D, dtype=torch.float64)
    by_sample[0, BATCH] = found.rows_u
    by_sample[1].index_add_(0, columns, found.columns_v)
    return (by_sample / len(BATCH)).numpy()


def draws(epochs: int) -> Tensor:
    """Partners of the batch's samples in each epoch, as a run of seed 7 draws them."""
    ids = BATCH.numpy()
    uniform = [torch.from_numpy(partner_draws(7, epoch, ids)) for epoch in range(epochs)]
    return torch.stack([ROWS.pick(BATCH).draw(x) for x in uniform])


def test_the_mean_gradient_of_sampled_delivery_is_that_of_the_whole_rows() -> None:
    """Over 2000 epochs, each component within 4.5 standard errors of the expectation under p, by enumeration.

    The expectation weighs the gradient of the cross-entropy at every choice of columns by the product of the rows'
    p(j|i): nothing outside the batch is lost. Restricted delivery, the control, is many standard errors off.
    """
    p = ROWS.dense()[BATCH]
    expected = np.zeros((2, N, D))
    for columns in itertools.product(*(row.nonzero()[:, 0].tolist() for row in p)):
        weight = np.prod([float(p[i, j]) for i, j in enumerate(columns)])
        expected += weight * gradient(STATIC, torch.tensor(columns))
    found = np.stack([gradient(STATIC, columns) for columns in draws(DRAWS)])
    error = found.std(0, ddof=1) / np.sqrt(DRAWS)
    moved = error > 0
    z = (found.mean(0) - expected)[moved] / error[moved]
    assert moved.sum() > 60
    assert np.abs(z).max() < 4.5
    assert 0.5 < z.std() < 1.5  # the stated error is the right one
    assert np.abs(found.mean(0) - expected)[~moved].max() < 1e-15

    batch = BatchColumns(N)
    batch.set(BATCH)
    restricted = restrict(ROWS.pick(BATCH), batch, torch.arange(len(BATCH)), torch.float64)
    control = gradient(Objective.of("infonce", temperature=TAU, supervisor="rows"), BATCH, restricted)
    assert np.abs((control - expected)[moved] / error[moved]).max() > 20


def test_draws_are_independent_of_each_other() -> None:
    """Of samples in one epoch, and of one sample in consecutive epochs: correlations within 4.5 / sqrt(draws)."""
    uniform = np.stack([partner_draws(7, epoch, np.arange(50)) for epoch in range(4000)])
    assert abs(uniform.mean() - 0.5) < 4.5 / np.sqrt(12 * uniform.size)
    centred = (uniform - 0.5) * np.sqrt(12)
    between = centred.T @ centred / len(centred)
    np.fill_diagonal(between, 0)
    assert np.abs(between).max() < 4.5 / np.sqrt(len(centred))
    assert np.abs((centred[1:] * centred[:-1]).mean(0)).max() < 4.5 / np.sqrt(len(centred))
    assert not np.array_equal(partner_draws(8, 0, np.arange(50)), uniform[0])


def test_a_batch_keeps_the_share_b_1_by_n_1_of_a_rows_relations() -> None:
    """Mean over random batches of the mass of a row's other entries that lies inside, within 4.5 standard errors."""
    rng, size, i = np.random.default_rng(2), 10, 3
    row = ROWS.dense()[i].numpy()
    others = np.delete(np.arange(N), i)
    relation = row[others].sum()
    kept = np.array([row[rng.choice(others, size - 1, replace=False)].sum() for _ in range(4000)])
    error = kept.std(ddof=1) / np.sqrt(len(kept))
    assert abs(kept.mean() - relation * (size - 1) / (N - 1)) < 4.5 * error
    assert relation - kept.mean() > 20 * error
