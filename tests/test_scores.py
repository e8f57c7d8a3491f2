"""Scores against slow transcriptions of their definitions; symmetries; the paper's subset; bad input."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from rkdo_dist.evaluate import scores
from rkdo_dist.evaluate.features import OwnFeatures
from rkdo_dist.evaluate.full_protocol import full_protocol

# --- slow transcriptions ----------------------------------------------------------------------------------


def slow_nmi(a: list[int], b: list[int]) -> float:
    n = len(a)

    def entropy(x: list[Any]) -> float:
        return -sum(c / n * math.log(c / n) for c in Counter(x).values())

    mutual = entropy(a) + entropy(b) - entropy(list(zip(a, b, strict=True)))
    mean = (entropy(a) + entropy(b)) / 2
    return 1.0 if mean == 0 else mutual / mean


def slow_ari(a: list[int], b: list[int]) -> float:
    """Hubert and Arabie (1985) by counting pairs of samples."""
    pairs = list(combinations(range(len(a)), 2))
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    in_a = sum(a[i] == a[j] for i, j in pairs)
    in_b = sum(b[i] == b[j] for i, j in pairs)
    expected = in_a * in_b / len(pairs)
    return 1.0 if in_a == in_b == both else (both - expected) / ((in_a + in_b) / 2 - expected)


def slow_neighbours(x: np.ndarray, i: int, k: int) -> list[int]:
    def distance(j: int) -> float:
        return sum((float(p) - float(q)) ** 2 for p, q in zip(x[i], x[j], strict=True))

    return sorted((j for j in range(len(x)) if j != i), key=lambda j: (distance(j), j))[:k]


def slow_knn(train: np.ndarray, y: np.ndarray, query: np.ndarray, k: int, temperature: float) -> int:
    cosines = [float(query @ t) / float(np.linalg.norm(query) * np.linalg.norm(t)) for t in train]
    votes: Counter[int] = Counter()
    for j in sorted(range(len(train)), key=lambda j: (-cosines[j], j))[:k]:
        votes[int(y[j])] += math.exp(cosines[j] / temperature)
    return max(votes, key=lambda c: votes[c])


# --- data -------------------------------------------------------------------------------------------------


def blobs(
    n: int, classes: int = 4, width: int = 6, spread: float = 0.7, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = generator.integers(classes, size=n)
    return (centres[labels] + spread * generator.normal(size=(n, width))).astype(np.float32), labels


def frozen(n: int, seed: int = 0) -> Any:
    backbone, labels = blobs(n, seed=seed)
    embeddings = backbone[:, :3] / np.linalg.norm(backbone[:, :3], axis=1, keepdims=True)
    return SimpleNamespace(backbone=backbone, embeddings=embeddings, labels=labels, ids=np.arange(n))


def rows_of(data: Any, rows: Any) -> Any:
    return SimpleNamespace(**{name: values[rows] for name, values in vars(data).items()})


def own(data: Any) -> OwnFeatures:
    """As the only rank has it."""
    facts = (torch.from_numpy(np.asarray(x)).long() for x in (data.ids, data.labels))
    return OwnFeatures(*facts, *(torch.from_numpy(np.ascontiguousarray(x)) for x in (data.backbone, data.embeddings)))


def full(train: Any, test: Any, k: int = 5) -> dict[str, Any]:
    """The scores of the full protocol, as an evaluation puts them together."""
    result, rows = full_protocol(own(train), own(test), k), test.labels >= 0
    with scores.gathered_warnings() as said:
        found = scores.structure(test.embeddings[rows], test.labels[rows])
    return result | found | {"warnings": result["warnings"] + said}


# --- each score -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_neighbourhood_is_its_definition(n: int, k: int, seed: int, duplicates: bool) -> None:
    x, labels = blobs(n, seed=seed)
    if duplicates:
        x = np.round(x)
    if k >= n:
        with pytest.raises(ValueError, match="need more samples"):
            scores.neighbourhood_preservation(x, labels, k)
        return
    same = [labels[i] == labels[j] for i in range(n) for j in slow_neighbours(x, i, k)]
    assert scores.neighbourhood_preservation(x, labels, k) == pytest.approx(np.mean(same), abs=1e-12)


def test_nearest_in_blocks_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from the origin float32 products alone would misjudge; many blocks, with a ragged last one."""
    generator = np.random.default_rng(0)
    base, queries = (generator.normal(size=(n, 40)) * 1e-2 + 50 for n in (700, 333))
    exact = ((queries[:, None] - base[None]) ** 2).sum(-1)
    order = np.argsort(exact, axis=1, kind="stable")[:, :9]
    monkeypatch.setattr(scores, "_BLOCK_BYTES", 2**18)
    indices, squared = scores.nearest(queries, base, 9)
    assert np.array_equal(indices, order)
    np.testing.assert_allclose(squared, np.take_along_axis(exact, order, axis=1), rtol=1e-10)


