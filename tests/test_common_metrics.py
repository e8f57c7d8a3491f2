"""Common metrics against slow transcriptions of their definitions; extremes whose values are known; bad input."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from rkdo_dist import checkpoint, parts
from rkdo_dist import config as configuration
from rkdo_dist.evaluate import common_metrics as common
from rkdo_dist.evaluate.evaluation import evaluate_encoder
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.ranks import runtime
from rkdo_dist.rundir import RunDirectory
from tests.jobs import command, run_of


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pairs(n: int, d: int = 8, noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    base = draw.normal(size=(n, d))
    return unit(base), unit(base + noise * draw.normal(size=(n, d)))


def slow_infonce(u: np.ndarray, v: np.ndarray, temperature: float = 0.5) -> tuple[float, float]:
    """Row by row: the mean loss, and the mean mass on the positive."""
    losses, masses = [], []
    for i in range(len(u)):
        weights = [math.exp(float(np.dot(u[i].astype(float), v[j].astype(float))) / temperature) for j in range(len(v))]
        masses.append(weights[i] / sum(weights))
        losses.append(-math.log(masses[-1]))
    return sum(losses) / len(losses), sum(masses) / len(masses)


def test_infonce_is_the_mean_over_whole_batches_in_the_fixed_order() -> None:
    u, v = pairs(600)
    found = common.common_metrics(u, v, u, u)
    order = common.fixed_order(600)
    parts = [slow_infonce(u[order[k : k + 256]], v[order[k : k + 256]]) for k in (0, 256)]
    assert (found["pairs"], found["batch"]) == (600, 256)
    assert found["infonce"] == pytest.approx(np.mean([a for a, _ in parts]), rel=1e-12)
    assert found["infonce_positive_mass"] == pytest.approx(np.mean([b for _, b in parts]), rel=1e-12)
    unshuffled = np.mean([slow_infonce(u[k : k + 256], v[k : k + 256])[0] for k in (0, 256)])
    assert abs(found["infonce"] - unshuffled) > 1e-6, "the control: another order gives other batches"


def test_few_samples_make_one_batch() -> None:
    u, v = pairs(50)
    found = common.common_metrics(u, v, u, u)
    assert found["batch"] == 50
    assert found["infonce"] == pytest.approx(slow_infonce(u, v)[0], rel=1e-12)
    assert found["infonce_at_uniform"] == pytest.approx(math.log(50))


def test_alignment_and_uniformity_by_their_definition() -> None:
    u, v = pairs(40)
    found = common.common_metrics(u, v, u, u)

    def squared(a: np.ndarray, b: np.ndarray) -> float:
        return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))

    def slow_uniformity(x: np.ndarray) -> float:
        kernel = [math.exp(-2 * squared(x[i], x[j])) for i in range(40) for j in range(i)]
        return math.log(sum(kernel) / len(kernel))

    assert found["alignment"] == pytest.approx(sum(map(squared, u, v)) / 40, rel=1e-12)
    assert found["uniformity"] == pytest.approx((slow_uniformity(u) + slow_uniformity(v)) / 2, rel=1e-9)


def test_values_at_the_extremes() -> None:
    same = np.tile(unit(np.ones((1, 4))), (64, 1))  # a collapsed encoder knows nothing
    collapsed = common.common_metrics(same, same, same, same)
    assert collapsed["infonce"] == pytest.approx(math.log(64), abs=1e-6)
    assert collapsed["infonce_attained"] == pytest.approx(0, abs=1e-6)
    assert collapsed["alignment"] == collapsed["uniformity"] == pytest.approx(0, abs=1e-6)
    assert collapsed["effective_rank"] == pytest.approx(1, abs=1e-4)
    simplex = unit(np.eye(16) - 1 / 16)
    ideal = common.common_metrics(simplex, simplex, simplex, np.eye(16))
    assert ideal["infonce_attained"] == pytest.approx(1, abs=1e-6)
    assert ideal["uniformity"] == pytest.approx(-2 * (2 + 2 / 15), rel=1e-6)
    assert ideal["effective_rank"] == pytest.approx(15, rel=1e-6)
    assert ideal["effective_rank_backbone"] == pytest.approx(16, rel=1e-12)
    assert common.effective_rank(np.diag([3.0, 1.0])) == pytest.approx(4 / 3**0.75, rel=1e-12)
    assert common.effective_rank(np.zeros((5, 3))) == 0


@pytest.mark.parametrize(
    "objective",
    [
        Objective.rkdo(),
        Objective.rkdo(depth=2, pairing="joint"),
        Objective.icon(),
        Objective.infonce(symmetric=True),
    ],
    ids=lambda objective: f"{objective.name}-{objective.pairing}",
)
def test_the_own_objective_taken_apart_is_the_dense_one(objective: Objective) -> None:
    u, v = pairs(100)
    found = common.own_objective(objective, u, v, global_batch=32)
    order = common.fixed_order(100)
    batches = [
        dense(objective, *(torch.from_numpy(x[order[k : k + 32]].astype(np.float64)) for x in (u, v)))
        for k in (0, 32, 64)
    ]
    assert found["own_loss"] == pytest.approx(np.mean([float(loss) for loss, _ in batches]), rel=1e-10)
    for name in objective.part_names:
        if name != "uniform":
            expected = np.mean([float(parts[name]) for _, parts in batches])
            assert found[f"own_{name}"] == pytest.approx(expected, rel=1e-10, abs=1e-12), name
    assert found["own_cross_entropy"] - found["own_entropy_p"] == pytest.approx(found["own_loss"], rel=1e-10)
    assert found["own_loss_at_uniform"] == objective.at_uniform(32)
    way = objective.at_uniform(32) - objective.at_ideal(32)
    assert found["own_loss_attained"] == pytest.approx((objective.at_uniform(32) - found["own_loss"]) / way)
    assert (found["own_objective"], found["own_batch"]) == (objective.name, 32)


def test_an_objective_without_a_way_has_no_share() -> None:
    """alpha = 1 without cooling: p(1) = q(0) = q(1), the loss is 0 whatever the encoder does."""
    found = common.own_objective(Objective.rkdo(depth=1, coupling=1.0, cooling=0.0), *pairs(20), global_batch=64)
    assert found["own_loss"] == pytest.approx(0, abs=1e-12)
    assert found["own_loss_attained"] is None


def test_common_metrics_do_not_follow_threads_and_leave_them_alone() -> None:
    u, v = pairs(700, d=32)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with threadpool_limits(threads):
                own = common.own_objective(Objective.rkdo(), u, v, 256)
                found.append(common.common_metrics(u, v, u, v) | own)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    json.dumps(found[0], allow_nan=False)


def test_bad_pairs_are_named() -> None:
    u, v = pairs(20)
    spoilt = v.copy()
    spoilt[7, 0] = np.inf
    with pytest.raises(ValueError, match="second view of 1 of 20 samples are not finite, the first is sample 7"):
        common.common_metrics(u, spoilt, u, u)
    with pytest.raises(ValueError, match=r"\(20, 8\) and \(19, 8\)"):
        common.own_objective(Objective.icon(), u, v[1:], 8)
    with pytest.raises(ValueError, match="n >= 2"):
        common.common_metrics(u[:1], v[:1], u, u)


def test_every_evaluation_holds_them_and_the_pairs_do_not_depend_on_the_seed(small: list[str], tmp_path: Path) -> None:
    """An encoder that is the same under two training seeds is measured by the same numbers."""
    code, text = command([*small, "evaluate.at_end=true", "train.max_steps=2"])
    assert code == 0, text
    run = run_of(small)
    first = json.loads((run / "evaluations" / "2.json").read_text())["yardsticks"]
    assert first["own_objective"] == "rkdo"
    assert {"infonce", "alignment", "uniformity", "effective_rank", "own_kl_3", "own_entropy_p"} <= set(first)
    assert 0 <= first["alignment"] <= 4
    other = RunDirectory(tmp_path / "other")
    other.path.mkdir()
    settings = configuration.load(small[1], [*small[2:], "run.seed=43"])
    encoder = parts.make_encoder(settings)
    encoder.load_state_dict(checkpoint.load(run / "checkpoints" / "2").model)
    with contextlib.closing(other):
        rt = runtime.start(1, 60, "exact")
        evaluate_encoder(settings, rt, parts.open_index(settings), other, encoder, 2, Console(quiet=True))
    assert json.loads((other.evaluations / "2.json").read_text())["yardsticks"] == first
    code, text = command(["compare", str(run), str(run)])
    assert code == 0
    assert "InfoNCE at 0.5" in text
    assert "effective rank" in text
