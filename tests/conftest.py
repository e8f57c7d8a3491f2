"""Fixtures shared by the tests: the embedded digits as shards, prepared once."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of shards of scikit-learn's digits. Treat it as read-only."""
    from rkdo_dist.data.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", out)
    return out


SMALL = """
field: {objective: rkdo}
views: {crop_scale: [0.5, 1.0], flip: 0.0, jitter: [0.4, 0.4, 0.0, 0.0], grayscale: 0.0}
encoder: {backbone: cifar_resnet8, embedding_dim: 16}
train: {global_batch: 32, micro_batch: 8, epochs: 1, batches_per_epoch: 6, checkpoint_every: 2}
evaluate: {protocol: paper, at_end: false}
data: {workers: 0}
"""


@pytest.fixture
def small(tmp_path: Path, digits: Path) -> list[str]:
    """Arguments of `rkdo train` for a run of six small steps: four lanes, so 1, 2 or 4 ranks."""
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    return ["train", str(config), f"data.shards={digits}", f"run.dir={tmp_path / 'run'}"]
