"""Another kind of CPU, or other libraries, give other bits: recorded, compared between ranks, said on a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rkdo_dist.checkpoint import optimizer_to_tensors, tensors_to_optimizer
from rkdo_dist.field import fused
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks.agreement import agreed_kernel
from rkdo_dist.ranks.arithmetic import as_before, choose
from tests.jobs import command, metrics, on_ranks, rank_command, run_of
from tests.ranks import Ranks, run_ranks


def _on_other_arithmetic(rank: int, world: int, arguments: list[str]) -> tuple[int, str]:
    if rank == 1:
        os.environ["MKL_CBWR"] = "COMPATIBLE"
    return rank_command(rank, world, arguments)


def test_ranks_of_different_arithmetic_are_refused_where_bits_are_promised(small: list[str]) -> None:
    with Ranks(_on_other_arithmetic, 2, (small,), timeout=60) as ranks:
        answers = ranks.answers()
    for code, text in (answers[rank][1] for rank in (0, 1)):
        assert code == 2
        words = " ".join(text.split())
        assert "ranks disagree on MKL_CBWR: rank 0 has , rank 1 has COMPATIBLE" in words
        assert "machines of one kind" in words
    assert not (run_of(small) / "metrics.jsonl").exists()


def test_a_resume_on_another_kind_of_cpu_is_said(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run: Path = run_of(small)
    assert command([*small, "train.max_steps=2"])[0] == 0
    recorded = json.loads((run / "environment.json").read_text())["arithmetic"]
    assert recorded["CPU capability"]
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    code, text = command([*small, "train.max_steps=4", "run.resume=auto"])
    assert code == 0, text
    assert "other arithmetic (MKL_CBWR: -> COMPATIBLE): the run goes on, but not with the same bits" in " ".join(
        text.split()
    )
    monkeypatch.delenv("MKL_CBWR")
    assert [code for code, _ in on_ranks(2, [*small, "run.resume=auto"])] == [0, 0]


def test_fast_sums_are_formed_by_any_arithmetic_and_that_is_said(small: list[str]) -> None:
    with Ranks(_on_other_arithmetic, 2, ([*small, "run.reduction=fast"],), timeout=60) as ranks:
        answers = ranks.answers()
    (code, text), (other, silence) = (answers[rank][1] for rank in (0, 1))
    assert (code, other) == (0, 0), text + silence
    assert "ranks compute by different arithmetic (MKL_CBWR: and COMPATIBLE)" in " ".join(text.split())


def _chosen() -> tuple[bool, ...]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    deterministic = cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    return matmul.allow_tf32, cudnn.allow_tf32, *deterministic, torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(
    ("exact", "precision", "expected"),
    [
        (True, None, (False, False, True, True, False)),
        (True, "high", (True, True, True, True, False)),
        (False, None, (True, True, False, False, True)),
        (False, "highest", (False, False, False, False, True)),
    ],
)
def test_algorithms_of_a_gpu_are_chosen_and_left_as_they_were(exact: bool, precision: Any, expected: Any) -> None:
    before = _chosen()
    with as_before():
        choose(torch.device("cpu"), exact, precision)
        assert _chosen() == before  # a CPU leaves no choice
        choose(torch.device("cuda"), exact, precision)
        assert _chosen() == expected
    assert _chosen() == before


@pytest.mark.parametrize("world", [1, 2])
def test_a_backbone_without_deterministic_algorithms_is_refused_by_name(small: list[str], world: int) -> None:
    """MaxUnpool2d has none on a CPU either."""
    words = [*small, "encoder.backbone=tests.nets:Unpooling"]
    for code, text in run_ranks(_deterministic_command, world, words):
        assert code == 2, text
        assert (
            "encoder.backbone=tests.nets:Unpooling uses max_unpooling2d_forward_out, which has no deterministic "
            "algorithm on cpu, so run.reduction=exact cannot keep its promise"
        ) in " ".join(text.split())
    assert not (run_of(small) / "metrics.jsonl").exists()


def _deterministic_command(rank: int, world: int, arguments: list[str]) -> tuple[int, str]:
    torch.use_deterministic_algorithms(True)
    return command(arguments)


def test_how_a_device_computes_is_no_part_of_a_checkpoint() -> None:
    module = nn.Linear(3, 2)
    fused, plain = (
        torch.optim.Adam(module.parameters(), lr=rate, fused=fused) for rate, fused in ((0.1, True), (1, None))
    )
    module(torch.ones(3)).sum().backward()
    fused.step()
    saved = optimizer_to_tensors(fused, module.named_parameters())
    tensors_to_optimizer(saved, plain, module.named_parameters())
    assert plain.param_groups[0]["fused"] is None
    assert plain.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(plain.state[p]["exp_avg"], fused.state[p]["exp_avg"]) for p in module.parameters())
    plain.step()  # its counter of steps is where it wants it


NO_COMPILER = "RuntimeError: Failed to find C compiler. Please specify via CC environment variable."


def _with_kernels(rank: int, world: int, arguments: list[str], broken: bool) -> tuple[Any, str, bool | None]:
    """A job whose devices have a fused kernel; on rank 1 there is no C compiler for it, if `broken`."""
    fused.fusible = lambda *_: True  # type: ignore[assignment]
    fused.self_check = lambda *_: NO_COMPILER if broken and rank == 1 else None  # type: ignore[assignment]
    if broken:
        return *command(arguments), fused._settled
    return 0, agreed_kernel(Objective.rkdo(), torch.device("cpu")), fused._settled


def test_all_ranks_use_the_eager_kernel_if_the_fused_one_fails_on_one(small: list[str], reference: Path) -> None:
    answers = run_ranks(_with_kernels, 2, small, True)
    assert [(code, settled) for code, _, settled in answers] == [(0, False), (0, False)], answers
    said = f"the fused kernel fails its self-check, so all ranks use the eager one (rank 1: {NO_COMPILER})"
    assert " ".join("".join(text for _, text, _ in answers).split()).count(said) == 1
    assert json.loads((run_of(small) / "environment.json").read_text())["kernel"] == f"eager (rank 1: {NO_COMPILER})"
    assert metrics(run_of(small)) == metrics(reference)
    assert run_ranks(_with_kernels, 2, small, False) == [(0, "fused (self-check passed)", True)] * 2
