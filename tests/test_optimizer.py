"""Optimizers as a run has them: which parameters decay, in groups that checkpoints keep."""

from __future__ import annotations

import torch
from torch import nn

from rkdo_dist import config as configuration
from rkdo_dist import parts
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
