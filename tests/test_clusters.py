"""Clusters of frozen features: the loss, the score beside k-means, the control, ranks and restarts, bad input."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from rkdo_dist.evaluate import scores
from rkdo_dist.frozen import cluster_page
from rkdo_dist.frozen import heads as heads_
from rkdo_dist.frozen.features import read_features
from rkdo_dist.frozen.heads import Heads, Recipe, clusters_loss, engine, pairs, random_neighbours
from tests.jobs import command, on_ranks, rank_command, wait_for
from tests.ranks import Ranks

DIGITS = load_digits()
SMALL = ["--clusters", "3", "--neighbours", "4", "--heads", "5", "--steps", "30", "--batch", "32"]


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "digits.npz"
    np.savez(path, features=DIGITS.data.astype(np.float32), labels=DIGITS.target)
    return path


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    """150 samples around three centres, with keys that must not become markup."""
    drawn = np.random.default_rng(5)
    labels = np.repeat(np.arange(3), 50)
    values = drawn.normal(size=(150, 6)) + 4 * drawn.normal(size=(3, 6))[labels]
    keys = np.array([f"<b>{k}</b>" for k in range(150)])
    path = tmp_path / "blobs.npz"
    np.savez(path, features=values.astype(np.float32), labels=labels, keys=keys)
    return path


@pytest.fixture(autouse=True)
def small_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """t-SNE of the page costs more than most clusterings here."""
    monkeypatch.setattr(cluster_page, "MAPPED", 60)


def found(arguments: list[str]) -> dict[str, Any]:
    code, text = command(["cluster", *arguments])
    assert code == 0, text
    return json.loads((Path(arguments[arguments.index("--out") + 1]) / "clusters.json").read_text())


# --- the loss ---------------------------------------------------------------------------------------------------


def by_hand(u: np.ndarray, v: np.ndarray, debias: float, coupling: float, depth: int) -> float:
    """Equations (I-Con's debiased clusters, eq. 1 and 3 of the paper), entry by entry."""
    n, total = len(u), 0.0
    sizes = [sum(v[k][c] for k in range(n)) for c in range(u.shape[1])]
    for i in range(n):
        q = [(1 - debias) * sum(u[i][c] * v[j][c] / sizes[c] for c in range(u.shape[1])) + debias / n for j in range(n)]
        p = [(1 - debias) * (i == j) + debias / n for j in range(n)]
        for _ in range(depth):
            if coupling:
                p = [(1 - coupling) * a + coupling * b for a, b in zip(p, q, strict=True)]
            total += sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0) / n
    return total


def probabilities(n: int, c: int, seed: int) -> torch.Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)


@pytest.mark.parametrize(("debias", "coupling", "depth"), [(0.0, 0.0, 1), (0.4, 0.0, 1), (0.4, 0.3, 3)])
def test_the_loss_is_the_equation(debias: float, coupling: float, depth: int) -> None:
    u, v = probabilities(7, 3, 1), probabilities(7, 3, 2)
    expected = by_hand(u.numpy(), v.numpy(), debias, coupling, depth)
    assert float(clusters_loss(u, v, debias, coupling, depth)) == pytest.approx(expected, rel=1e-12)
    recipe = Recipe(3, debias=debias, coupling=coupling, depth=depth)
    gradients = []
    for loss in (
        lambda a, b: clusters_loss(a.softmax(1), b.softmax(1), debias, coupling, depth),
        engine(recipe, coupling),
    ):
        x, y = u.log().requires_grad_(), v.log().requires_grad_()
        value = loss(x, y)
        value.backward()
        gradients.append((x.grad, y.grad))
        assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
    for one, two in zip(*gradients, strict=True):
        assert float((one - two).abs().max()) < 1e-12 * float(one.abs().max())


def test_gradients_flow_through_the_sizes_of_clusters() -> None:
    """Without them the loss is another one: all samples in one cluster would cost nothing more."""
    v = probabilities(7, 3, 2).requires_grad_()
    clusters_loss(probabilities(7, 3, 1), v, 0.4).backward()
    bump, at = 1e-6, (2, 1)
    ends = []
    for sign in (1, -1):
        moved = v.detach().clone()
        moved[at] += sign * bump
        ends.append(float(clusters_loss(probabilities(7, 3, 1), moved, 0.4)))
    slope = (ends[0] - ends[1]) / (2 * bump)
    assert float(v.grad[at]) == pytest.approx(slope, rel=1e-6)
    u, w = probabilities(7, 3, 1), v.detach().clone().requires_grad_()
    q = 0.6 * (u @ (w / w.sum(0).detach()).T) + 0.4 / 7
    (-(0.6 * torch.eye(7) + 0.4 / 7) * q.log()).sum().div(7).backward()
    assert abs(float(w.grad[at]) - slope) > 0.1 * abs(slope)


