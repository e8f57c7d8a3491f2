"""One process, exact and averaged DDP, DeepSpeed ZeRO 1 to 3: the same gradient, and a state that all can continue."""

from __future__ import annotations

import itertools
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkdo_dist.exchange import group
from rkdo_dist.ranks import runtime
from rkdo_dist.ranks.launch import LaunchError
from tests.jobs import command, metrics, run_of, steps
from tests.launching import Script, environment, wait_until
from tests.ranks import run_ranks
from tests.strategies import ALL, ZERO, Task, gradients, launched, session, train

pytest.importorskip("deepspeed")


@cache
def single(objective: str = "rkdo") -> dict[str, Any]:
    """The reference: the same step on one process."""
    return train(0, 1, Task("exact", objective=objective))


FIRST_STEP = [(strategy, how) for how in ("kept", "recomputed", "labels", "clipped", "wrong") for strategy in ALL]
CLIP = 0.05  # a small part of the norm of the first gradient
HANDED_ON = {2: ("zero-3", "zero-1"), 4: ("zero-2", "fast", "zero-3"), 1: ("exact",)}  # world size: five steps each


@cache
def on_two_ranks() -> dict[str, Any]:
    """All that two ranks are asked for, in one go: importing DeepSpeed takes longer than the steps."""
    tasks = [
        Task(s, clip=CLIP, scale=1024.0)
        if how == "clipped"
        else Task(
            s, recompute=how == "recomputed", wrong=how == "wrong", objective="supcon" if how == "labels" else "rkdo"
        )
        for s, how in FIRST_STEP
    ]
    poisoned = [Task(s, optimizer="adam", steps=3, poison=(1,)) for s in ZERO]
    three = [Task(s, optimizer="adam", steps=3, ema=None if s == "zero-3" else 0.5) for s in ALL]
    answers = run_ranks(_on_two_ranks, 2, tasks + poisoned + three, timeout=300)
    found = {"poisoned": [answer[0][len(tasks) : -len(three)] for answer in answers], "handed on": answers[0][1]}
    found |= {(s, "three"): got for s, got in zip(ALL, answers[0][0][-len(three) :], strict=True)}
    return found | dict(zip(FIRST_STEP, answers[0][0], strict=False))


def _on_two_ranks(rank: int, world: int, tasks: list[Task]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return session(rank, world, tasks), _handed_on(rank, world, None)


def agree(got: dict[str, Any], reference: dict[str, Any], tolerance: float = 1e-5) -> bool:
    """Whether every parameter's gradient agrees, relative to its own size."""
    mine, right = gradients(got), gradients(reference)
    assert mine.keys() == right.keys()
    assert len(right) == 5
    assert all(np.linalg.norm(g) > 1e-4 for g in right.values())
    return all(np.linalg.norm(mine[n] - g) <= tolerance * np.linalg.norm(g) for n, g in right.items())


@pytest.mark.parametrize("how", ["kept", "recomputed", "labels"])
@pytest.mark.parametrize("strategy", ALL)
def test_the_first_gradient_of_every_parameter_is_that_of_one_process(strategy: str, how: str) -> None:
    got, reference = on_two_ranks()[strategy, how], single("supcon" if how == "labels" else "rkdo")
    assert agree(got, reference)
    assert got["launch"]["strategy"] == (strategy if strategy in ZERO else "ddp")
    assert got["launch"]["reduction"] == ("exact" if strategy == "exact" else "fast")
    for name, value in reference["first"]["model"].items():  # weights and batch norm's statistics
        assert np.allclose(got["first"]["model"][name], value, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("strategy", ALL)
def test_clipping_is_the_same_everywhere(strategy: str) -> None:
    """By the norm over all ranks of the gradient without loss scale, which the step reports."""
    right, got = gradients(single()), on_two_ranks()[strategy, "clipped"]
    norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in right.values()))
    assert norm > 4 * CLIP
    for how in ("kept", "clipped"):
        assert abs(on_two_ranks()[strategy, how]["norms"][0] - norm) < 1e-5 * norm
    clipped = gradients(got)
    assert (
        abs(np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in clipped.values())) - CLIP) < 1e-6 * CLIP + 1e-6
    )
    for name, gradient in right.items():
        wanted = gradient * CLIP / (norm + 1e-6)
        assert np.linalg.norm(clipped[name] - wanted) < 1e-5 * np.linalg.norm(wanted), name


@pytest.mark.parametrize("strategy", ALL)
def test_an_average_taken_twice_would_be_seen(strategy: str) -> None:
    wrong = on_two_ranks()[strategy, "wrong"]
    assert not agree(wrong, single())
    halved = {n: 2 * g for n, g in gradients(wrong).items()}
    assert all(np.allclose(halved[n], g, rtol=1e-4, atol=1e-7) for n, g in gradients(single()).items())


@pytest.mark.parametrize("strategy", ALL)
def test_the_first_three_losses_are_those_of_one_process(strategy: str) -> None:
    right = train(0, 1, Task("exact", optimizer="adam", steps=3))["losses"]
    assert len(right) == 3
    assert np.abs(np.array(on_two_ranks()[strategy, "three"]["losses"]) - right).max() < 1e-4


@pytest.mark.parametrize("strategy", ALL)
def test_the_derivative_by_the_temperature_is_that_of_one_process(strategy: str) -> None:
    (right,) = single()["slopes"]
    assert abs(right) > 0.01
    assert abs(on_two_ranks()[strategy, "three"]["slopes"][0] - right) < 1e-4 * abs(right)


