"""Common metrics, the same function for every objective, and the parts of an objective's own value.

Losses of different objectives are different functions of the embeddings, so their values cannot be compared. Everything
here is computed from held-out pairs: two views of each sample of the test split, drawn with fixed keys (`SEED`,
`EPOCH`), so that every run on the same data is measured on the same pixels whatever its own seed. The encoder is in
evaluation mode.

Sums run in float64 on one thread and in a fixed order, so that the numbers do not depend on ranks or threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rkdo_dist.data.views import uniforms
from rkdo_dist.field.objectives import Objective
from rkdo_dist.history import attained_share
from rkdo_dist.losses import FieldLoss

SEED, EPOCH = 20_250_501, 0  # key the held-out views, apart from every training seed
BATCH = 256  # samples of a batch of that InfoNCE
TEMPERATURE = 0.5  # of that InfoNCE
UNIFORMITY_SAMPLES = 10_000  # at most: all of their pairs are compared
_ORDER_VIEW = 2  # the draws of a view that is not used order the samples
_BLOCK_ROWS = 1024

Array = NDArray[Any]


def common_metrics(u: Array, v: Array, embeddings: Array, backbone: Array) -> dict[str, Any]:
    """The numbers that compare encoders trained under different objectives.

    Args:
        u, v: (n, d) unit-norm embeddings of the two held-out views of n >= 2 samples, in index order.
        embeddings, backbone: (m, d) and (m, f) frozen features of the test images themselves.

    Returns:
        `pairs` n, `batch` (`BATCH`, or n if there are fewer); `infonce` at temperature 0.5: the mean over whole batches
        of samples in a fixed shuffled order (an incomplete last batch is left out), beside its value `_at_uniform`,
        `_at_ideal` and the share `_attained` between them, and `infonce_positive_mass`, the mean mass on the positive;
        `alignment` and `uniformity` (Wang and Isola 2020, alpha = 2 and t = 2); `effective_rank` of the embeddings and
        `effective_rank_backbone` (Roy and Vetterli 2007).

    Raises:
        ValueError: for mismatched, too few or not finite embeddings.
    """
    _check(u, v)
    order = fixed_order(len(u))
    objective = Objective.infonce(TEMPERATURE)
    batch = min(BATCH, len(u))
    infonce = _field_means(objective, u[order], v[order], batch)
    some = order[:UNIFORMITY_SAMPLES]
    return {
        "pairs": len(u),
        "batch": batch,
        **_placed("infonce", infonce["loss"], objective.at_uniform(batch), objective.at_ideal(batch)),
        "infonce_positive_mass": infonce["positive_mass"],
        "alignment": alignment(u, v),
        "uniformity": (uniformity(u[some]) + uniformity(v[some])) / 2,
        "effective_rank": effective_rank(embeddings),
        "effective_rank_backbone": effective_rank(backbone),
    }


def own_objective(
    objective: Objective, u: Array, v: Array, global_batch: int, labels: Array | None = None
) -> dict[str, Any]:
    """A run's own objective on held-out pairs, and its parts.

    Args:
        objective: resolved for the step that is evaluated. With a persistent field, held-out samples have no rows yet,
            and with a relation no keys, so their supervisor is the identity.
        u, v: as in `common_metrics`.
        global_batch: of training, on which the objective's value depends; fewer pairs make one smaller batch.
        labels: (n,) integers, for objectives that need them; without, or with some only (-1), there is no `own_loss`.

    Returns:
        `own_objective` (its name), `own_batch`, `own_loss` (the mean over whole batches), `own_loss_at_uniform`,
        `own_loss_at_ideal`, `own_loss_attained` (the attained share), `own_kl_t` of every level,
        `own_cross_entropy` and `own_entropy_p` (summed over levels; their difference is the loss), and
        `own_positive_mass` (of the last learned row).

    Raises:
        ValueError: as `common_metrics`.
    """
    _check(u, v)
    order, batch = fixed_order(len(u)), min(global_batch, len(u))
    about = {"own_objective": objective.name, "own_batch": batch}
    if objective.needs_labels and (labels is None or labels.min() < 0):
        return {**about, "own_loss": None, "own_loss_attained": None}
    used = labels[order] if objective.needs_labels and labels is not None else None
    means = _field_means(objective, u[order], v[order], batch, used)
    loss, uniform, ideal = means.pop("loss"), means.pop("uniform"), means.pop("ideal", objective.at_ideal(batch))
    if used is None:
        uniform = objective.at_uniform(batch)
    return {
        **about,
        **_placed("own_loss", loss, uniform, ideal),
        **{f"own_{name}": value for name, value in means.items()},
    }


def fixed_order(samples: int) -> NDArray[np.int64]:
    """A fixed shuffled order (n,) of the samples, so that shards sorted by class make mixed batches too."""
    keys = uniforms(np.arange(samples, dtype=np.int64), SEED, EPOCH, _ORDER_VIEW, 1)[:, 0]
    return np.argsort(keys, kind="stable")


def alignment(u: Array, v: Array) -> float:
    """mean_i |u_i - v_i|^2 of unit rows, in [0, 4]: 0 when both views are embedded alike (Wang and Isola 2020)."""
    difference = u.astype(np.float64) - v.astype(np.float64)
    return float(np.mean(np.einsum("ij,ij->i", difference, difference)))


def uniformity(x: Array) -> float:
    """log of the mean over pairs i < j of exp(-2 |x_i - x_j|^2), in [-8, 0]: lower is more uniform on the sphere.

    Args:
        x: (n, d) unit rows, n >= 2 (Wang and Isola 2020, t = 2).
    """
    rows, total = x.astype(np.float64), 0.0
    squares = np.einsum("ij,ij->i", rows, rows)
    with threadpool_limits(1):
        for start in range(0, len(rows), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            distances = squares[block, None] + squares - 2 * (rows[block] @ rows.T)
            total += float(np.exp(-2 * np.maximum(distances, 0)).sum())
    pairs = len(rows) * (len(rows) - 1)
    return float(np.log((total - len(rows)) / pairs))  # every row is at distance 0 from itself


def effective_rank(features: Array) -> float:
    """exp of the entropy of the normalised singular values of (n, d) features (Roy and Vetterli 2007), in [1, d].

    The features are not centred, as in the definition. All zeros have rank 0.
    """
    with threadpool_limits(1):
        values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _field_means(objective: Objective, u: Array, v: Array, batch: int, labels: Array | None = None) -> dict[str, float]:
    """Loss and parts, with labels also the value at the ideal: means over whole batches of rows, in float64."""
    loss_fn = FieldLoss(objective, exchange="local")
    found: list[dict[str, float]] = []
    with one_thread(), torch.no_grad():
        for start in range(0, len(u) - batch + 1, batch):
            rows = slice(start, start + batch)
            pair = (torch.from_numpy(x[rows].astype(np.float64)) for x in (u, v))
            mine = None if labels is None else torch.from_numpy(labels[rows])
            loss, parts = loss_fn(*pair, mine, parts=True)
            found.append({"loss": float(loss), **{name: float(part) for name, part in parts.items()}})
            if mine is not None:
                ideal = objective.at_ideal(batch, mine)
                found[-1] |= {} if ideal is None else {"ideal": ideal}
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def _placed(name: str, loss: float, uniform: float, ideal: float | None) -> dict[str, float | None]:
    """A loss with its values at chance level and at the ideal, and the share attained (see `attained_share`)."""
    return {
        name: loss,
        f"{name}_at_uniform": uniform,
        f"{name}_at_ideal": ideal,
        f"{name}_attained": attained_share(loss, uniform, ideal),
    }


def _check(u: Array, v: Array) -> None:
    if u.ndim != 2 or u.shape != v.shape or len(u) < 2:
        raise ValueError(f"held-out pairs need embeddings (n, d) of two views, n >= 2; got {u.shape} and {v.shape}")
    for name, x in (("first", u), ("second", v)):
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if len(bad):
            raise ValueError(
                f"embeddings of the {name} view of {len(bad)} of {len(x)} samples are not finite, "
                f"the first is sample {bad[0]}"
            )


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch on CPUs, on whose number last bits depend."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
