"""What a run says while it trains: the progress line at 80 columns and in a pipe, and collapse in words."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rkdo_dist.evaluate.maps import tsne
from rkdo_dist.training.collapse import STEPS, Collapse
from rkdo_dist.training.journal import Journal
from tests.jobs import command, metrics, run_of


def shown(tmp_path: Path, terminal: bool, *records: dict[str, Any]) -> list[str]:
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=terminal, color_system=None)
    with Journal(tmp_path / "metrics.jsonl", 0, 1200, 10, console, "rkdo") as journal:
        for number, record in enumerate(records):
            journal._plain_at = 0.0 if number else journal._plain_at
            placed = {"loss_at_uniform": 2.0, "loss_at_ideal": 1.0, "pairs_per_second": 1234.5}
            journal.step({"step": 131 + number, "epoch": 1, **placed, **record})
    return [line for line in re.split(r"[\r\n]+|\x1b\[[0-9;?]*[A-Za-z]", text.getvalue()) if line.strip()]


def test_the_line_says_where_the_loss_lies_and_fits_80_columns(tmp_path: Path) -> None:
    probes = {"probe_linear": 0.912, "probe_knn": 0.899}
    for records, words in (
        ([{"loss": 1.4}], "epoch 2/10  loss 1.4000 (60%)  1234 pairs/s"),
        ([{"loss": 2.004}], "loss 2.0040 (0%)"),
        ([{"loss": 2.2}], "loss 2.2000 (-20%)"),
        ([{"loss": None}], "epoch 2/10  skipped  1234 pairs/s"),
        ([{"loss": 1.4, "loss_at_uniform": None}], "loss 1.4000  1234"),
        ([{"loss": 1.3, **probes}, {"loss": 1.2}], "epoch 2/10  loss 1.2000 (80%)  linear 0.91  knn 0.90"),
        ([{"loss": 1.3, **probes}, {"loss": 1.2, "probe_knn": None}], "knn 0.90"),
    ):
        line = shown(tmp_path, True, *records)[-1]
        assert words in line
        assert f"{130 + len(records)}/1200" in line
        assert len(line) <= 80
        plain = shown(tmp_path, False, *records)[-1]
        assert plain.startswith(f"rkdo: step {130 + len(records)}/1200  ")
        assert words in plain
        assert re.search(r"  ETA \d+:\d\d:\d\d$", plain)
        assert len(plain) <= 90


# --- collapse -----------------------------------------------------------------------------------------------------


def test_collapse_is_a_loss_at_uniform_for_long() -> None:
    watch, noticed = Collapse(), []
    losses = [2.0] * (STEPS - 1) + [1.9] + [2.0004] * 30 + [None] + [1.9995] * (STEPS + 20)
    for step, loss in enumerate(losses, start=1):
        if watch.add(step, loss, 2.0, 1.0):
            noticed.append(step)
        again = Collapse()
        again.restore(json.loads(json.dumps(watch.state())))
        watch = again
    assert noticed == [STEPS + 31 + STEPS]
    assert watch.noticed == noticed[0]
    for at_uniform, at_ideal in ((None, 1.0), (2.0, None), (2.0, 2.0)):  # not known, or nothing to be gained
        watch = Collapse()
        assert not any(watch.add(step, 2.0, at_uniform, at_ideal) for step in range(2 * STEPS))


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> list[str]:
    """Arguments of a run that weight decay has crushed. Read-only."""
    from tests.conftest import _arguments

    arguments = [*_arguments(tmp_path_factory.mktemp("collapsed"), digits), "train.batches_per_epoch=44"]
    arguments += ["train.epochs=2", "train.max_steps=60", "train.checkpoint_every=30", "train.optimizer=adamw"]
    arguments += ["train.weight_decay=100", "train.learning_rate=0.01", "train.keep_checkpoints=9"]
    code, text = command(arguments)
    assert code == 0, text
    (warning,) = [line for line in text.splitlines() if "warning: collapse" in line]
    assert warning.startswith("rkdo: warning: collapse at step ")
    assert "train.weight_decay" in warning
    return arguments


def test_collapse_is_said_once_and_kept(collapsed: list[str], tmp_path: Path) -> None:
    run = run_of(collapsed)
    at = [record["step"] for record in metrics(run) if "collapsed" in record]
    assert len(at) == 1
    assert STEPS <= at[0] < 60
    code, text = command(["status", str(run)])
    assert code == 0
    assert f"collapse at step {at[0]}: " in text
    for cut in (30, 60):  # continued before and after it was noticed
        copy = shutil.copytree(run, tmp_path / str(cut))
        for step in (30, 60):
            if step > cut:
                shutil.rmtree(copy / "checkpoints" / str(step))
        (copy / "checkpoints" / "latest").write_text(f"{cut}\n")
        code, text = command([*collapsed, f"run.dir={copy}", "run.resume=auto"])
        assert code == 0, text
        assert ("warning: collapse" in text) == (cut == 30)
        assert metrics(copy) == metrics(run)
        assert "collapse" in json.loads((copy / "status.json").read_text())["remark"]


def test_a_map_of_one_point() -> None:
    point = np.full((20, 4), 0.5, np.float32)
    assert tsne(point).tolist() == [[0.0, 0.0]] * 20
    assert tsne(point + np.float32(1e-9) * np.arange(20, dtype=np.float32)[:, None]).tolist() == [[0.0, 0.0]] * 20
