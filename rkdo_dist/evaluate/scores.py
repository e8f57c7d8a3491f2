"""Scores of a few frozen features: linear evaluation, clustering, neighbourhoods. Plain arrays in, plain
numbers out.

`paper_protocol` is what the released notebook of the paper did: everything on the first 11 batches of the
test split, the linear classifier on an 80/20 split of those 704 images (352 at batch size 32). For the
field's ordinary protocol, on whole splits and many ranks, see `full_protocol`.

All of it runs on one thread: sums of BLAS and of k-means depend on the number of threads in their last
bits, and launchers choose the number of threads by the number of ranks. The scores must not depend on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from rkdo_dist.evaluate.features import FrozenFeatures

SEED = 42  # the released notebook's random_state, for every random choice here
NEIGHBOURS = 5  # of neighbourhood preservation
VOTERS, TEMPERATURE = 20, 0.07  # of the k-NN classifier
_BLOCK_BYTES = 2**26  # of the largest array in the search for neighbours

_COUNTS = ["train_samples", "test_samples", "clustered_samples", "unlabelled", "standardised", "neighbours", "voters"]

Array = NDArray[Any]


def paper_protocol(
    test: FrozenFeatures, batch_size: int = 64, batches: int = 11, neighbours: int = NEIGHBOURS
) -> dict[str, Any]:
    """Score frozen features as the released notebook did (see the text above).

    Args:
        test: the test split in its canonical order; only the first `batches * batch_size` samples are used,
            fewer if there are not so many. Unlabelled samples among them are left out and counted.
        batch_size: of training: 64, or 32 for STL-10.
        batches: how many of them.
        neighbours: k of the neighbourhood preservation.

    Returns:
        `protocol` "paper"; on the projected embeddings of that subset `linear_accuracy` (80/20 split with
        seed 42, not standardised), `nmi`, `ari`, `neighbourhood`; beside them, with the same split,
        `knn_accuracy`, `linear_accuracy_backbone` and `knn_accuracy_backbone`, which the paper does not have;
        counts; `warnings`.

    Raises:
        ValueError: as `full_protocol`.
    """
    rows = _labelled(test.labels[: batches * batch_size], "test")
    labels = test.labels[rows]
    fitted, scored = train_test_split(np.arange(len(rows)), test_size=0.2, random_state=SEED)
    result: dict[str, Any] = {
        "protocol": "paper",
        "train_samples": len(fitted),
        "test_samples": len(scored),
        "subset_samples": len(rows),
        "unlabelled": len(test.labels[: batches * batch_size]) - len(rows),
        "standardised": False,
    }
    with gathered_warnings() as said:
        for suffix, array in (("", test.embeddings[rows]), ("_backbone", test.backbone[rows])):
            pair = (array[fitted], labels[fitted], array[scored], labels[scored])
            result[f"linear_accuracy{suffix}"] = linear_evaluation(*pair)
            result[f"knn_accuracy{suffix}"] = knn_accuracy(*pair)
        result |= {
            **structure(test.embeddings[rows], labels),
            "neighbourhood": neighbourhood_preservation(test.embeddings[rows], labels, neighbours),
            "neighbours": neighbours,
            "voters": VOTERS,
        }
    return result | {"warnings": said}


def class_counts(labels: Array) -> Array:
    """Samples of each class (C,) among labels (n,), of which -1 is none."""
    return np.bincount(labels[labels >= 0])


def unscorable(test: Array, train: Array | None = None, neighbours: int = NEIGHBOURS) -> str | None:
    """Why labels do not allow the scores of a protocol; None if they do.

    Args:
        test: (C,) `class_counts` of the samples that are scored (and for the paper protocol fitted).
        train: of those that are fitted; None for the paper protocol.
        neighbours: k of the neighbourhood preservation.
    """
    for name, counts in (("test", test), ("train", train)):
        if counts is not None and not counts.sum():
            return f"the {name} split has no labels"
    if np.count_nonzero(test if train is None else train) < 2:
        return "the samples have one class only"
    scored = int(test.sum())
    if scored <= neighbours or (train is None and scored < 10):
        return f"the test split has {scored} labelled samples only"
    return None


def without_scores(protocol: str, reason: str) -> dict[str, Any]:
    """What a protocol gives where labels do not allow its scores: the same fields, null, and the reason."""
    names = [f"{kind}_accuracy{suffix}" for suffix in ("", "_backbone") for kind in ("linear", "knn")]
    scores = dict.fromkeys([*names, "nmi", "ari", "clusters", "neighbourhood"])
    counts = dict.fromkeys(_COUNTS)
    return {"protocol": protocol, **counts, **scores, "unscored": reason, "warnings": []}


def structure(embeddings: Array, labels: Array) -> dict[str, Any]:
    """Agreement of k-means with the labels, and what it depends on: `nmi`, `ari`, `clusters`, `clustered_samples`."""
    nmi, ari = clustering(embeddings, labels)
    return {"nmi": nmi, "ari": ari, "clusters": len(np.unique(labels)), "clustered_samples": len(labels)}


def linear_evaluation(
    train: Array, train_labels: Array, test: Array, test_labels: Array, standardise: bool = False
) -> float:
    """Accuracy of multinomial logistic regression on frozen features (lbfgs, C = 1, at most 1000
    iterations).

    Args:
        train, test: (n, d) features; fitted on the first, scored on the second.
        train_labels, test_labels: (n,) integers from 0.
        standardise: bring each feature to mean 0 and variance 1 first (estimated on `train`), so that the
            penalty and the convergence do not depend on the scale of the features.

    Raises:
        ValueError: for mismatched or unlabelled samples, features that are not finite, or a single class.
    """
    _check(train, train_labels)
    _check(test, test_labels)
    if len(np.unique(train_labels)) < 2:
        raise ValueError("linear evaluation needs at least two classes among its training samples")
    model = LogisticRegression(max_iter=1000, random_state=SEED)
    with threadpool_limits(1):
        fitted = (make_pipeline(StandardScaler(), model) if standardise else model).fit(train, train_labels)
        return float(fitted.score(test, test_labels))


def clustering(features: Array, labels: Array, seed: int = SEED) -> tuple[float, float]:
    """Agreement of k-means with the labels, k being the number of labels present.

    Args:
        features: (n, d).
        labels: (n,) integers from 0.
        seed: of k-means (the best of ten runs counts).

    Returns:
        Normalised mutual information (arithmetic mean of the entropies) in [0, 1], and the adjusted Rand
        index, at most 1 and 0 in expectation for random clusters.

    Raises:
        ValueError: for mismatched or unlabelled samples, or features that are not finite.
    """
    _check(features, labels)
    found = clusters_agreement(labels, kmeans(features, len(np.unique(labels)), seed))
    return found["nmi"], found["ari"]


def kmeans(features: Array, clusters: int, seed: int = SEED) -> Array:
    """Clusters (n,) of k-means on (n, f) features: the best of ten runs, on one thread."""
    with threadpool_limits(1):
        return np.asarray(KMeans(n_clusters=clusters, random_state=seed, n_init=10).fit_predict(features))


def clusters_agreement(labels: Array, clusters: Array) -> dict[str, float]:
    """How well clusters agree with labels, both (n,) integers from 0.

    Returns:
        `accuracy`: the largest share of samples whose cluster is their class, over all ways to give each class at most
        one cluster (the Hungarian method); `nmi`: normalised mutual information (arithmetic mean of the entropies);
        `ari`: adjusted Rand index.
    """
    table = np.zeros((int(clusters.max()) + 1, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(table, (clusters, labels), 1)
    matched = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "accuracy": float(matched / len(labels)),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }


def neighbourhood_preservation(features: Array, labels: Array, k: int = NEIGHBOURS) -> float:
    """The share of each sample's k nearest neighbours (Euclidean, itself excluded) that have its label.

    Args:
        features: (n, d), n > k.
        labels: (n,) integers from 0.

    Raises:
        ValueError: for mismatched or unlabelled samples, features that are not finite, or n <= k.
    """
    _check(features, labels)
    neighbours, _ = nearest(features, features, k, exclude_self=True)
    return float(np.mean(labels[neighbours] == labels[:, None]))


def knn_accuracy(
    train: Array,
    train_labels: Array,
    test: Array,
    test_labels: Array,
    k: int = VOTERS,
    temperature: float = TEMPERATURE,
) -> float:
    """Accuracy of the weighted k-NN classifier (Wu et al. 2018, section 3.4): votes exp(cosine /
    temperature).

    Args:
        train, test: (n, d) features, brought to unit length here.
        train_labels, test_labels: (n,) integers from 0.
        k: number of voters, all training samples if there are fewer.
        temperature: of the votes, > 0.

    Raises:
        ValueError: for mismatched or unlabelled samples, or features that are not finite.
    """
    _check(train, train_labels)
    _check(test, test_labels)
    neighbours, squared = nearest(_unit(test), _unit(train), min(k, len(train)))
    # cosine = 1 - squared / 2 for unit rows; the common factor exp(1 / temperature) cancels in the
    # comparison.
    votes = np.exp(-squared / (2 * temperature))
    totals = np.zeros((len(test), int(max(train_labels.max(), test_labels.max())) + 1))
    np.add.at(totals, (np.arange(len(test))[:, None], train_labels[neighbours]), votes)
    return float(np.mean(totals.argmax(axis=1) == test_labels))


def nearest(queries: Array, base: Array, k: int, exclude_self: bool = False) -> tuple[Array, Array]:
    """The k nearest rows of `base` for each row of `queries`, by brute force in bounded memory.

    Candidates are found in float32 by matrix products over blocks of queries; a few more than k of them are
    then ordered by exact float64 distances, ties by index. So rounding decides nothing that an exact search
    would not.

    Args:
        queries: (n, d); base: (m, d); floating point.
        k: number of neighbours.
        exclude_self: row i of `queries` is row i of `base` and not its own neighbour.

    Returns:
        Indices into `base` (n, k), nearest first, and squared Euclidean distances (n, k) float64.

    Raises:
        ValueError: if `base` has fewer than k other rows.
    """
    available = len(base) - bool(exclude_self)
    if k > available:
        raise ValueError(f"{k} neighbours need more samples than the {len(base)} there are")
    candidates = min(k + 16, available)
    centre = base.mean(axis=0, dtype=np.float64)  # distances do not change, float32 loses less
    base32 = (base - centre).astype(np.float32)
    norms = np.einsum("ij,ij->i", base32, base32)
    per_query = max(4 * len(base), 8 * candidates * base.shape[1])  # bytes of scores, and of differences
    block = max(1, _BLOCK_BYTES // per_query)
    indices = np.empty((len(queries), k), dtype=np.int64)
    squared = np.empty((len(queries), k))
    with threadpool_limits(1):
        for start in range(0, len(queries), block):
            rows = queries[start : start + block]
            scores = norms - 2 * ((rows - centre).astype(np.float32) @ base32.T)
            if exclude_self:
                scores[np.arange(len(rows)), np.arange(start, start + len(rows))] = np.inf
            found = np.sort(np.argpartition(scores, candidates - 1, axis=1)[:, :candidates], axis=1)
            difference = base[found].astype(np.float64) - rows[:, None].astype(np.float64)
            exact = np.einsum("ijk,ijk->ij", difference, difference)
            order = np.argsort(exact, axis=1, kind="stable")[:, :k]
            indices[start : start + block] = np.take_along_axis(found, order, axis=1)
            squared[start : start + block] = np.take_along_axis(exact, order, axis=1)
    return indices, squared


def _unit(rows: Array) -> Array:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _labelled(labels: Array, split: str) -> Array:
    """Indices of the samples with a label."""
    rows = np.flatnonzero(labels >= 0)
    if len(rows) == 0:
        raise ValueError(f"the {split} split has no labelled sample; evaluation needs labels")
    return rows


def _check(features: Array, labels: Array) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"need features (n, d) and labels (n,), got {features.shape} and {labels.shape}")
    if len(labels) == 0:
        raise ValueError("there are no samples to score")
    if labels.min() < 0:
        raise ValueError(f"{int((labels < 0).sum())} of {len(labels)} samples have no label; leave them out")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(
            f"features of {len(bad)} of {len(labels)} samples are not finite, the first is sample {bad[0]}"
        )


@contextmanager
def gathered_warnings() -> Iterator[list[str]]:
    """Collect warnings as sentences, each once, instead of printing them."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    for warning in caught:
        sentence = f"{warning.category.__name__}: {' '.join(str(warning.message).split())}"
        if sentence not in said:
            said.append(sentence)
