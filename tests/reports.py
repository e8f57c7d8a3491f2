"""Run directories without training, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rkdo_dist import config as configuration
from rkdo_dist.field.objectives import Objective
from tests.conftest import ROOT

OBJECTIVES = {"rkdo": Objective.rkdo(), "icon": Objective.icon(), "infonce": Objective.infonce()}


def fake_run(
    path: Path,
    objective: str,
    seed: int,
    losses: list[float],
    evaluations: dict[int, dict[str, Any]] | None = None,
    *settings: str,
    steps: int = 4,
) -> Path:
    """A run directory as training leaves it, except for checkpoints.

    Args:
        losses: mean loss of each epoch of `steps` steps.
        evaluations: by step.
        settings: overrides.
    """
    file = ROOT / "configs" / "paper" / "cifar10-rkdo.yaml"
    words = [f"field.objective={objective}", f"run.seed={seed}", "data.shards=gone/cifar10", *settings]
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(configuration.to_yaml(configuration.load(file, words)))
    kind = OBJECTIVES[objective]
    records = [
        {
            "step": epoch * steps + k + 1,
            "epoch": epoch,
            "loss": loss + 0.01 * (k - (steps - 1) / 2),
            "loss_at_uniform": kind.at_uniform(64),
            "loss_at_ideal": kind.at_ideal(64),
            "kl_1": loss,
            "cross_entropy": loss + 1,
            "entropy_p": 1.0,
            "positive_mass": 0.1,
            "seconds": 0.5,
            "pairs_per_second": 128.0,
        }
        for epoch, loss in enumerate(losses)
        for k in range(steps)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    facts = {"world_size": 1, "device": "cpu", "precision": "no", "versions": {"torch": "2.14.1"}, "platform": "Linux"}
    (path / "environment.json").write_text(json.dumps(facts))
    if evaluations:
        (path / "evaluations").mkdir()
        for step, scores in evaluations.items():
            (path / "evaluations" / f"{step}.json").write_text(
                json.dumps({"step": step, "protocol": "paper", **scores})
            )
    return path


def scores_of(accuracy: float, infonce: float = 5.0, **more: Any) -> dict[str, Any]:
    """An evaluation with two scores."""
    return {"linear_accuracy": accuracy, **more, "yardsticks": {"infonce": infonce, "own_loss": 1.0}}