def test_second_views_are_walks_on_the_graph() -> None:
    n, recipe = 40, Recipe(2, neighbours=3, walk=2, batch=16)
    graph = (torch.arange(n)[:, None] + torch.tensor([[1, 2, 3]])).remainder(n).int()
    drawn = [(int(i), int(j)) for a, b in pairs(recipe, graph, range(400)) for i, j in zip(a, b, strict=True)]
    steps = np.bincount([(j - i) % n for i, j in drawn], minlength=7) / len(drawn)
    expected = np.array([0, 3, 4, 5, 3, 2, 1]) / 18  # (P + P^2) / 2
    assert steps[7:].sum() == 0
    assert np.abs(steps[:7] - expected).max() < 5 * np.sqrt(0.25 / len(drawn))  # five standard errors
    epoch = [int(i) for a, _ in pairs(recipe, graph, range(2)) for i in a]
    assert len(set(epoch)) == 32  # each sample at most once in an epoch
    others = random_neighbours(recipe, n)
    assert not (others == torch.arange(n)[:, None]).any()
    assert len(others.unique()) > 30


def test_agreement_matches_clusters_with_classes() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert scores.clusters_agreement(labels, np.array([2, 2, 0, 0, 1, 1])) == {"accuracy": 1, "nmi": 1, "ari": 1}
    # five clusters, three classes: a class has one cluster
    assert scores.clusters_agreement(labels, np.array([4, 4, 0, 1, 2, 3]))["accuracy"] == pytest.approx(4 / 6)
    assert scores.clusters_agreement(labels, np.zeros(6, int))["accuracy"] == pytest.approx(2 / 6)


# --- digits -----------------------------------------------------------------------------------------------------


def gain(seed: int, file: Path, out: Path, *more: str) -> float:
    result = found([str(file), "--clusters", "10", "--seed", str(seed), "--out", str(out), *more])
    assert result["labelled"] == 1797
    assert result["kmeans"]["nmi"] == pytest.approx(0.74, abs=0.02)
    return result["accuracy"] - result["kmeans"]["accuracy"]


def test_clusters_of_digits_are_better_than_k_means(digits_file: Path, tmp_path: Path) -> None:
    assert gain(1, digits_file, tmp_path / "out", "--steps", "300") >= 0.03


@pytest.mark.nightly
def test_clusters_of_digits_are_better_than_k_means_for_five_seeds(digits_file: Path, tmp_path: Path) -> None:
    assert np.mean([gain(seed, digits_file, tmp_path / str(seed)) for seed in range(5)]) >= 0.03


def test_random_neighbours_find_nothing(digits_file: Path, tmp_path: Path) -> None:
    """The control: linear heads on pixels draw some line, but the labels must not come out of it."""
    out = tmp_path / "out"
    short = ["--clusters", "10", "--steps", "150", "--heads", "3"]
    result = found([str(digits_file), *short, "--control", "random", "--out", str(out)])
    assert result["accuracy"] < 0.3 < result["kmeans"]["accuracy"]
    assert "this is no evidence" in (out / "clusters.html").read_text()


def test_the_recursion_lowers_its_own_loss_and_not_that_against_p0(tmp_path: Path, blobs: Path) -> None:
    plain = found([str(blobs), *SMALL, "--out", str(tmp_path / "a")])
    recursive = found([str(blobs), *SMALL, "--coupling", "0.5", "--depth", "9", "--out", str(tmp_path / "b")])
    assert recursive["own_loss"] / 9 < plain["own_loss"] / 3  # the mean over nine levels
    assert recursive["loss"] > plain["loss"] - 0.01


# --- ranks and restarts -----------------------------------------------------------------------------------------


def same_result(one: Path, two: Path) -> None:
    a, b = np.load(one / "assignments.npz"), np.load(two / "assignments.npz")
    assert sorted(a) == sorted(b) == ["assignments", "keys", "probabilities"]
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    results = [json.loads((path / "clusters.json").read_text()) for path in (one, two)]
    for result in results:
        del result["machine"], result["seconds"]
    assert results[0] == results[1]


def test_the_same_on_any_ranks_and_after_kill_9(blobs: Path, tmp_path: Path) -> None:
    arguments = [str(blobs), *SMALL, "--heads", "3", "--steps", "400", "--out"]
    one, four, killed = (tmp_path / name for name in ("one", "four", "killed"))
    found([*arguments, str(one)])
    answers = on_ranks(4, ["cluster", *arguments, str(four)])  # one rank has no head
    assert [code for code, _ in answers] == [0] * 4, answers
    same_result(one, four)
    with Ranks(rank_command, 2, (["cluster", *arguments, str(killed)],), 120) as ranks:
        wait_for(lambda: _step(killed) >= 40, ranks.running)
        ranks.kill([0, 1])
    assert not (killed / "clusters.json").exists()
    assert 40 <= _step(killed) < 400
    found([*arguments, str(killed), "--resume"])
    same_result(one, killed)
    assert not (killed / "checkpoint.npz").exists()


