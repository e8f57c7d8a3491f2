"""Two-dimensional maps of embeddings: principal components and t-SNE, for illustration only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from sklearn.manifold import trustworthiness as sklearns_trustworthiness
from threadpoolctl import threadpool_limits

SEED = 42
PERPLEXITY = 30.0
_ONE_POINT = 1e-7  # a deviation that scikit-learn would divide by, and crash

Array = NDArray[Any]


def principal_components(features: Array) -> tuple[Array, tuple[float, float]]:
    """The plane of largest variance.

    Args:
        features: (n, d), n >= 2.

    Returns:
        (n, 2) coordinates (each component signed so that its largest entry is positive), and the shares of the
        variance.
    """
    x = features.astype(np.float64)
    x = x - x.mean(axis=0)
    with threadpool_limits(1):
        _, values, directions = np.linalg.svd(x, full_matrices=False)
    count = min(2, len(values))
    plane = np.zeros((len(x), 2))
    for k in range(count):
        direction = directions[k] * np.sign(directions[k][np.abs(directions[k]).argmax()])
        plane[:, k] = x @ direction
    total = float((values**2).sum())
    shares = [float(values[k] ** 2) / total if total > 0 and k < count else 0.0 for k in range(2)]
    return plane, (shares[0], shares[1])


def tsne(features: Array) -> Array:
    """t-SNE of (n, d) features, (n, 2): fixed seed, started at the principal components, on one thread.

    Features that have collapsed to one point are one point of the map.

    Raises:
        ValueError: for fewer than 8 samples.
    """
    if len(features) < 8:
        raise ValueError(f"a t-SNE map needs at least 8 samples, got {len(features)}")
    if features.std(axis=0).max() < _ONE_POINT:
        return np.zeros((len(features), 2))
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    model = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=SEED, n_jobs=1)
    with threadpool_limits(1):
        return np.asarray(model.fit_transform(features.astype(np.float64)))


def trustworthiness(features: Array, plane: Array, neighbours: int) -> float:
    """Whether the nearest neighbours in a map (n, 2) are near among the features (n, d): 1 at best, n x n memory."""
    with threadpool_limits(1):
        return float(sklearns_trustworthiness(features, plane, n_neighbors=neighbours))
