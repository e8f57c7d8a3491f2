"""The moving average of the weights: the formula, evaluated and exported (on several ranks: tests/test_recipes.py)."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rkdo_dist
from rkdo_dist import checkpoint
from rkdo_dist import config as configuration
from rkdo_dist.config import ConfigError
from rkdo_dist.training.average import WeightAverage
from tests.jobs import command, fingerprint, metrics, run_of
from tests.test_step import SmallEncoder


def moved(encoder: nn.Module, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """The weights and buffers after each of some random steps."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for tensor in encoder.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            else:
                tensor.add_(1)
        yield {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def formula(first: dict[str, torch.Tensor], later: list[dict[str, torch.Tensor]], decay: float) -> dict[str, Any]:
    """The oracle in float64: decay^T first + (1 - decay) sum_t decay^(T - t) w_t; counts are those of the last step."""
    found = {}
    for name, value in first.items():
        if value.is_floating_point():
            terms = [(1 - decay) * decay ** (len(later) - 1 - t) * w[name].double() for t, w in enumerate(later)]
            found[name] = decay ** len(later) * value.double() + torch.stack(terms).sum(0)
        else:
            found[name] = later[-1][name]
    return found


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_the_average_is_that_of_the_formula(decay: float) -> None:
    torch.manual_seed(0)
    encoder = SmallEncoder()
    encoder.tied = encoder.body[0].weight  # two names of one tensor: it moves once
    first = copy.deepcopy(encoder.state_dict())
    average = WeightAverage(encoder, decay)
    later = []
    for weights in moved(encoder, 5):
        average.move()
        later.append(weights)
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    got, right, wrong = average.model.state_dict(), formula(first, later, decay), formula(first, later, 1 - decay)
    for name, value in right.items():
        assert (got[name].double() - value).abs().max() < 1e-6, name
        assert got[name].dtype == first[name].dtype
    if decay in (0.0, 1.0):
        assert all(torch.equal(got[name], [later[-1], first][int(decay)][name]) for name in got if "num" not in name)
    elif decay == 0.9:  # the control: a decay from the other end
        assert (got["body.0.weight"] - wrong["body.0.weight"]).abs().max() > 1e-2


def averaged(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / str(step) / "parts" / f"{checkpoint.AVERAGE}.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Six steps on one process, evaluated with the averaged weights. Read-only."""
    from tests.conftest import _arguments

    arguments = _arguments(tmp_path_factory.mktemp("averaged"), digits)
    code, text = command([*arguments, "train.ema=0.8", "evaluate.weights=ema", "evaluate.at_end=true"])
    assert code == 0, text
    return run_of(arguments)


def test_it_changes_nothing_of_the_training(run: Path, reference: Path) -> None:
    assert fingerprint(run, 6) == fingerprint(reference, 6)
    assert metrics(run) == metrics(reference)
    assert {int(value) for name, value in averaged(run, 6).items() if name.endswith("num_batches_tracked")} == {6}


def test_it_is_evaluated_if_asked_for_and_the_file_says_so(run: Path, reference: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(run, again)

    def judged() -> dict[str, Any]:
        return json.loads((again / "evaluations" / "6.json").read_text())

    averages = judged()
    assert averages["weights_are"] == "ema"
    assert averages["weights"] == checkpoint.model_digest(again / "checkpoints", 6, "ema")
    assert command(["evaluate", str(again)])[0] == 0  # as the run was told: once more the same
    assert judged() == averages
    assert command(["evaluate", str(again), "evaluate.weights=trained"])[0] == 0
    assert judged() == json.loads((reference / "evaluations" / "6.json").read_text())
    assert judged()["yardsticks"]["infonce"] != averages["yardsticks"]["infonce"]


def test_it_is_loaded_and_exported_if_asked_for(run: Path, tmp_path: Path) -> None:
    encoder, trained = rkdo_dist.load_encoder(run, weights="ema"), rkdo_dist.load_encoder(run)
    right = averaged(run, 6)
    assert all(torch.equal(value, right[name]) for name, value in encoder.state_dict().items())
    assert not torch.equal(trained.state_dict()["head.0.weight"], right["head.0.weight"])
    assert (encoder.about["weights"], trained.about["weights"]) == ("ema", "trained")
    assert encoder.about["evaluation"]["weights_are"] == "ema"
    assert trained.about["evaluation"] is None  # the scores there are those of other weights
    out = tmp_path / "averaged.safetensors"
    code, text = command(["export", str(run), "--format", "safetensors", "--weights", "ema", "--out", str(out)])
    assert code == 0, text
    assert all(torch.equal(value, right[name]) for name, value in rkdo_dist.load_encoder(out).state_dict().items())
    with pytest.raises(ValueError, match="holds one set of weights"):
        rkdo_dist.load_encoder(out, weights="ema")


def test_an_average_that_is_not_there_is_one_line(reference: Path, small: list[str]) -> None:
    with pytest.raises(ValueError, match=r"holds no average of the weights: it was trained without train\.ema"):
        rkdo_dist.load_encoder(reference, weights="ema")
    with pytest.raises(ValueError, match="weights must be one of trained, ema, got 'best'"):
        rkdo_dist.load_encoder(reference, weights="best")
    for words, told in (
        (["evaluate", str(reference), "evaluate.weights=ema"], "evaluate.weights=ema needs an average of the weights"),
        ([*small, "train.ema=1.5"], "train.ema must be at least 0 and at most 1, got 1.5"),
    ):
        code, text = command(words)
        assert code == 2, text
        assert told in " ".join(text.split())
    config = configuration.change(configuration.Config(), ["train.ema=0.9"])
    configuration.check_strategy(config, 2)
    with pytest.raises(
        ConfigError, match=r"train\.ema=0\.9 keeps whole weights on every rank, which ZeRO stage 3 shards"
    ):
        configuration.check_strategy(config, 3)
