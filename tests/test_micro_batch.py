"""`train.micro_batch=auto`: a number that every rank can hold, chosen once and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.config import ConfigError
from rkdo_dist.exchange import group
from rkdo_dist.ranks import runtime
from rkdo_dist.training import machine, memory
from rkdo_dist.training.micro_batch import ROOM, candidates, resolved
from rkdo_dist.training.shape import shape_of
from tests.jobs import command, fingerprint, metrics, on_ranks, run_of
from tests.ranks import run_ranks

AUTO = "train.micro_batch=auto"


def test_candidates_give_every_rank_whole_lanes() -> None:
    assert candidates(24, 1) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert candidates(24, 4) == [1, 2, 3, 6]
    assert candidates(24, 5) == []


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, whole = torch.device("cpu"), machine.available_bytes(torch.device("cpu"))
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.available_bytes(cpu) > whole / 2  # no limit is written there
    for name, text in (("max", "90000\n"), ("current", "80000\n"), ("stat", "anon 5\ninactive_file 3000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine.available_bytes(cpu) == 13000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes(cpu) > whole / 2


def chosen(rank: int, world: int, config: configuration.Config, free: list[int]) -> Any:
    """What each of several memories, larger on later ranks, leads to; and what each candidate needs."""
    rt, index = runtime.start(1, 60, "exact"), parts.open_index(config)
    found = []
    for bytes_free in free:
        machine.available_bytes = lambda device, n=bytes_free: n * world * (1 + rank)  # type: ignore[assignment]
        try:
            found.append(resolved(config, rt, index, None).train.micro_batch)
        except ConfigError as error:
            found.append(str(error))
    encoder = parts.make_encoder(config)
    lane = memory.lane_growth(config, rt, index, encoder)
    needs = {}
    for size in candidates(config.train.global_batch, world):
        sized = configuration.change(config, [f"train.micro_batch={size}"])
        shape = shape_of(sized, encoder, parts.make_objective(sized, 0.0), world, rt.launch)
        needs[size] = sum(memory.needed(sized, rt, index, shape, lane(size)).values())
    return found, needs, group.rank()


def test_the_largest_that_fits_on_every_rank(small: list[str], digits: Path) -> None:
    words = [f"data.shards={digits}", AUTO, "train.global_batch=64", "train.recompute=true"]
    config = configuration.load(small[1], words)
    needs = run_ranks(chosen, 2, config, [])[0][1]
    assert sorted(needs) == [1, 2, 4, 8, 16, 32]
    assert needs[8] < needs[16] < needs[32]
    free = [round(n / ROOM) + 1000 for n in (10 * needs[32], needs[16], needs[8])] + [1000]
    for found, _, _ in run_ranks(chosen, 2, config, free):  # rank 1 has twice the memory of rank 0
        assert found[:3] == [32, 16, 8]
        assert "no micro-batch fits on every process; use train.recompute=true" in found[3]
        assert "\n" not in found[3]


def test_it_is_recorded_and_kept_when_the_run_is_continued(small: list[str], tmp_path: Path) -> None:
    auto, straight = [*small, AUTO, "run.resume=auto"], tmp_path / "straight"
    answers = on_ranks(2, [*auto, "train.max_steps=2"])
    assert [code for code, _ in answers] == [0, 0], answers
    assert "train.micro_batch=16, chosen by auto and kept in config.yaml" in answers[0][1]
    code, text = command(auto)  # alone it would choose 32
    assert code == 0, text
    run = run_of(small)
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["micro_batch"] == 16
    code, text = command([*small, "train.micro_batch=16", f"run.dir={straight}"])
    assert code == 0, text
    assert fingerprint(run, 6) == fingerprint(straight, 6)
    assert metrics(run) == metrics(straight)
    facts = [json.loads((x / "environment.json").read_text())["settings"] for x in (run, straight)]
    assert len(set(facts)) == 1


def test_where_nothing_is_chosen_one_line_says_so(small: list[str]) -> None:
    code, text = command(["doctor", *small[1:], AUTO])
    assert code == 0, text
    assert "1 lanes of 32 (auto)" in " ".join(text.split())
    code, text = command(["flops", *small[1:], AUTO])
    assert code == 2, text
    assert "train.micro_batch=auto is chosen by `rkdo train`" in " ".join(text.split())
    for words in ("train.micro_batch=many", "train.micro_batch=0", "train.micro_batch=1.5"):
        with pytest.raises(ConfigError, match=r"train\.micro_batch"):
            configuration.change(configuration.Config(), [words])
    assert configuration.change(configuration.Config(), ["train.micro_batch=32.0"]).train.micro_batch == 32
