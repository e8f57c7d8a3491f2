"""Another kind of CPU, or other libraries, give other bits: recorded, compared between ranks, said on a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.jobs import command, on_ranks, rank_command, run_of
from tests.ranks import Ranks


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
