"""`rkdo reproduce`, real runs: the data sets, a request to stop, a failing run, the command with its processes."""

from __future__ import annotations

import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rkdo_dist import lock
from rkdo_dist.data.prepare import prepare
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies import reproduce, runner
from rkdo_dist.studies.paper import Results
from tests.jobs import command, metrics
from tests.launching import environment
from tests.runs import Forked, locked_elsewhere

ROOT = Path(__file__).resolve().parent.parent
TINY = ("encoder.backbone=shufflenet_v2_x0_5", "train.batches_per_epoch=2", "data.workers=0")


def cifar100_files(root: Path) -> None:
    """Files in CIFAR-100's own format, 80 training and 40 test images."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in (("train", 160), ("test", 60)):
        labels = [k % 5 for k in range(count)]
        data = draw.integers(0, 256, (count, 3072), dtype=np.uint8)
        data[:, :512] = np.array(labels)[:, None] * 40
        (folder / name).write_bytes(pickle.dumps({"data": data, "fine_labels": labels, "coarse_labels": labels}))
    names = [f"class{k}" for k in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names, "coarse_label_names": names[:20]}))


def stl10_files(root: Path) -> None:
    """Files in STL-10's own format, 80 training, 40 test and 8 unlabelled images of 96 x 96."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(1)
    for name, count in (("train", 80), ("test", 40), ("unlabeled", 8)):
        (folder / f"{name}_X.bin").write_bytes(draw.integers(0, 256, count * 3 * 96 * 96, dtype=np.uint8).tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(np.array([1 + k % 4 for k in range(count)], np.uint8).tobytes())
    (folder / "class_names.txt").write_text("\n".join(f"class{k}" for k in range(10)) + "\n")
    (folder / "fold_indices.txt").write_text("0\n" * 10)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-100 and STL-10 prepared from small files in their own formats."""
    from torchvision import datasets

    root = tmp_path_factory.mktemp("files")
    cifar100_files(root / "raw")
    stl10_files(root / "raw")
    with pytest.MonkeyPatch.context() as patch:  # the files are not the published ones, and checksums would say so
        patch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
        patch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
        for name in ("cifar100", "stl10"):
            prepare(name, root / name, root / "raw")
    return root


def arguments(shards: Path, out: Path, datasets: str, processes: int = 2) -> list[str]:
    words = ["reproduce", "--datasets", datasets, "--data", str(shards), "--out", str(out), "--seeds", "7"]
    return [*words, "--epochs", "1,2", "--processes", str(processes), *(w for c in TINY for w in ("--set", c))]


def test_cifar100_and_stl10_run_where_their_data_is(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "start", Forked)
    code, text = command(arguments(shards, tmp_path, "cifar10,cifar100,stl10"))
    assert code == 0, text
    assert "CIFAR-10 is left out" in text
    facts = json.loads((tmp_path / "paper" / "reproduction.json").read_text())
    assert facts["runs"] == [f"{d}-{o}-7" for d in ("cifar100", "stl10") for o in ("icon", "rkdo")]
    assert (facts["protocol"], facts["changes"]) == ("paper", list(TINY))
    for dataset, batch in (("cifar100", 64), ("stl10", 32)):
        record = RunDirectory(tmp_path / "paper" / "runs" / f"{dataset}-rkdo-7").history()
        assert record.config.train.global_batch == batch
        assert sorted(record.evaluations) == [2, 4]
        assert record.after_epoch(2)["subset_samples"] == (60 if dataset == "cifar100" else 40)
        row = next(r for r in facts["tables"]["table1"] if (r["dataset"], r["epochs"]) == (dataset, 2))
        assert row["rkdo"] == pytest.approx(record.epochs[1].loss)
        assert not math.isnan(row["rkdo_away"])
    assert len(list((tmp_path / "paper" / "figures").iterdir())) == 10
    monkeypatch.setattr(reproduce, "all_figures", _no_figures)
    code, text = command(arguments(shards, tmp_path, "cifar100,stl10"))
    assert code == 0
    assert "4 of 4 runs are complete already" in text


def test_a_request_to_stop_reaches_the_runs_and_the_same_command_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "start", Forked)
    monkeypatch.setattr(reproduce, "all_figures", _no_figures)
    words = arguments(shards, tmp_path, "cifar100")
    run = tmp_path / "paper" / "runs" / "cifar100-rkdo-7"
    stopper = threading.Thread(target=_stop_after_first_step, args=(run / "metrics.jsonl",))
    stopper.start()
    code, text = command(words)
    stopper.join()
    assert code == 75, text
    code, text = command(words)
    assert code == 0, text
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4]
    assert len(list(run.parent.glob("*/evaluations/4.json"))) == 2


def _no_figures(results: Results, folder: Path) -> list[Path]:
    return [folder / "none.png"]


def _stop_after_first_step(journal: Path) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (journal.is_file() and journal.stat().st_size):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_failing_run_leaves_the_others_and_is_reported(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "start", Forked)
    runs = tmp_path / "paper" / "runs"
    (runs / "cifar100-rkdo-7").mkdir(parents=True)
    (runs / "cifar100-rkdo-7" / "thesis.tex").write_text("")
    with locked_elsewhere(runs / "cifar100-icon-7") as pid:
        code, text = command(arguments(shards, tmp_path, "cifar100"))
    assert code == 2
    assert "thesis.tex" in text
    assert f"cifar100-icon-7: process {pid} on {platform.node()} is working on it" in text


@pytest.mark.slow
def test_the_command_with_real_processes(shards: Path, tmp_path: Path) -> None:
    words = arguments(shards, tmp_path, "cifar100")
    process = subprocess.Popen(
        [sys.executable, "-m", "rkdo_dist", *words], stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )
    run = tmp_path / "paper" / "runs" / "cifar100-rkdo-7"
    held = False
    while process.poll() is None and not held:
        held = lock.holder(run) is not None
        time.sleep(0.05)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert held
    assert lock.holder(run) is None
    assert "Table 4" in text