def test_nearest_breaks_ties_by_index_and_never_returns_the_query() -> None:
    x = np.zeros((30, 3), dtype=np.float32)
    indices, squared = scores.nearest(x[:12], x[:12], 3, exclude_self=True)
    assert indices[0].tolist() == [1, 2, 3]
    assert indices[2].tolist() == [0, 1, 3]
    assert not squared.any()
    with pytest.raises(ValueError, match="12"):
        scores.nearest(x[:12], x[:12], 12, exclude_self=True)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 30), st.integers(1, 25), st.integers(0, 10**6))
def test_knn_is_its_definition(n: int, k: int, seed: int) -> None:
    train, y = blobs(n, seed=seed)
    test, truth = blobs(20, seed=seed + 1)
    right = [slow_knn(train, y, q, k, 0.07) == t for q, t in zip(test.astype(float), truth, strict=True)]
    assert scores.knn_accuracy(train, y, test, truth, k) == pytest.approx(np.mean(right), abs=1e-12)


def test_clustering_is_nmi_and_ari_of_k_means(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = blobs(60, spread=0.6)
    seen: dict[str, Any] = {}

    class Recorded(scores.KMeans):  # type: ignore[misc]
        def fit_predict(self, *arguments: Any) -> np.ndarray:
            seen["parameters"] = self.get_params()
            seen["clusters"] = super().fit_predict(*arguments)
            return seen["clusters"]

    monkeypatch.setattr(scores, "KMeans", Recorded)
    nmi, ari = scores.clustering(x, labels)
    clusters = seen["clusters"].tolist()
    assert 0.1 < ari < 0.99  # neither trivial nor perfect, so that the comparison says something
    assert nmi == pytest.approx(slow_nmi(labels.tolist(), clusters), abs=1e-12)
    assert ari == pytest.approx(slow_ari(labels.tolist(), clusters), abs=1e-12)
    assert {name: seen["parameters"][name] for name in ("n_clusters", "random_state", "n_init")} == {
        "n_clusters": 4,
        "random_state": 42,
        "n_init": 10,
    }


def test_as_many_clusters_as_labels_present() -> None:
    x, labels = blobs(60, classes=3, spread=0.01)
    assert scores.clustering(x, labels * 5 + 2) == (pytest.approx(1), pytest.approx(1))


def test_linear_evaluation_is_logistic_regression() -> None:
    train, y = blobs(200, spread=1.5)
    test, truth = blobs(100, spread=1.5, seed=5)
    expected = LogisticRegression(max_iter=1000).fit(train, y).score(test, truth)
    assert scores.linear_evaluation(train, y, test, truth) == expected
    # Standardised, the scale of a feature does not matter; otherwise it does.
    scale = np.array([1e-3, 1, 1, 1, 1, 1e3], dtype=np.float32)
    plain = scores.linear_evaluation(train, y, test, truth, standardise=True)
    assert scores.linear_evaluation(train * scale, y, test * scale, truth, standardise=True) == plain


def test_better_features_score_better_and_random_ones_at_chance() -> None:
    for spread, low, high in ((0.05, 0.99, 1.0), (1000.0, 0.1, 0.4)):
        train, y = blobs(400, spread=spread)
        test, truth = blobs(400, spread=spread, seed=1)
        assert low <= scores.linear_evaluation(train, y, test, truth, standardise=True) <= high
        assert low <= scores.knn_accuracy(train, y, test, truth) <= high
        assert low <= scores.neighbourhood_preservation(test, truth) <= high
    nmi, ari = scores.clustering(test, truth)
    assert nmi < 0.1
    assert abs(ari) < 0.05


# --- protocols --------------------------------------------------------------------------------------------

MAIN = ("linear_accuracy", "nmi", "ari", "neighbourhood", "linear_accuracy_backbone", "knn_accuracy")


def test_full_protocol_fits_on_train_and_scores_on_test() -> None:
    train, test = frozen(300), frozen(120, seed=1)
    result = full(train, test)
    assert result["protocol"] == "full"
    counts = [result[name] for name in ("train_samples", "test_samples", "clusters", "unlabelled")]
    assert counts == [300, 120, 4, 0]
    assert result["linear_accuracy"] == scores.linear_evaluation(
        train.embeddings, train.labels, test.embeddings, test.labels, standardise=True
    )
    # The backbone has six informative dimensions, the embeddings three.
    assert result["linear_accuracy_backbone"] > result["linear_accuracy"]
    assert result["knn_accuracy_backbone"] == scores.knn_accuracy(
        train.backbone, train.labels, test.backbone, test.labels
    )
    assert (result["nmi"], result["ari"]) == scores.clustering(test.embeddings, test.labels)
    assert result["neighbourhood"] == scores.neighbourhood_preservation(test.embeddings, test.labels)
    assert result["neighbourhood"] != full(train, test, k=20)["neighbourhood"]


def test_paper_protocol_is_the_notebooks() -> None:
    """Independent of the module: sklearn's own pieces put together as the notebook does."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.model_selection import train_test_split
    from sklearn.neighbors import NearestNeighbors

    test = frozen(1500)
    result = scores.paper_protocol(test)
    x, y = test.embeddings[:704], test.labels[:704]
    parts = train_test_split(x, y, test_size=0.2, random_state=42)
    model = LogisticRegression(max_iter=1000).fit(parts[0], parts[2])
    clusters = KMeans(n_clusters=4, random_state=42, n_init=10).fit_predict(x)
    _, neighbours = NearestNeighbors(n_neighbors=6).fit(x).kneighbors(x)
    assert result["linear_accuracy"] == model.score(parts[1], parts[3])
    right = result["linear_accuracy"] * 141
    assert right == pytest.approx(round(right), abs=1e-9)
    assert result["nmi"] == pytest.approx(normalized_mutual_info_score(y, clusters), abs=1e-12)
    assert result["ari"] == pytest.approx(adjusted_rand_score(y, clusters), abs=1e-12)
    assert result["neighbourhood"] == pytest.approx(np.mean(y[neighbours[:, 1:]] == y[:, None]), abs=1e-12)
    assert (result["train_samples"], result["test_samples"], result["subset_samples"]) == (563, 141, 704)
    assert scores.paper_protocol(test, batch_size=32)["test_samples"] == 71


def test_only_the_first_batches_count_in_the_paper_protocol() -> None:
    test = frozen(900)
    same = rows_of(test, np.arange(704))
    assert scores.paper_protocol(test) == scores.paper_protocol(same)
    assert scores.paper_protocol(frozen(100))["subset_samples"] == 100


def test_scores_do_not_follow_the_number_of_threads() -> None:
    train, test = frozen(600), frozen(500, seed=1)
    found = []
    for threads in (1, 2, 4):
        with threadpool_limits(threads):
            found.append((full(train, test), scores.paper_protocol(test)))
    assert found[0] == found[1] == found[2]


def test_order_of_classes_and_of_samples_and_rotations_do_not_matter() -> None:
    train, test = frozen(300), frozen(200, seed=1)
    result = full(train, test)
    names = np.array([7, 2, 5, 0])  # other numbers for the classes
    renamed = [SimpleNamespace(**{**vars(d), "labels": names[d.labels]}) for d in (train, test)]
    order = np.random.default_rng(0).permutation(200)
    turn = np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]])
    turned = [SimpleNamespace(**{**vars(d), "embeddings": d.embeddings @ turn}) for d in (train, test)]
    unseeded = ("linear_accuracy", "neighbourhood", "knn_accuracy")  # k-means starts elsewhere
    for other, names_that_hold in (
        (full(*renamed), MAIN),
        (full(train, rows_of(test, order)), unseeded),
        (full(*turned), unseeded),
    ):
        for name in names_that_hold:
            assert other[name] == pytest.approx(result[name], abs=1e-9), name


# --- bad input --------------------------------------------------------------------------------------------


def test_unlabelled_samples_are_left_out_and_counted() -> None:
    train, test = frozen(200), frozen(150, seed=1)
    some = SimpleNamespace(**{**vars(test), "labels": np.where(np.arange(150) % 3 == 0, -1, test.labels)})
    kept = rows_of(test, np.arange(150) % 3 != 0)
    with_gaps, without = full(train, some), full(train, kept)
    assert with_gaps.pop("unlabelled") == 50
    assert without.pop("unlabelled") == 0
    assert with_gaps == without
    none = SimpleNamespace(**{**vars(test), "labels": np.full(150, -1)})
    with pytest.raises(ValueError, match="the test split has no labels"):
        full(train, none)
    with pytest.raises(ValueError, match="50 of 150 samples have no label"):
        scores.neighbourhood_preservation(some.embeddings, some.labels)


def test_bad_features_are_named() -> None:
    x, y = blobs(50)
    spoilt = x.copy()
    spoilt[[3, 9], 1] = np.nan
    with pytest.raises(ValueError, match="features of 2 of 50 samples are not finite, the first is sample 3"):
        scores.clustering(spoilt, y)
    with pytest.raises(ValueError, match=r"\(50, 6\) and \(49,\)"):
        scores.clustering(x, y[1:])
    with pytest.raises(ValueError, match="no samples"):
        scores.clustering(x[:0], y[:0])
    with pytest.raises(ValueError, match="two classes"):
        scores.linear_evaluation(x, y * 0, x, y)


def test_warnings_are_results_not_noise() -> None:
    """Fewer distinct points than clusters: k-means warns, and a collapsed encoder is worth knowing about."""
    train, test = frozen(100), frozen(100, seed=1)
    collapsed = SimpleNamespace(**{**vars(test), "embeddings": np.ones((100, 3), dtype=np.float32)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = full(train, collapsed)
    assert any("ConvergenceWarning" in sentence for sentence in result["warnings"])
    assert len(result["warnings"]) == len(set(result["warnings"]))
    assert result["nmi"] == pytest.approx(0, abs=1e-12)