def _step(out: Path) -> int:
    try:
        with np.load(out / "checkpoint.npz", allow_pickle=False) as file:
            return int(file["step"])
    except FileNotFoundError:
        return -1


def test_heads_are_loaded_as_they_were_saved() -> None:
    x, recipe = torch.randn(64, 4), Recipe(3, neighbours=2, heads=2, steps=6)
    graph = random_neighbours(recipe, 64)
    straight, stopped = Heads(x, recipe, [0, 1]), Heads(x, recipe, [0, 1])
    for heads, until in ((straight, 6), (stopped, 3)):
        for first, second in pairs(recipe, graph, range(until)):
            heads.train(first, second)
    for number in (0, 1):  # each on a rank of its own now
        alone = Heads(x, recipe, [number])
        alone.load(3, stopped.state())
        for first, second in pairs(recipe, graph, range(3, 6)):
            alone.train(first, second)
        for a, b in zip(alone.state()[number], straight.state()[number], strict=True):
            assert torch.equal(a, b)


def test_large_batches_are_trained_alike_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x, recipe = torch.randn(96, 4), Recipe(3, neighbours=2, heads=1, steps=20, batch=48, coupling=0.3)
    graph, weights = random_neighbours(recipe, 96), []
    for most in (512, 0):
        monkeypatch.setattr(heads_, "DENSE", most)
        heads = Heads(x, recipe, [0])
        for first, second in pairs(recipe, graph, range(20)):
            heads.train(first, second)
        weights.append(heads.state()[0][0])
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)
    assert float((weights[0] - Heads(x, recipe, [0]).state()[0][0]).abs().max()) > 0.1


def test_a_directory_is_continued_only_with_the_same_request(blobs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(blobs), *SMALL, "--out", str(out)]
    first = found(arguments)
    assert first["accuracy"] > 0.95
    refused(arguments, "holds assignments.npz", "--resume")
    refused([*arguments, "--seed", "7", "--resume"], "was made with seed = 42, not 7")
    assert found([*arguments, "--resume"]) == first
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    refused([str(blobs), *SMALL, "--out", str(other), "--resume"], "thesis.txt", "nothing to resume")
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


