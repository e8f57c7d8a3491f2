"""Online probes: curves of accuracy while training, the same on any ranks and after a restart; no weight knows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rkdo_dist
from rkdo_dist.data.order import evaluation_blocks
from rkdo_dist.evaluate import probes, scores
from rkdo_dist.evaluate.features import FrozenFeatures, gather_features
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies.report.charts import probe_chart
from rkdo_dist.studies.report.groups import read_groups
from tests.jobs import command, fingerprint, metrics, on_ranks, run_of
from tests.test_python import Pixels

PROBED = ["evaluate.probes=[linear,knn]", "evaluate.probe_every=2"]
NAMES = ("probe_linear", "probe_knn")


def without(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in NAMES} for record in records]


def curve(run: Path, name: str) -> dict[int, float]:
    return {record["step"]: record[name] for record in metrics(run) if name in record}


def test_one_curve_on_any_ranks_and_after_a_restart_and_the_weights_do_not_know(
    small: list[str], reference: Path
) -> None:
    runs = []
    for world in (1, 4):
        run = run_of(small).with_name(f"probed{world}")
        answers = on_ranks(world, [*small, *PROBED, f"run.dir={run}"])
        assert [code for code, _ in answers] == [0] * world, answers
        assert fingerprint(run, 6) == fingerprint(reference, 6)
        assert without(metrics(run)) == metrics(reference)
        runs.append(metrics(run))
    assert runs[0] == runs[1]
    for name in NAMES:
        assert list(curve(run, name)) == [2, 4, 6]
        assert 0.2 < curve(run, name)[6] <= 1  # ten classes
    shutil.rmtree(run / "checkpoints" / "6")  # as after a kill at step 5
    (run / "checkpoints" / "latest").write_text("4\n")
    assert on_ranks(2, [*small, *PROBED, f"run.dir={run}", "run.resume=auto"])[0][0] == 0
    assert metrics(run) == runs[0]


def test_a_probe_is_what_it_says(small: list[str], reference: Path) -> None:
    """The last probe, computed again from the checkpoint by `load_encoder`, with all images of blocks evenly spaced."""
    code, text = command([*small, *PROBED, "train.max_steps=2"])
    assert code == 0, text
    run = RunDirectory(run_of(small))
    encoder, index = rkdo_dist.load_encoder(run.path), rkdo_dist.parts.open_index(run.config())  # type: ignore[attr-defined]
    arrays: list[Any] = []
    for split in ("train", "test"):
        from rkdo_dist.data.stream import evaluation_stream

        counts = index.split(split).counts
        whole = gather_features(evaluation_stream(index, split, 32), _embedding(encoder), sum(counts))
        assert whole is not None
        blocks = -(-len(whole.ids) // 32)
        places = range(blocks) if blocks <= 32 else [k * blocks // 32 for k in range(32)]
        rows = [i for b in places for i in range(32 * b, min(32 * b + 32, len(whole.ids)))]
        assert len(rows) == min(1024, len(whole.ids))
        arrays += [whole.backbone[rows], whole.labels[rows]]
    assert probe_chart(read_groups([reference])[0]) is None
    figure = probe_chart(read_groups([run.path])[0])
    assert [panel.get_title("left") for panel in figure.axes] == ["linear probe (backbone)", "k-NN probe (backbone)"]
    assert curve(run.path, "probe_knn") == {2: scores.knn_accuracy(*arrays)}
    assert curve(run.path, "probe_linear") == {2: scores.linear_evaluation(*arrays, standardise=True)}


def _embedding(encoder: Any) -> Any:
    return lambda images: encoder.features(encoder.transform.plain(images))


class Dropping(nn.Module):
    """Dropout and batch norm, which a careless probe would disturb."""

    feature_dim = 12

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 12)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def test_dropout_and_batch_norm_are_not_disturbed(small: list[str], tmp_path: Path) -> None:
    settings = {"data.shards": small[2].partition("=")[2], "encoder.backbone": "resnet18"}
    found = []
    for name, extra in (("plain", {}), ("probed", {"evaluate": {"probes": ["knn", "linear"], "probe_every": 1}})):
        torch.manual_seed(1)
        run = rkdo_dist.train(
            small[1], encoder=Dropping(), settings={**settings, "run.dir": tmp_path / name, **extra}
        ).path
        found.append((fingerprint(run, 6), without(metrics(run))))
    assert found[0] == found[1]
    assert len(curve(run, "probe_knn")) == 6


def test_blocks_evenly_spaced() -> None:
    def ids(spread: int, rank: int, world: int) -> Iterator[tuple[int, list[int]]]:
        for number, windows in evaluation_blocks([10, 15, 0, 8], 4, rank, world, spread=spread):
            yield number, [w.shard * 100 + i for w in windows for i in range(w.start, w.stop)]

    assert list(ids(9, 0, 1)) == list(ids(50, 0, 1))  # 33 samples are nine blocks, the last of one sample
    three = dict(ids(3, 0, 1))
    assert three == {0: [0, 1, 2, 3], 1: [102, 103, 104, 105], 2: [114, 300, 301, 302]}
    assert dict(ids(3, 0, 2)) | dict(ids(3, 1, 2)) == three


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_an_unknown_probe(small: list[str]) -> None:
    code, text = command([*small, "evaluate.probes=[linaer]"])
    assert code == 2
    assert "did you mean 'linear'" in text
    code, text = command([*small, "evaluate.probes=[knn]", "evaluate.probe_every=0"])
    assert code == 2
    assert "evaluate.probe_every must be at least 1" in text
    assert not run_of(small).exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": Pixels(24, labels=False), "test": Pixels(8)}, "python:Pixels has no labels in it"),
        ({"train": Pixels(24)}, "python:Pixels has no split 'test'"),
    ],
)
def test_data_without_labels_are_refused_before_the_first_step(tmp_path: Path, data: Any, said: str) -> None:
    settings = {"evaluate.probes": ["knn"], "data.workers": 0, "train": {"global_batch": 8, "micro_batch": 8}}
    with pytest.raises(ValueError, match=said) as caught:
        rkdo_dist.train(
            settings, data=data, settings={"run.dir": tmp_path / "run", "encoder.backbone": "cifar_resnet8"}
        )
    assert "leave evaluate.probes out" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_images_of_one_class_give_no_accuracy() -> None:
    import numpy as np

    some = FrozenFeatures(np.arange(30), np.zeros(30, dtype=np.int64), np.ones((30, 2), np.float32), np.ones((30, 2)))
    with pytest.warns(UserWarning, match="one class only"):
        assert probes._accuracies(("knn",), some, some) == {"probe_knn": None}
