"""Optimizers as a run has them: which parameters decay, in groups that checkpoints keep."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.checkpoint import optimizer_to_tensors, tensors_to_optimizer
from rkdo_dist.config import ConfigError
from rkdo_dist.lars import LARS
from tests.jobs import command, metrics, run_of
from tests.nets import tiny_vit
from tests.test_step import SmallEncoder


def made(encoder: nn.Module, *overrides: str) -> torch.optim.Optimizer:
    return parts.make_optimizer(configuration.change(configuration.Config(), overrides), encoder)


def test_by_default_everything_decays() -> None:
    encoder = SmallEncoder()
    (group,) = made(encoder, "train.weight_decay=0.1").param_groups
    assert group["weight_decay"] == 0.1
    assert group["params"] == list(encoder.parameters())


def test_biases_and_norms_are_left_out_of_the_decay() -> None:
    encoder = nn.Sequential(SmallEncoder(), tiny_vit())
    frozen = encoder[0].body[5].bias
    frozen.requires_grad_(False)
    names = {id(p): name for name, p in encoder.named_parameters()}
    decaying, others = made(encoder, "train.weight_decay=0.1", "train.decay_norms=false").param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    left_out = {names[id(p)] for p in others["params"]}
    norms = {
        f"{module}.{name}"
        for module, part in encoder.named_modules()
        if isinstance(part, nn.BatchNorm2d | nn.LayerNorm)
        for name, _ in part.named_parameters(recurse=False)
    }
    assert len(norms) == 2 + 5 * 2  # batch norm, and five layer norms
    biases = {name for name in names.values() if name.endswith("bias")}
    assert left_out == (norms | biases) - {"0.body.5.bias"}
    assert {names[id(p)] for p in decaying["params"]} == set(names.values()) - norms - biases


def test_a_decay_of_weights_alone_moves_them_alone() -> None:
    encoder = SmallEncoder()
    for parameter in encoder.parameters():
        nn.init.constant_(parameter, 2.0)
        parameter.grad = torch.zeros_like(parameter)
    made(
        encoder, "train.optimizer=sgd", "train.weight_decay=0.5", "train.learning_rate=0.1", "train.decay_norms=no"
    ).step()
    for name, parameter in encoder.named_parameters():
        assert torch.allclose(parameter, torch.tensor(2.0 - 0.1 * 0.5 * 2.0 if parameter.ndim > 1 else 2.0)), name


# --- LARS -------------------------------------------------------------------------------------------------------


def formula(weights: list[np.ndarray], gradients: list[list[np.ndarray]], rates: list[float], wrong: str = "") -> None:
    """The oracle: algorithm 1 of You et al. with SimCLR's norm of the decayed gradient, in place."""
    decays, momentum, trust = (0.1, 0.1, 0.0, 0.0, 0.1, 0.0), 0.9, 0.02
    velocity = [np.zeros_like(w) for w in weights]
    for step, rate in zip(gradients, rates, strict=True):
        for w, v, g, decay in zip(weights, velocity, step, decays, strict=True):
            adapted = w.ndim > 1 or wrong == "biases"
            d = g + decay * w
            norms = np.linalg.norm(w), np.linalg.norm(g if wrong == "norm" else d)
            ratio = trust * norms[0] / norms[1] if adapted and all(norms) else 1.0
            v[...] = momentum * v + (1 if wrong == "rate" else rate) * ratio * d
            w -= (rate if wrong == "rate" else 1) * v


@pytest.mark.parametrize("wrong", ["", "biases", "norm", "rate"])
def test_lars_is_its_formula(wrong: str) -> None:
    draws = np.random.default_rng(0)
    shapes = [(7, 5), (3, 2, 3, 3), (5,), (), (4, 4), (2, 3)]
    start = [draws.normal(size=shape) for shape in shapes]
    start[4][...] = 0.0  # weights of norm 0: the ratio is 1
    gradients = [[draws.normal(size=shape) for shape in shapes] for _ in range(4)]
    gradients[0][5][...] = 0.0  # nothing to move by: the ratio is 1
    rates = [0.5, 1.0, 0.25, 0.1]
    parameters = [nn.Parameter(torch.from_numpy(w.copy())) for w in start]
    groups = [
        {"params": [parameters[k] for k in (0, 1, 4)], "weight_decay": 0.1},
        {"params": [parameters[k] for k in (2, 3, 5)], "weight_decay": 0.0},
    ]
    optimizer = LARS(groups, lr=1.0, trust=0.02)
    for step, rate in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    right = [w.copy() for w in start]
    formula(right, gradients, rates, wrong)
    errors = [np.abs(p.detach().numpy() - w).max() for p, w in zip(parameters, right, strict=True)]
    assert (max(errors) < 1e-12) == (wrong == ""), errors


def test_lars_leaves_out_biases_and_norms_and_goes_through_a_checkpoint() -> None:
    def trained(encoder: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in encoder.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    def new() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        encoder = SmallEncoder()
        return encoder, made(encoder, "train.optimizer=lars", "train.weight_decay=0.1", "train.learning_rate=0.3")

    straight, optimizer = new()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    trained(straight, optimizer, range(4))
    first, optimizer = new()
    trained(first, optimizer, range(2))
    again, other = new()
    again.load_state_dict(first.state_dict())
    saved = optimizer_to_tensors(optimizer, first.named_parameters())
    assert {name.rpartition(".")[2] for name in saved.tensors} == {"momentum_buffer"}
    tensors_to_optimizer(saved, other, again.named_parameters())
    trained(again, other, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lars_is_refused_where_weights_are_flat_shards(stage: int) -> None:
    config = configuration.change(configuration.Config(), ["train.optimizer=lars"])
    configuration.check_strategy(config, 0)
    with pytest.raises(
        ConfigError, match=r"train\.optimizer=lars needs the norm of every weight, and DeepSpeed's ZeRO"
    ):
        configuration.check_strategy(config, stage)


# --- the learning rate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "rate"), [("none", 0.3), ("linear", 1.2), ("sqrt", 0.6)])
def test_the_rate_is_scaled_with_the_batch_and_warms_up_in_epochs(how: str, rate: float, small: list[str]) -> None:
    words = ["train.global_batch=1024", "train.learning_rate=0.3", f"train.scale_lr={how}"]
    config = configuration.change(configuration.Config(), words)
    assert abs(config.train.peak_rate - rate) < 1e-12
    scaled = 0.3 * {"none": 1.0, "linear": 0.125, "sqrt": 0.125**0.5}[how]  # a global batch of 32
    arguments = [*small, "train.learning_rate=0.3", "train.optimizer=sgd", f"train.scale_lr={how}"]
    code, text = command([*arguments, "train.epochs=2", "train.batches_per_epoch=2", "train.warmup_epochs=1.5"])
    assert code == 0, text
    rates = [record["learning_rate"] for record in metrics(run_of(small))]
    assert np.allclose(rates, np.array([1 / 3, 2 / 3, 1, 1]) * scaled, rtol=1e-12)
    facts = json.loads((run_of(small) / "environment.json").read_text())
    assert abs(facts["peak_learning_rate"] - scaled) < 1e-12
    assert (f"learning rate {scaled:g}: train.learning_rate=0.3 for 256 samples" in text) == (how != "none")