def test_the_page_and_a_file_without_labels(blobs: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    code, text = command(["cluster", str(blobs), *SMALL, "--out", str(out)])
    assert code == 0
    assert "k-means" in text
    page = (out / "clusters.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert (out / "clusters.png").stat().st_size > 1000
    sizes = np.bincount(np.load(out / "assignments.npz")["assignments"])
    assert (np.diff(sizes) <= 0).all()
    np.savez(tmp_path / "bare.npz", features=np.load(blobs)["features"])
    result = found([str(tmp_path / "bare.npz"), *SMALL, "--out", str(tmp_path / "b")])
    assert result["accuracy"] is None
    quick = found([str(blobs), *SMALL, "--no-kmeans", "--out", str(tmp_path / "c")])
    assert quick["kmeans"]["accuracy"] is None
    assert quick["accuracy"] > 0.95
    assert result["kmeans"] == {"accuracy": None, "nmi": None, "ari": None}
    assert sorted(np.load(tmp_path / "b" / "assignments.npz")) == ["assignments", "positions", "probabilities"]


def test_the_page_shows_the_pictures_of_the_features(reference: Path, digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "f.npz"
    code, text = command(["embed", str(reference), str(digits), "--split", "test", "--out", str(file)])
    assert code == 0, text
    arguments = [str(file), "--clusters", "4", "--steps", "5", "--heads", "1", "--images", str(digits), "--out"]
    found([*arguments, str(tmp_path / "out")])
    filled = np.bincount(np.load(tmp_path / "out" / "assignments.npz")["assignments"]).clip(max=8).sum()
    page = (tmp_path / "out" / "clusters.html").read_text()
    assert page.count('width="56"') == filled
    assert page.count("data:image/png") == filled + 2  # the map by cluster and by label
    arrays = dict(np.load(file))
    np.savez(file, **{name: array[:-1] if len(array) == 359 else array for name, array in arrays.items()})
    refused([*arguments, str(tmp_path / "other")], "359 samples in split test, the features have 358")


# --- files ------------------------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def test_files_of_other_kinds(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (9, 4, 3)).astype(np.uint8)
    labels = np.arange(9, dtype=np.uint8)
    (tmp_path / "images-idx3-ubyte").write_bytes(idx(pixels))
    (tmp_path / "labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    one = read_features(tmp_path / "images-idx3-ubyte", labels=tmp_path / "labels-idx1-ubyte.gz")
    assert one.values.dtype == np.float32
    assert np.array_equal(one.values, pixels.reshape(9, 12))
    assert np.array_equal(one.pictures, pixels)
    assert one.labels.tolist() == list(range(9))
    arrays = {"features": one.values, "labels": one.labels}
    save_file(arrays, tmp_path / "f.safetensors", {"keys": json.dumps(["k"] * 9)})
    two = read_features(tmp_path / "f.safetensors")
    assert two.digest == one.digest
    assert two.keys.tolist() == ["k"] * 9
    assert two.labels.tolist() == one.labels.tolist()


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    values = np.arange(12, dtype=np.float32)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(values), 3)
    table = pa.table({"key": list("abcd"), "split": ["train"] * 4, "features": rows, "label": [0, 1, -1, 0]})
    parquet.write_table(table, tmp_path / "f.parquet")
    found_ = read_features(tmp_path / "f.parquet")
    assert np.array_equal(found_.values, values.reshape(4, 3))
    assert found_.keys.tolist() == list("abcd")
    assert found_.known().tolist() == [0, 1, 3]


def refused(arguments: list[str], *words: str) -> None:
    code, text = command(["cluster", *arguments])
    assert code == 2, text
    assert all(word in text for word in words), text
    assert len(text.strip().splitlines()) == 1, text


def with_nan() -> np.ndarray:
    x = np.ones((20, 3), np.float32)
    x[7, 1], x[9, 0] = np.nan, np.inf
    return x


@pytest.mark.parametrize(
    ("arrays", "more", "words"),
    [
        ({"features": with_nan()}, [], ["row 7 is not", "2 of 20"]),
        ({"features": np.eye(20)}, ["--clusters", "1"], ["--clusters must be in [2, 20]", "got 1"]),
        ({"features": np.eye(20)}, ["--clusters", "21"], ["--clusters must be in [2, 20]", "got 21"]),
        ({"features": np.eye(20)}, ["--neighbours", "20"], ["--neighbours must be in [1, 19]", "got 20"]),
        ({"features": np.eye(20)}, ["--debias", "1"], ["--debias must be in [0, 1)"]),
        ({"features": np.eye(20)}, ["--learning-rate", "0"], ["--learning-rate must be above 0"]),
        ({"features": np.ones((20, 3))}, [], ["all rows of the features are equal"]),
        ({"feats": np.eye(20), "labels": np.arange(20)}, [], ["no array 'features'", "feats, labels"]),
        ({"features": np.eye(20)}, ["--array", "embeddings"], ["no array 'embeddings'", "features"]),
        ({"features": np.eye(20), "labels": np.arange(19)}, [], ["labels must be (20,)", "(19,)"]),
        ({"features": np.eye(20), "labels": np.ones(20)}, [], ["labels must be whole numbers"]),
        ({"features": np.ones(20)}, [], ["must be numbers (n, f)"]),
        ({"features": np.array([None, "x"])}, [], ["Python objects, which are not read"]),
        ({"features": np.eye(20)}, ["--images", "x"], ["--images needs features with `splits`"]),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arrays: dict[str, Any], more: list[str], words: list[str]) -> None:
    path, out = tmp_path / "f.npz", tmp_path / "out"
    np.savez(path, **arrays)
    refused([str(path), "--clusters", "3", "--neighbours", "4", "--steps", "2", "--out", str(out), *more], *words)
    assert not (out / "clusters.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("f.npz", b"not a zip", "cannot be read as an .npz"),
        ("f", b"text", "is not an .npz, .parquet, .safetensors or idx file"),
        ("f", idx(np.zeros((4, 3), np.uint8))[:-1], "is cut off or too long"),
        ("f.gz", gzip.compress(idx(np.zeros((4, 3), np.uint8)), mtime=0)[:-9], "cannot be read"),
        ("f.safetensors", b"0", "cannot be read as a .safetensors"),
        ("", b"", "is not there, or not a file"),
    ],
)
def test_files_that_are_no_features(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    if name:
        path.write_bytes(content)
    refused([str(path), "--clusters", "2", "--out", str(tmp_path / "out")], words)
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_said_on_every_rank_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    np.savez(path, features=with_nan())
    for code, text in on_ranks(2, ["cluster", str(path), "--clusters", "2", "--out", str(tmp_path / "out")]):
        assert code == 2, text
    assert not (tmp_path / "out").exists()
