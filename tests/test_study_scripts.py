"""Scripts of studies, rehearsed on the digits: every arm trains, a chunk that ends is continued, tables are written."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

TINY = (
    "encoder.backbone=cifar_resnet8 encoder.embedding_dim=16 data.workers=0 train.global_batch=64 train.micro_batch=64 "
    "train.batches_per_epoch=2 train.warmup_epochs=0"
)


def one_gpu(experiment: str, out: Path, digits: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """launch/one-gpu.sh with three epochs of two steps on a CPU."""
    variables = {
        "RKDO": f"{sys.executable} -m rkdo_dist",
        "PYTHONPATH": str(ROOT),
        "DATA": str(digits),
        "EXTRA": TINY,
        "QUEUE": "128",
        "SEEDS": "1",
        "EPOCHS": "3",
        "START3": "1",
        "START4": "1",
        "PRECISION": "no",
    }
    command = ["bash", str(ROOT / "launch" / "one-gpu.sh"), experiment, str(out)]
    environment = os.environ | variables | changes
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.nightly
@pytest.mark.parametrize(("experiment", "arms"), [("E3", ["SimCLR", "snapshot"]), ("E4", ["MoCo", "SCE", "SCE late"])])
def test_the_experiments_for_one_gpu(experiment: str, arms: list[str], tmp_path: Path, digits: Path) -> None:
    none = one_gpu(experiment, tmp_path, digits, MINUTES="0")
    assert none.returncode == 75
    assert "the same command goes on" in none.stdout
    ended = one_gpu(experiment, tmp_path, digits)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"done: {tmp_path / experiment}" in ended.stdout
    with (tmp_path / experiment / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == arms
    assert all(float(row["knn_accuracy_backbone"]) > 0.1 for row in rows)
