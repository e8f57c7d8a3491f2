"""Counted operations against hand counts, and against the paper's published number."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from rkdo_dist import config as configuration
from rkdo_dist.encoders import Encoder
from rkdo_dist.field.objectives import Objective
from rkdo_dist.losses import FieldLoss
from rkdo_dist.measure import flops
from tests.conftest import ROOT
from tests.jobs import command

PAPER = str(ROOT / "configs" / "paper" / "cifar10-rkdo.yaml")


def by_hand(encoder: Encoder, size: int) -> float:
    """Two operations for every multiply-add of every convolution and linear layer, for one image."""
    total = 0.0

    def count(layer: nn.Module, _: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            height, width = layer.kernel_size
            total += 2 * out[0].numel() * height * width * layer.in_channels / layer.groups
        else:
            total += 2 * layer.in_features * layer.out_features

    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        encoder.eval()(torch.zeros(1, 3, size, size))
    return total


SMALL = ["train.global_batch=8", "train.micro_batch=8"]


@pytest.mark.parametrize(("backbone", "size"), [("squeezenet1_1", 48), ("shufflenet_v2_x0_5", 32)])
def test_the_encoder_by_hand(backbone: str, size: int) -> None:
    config = configuration.load(PAPER, [f"encoder.backbone={backbone}", *SMALL])
    assert flops.step_flops(config, size).encoder_forward == 16 * by_hand(Encoder(backbone), size)


def test_backward_costs_twice_the_forward_but_for_the_first_layer_and_recomputing_once_more() -> None:
    config = configuration.load(PAPER, ["encoder.backbone=squeezenet1_1", *SMALL])
    cost = flops.step_flops(config, 48)
    assert 2.5 * cost.encoder_forward < cost.encoder_step < 3 * cost.encoder_forward
    again = flops.step_flops(
        configuration.load(PAPER, [*SMALL, "encoder.backbone=squeezenet1_1", "train.recompute=true"]), 48
    )
    assert again.encoder_step == cost.encoder_step + cost.encoder_forward


@pytest.mark.parametrize(
    ("objective", "products"),
    [
        (Objective.rkdo(depth=1), 1),
        (Objective.rkdo(depth=5), 1),
        (Objective.icon(), 1),
        (Objective.infonce(symmetric=True), 2),
        (Objective.rkdo(pairing="joint"), 4),
    ],
    ids=lambda value: f"{value.name}-{value.depth}" if isinstance(value, Objective) else "",
)
def test_the_loss_by_hand(objective: Objective, products: int) -> None:
    """Similarities of B rows with B columns, d wide; twice as much again for the gradients of rows and columns."""
    for batch in (16, 150):
        forward, both = flops.loss_flops(objective, batch, 24)
        assert forward == pytest.approx(products * 2 * batch * batch * 24, rel=1e-12)
        assert both == pytest.approx(3 * forward, rel=1e-12)


def test_the_counter_alone_overlooks_products_in_place() -> None:
    """The control: two thirds of the loss's products are `addmm_`."""
    u, v = (functional.normalize(torch.randn(32, 8), dim=1).requires_grad_() for _ in range(2))
    with FlopCounterMode(display=False) as plain:
        FieldLoss(Objective.rkdo())(u, v).backward()
    with flops.counter() as ours:
        FieldLoss(Objective.rkdo())(u, v).backward()
    assert 3 * plain.get_total_flops() == ours.get_total_flops() == 3 * 2 * 32 * 32 * 8


def test_the_papers_number_is_reproduced_to_a_twentieth_of_a_per_cent() -> None:
    for depth, published in flops.PAPER.items():
        cost = flops.step_flops(configuration.load(PAPER, [f"field.depth={depth}"]), 32)
        assert cost.forward == pytest.approx(published, rel=5e-4)
    one_view_or_one_operation = cost.forward / 2
    assert one_view_or_one_operation != pytest.approx(published, rel=0.4), "the control: other conventions miss by half"


def test_the_command_shows_counts_and_times() -> None:
    small = ["encoder.backbone=shufflenet_v2_x0_5", "train.global_batch=16", "train.micro_batch=8", "field.depth=2"]
    code, text = command(["flops", PAPER, *small, "--image-size", "16", "--repeats", "3"])
    assert code == 0, text
    for words in (
        "depth 1",
        "depth 2",
        "depth 3",
        "forward and backward",
        "seconds",
        "median step",
        "16 x 16, 16 pairs",
    ):
        assert words in text, text
    assert "from, to" in text
    code, text = command(["flops", PAPER, "field.objective=icon", "--repeats", "1"])
    assert code == 0, text
    assert "seconds" not in text, "first calls are no finding"
    assert "fewer than 3 steps" in " ".join(text.split())
    code, text = command(["flops", PAPER, "field.objective=icon", "--repeats", "0"])
    assert code == 0, text
    assert "depth" not in text
    assert "median" not in text
    assert command(["flops", PAPER, "--image-size", "0", "--repeats", "-1"])[0] == 2
