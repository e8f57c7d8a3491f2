"""`run.branch`: a run that begins with another's weights and optimizer's state, under settings of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rkdo_dist import checkpoint
from rkdo_dist.checkpoint import Checkpoint
from tests.jobs import command, fingerprint, kill_and_resume, on_ranks

BRANCH = ("field.objective=infonce", "train.max_steps=4", "train.schedule=cosine", "train.checkpoint_every=2")


@pytest.fixture
def trunk(small: list[str]) -> Path:
    """A complete run of six steps, whose directory has the seed in its name."""
    place = Path(small[-1].removeprefix("run.dir=")).with_name("trunk-42")
    assert command([*small[:-1], f"run.dir={place}"])[0] == 0
    return place


def of(small: list[str], trunk: Path, name: str, *settings: str) -> list[str]:
    place = trunk.with_name(name)
    return [*small[:-1], *BRANCH, f"run.branch={trunk.with_name('trunk-{seed}')}", *settings, f"run.dir={place}"]


def newest(run: Path) -> Checkpoint:
    found = checkpoint.load_latest(run / "checkpoints")
    assert found is not None
    return found


def test_it_begins_where_the_other_ended(small: list[str], trunk: Path) -> None:
    still = of(small, trunk, "still", "train.learning_rate=1e-30", "train.weight_decay=0", "train.ema=0.5")
    assert command(still)[0] == 0
    begun, ended = newest(trunk), newest(trunk.with_name("still"))
    assert ended.step == 4
    weights = [name for name, value in begun.model.items() if value.is_floating_point() and "running" not in name]
    assert all(torch.equal(ended.model[name], begun.model[name]) for name in weights)
    average = ended.weights("ema")
    assert all(torch.equal(average[name], begun.model[name]) for name in weights)
    assert ended.optimizer is not None
    assert begun.optimizer is not None
    name = next(n for n in ended.optimizer.tensors if n.endswith(".step"))
    assert ended.optimizer.tensors[name] == begun.optimizer.tensors[name] + 4  # its moments are the other's
    assert {group["weight_decay"] for group in ended.optimizer.groups} == {0}  # its settings are its own
    assert command(of(small, trunk, "fresh", "train.learning_rate=1e-30", "run.branch=none"))[0] == 0
    fresh = newest(trunk.with_name("fresh"))
    assert not all(torch.equal(fresh.model[name], begun.model[name]) for name in weights)


def test_the_same_bits_on_two_processes_and_after_a_kill(small: list[str], trunk: Path) -> None:
    one = of(small, trunk, "one")
    assert command(one)[0] == 0
    assert [code for code, _ in on_ranks(2, of(small, trunk, "two"))] == [0, 0]
    killed = of(small, trunk, "killed")
    kill_and_resume(killed, [(1, 1), (2, 3)])
    shutil.move(trunk, trunk.with_name("trunk-43"))  # not looked at again
    assert command([*killed, "run.resume=auto"])[0] == 0
    bits = [fingerprint(trunk.with_name(name), 4) for name in ("one", "two", "killed")]
    assert bits[0] == bits[1] == bits[2]


def test_refusals(small: list[str], trunk: Path) -> None:
    for name, settings, words in (
        ("wider", ["encoder.embedding_dim=8"], "has another encoder or optimizer"),
        ("other", ["run.seed=7"], "trunk-7"),
    ):
        code, text = command(of(small, trunk, name, *settings))
        assert code == 2
        assert words in " ".join(text.split())
        assert not trunk.with_name(name).exists()
    (trunk / "status.json").write_text('{"status": "preempted", "step": 4}')
    code, text = command(of(small, trunk, "early"))
    assert code == 2
    assert "is not complete" in " ".join(text.split())
