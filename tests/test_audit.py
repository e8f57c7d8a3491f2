"""The audit of supervisors: shares of mass by hand, views and seeds, ranks, the report, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rkdo_dist.frozen.rows import Teachers, grade, own_class_share
from rkdo_dist.studies import audit as shown
from tests.jobs import command, on_ranks

N, TAU = 30, 0.1


def unit(seed: int, labels: Tensor, noise: float) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    x = centres[labels.clamp(min=0)] + noise * torch.randn(len(labels), 5, generator=drawn)
    return torch.nn.functional.normalize(x)


def teachers() -> Teachers:
    labels = torch.arange(N) % 3
    labels[4] = -1
    visits = [[unit(10 * k + v, labels, noise) for v in range(3)] for k, noise in ((1, 0.8), (2, 1.2))]
    return Teachers(unit(5, labels, 0.5), visits[0], visits[1], labels)


def by_hand(keys: list[Tensor], labels: Tensor, mean: str = "arithmetic", allowed: Tensor | None = None) -> float:
    """Entry by entry: the mean share of mass on the sample's own class."""
    masses = []
    for i in range(N):
        logits = [[float(k[i].double() @ k[j].double()) / TAU for j in range(N)] for k in keys]
        others = [j for j in range(N) if j != i and (allowed is None or bool(allowed[i, j]))]
        if labels[i] < 0 or not others:
            continue
        if mean == "geometric":
            logits = [np.mean(logits, axis=0).tolist()]
        rows = []
        for some in logits:
            e = np.exp([some[j] for j in others])
            rows.append(e / e.sum())
        p = np.mean(rows, axis=0)
        masses.append(sum(p[a] for a, j in enumerate(others) if labels[j] == labels[i]))
    return float(np.mean(masses))


def test_shares_are_those_by_hand() -> None:
    t = teachers()
    found, unlabelled = grade(t, (TAU, 0.5), TAU, (4, 6, 9), (2,))
    got = {(row["group"], row["view"], shown.name(row)): row["precision"] for row in found}
    for view, keys in (("plain", t.plain), ("weak", t.weak[0]), ("strong", t.strong[0])):
        assert got["view", view, "tau 0.1"] == pytest.approx(by_hand([keys], t.labels), rel=1e-5)
    for view, visits in (("weak", t.weak), ("strong", t.strong)):
        for mean in ("arithmetic", "geometric"):
            expected = by_hand(list(visits), t.labels, mean)
            assert got["memory", view, f"{mean}, 3 visits"] == pytest.approx(expected, rel=1e-5)
    x = (t.plain.double() @ t.plain.double().T).fill_diagonal_(-9)
    near = torch.zeros(N, N, dtype=torch.bool).scatter_(1, x.topk(6, dim=1).indices, True)
    assert got["neighbours", "plain", "k 6"] == pytest.approx(by_hand([t.plain], t.labels, allowed=near), rel=1e-5)
    both = near & near.T
    assert got["mutual", "plain", "k 6"] == pytest.approx(by_hand([t.plain], t.labels, allowed=both), rel=1e-5)
    assert unlabelled["mutual"]["6"] == pytest.approx(float(both.sum() / near.sum()))
    step = near.double() / 6
    walk = (step + step @ step).fill_diagonal_(0)
    walk /= walk.sum(1, keepdim=True)
    known = t.labels >= 0
    mass = (walk * (t.labels[:, None] == t.labels)).sum(1)[known].mean()
    assert got["walk", "plain", "2 steps, k 6"] == pytest.approx(float(mass), rel=1e-5)
    p, q = ((keys.double() @ keys.double().T / TAU).fill_diagonal_(-torch.inf).softmax(1) for keys in t.weak[:2])
    assert unlabelled["overlap"]["weak"] == pytest.approx(float(torch.minimum(p, q).sum(1).mean()), rel=1e-5)
    # ten of each class, one of them without a label: a sample of a whole class has nine of 29 others
    assert own_class_share(t.labels) == pytest.approx((20 * 9 + 9 * 8) / (29 * 29))


def test_without_labels_there_is_no_grade() -> None:
    t = teachers()
    bare = Teachers(t.plain, t.weak, t.strong, torch.full((N,), -1))
    found, unlabelled = grade(bare, (TAU,), TAU, (4,), (2,))
    assert all(row["precision"] is None for row in found)
    assert unlabelled == grade(t, (TAU,), TAU, (4,), (2,))[1]
    assert own_class_share(bare.labels) is None


def test_the_audit_of_a_run_on_any_ranks_and_in_the_report(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    words = ["audit", str(run), "--samples", "300", "--visits", "2"]
    code, text = command(words)
    assert code == 0, text
    assert all(len(line) <= 80 for line in text.splitlines() if "audit:" not in line), text
    for said in ("mutual nearest", "geometric, 2 visits", "Dilution", "Worth:"):
        assert said in text
    found = json.loads((run / "audit" / "audit.json").read_text())
    assert (found["samples"], found["of"], found["labelled"]) == (300, 1438, 300)
    assert found["kept"] == pytest.approx(31 / 1437)
    assert found["base"] == pytest.approx(0.1, abs=0.01)
    shares = {(row["group"], row["view"], shown.name(row)): row["precision"] for row in found["rows"]}
    assert all(found["base"] < share <= 1 for share in shares.values())
    assert found["student"] == shares["view", "strong", "tau 0.5"]
    assert (run / "audit" / "audit.png").stat().st_size > 1000
    other = tmp_path / "two"
    for code, text in on_ranks(2, [*words, "--out", str(other)]):
        assert code == 0, text
    assert json.loads((other / "audit.json").read_text()) == found
    code, text = command(["report", str(run), "--out", str(tmp_path / "report.html")])
    assert code == 0, text
    page = (tmp_path / "report.html").read_text()
    assert 'id="audit"' in page
    assert "Share of a row&#x27;s mass on the sample&#x27;s own class" in page
    (run / "audit" / "audit.json").write_text('{"rows": [')
    assert command(["report", str(run), "--out", str(tmp_path / "report.html")])[0] == 0
    assert "its audit cannot be read" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--samples", "7"], "--samples must be at least 8"),
        (["--visits", "1"], "--visits must be at least 2"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--weights", "ema"], "no average of the weights"),
        (["train.epochs=2"], "only settings that do not change the run"),
    ],
)
def test_mistakes_are_one_line(reference: Path, tmp_path: Path, more: list[str], words: str) -> None:
    code, text = command(["audit", str(reference), "--out", str(tmp_path / "out"), *more])
    assert code == 2
    assert words in text
    assert len(text.strip().splitlines()) == 1, text
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    code, text = command(["audit", str(tmp_path)])
    assert code == 2
    assert str(tmp_path) in text
