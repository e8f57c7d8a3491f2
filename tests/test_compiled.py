"""`train.compile`: the same run but for rounding, the same bits on 1 and 2 ranks, and nothing of it in checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.batch_norm import BatchStatistics
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks import runtime
from rkdo_dist.training.compiled import compiled
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.step import Step, StepSettings
from tests.jobs import command, fingerprint, metrics
from tests.ranks import run_ranks
from tests.strategies import launched
from tests.test_step import make_view, micro_batch, own

COMPILE = "train.compile=true"
STEPS = 4


def _eager_and_compiled(rank: int, world: int) -> dict[str, Any]:
    """Losses, running statistics and keys of both, and how many graphs were compiled."""
    # In float64: steps make rounding larger (2e-4 of a loss after four of these in float32), and hide a wrong graph.
    torch.set_default_dtype(torch.float64)
    options = ["encoder.backbone=cifar_resnet8", "encoder.embedding_dim=8", "encoder.head=paper", "train.optimizer=sgd"]
    config = configuration.change(configuration.Config(), [*options, "train.learning_rate=0.1"])
    found: dict[str, Any] = {}
    with launched("fast"):
        rt = runtime.start(1, 600, "fast")
        settings = StepSettings(3, "fast", False, True, "gather")
        for name in ("eager", "compiled"):
            encoder = parts.make_encoder(config)
            encoder.backbone.append(torch.nn.Dropout(0.2))  # draws the same
            before = {key: value.clone() for key, value in encoder.state_dict().items()}
            model = compiled(encoder, (12, 3, 12, 12), rt) if name == "compiled" else None
            assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
            step = Step(
                encoder,
                lambda *drawn: make_view(*drawn).double(),
                rt,
                settings,
                parts.make_optimizer(config, encoder),
                compiled=model,
            )
            losses = []
            for t in range(STEPS):
                lanes = [micro_batch(t, lane, size=12) for lane in own(rank, world)]
                losses.append(train_step(step, lanes, Objective.of("rkdo"), 0, t)[0].loss)
            state = step.strategy.state().model
            found[name] = {
                "losses": losses,
                "running": {key: x.double().numpy().copy() for key, x in state.items() if "running" in key},
                "keys": list(state),
                "digest": encoder.digest(),
            }
        found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with pytest.raises(RuntimeError, match="nothing to take"):  # why counts are given: no hook is called
            _count_without_help(compiled(encoder, (12, 3, 12, 12), rt), encoder)
        for stage in (1, 2, 3):
            with pytest.raises(ValueError, match=rf"train.compile=true: zero-{stage} \(DeepSpeed\) hooks into"):
                compiled(encoder, (12, 3, 12, 12), dataclasses.replace(rt, strategy=f"zero-{stage}"))
    return found


def _count_without_help(model: torch.nn.Module, encoder: torch.nn.Module) -> None:
    statistics = BatchStatistics(encoder)
    with statistics.collecting():
        model(torch.rand(12, 3, 12, 12).contiguous(memory_format=torch.channels_last))
    statistics.take()


def test_losses_and_statistics_are_those_of_the_eager_step() -> None:
    answers = run_ranks(_eager_and_compiled, 2, timeout=600)
    assert answers[0]["compiled"]["digest"] == answers[1]["compiled"]["digest"]
    for found in answers:
        eager, ours = found["eager"], found["compiled"]
        assert len(set(eager["losses"])) == STEPS
        assert max(abs(a - b) for a, b in zip(eager["losses"], ours["losses"], strict=True)) < 1e-9
        assert ours["keys"] == eager["keys"]
        assert len(eager["running"]) == 2 * 10
        for key, value in eager["running"].items():
            assert abs(ours["running"][key] - value).max() < 1e-9, key
        assert found["graphs"] == 1


def _runs(rank: int, world: int, small: list[str], folder: str) -> tuple[int, str]:
    """Two ranks: a compiled run; one rank: one that goes to eager and back."""
    words = [*small, f"run.dir={folder}/on-{world}", "train.keep_checkpoints=9", "run.resume=auto"]
    if world > 1:
        return command([*words, COMPILE, "train.recompute=true"])
    code, text = 0, ""
    for until, how in ((4, "true"), (5, "false"), (6, "true")):
        if code == 0:
            code, more = command([*words, f"train.compile={how}", f"train.max_steps={until}"])
            text += more
    return code, text


def test_whole_runs(small: list[str], reference: Path, tmp_path: Path) -> None:
    for world in (2, 1):
        for code, text in run_ranks(_runs, world, small, str(tmp_path), timeout=600):
            assert code == 0, text
    assert "encoder: compiled -> eager" in text
    assert "encoder: eager -> compiled" in text
    assert fingerprint(tmp_path / "on-1", 4) == fingerprint(tmp_path / "on-2", 4)
    for name in ("on-1", "on-2"):
        for ours, eager in zip(metrics(tmp_path / name), metrics(reference), strict=True):
            assert abs(ours["loss"] - eager["loss"]) < 1e-5
            assert ours["batch_digest"] == eager["batch_digest"]
        for file in (reference / "checkpoints" / "6").glob("*.safetensors"):
            assert load_file(tmp_path / name / "checkpoints" / "6" / file.name).keys() == load_file(file).keys()
    facts = json.loads((tmp_path / "on-2" / "environment.json").read_text())
    assert facts["arithmetic"]["encoder"] == "compiled"


def _without_a_compiler(rank: int, world: int, small: list[str]) -> tuple[int, str]:
    torch._inductor.config.cpp.cxx = ("/nowhere/g++",)
    return command([*small, COMPILE])


def test_without_a_compiler_there_is_one_line_on_every_rank(small: list[str], tmp_path: Path) -> None:
    for code, text in run_ranks(_without_a_compiler, 2, small, timeout=600):
        assert code == 2
        assert "train.compile=true: the encoder cannot be compiled (" in text
        assert "torch.compile needs a C++ compiler (g++)" in text
        assert "Traceback" not in text
    run = Path(next(word for word in small if word.startswith("run.dir=")).removeprefix("run.dir="))
    assert not run.exists()
    assert shutil.which("g++")