@pytest.mark.parametrize("strategy", ["exact", "fast", "zero-1", "zero-2"])
def test_the_average_of_the_weights_is_that_of_one_process(strategy: str) -> None:
    right = train(0, 1, Task("exact", optimizer="adam", steps=3, ema=0.5))
    got = on_two_ranks()[strategy, "three"]
    for name, value in right["average"].items():
        assert np.abs(got["average"][name] - value).max() < 1e-4, name
        trained = right["last"]["model"][name]
        assert (np.abs(trained - value).max() > 3e-4) == (value.dtype != np.int64), name  # the control: it lags behind


@cache
def chain() -> list[dict[str, Any]]:
    """30 steps of Adam with two groups of parameters, handed on over strategies and from 2 ranks to 4 to 1."""
    found: list[dict[str, Any]] = list(on_two_ranks()["handed on"])
    found += run_ranks(_handed_on, 4, found[-1]["last"], timeout=300)[0]
    return found + _handed_on(0, 1, found[-1]["last"])


def _handed_on(rank: int, world: int, begin: Any) -> list[dict[str, Any]]:
    found = []
    for strategy in HANDED_ON[world]:
        found.append(train(rank, world, Task(strategy, optimizer="grouped", steps=5, begin=begin)))
        begin = group.from_rank_zero(found[-1]["last"])
    return found


def test_a_state_passes_between_strategies_and_world_sizes_without_losing_a_bit() -> None:
    found = chain()
    for before, after in itertools.pairwise(found):
        for part in ("model", "tensors"):
            assert before["last"][part].keys() == after["begin"][part].keys()
            for name, value in before["last"][part].items():
                assert np.array_equal(value, after["begin"][part][name]), (after["launch"], name)
        assert before["last"]["groups"] == after["begin"]["groups"]
    assert {n.rpartition(".")[2] for n in found[-1]["last"]["tensors"]} == {"exp_avg", "exp_avg_sq", "step"}
    assert float(found[-1]["last"]["tensors"]["body.4.bias.step"]) == 30


def test_thirty_steps_learn_and_follow_one_process() -> None:
    handed = [loss for part in chain() for loss in part["losses"]]
    straight: list[float] = []
    begin = None
    for _ in range(6):
        part = train(0, 1, Task("exact", optimizer="grouped", steps=5, begin=begin))
        begin, straight = part["last"], straight + part["losses"]
    assert np.abs(np.array(handed[:3]) - straight[:3]).max() < 1e-4
    assert np.abs(np.array(handed) - straight).max() < 0.02
    assert np.mean(handed[-5:]) < np.mean(handed[:5]) - 0.02
    fresh = train(0, 1, Task("exact", optimizer="grouped", steps=5, begin=_without_moments(chain()[-2]["last"])))
    assert np.abs(np.array(fresh["losses"]) - handed[-5:]).max() > 1e-4  # the control: moments that start anew show


def _without_moments(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "tensors": {}}


@pytest.mark.parametrize("strategy", ZERO)
def test_a_gradient_that_is_not_finite_stops_zero_before_any_weight_changes(strategy: str) -> None:
    ranks = [rank[ZERO.index(strategy)] for rank in on_two_ranks()["poisoned"]]
    for one in ranks:
        assert [bool(s) for s in one["skipped"]] == [False, True, False]
        assert "the gradient of step 2 is not finite" in one["skipped"][1]
        assert [norm is None for norm in one["norms"]] == [False, True, False]
    assert all(np.isfinite(a).all() for a in ranks[0]["last"]["model"].values())
    assert float(ranks[0]["last"]["tensors"]["body.4.bias.step"]) == 2


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, "gradient_clipping=1.0"),
        ({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}, "train.micro_batch"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "train.optimizer"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_deepspeed_configuration_that_would_change_the_mathematics_is_refused(
    config: dict[str, Any], word: str
) -> None:
    with pytest.raises(LaunchError, match=word):
        runtime._settle_deepspeed(config, on_cpu=True)


def test_without_deepspeed_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with launched("zero-2"), pytest.raises(LaunchError, match=r"pip install 'rkdo_dist\[deepspeed\]'"):
        runtime.start(1, 60, "exact")


@pytest.mark.parametrize("name", ["FSDP", "MEGATRON_LM"])
def test_strategies_that_are_not_run_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(LaunchError, match=name):
        runtime.start(1, 60, "exact")


@pytest.mark.slow
def test_a_real_launch_is_killed_and_goes_on_in_one_process(small: list[str], tmp_path: Path) -> None:
    """`accelerate launch --use_deepspeed --zero_stage 3` as users type it, kill -9, then plain `rkdo train`."""
    run = run_of(small)
    arguments = [*small, "train.batches_per_epoch=40", "train.checkpoint_every=2", "train.recompute=true"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--use_deepspeed"]
    words = [*accelerate, "--zero_stage", "3", "-m", "rkdo_dist", *arguments]
    with Script(words, tmp_path / "log", environment()) as launch:
        wait_until(lambda: steps(run) >= 5, launch)
        launch.kill()
        facts = json.loads((run / "environment.json").read_text())
        assert (facts["strategy"], facts["reduction"], facts["world_size"]) == ("zero-3", "fast", 2)
        assert "run.reduction=fast is in effect" in launch.text
    code, text = command([*arguments, "run.resume=auto", "train.max_steps=12"])
    assert code == 0, text
    assert "strategy: zero-3 -> single" in " ".join(text.split())
    records = metrics(run)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert all(np.isfinite(r["loss"]) for r in records)
    assert os.listdir(run / "checkpoints" / "12")
