"""What is read at start and at resume: each byte once on a node, all ranks together, and one verdict."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from rkdo_dist import checkpoint
from rkdo_dist.checkpoint import manifest
from rkdo_dist.data import shards
from rkdo_dist.data.index import DataError, ShardIndex, load_index
from rkdo_dist.data.prepare import prepare
from rkdo_dist.exchange import group
from tests.checkpoints import content, write
from tests.pictures import image_folder
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 training samples in 7 shards."""
    root = tmp_path_factory.mktemp("shards")
    prepare("imagefolder", root / "s", image_folder(root / "f", train=100, test=4), shard_size=15)
    return root / "s"


def counted(module: Any, name: str) -> list[str]:
    """What `module.name` is called with from now on."""
    function, seen = getattr(module, name), []

    def noted(*arguments: Any) -> Any:
        seen.append(Path(str(arguments[0] if len(arguments) == 1 else arguments[1])).name)
        return function(*arguments)

    setattr(module, name, noted)
    return seen


def open_all(index: ShardIndex) -> str:
    try:
        for shard in index.split("train").shards:
            shards.open_shard(index, shard).close()
    except DataError as error:
        return str(error)
    return ""


def read_shards(rank: int, world: int, root: Path) -> dict[str, Any]:
    """What each rank hashes: at the start its share, then, of all shards, nothing, those changed since excepted."""
    index, found, hashed = load_index(root), {}, counted(shards, "_verify")
    with shards.verified_once(index) as shared:
        assert shared.digest() == index.digest()
        shards.check_shards(shared, "train")
        found["start"] = [*hashed]
        group.barrier()
        shards._verified.clear()
        found["said"] = [open_all(shared)]
        found["epoch"] = hashed[len(found["start"]) :]
        group.barrier()
        if rank == 0:
            os.utime(root / "train-00001.tar", ns=(1, 1))  # the same bytes, but nobody can know
            (root / "train-00003.tar").write_bytes(bytes((root / "train-00003.tar").stat().st_size))
        group.barrier()
        shards._verified.clear()
        found["said"].append(open_all(shared))
        found["again"] = hashed[len(found["start"]) + len(found["epoch"]) :]
        group.barrier()
        if rank == 0:
            assert shared.verified is not None
            assert shared.verified.stat().st_mode & 0o777 == 0o700
            shutil.rmtree(shared.verified)
        group.barrier()
        shards._verified.clear()
        open_all(shared)  # without notes, everybody verifies
        found["alone"] = hashed[-4:]
    assert not shared.verified.exists()
    return found


def test_a_shard_is_hashed_once_on_a_node(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "s")
    first, second = run_ranks(read_shards, 2, tmp_path / "s")
    names = [f"train-{k:05d}.tar" for k in range(7)]
    assert first["start"] == names[::2]
    assert second["start"] == names[1::2]
    assert first["epoch"] == second["epoch"] == []
    assert sorted(first["again"] + second["again"]) == [names[1], names[3], names[3]]  # a failure is no verification
    for found in (first, second):
        assert found["said"][0] == ""
        assert "train-00003.tar is damaged" in found["said"][1]
        assert found["alone"] == names[:4]


def without_notes(rank: int, world: int, root: Path) -> list[str]:
    index, hashed = load_index(root), counted(shards, "_verify")
    open_all(index)
    return hashed


def test_the_control_every_rank_hashes_every_shard(prepared: Path) -> None:
    assert [len(hashed) for hashed in run_ranks(without_notes, 2, prepared)] == [7, 7]


def resume(rank: int, world: int, root: Path) -> dict[str, Any]:
    hashed = counted(manifest, "sha256_of")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = checkpoint.load_latest(root, together=True)
        by_one_node = [*hashed]
        with mock.patch.dict(os.environ, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}):  # as if each were on its own
            checkpoint.load_latest(root, together=True)
    weights = None if found is None else {name: x.numpy() for name, x in found.model.items()}
    rows = None if found is None else found.part("field.0")["rows"].tolist()
    step = None if found is None else found.step
    facts = {"hashed": by_one_node, "alone": hashed[len(by_one_node) :], "step": step, "weights": weights, "rows": rows}
    return {**facts, "said": [str(w.message) for w in said]}


FILES = ["model.safetensors", "optimizer.safetensors", "field.0.safetensors", "state.json"]  # of rank 0, 1, 0, 1


@pytest.mark.parametrize("damaged", [None, "model.safetensors", "optimizer.safetensors"])
def test_ranks_of_a_node_verify_a_checkpoint_together(tmp_path: Path, damaged: str | None) -> None:
    """Whichever rank finds the damage, all use the checkpoint before."""
    for step in (1, 2):
        write(tmp_path, step)
    if damaged is not None:
        file = next((tmp_path / "2").rglob(damaged))
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    answers = run_ranks(resume, 2, tmp_path)
    for answer in answers:
        assert answer["rows"] == list(range(answer["step"], answer["step"] + 7))
        assert all(np.array_equal(x, answer["weights"][name]) for name, x in content(0)[0].items())
        assert answer["step"] == (2 if damaged is None else 1)
        assert (damaged is None) == (answer["said"] == [])
        assert damaged is None or f"{damaged} has changed" in answer["said"][0]
    hashed = sorted(name for answer in answers for name in answer["hashed"])
    assert sorted({*hashed}) == sorted(FILES)
    assert damaged is not None or len(hashed) == len(FILES)
    if damaged is None:  # on two nodes, each hashes every file once
        assert [sorted(answer["alone"]) for answer in answers] == [sorted(FILES)] * 2


def test_nothing_to_continue(tmp_path: Path) -> None:
    assert [answer["step"] for answer in run_ranks(resume, 2, tmp_path / "none")] == [None, None]


def test_a_part_is_hashed_by_who_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256_of = manifest.sha256_of
    building = checkpoint.begin(tmp_path, 5)
    known = checkpoint.write_parts(building, {"rows.1": {"x": torch.ones(2)}})
    hashed: list[str] = []
    monkeypatch.setattr(manifest, "sha256_of", lambda path: (hashed.append(path.name), sha256_of(path))[1])
    checkpoint.write_parts(building, {"rows.2": {"x": torch.ones(2)}})
    checkpoint.commit(building, {"w": torch.ones(1)}, known=known)
    assert sorted(hashed) == ["model.safetensors", "rows.2.safetensors", "rows.2.safetensors", "state.json"]
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "5").parts == ("rows.1", "rows.2")
