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


FORTY = ("train.batches_per_epoch=40",)
SMALL = """
field: {objective: rkdo}
views: {crop_scale: [0.5, 1.0], flip: 0.0, jitter: [0.4, 0.4, 0.0, 0.0], grayscale: 0.0}
encoder: {backbone: cifar_resnet8, embedding_dim: 16}
train: {global_batch: 32, micro_batch: 8, epochs: 1, batches_per_epoch: 6, checkpoint_every: 2}
evaluate: {protocol: paper, at_end: false}
data: {workers: 0}
"""


def _arguments(folder: Path, digits: Path) -> list[str]:
    config = folder / "small.yaml"
    config.write_text(SMALL)
    return ["train", str(config), f"data.shards={digits}", f"run.dir={folder / 'run'}"]


@pytest.fixture
def small(tmp_path: Path, digits: Path) -> list[str]:
    """Arguments of `rkdo train` for a run of six small steps: four lanes, so 1, 2 or 4 ranks."""
    return _arguments(tmp_path, digits)


def _trained(arguments: list[str], *settings: str) -> Path:
    from tests.jobs import command, run_of

    code, text = command([*arguments, *settings])
    assert code == 0, text
    return run_of(arguments)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The run of `small` in one process, evaluated, with all three checkpoints. Read-only: copy it to go on with it."""
    arguments = _arguments(tmp_path_factory.mktemp("reference"), digits)
    return _trained(arguments, "evaluate.at_end=true", "train.keep_checkpoints=9")


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The run of `small` with `FORTY` steps, never interrupted: what a broken run must come to. Read-only."""
    return _trained(_arguments(tmp_path_factory.mktemp("straight"), digits), *FORTY, "train.checkpoint_every=1000")
