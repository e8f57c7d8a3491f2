"""bf16 and fp16: embeddings in float32, the same under every strategy, and overflows that all ranks see alike."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from rkdo_dist.ranks.loss_scale import SMALLEST, LossScale
from rkdo_dist.training.reproducible import check_half_precision
from tests.ranks import run_ranks
from tests.strategies import ALL, Task, session, train
from tests.test_strategies import agree, single

pytest.importorskip("deepspeed")
SCALE = 2.0**12
LOW = ("bf16", "fp16")


@cache
def on_two_ranks() -> list[list[dict[str, Any]]]:
    """Per rank: the first step in bf16 and in fp16, an overflow, and a loss scale in float32; each by strategy."""
    tasks = [Task(s, precision=precision) for precision in LOW for s in ALL]
    tasks += [Task(s, optimizer="adam", scale=SCALE, steps=3, poison=(1,)) for s in ALL]
    tasks += [Task(s, scale=SCALE) for s in ALL]
    return run_ranks(session, 2, tasks, timeout=200)


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("precision", LOW)
def test_half_precision_is_the_same_under_every_strategy(precision: str, strategy: str) -> None:
    one = train(0, 1, Task("exact", precision=precision))
    got = on_two_ranks()[0][LOW.index(precision) * len(ALL) + ALL.index(strategy)]
    assert got["launch"]["precision"] == one["launch"]["precision"] == precision
    assert got["scales"] == one["scales"] == [2.0**16 if precision == "fp16" else None]
    assert got["dtypes"] == ["torch.float32"]
    assert agree(got, one, tolerance=1e-3)
    assert not agree(got, single(), tolerance=2e-3)  # the control: float32 computes something else
    assert agree(got, single(), tolerance=0.2)
    assert all(a.dtype in (np.float32, np.int64) for a in got["last"]["model"].values())


@pytest.mark.parametrize("precision", LOW)
def test_exact_stays_exact_in_half_precision(precision: str) -> None:
    one = train(0, 1, Task("exact", precision=precision))
    two = on_two_ranks()[0][LOW.index(precision) * len(ALL) + ALL.index("exact")]
    for part in ("model", "tensors"):
        assert all(np.array_equal(a, two["last"][part][n]) for n, a in one["last"][part].items())


@pytest.mark.parametrize("strategy", ALL)
def test_an_overflow_on_one_rank_skips_the_step_on_all(strategy: str) -> None:
    got = [rank[2 * len(ALL) + ALL.index(strategy)] for rank in on_two_ranks()]
    for one in got:
        assert [bool(s) for s in one["skipped"]] == [False, True, False]
        assert "overflow" in one["skipped"][1]
        assert one["scales"] == [SCALE, SCALE, SCALE / 2]
        assert one["last"]["loss_scale"] == {"scale": SCALE / 2, "steps_since_overflow": 1}
    last = got[0]["last"]
    assert all(np.isfinite(a).all() for a in last["model"].values())
    assert int(last["model"]["body.1.num_batches_tracked"]) == 2
    assert float(last["tensors"]["body.4.bias.step"]) == 2


@pytest.mark.parametrize("strategy", ALL)
def test_a_loss_scale_leaves_the_gradient_as_it_is(strategy: str) -> None:
    assert agree(on_two_ranks()[0][3 * len(ALL) + ALL.index(strategy)], single())


def test_the_scale_follows_overflows_and_survives_a_checkpoint() -> None:
    scale = LossScale(8.0, growth_interval=2)
    for overflow, expected in ((False, 8.0), (False, 16.0), (True, 8.0), (False, 8.0)):
        scale.update(overflow)
        assert scale.scale == expected
    other = LossScale(growth_interval=2)
    other.load(scale.state())
    other.update(False)
    assert other.scale == 16.0


def test_a_gradient_that_no_scale_can_save_ends_the_run() -> None:
    got = train(0, 1, Task("exact", scale=2 * SMALLEST, steps=3, poison=(0, 1, 2)))
    assert "overflow" in got["skipped"][0]
    assert "not finite at any loss scale" in got["skipped"][2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the same on a GPU needs one")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["exact", "fast"])
def test_training_in_half_precision_on_a_gpu(strategy: str, precision: str) -> None:
    got = train(0, 1, Task(strategy, precision=precision, optimizer="adam", steps=30))
    assert got["launch"]["precision"] == precision
    assert got["dtypes"] == ["torch.float32"]
    assert np.mean(got["losses"][-5:]) < np.mean(got["losses"][:5])


@pytest.mark.parametrize(("size", "name"), [(8, "layer3.0.conv1"), (32, None)])
def test_convolutions_whose_gradient_is_wrong_in_half_precision_are_refused(size: int, name: str | None) -> None:
    encoder = torchvision.models.resnet18(num_classes=4)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return encoder(images)

    refused = pytest.raises(ValueError, match=f"resnet18 has a convolution .{name}.*--mixed_precision no")
    with refused if name else contextlib.nullcontext():
        check_half_precision(forward, encoder, "resnet18", size)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
