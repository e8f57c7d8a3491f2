"""Maps of frozen features: t-SNE's exact value and gradient, other kernels, the recursion, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import squareform
from sklearn.datasets import load_digits
from sklearn.manifold._t_sne import _joint_probabilities, _kl_divergence
from torch import Tensor

from rkdo_dist.frozen import mapping, sne
from tests.jobs import command

DIGITS = torch.from_numpy(load_digits().data[::12])  # (150, 64) float64
KERNELS = [sne.Kernel("student", "field"), sne.Kernel("student", "row", 3.0), sne.Kernel("gaussian", "row")]
KERNELS += [sne.Kernel("gaussian", "field")]


def plane(n: int) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def dense(p: Tensor, y: Tensor, kernel: sne.Kernel) -> Tensor:
    """The loss as one formula, for autograd."""
    squared = (y[:, None] - y[None]).square().sum(2)
    nu = kernel.freedom
    k = (-squared).exp() if kernel.affinity == "gaussian" else (1 + squared / nu) ** (-(nu + 1) / 2)
    k = k - torch.diag(k.diagonal())
    q = k / k.sum() if kernel.normaliser == "field" else k / (len(y) * k.sum(1, keepdim=True))
    off = ~torch.eye(len(y), dtype=torch.bool)
    return (p[off] * (p[off] / q[off]).log()).sum()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_t_sne_is_scikit_learns() -> None:
    n, y = len(DIGITS), plane(len(DIGITS))
    p = sne.supervisor(DIGITS, 30.0, sne.Kernel())
    given = squareform(p.numpy(), checks=False)
    kl, expected = _kl_divergence(y.numpy().ravel(), given, 1.0, n, 2, skip_num_points=0)
    assert relative(sne.gradient(p, y, sne.Kernel()).numpy().ravel(), expected) < 1e-12
    assert sne.divergence(p, y, sne.Kernel()) == pytest.approx(kl, rel=1e-12)
    # the control that must fail: rows normalised one by one
    row = sne.Kernel(normaliser="row")
    assert relative(sne.gradient(sne.supervisor(DIGITS, 30.0, row), y, row).numpy().ravel(), expected) > 0.1
    # and p(0) itself, as exact as scikit-learn's search for the width
    theirs = _joint_probabilities(torch.cdist(DIGITS, DIGITS).square().numpy().astype(np.float32), 30.0, 0)
    assert np.abs(given - theirs).max() < 1e-4 * theirs.max()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.affinity}-{k.normaliser}")
def test_value_and_gradient_are_autograds(kernel: sne.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    p, y = sne.supervisor(DIGITS[:23], 5.0, kernel), plane(23).requires_grad_()
    loss = dense(p, y, kernel)
    loss.backward()
    for entries in (1 << 22, 23 * 4):  # in one block, and in six
        monkeypatch.setattr(sne, "_ENTRIES", entries)
        found = sne.gradient(p, y.detach(), kernel)
        assert relative(found.numpy(), y.grad.numpy()) < 1e-12
        assert sne.divergence(p, y.detach(), kernel) == pytest.approx(float(loss.detach()), rel=1e-12)
        again = sne.supervisor(DIGITS[:23], 5.0, kernel)
        assert float((again - p).abs().max()) < 1e-15


def test_rows_have_the_perplexity_asked_for() -> None:
    rows = sne.perplexity_rows(DIGITS, 12.0)
    assert float((rows.sum(1) - 1).abs().max()) < 1e-12
    assert not rows.diagonal().any()
    entropy = -torch.special.xlogy(rows, rows).sum(1)
    assert float((entropy.exp() - 12).abs().max()) < 1e-9


def test_p_recurs_as_equation_3_says() -> None:
    kernel, y = sne.Kernel(), plane(23)
    p = sne.supervisor(DIGITS[:23], 5.0, kernel)
    k = 1 / (1 + (y[:, None] - y[None]).square().sum(2))
    k.fill_diagonal_(0)
    expected = 0.9 * p + 0.1 * k / k.sum()
    sne.gradient(p, y, kernel, coupling=0.1)
    assert float((p - expected).abs().max()) < 1e-15


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "f.npz"
    np.savez(path, features=DIGITS.numpy()[:100], labels=load_digits().target[::12][:100])
    return path


def test_the_loss_falls_and_the_map_gets_worse(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "map"
    words = ["map", str(file), "--perplexity", "10", "--iterations", "500", "--couplings", "0,0.1", "--out", str(out)]
    code, text = command(words)
    assert code == 0, text
    assert all(len(line) <= 80 for line in text.splitlines() if "map:" not in line)
    result = json.loads((out / "map.json").read_text())
    plain, recursive = result["couplings"]
    assert plain["kl"] == pytest.approx(plain["own_loss"]) == result["kl"]
    assert recursive["own_loss"] < 0.01 * plain["own_loss"]
    assert recursive["kl"] > 1.2 * plain["kl"]
    assert recursive["trustworthiness"] < plain["trustworthiness"] == result["trustworthiness"]
    arrays = np.load(out / "map.npz")
    assert arrays["maps"].shape == (2, 100, 2)
    assert arrays["labels"].tolist() == load_digits().target[::12][:100].tolist()
    assert {p.name for p in out.iterdir()} >= {"map.png", "map.svg", "couplings.png", "couplings.svg"}
    code, text = command(words)
    assert code == 2
    assert "is not an empty directory" in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--perplexity", "99"], "--perplexity must be in (1, 99) for 100 samples"),
        (["--perplexity", "1"], "--perplexity must be in (1, 99)"),
        (["--freedom", "0"], "--freedom must be above 0"),
        (["--couplings", "0,1"], "--couplings must be in [0, 1), got 1.0"),
        (["--couplings", "few"], "needs numbers with commas"),
        (["--iterations", "250"], "--iterations must be above 250"),
        (["--samples", "3"], "--samples must be at least 4"),
        (["--array", "x"], "there are features, labels"),
    ],
)
def test_mistakes_are_said(file: Path, tmp_path: Path, more: list[str], words: str) -> None:
    code, text = command(["map", str(file), "--out", str(tmp_path / "out"), *more])
    assert code == 2
    assert words in text
    assert not (tmp_path / "out").exists()


def test_a_map_that_does_not_fit_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "available_bytes", lambda device: 2**20)
    code, text = command(["map", str(file), "--out", str(tmp_path / "out")])
    assert code == 2
    assert "1 arrays of n x n numbers: 0.2 GiB, but 0.0 GiB are free: take fewer with --samples" in text
