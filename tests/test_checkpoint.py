"""Checkpoints: what is saved comes back bit by bit, and the newest are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rkdo_dist import checkpoint
from rkdo_dist.checkpoint import CheckpointError
from tests.checkpoints import in_memory, network, quietly, same, take_steps, whole, write


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with in_memory() as folder:
        yield Path(folder)


# --- there and back ---------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert quietly(root) is None
    write(root, 10)
    assert whole(quietly(root), 10)
    write(root, 200)
    assert whole(quietly(root), 200)
    assert whole(checkpoint.load(root / "10"), 10)
    assert (root / "latest").read_text() == "200\n"
    assert sorted(p.relative_to(root / "200").as_posix() for p in (root / "200").rglob("*.*")) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "parts/field.0.safetensors",
        "state.json",
    ]
    assert "3.exp_avg" not in checkpoint.load(root / "10").optimizer.tensors  # type: ignore[union-attr]
    assert "3.weight.exp_avg" in checkpoint.load(root / "10").optimizer.tensors  # type: ignore[union-attr]


def test_every_dtype_shape_and_layout_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    tensors = {
        "bf16": torch.randn(3, 2).bfloat16(),
        "f16": torch.randn(5).half(),
        "f64": torch.randn(5, dtype=torch.float64),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "transposed": torch.randn(4, 6).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "tied": shared,
        "tied.too": shared,
        "slice": shared[3:7],
        "parameter": nn.Parameter(torch.randn(2)),
    }
    checkpoint.save(tmp_path, 0, tensors)
    found = quietly(tmp_path)
    assert found is not None
    assert found.optimizer is None
    assert found.extra == {}
    for name, tensor in tensors.items():
        assert found.model[name].dtype == tensor.dtype
        assert torch.equal(found.model[name].nan_to_num(9), tensor.detach().nan_to_num(9)), name
    assert str(found.model["odd"][2].item()) == "-0.0"


def test_loaded_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found = quietly(tmp_path)
    (tmp_path / "1" / "model.safetensors").write_bytes(b"")
    assert whole(found, 1)


def test_parts_are_written_by_their_owners(tmp_path: Path) -> None:
    building = checkpoint.begin(tmp_path, 5)
    checkpoint.write_parts(building, {"rows.1": {"x": torch.ones(2)}})
    checkpoint.write_parts(building, {"rows.0": {"x": torch.zeros(3)}})
    assert checkpoint.load_latest(tmp_path) is None
    checkpoint.commit(building, {"w": torch.ones(1)})
    found = quietly(tmp_path)
    assert found is not None
    assert found.parts == ("rows.0", "rows.1")
    assert torch.equal(found.part("rows.0")["x"], torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"no part 'rows.2', only rows.0, rows.1"):
        found.part("rows.2")
    for name in ("../evil", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="part's name"):
            checkpoint.write_parts(building, {name: {}})


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="negative"):
        checkpoint.save(tmp_path, -1, {})
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.save(tmp_path, 1, {}, keep=0)
    with pytest.raises(ValueError, match="w is a list"):
        checkpoint.save(tmp_path, 1, {"w": [1]})  # type: ignore[dict-item]


# --- the optimizer ----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-5, betas=(0.8, 0.99)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1 + 0.2, amsgrad=True),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.03)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "adafactor": torch.optim.Adafactor,
}


def grouped(module: nn.Module, backwards: bool = False) -> list[dict[str, Any]]:
    """Biases without weight decay, the usual second group; parameters in another order if asked."""
    named = list(module.named_parameters())[:: -1 if backwards else 1]
    return [
        {"params": [p for n, p in named if "weight" in n], "weight_decay": 0.1},
        {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_continues_bit_by_bit(kind: str, tmp_path: Path) -> None:
    module = network()
    optimizer = OPTIMIZERS[kind](grouped(module))
    take_steps(module, optimizer, range(3))
    state = checkpoint.optimizer_to_tensors(optimizer, module.named_parameters())
    checkpoint.save(tmp_path, 3, module.state_dict(), state)

    restored = network(seed=9)
    continued = OPTIMIZERS[kind](grouped(restored, backwards=True))
    take_steps(restored, continued, range(5, 6))  # state that has to go
    for group in continued.param_groups:
        group["lr"] = 77.0
    found = quietly(tmp_path)
    assert found is not None
    assert found.optimizer is not None
    restored.load_state_dict(found.model)
    checkpoint.tensors_to_optimizer(found.optimizer, continued, dict(restored.named_parameters()))
    again = checkpoint.optimizer_to_tensors(continued, restored.named_parameters())
    assert same(again.tensors, state.tensors)
    assert again.scalars == state.scalars
    for group, other in zip(optimizer.param_groups, continued.param_groups, strict=True):
        assert {k: (type(v), v) for k, v in group.items() if k != "params"} == {
            k: (type(v), v) for k, v in other.items() if k != "params"
        }
    take_steps(module, optimizer, range(3, 6))
    take_steps(restored, continued, range(3, 6))
    assert same(restored.state_dict(), module.state_dict())


def test_an_optimizer_that_does_not_fit_is_refused_unchanged() -> None:
    module = network()
    optimizer = torch.optim.Adam(module.parameters())
    take_steps(module, optimizer, range(1))
    state = checkpoint.optimizer_to_tensors(optimizer, module.named_parameters())
    fewer = torch.optim.Adam(list(module.parameters())[:-1])
    with pytest.raises(ValueError, match=r"parameters differ, the first is 3\.bias"):
        checkpoint.tensors_to_optimizer(state, fewer, module.named_parameters())
    with pytest.raises(ValueError, match="groups differ"):
        checkpoint.tensors_to_optimizer(state, torch.optim.Adam(grouped(module)), module.named_parameters())
    with pytest.raises(ValueError, match="6 of 6 parameters in group 0 have no name"):
        checkpoint.optimizer_to_tensors(optimizer, network().named_parameters())
    wide = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    untouched = torch.optim.Adam(wide.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=r"0\.weight\.exp_avg has shape \(8, 4\), its parameter \(9, 4\)"):
        checkpoint.tensors_to_optimizer(state, untouched, wide.named_parameters())
    assert not untouched.state
    assert untouched.param_groups[0]["lr"] == 0.5


# --- retention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    for i, step in enumerate((1, 5, 30, 200, 1000)):
        write(tmp_path, step, keep)
        expected = [1, 5, 30, 200, 1000][max(0, i + 1 - keep) : i + 1]
        assert sorted(int(p.name) for p in tmp_path.iterdir() if p.is_dir()) == expected
        assert whole(quietly(tmp_path), step)


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "2" / "manifest.json").unlink()
    write(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["1", "3", "latest"]


def test_strangers_are_left_alone_and_remains_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "007").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".5.tmp" / "parts").mkdir(parents=True)
    (tmp_path / ".latest.0123.tmp").write_text("5")
    write(tmp_path, 6)
    assert sorted(os.listdir(tmp_path)) == ["007", "6", "best", "latest", "notes.txt"]


def test_the_same_step_again(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    before = (tmp_path / "2" / "model.safetensors").stat()
    write(tmp_path, 2)
    assert (tmp_path / "2" / "model.safetensors").stat().st_ino == before.st_ino  # equal: kept
    write(tmp_path, 2, seed=77)
    assert whole(quietly(tmp_path), 2, seed=77)  # another: replaced
    (tmp_path / "2" / "state.json").write_bytes(b"{}")
    write(tmp_path, 2)
    assert whole(quietly(tmp_path), 2)  # damaged: replaced
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "latest"]
