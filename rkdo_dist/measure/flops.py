"""Cost of a step in floating point operations, by PyTorch's counter, and in seconds.

Convention: a multiply-add is two operations, and only convolutions and matrix products are counted (that is what
`torch.utils.flop_counter` does, and torch.profiler does nearly the same). So elementwise work, which is all that a
further level of the recursion adds, does not appear in the count; it appears in the time. The counter takes the
backward of a grouped convolution for that of a full one (shufflenet: 3.7 times the forward, not 3). The encoder is
counted on fake tensors, which cost nothing, and the loss on a small batch of its own, which is scaled exactly: its
products are bilinear in rows and columns.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from rkdo_dist import parts
from rkdo_dist.config import Config, ConfigError, EncoderConfig
from rkdo_dist.encoders import Encoder
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.losses import FieldLoss
from rkdo_dist.training import machine

_LABELS = 10  # classes, for objectives that need labels
LEAST_REPEATS = 3  # fewer say more about first calls than about steps
_WARM_UP = 2
_UNTIMED = f"Without times: fewer than {LEAST_REPEATS} steps (--repeats) say more about first calls."
_COUNTED_BATCH = 64  # at most: of the loss
PAPER = {1: 9.5537e9, 3: 9.5545e9}  # section 4.3: forward, ResNet-18, batch 64, CIFAR-10, by depth


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of one step over a global batch, both views, and the teacher's, if there is one.

    Attributes:
        encoder_forward, loss_forward: of the forward pass, as the paper counts.
        encoder_step, loss_step: forward and backward, and the second forward of `train.recompute`.
    """

    encoder_forward: float
    loss_forward: float
    encoder_step: float
    loss_step: float

    @property
    def forward(self) -> float:
        """Encoder and loss, forward."""
        return self.encoder_forward + self.loss_forward

    @property
    def step(self) -> float:
        """Encoder and loss, forward and backward."""
        return self.encoder_step + self.loss_step


def step_flops(config: Config, image_size: int) -> StepFlops:
    """Count one step.

    Args:
        config: of the run.
        image_size: side of the squares that the encoder sees.
    """
    objective = parts.make_objective(config, 0.0)
    batch, width, relation = config.train.global_batch, config.encoder.embedding_dim, objective.relation
    forward, both = _encoder_flops(config.encoder, image_size)
    loss_forward, loss_step = loss_flops(objective, batch, width)
    student, teacher = 2 * batch, 0
    if relation is not None and relation.teacher != "snapshot":  # whose cost is that of an epoch
        queued = relation.columns != "batch"  # or in a bank, counted like a queue: the samples are not known here
        product = 2.0 * batch * (relation.queue if queued else batch) * width
        loss_forward, loss_step = 2 * product, (3 if queued else 4) * product  # of keys, of rows; their gradients
        student, teacher = (batch, batch) if queued else (2 * batch, 0 if relation.own_keys else batch)
    again = forward if config.train.recompute else 0.0
    return StepFlops(
        (student + teacher) * forward, loss_forward, student * (both + again) + teacher * forward, loss_step
    )


@functools.cache
def _encoder_flops(section: EncoderConfig, image_size: int) -> tuple[float, float]:
    """Operations for one image: forward, and forward and backward."""
    found = []
    for backward in (False, True):
        with FakeTensorMode(), counter() as count:
            encoder = parts.encoder_of(section, pretrained=False)
            out = encoder(torch.empty(2, 3, image_size, image_size))  # two, as batch norm asks
            if backward:
                out.sum().backward()
        found.append(count.get_total_flops() / 2)
    return found[0], found[1]


def loss_flops(objective: Objective, batch: int, width: int) -> tuple[float, float]:
    """Operations of the loss over a global batch of embeddings (batch, width): forward, and with its gradients."""
    small = min(batch, _COUNTED_BATCH)
    u, v = (functional.normalize(torch.randn(small, width), dim=1).requires_grad_() for _ in range(2))
    labels = torch.arange(small) % _LABELS if objective.needs_labels else None
    with counter() as forward:
        dense(objective, u, v, labels)
    with counter() as both:
        _value(FieldLoss(objective, exchange="local")(u, v, labels)).backward()
    scale = (batch / small) ** 2
    return forward.get_total_flops() * scale, both.get_total_flops() * scale


def counter() -> FlopCounterMode:
    """PyTorch's counter, which by itself overlooks the in-place products (`addmm_`) of our loss."""

    def product(_self: Any, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


def _value(loss: Tensor | tuple[Tensor, dict[str, Tensor]]) -> Tensor:
    assert isinstance(loss, Tensor)  # no parts were asked for
    return loss


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Medians over steps on random images, seconds.

    Attributes:
        encoder_forward, loss, encoder_backward: the loss with its gradients.
        loss_range: its fastest and slowest.
        peak_bytes: of the process (CPU) or allocated on the device, after these steps.
    """

    encoder_forward: float
    loss: float
    encoder_backward: float
    loss_range: tuple[float, float]
    peak_bytes: int

    @property
    def step(self) -> float:
        """All three; reading, views and the optimizer are not in it."""
        return self.encoder_forward + self.loss + self.encoder_backward


def step_times(config: Config, image_size: int, objectives: Sequence[Objective], repeats: int) -> list[StepTimes]:
    """Time steps on this machine, on one process, in micro-batches as a run would have them.

    All losses are warmed up before any is measured, and they take turns, so that none has the first calls or a busy
    moment to itself.

    Args:
        config: its encoder, batch sizes and `run.threads` are used.
        image_size: side of the squares.
        objectives: the losses.
        repeats: steps of each that count, `LEAST_REPEATS` or more.
    """
    torch.set_num_threads(config.run.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = parts.make_encoder(config).to(device)
    lanes = [
        torch.randn(2 * config.train.lane_size, 3, image_size, image_size, device=device)
        for _ in range(config.train.lanes)
    ]
    losses = [FieldLoss(objective, exchange="local") for objective in objectives]
    rounds = [[_one_step(encoder, lanes, loss, device) for loss in losses] for _ in range(_WARM_UP + repeats)]
    found = []
    for rows in zip(*rounds[_WARM_UP:], strict=True):
        forward, loss, backward = (statistics.median(part) for part in zip(*rows, strict=True))
        spent = [row[1] for row in rows]
        found.append(StepTimes(forward, loss, backward, (min(spent), max(spent)), machine.peak_bytes(device)))
    return found


def _one_step(
    encoder: Encoder, lanes: list[Tensor], loss_fn: FieldLoss, device: torch.device
) -> tuple[float, float, float]:
    """Seconds of the forward pass, of the loss with its gradients, and of the backward pass."""
    encoder.zero_grad(set_to_none=True)
    pairs, forward = _timed(lambda: [encoder(lane).chunk(2) for lane in lanes], device)
    u, v = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
    leaves = [x.detach().requires_grad_() for x in (u, v)]
    labels = torch.arange(len(u), device=device) % _LABELS if loss_fn.objective.needs_labels else None
    gradients, loss = _timed(lambda: torch.autograd.grad(_value(loss_fn(*leaves, labels)), leaves), device)
    _, backward = _timed(lambda: torch.autograd.backward([u, v], gradients), device)
    return forward, loss, backward


def _timed(action: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    _wait(device)
    began = time.perf_counter()
    result = action()
    _wait(device)
    return result, time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def cost_table(config: Config, image_size: int, repeats: int) -> Table:
    """A column per depth (1, 3 and the configuration's own); a single one for objectives without recursion.

    Args:
        config: of the run.
        image_size: side of the squares that the encoder sees.
        repeats: steps to time; with fewer than `LEAST_REPEATS` there are no times.

    Raises:
        ConfigError: for times of an objective with a teacher.
    """
    field = config.field
    objective = parts.make_objective(config, 0.0)
    if objective.relation is not None and objective.relation.teacher != "snapshot" and repeats >= LEAST_REPEATS:
        raise ConfigError(
            f"objective {objective.name} has a teacher, and its steps are not timed here: count with --repeats 0, time "
            "with `rkdo measure`"
        )
    depths = sorted({1, 3, field.depth}) if objective.recursion == "in_batch" else [1]
    columns = [dataclasses.replace(config, field=dataclasses.replace(field, depth=depth)) for depth in depths]
    costs = [step_flops(column, image_size) for column in columns]
    timed = repeats >= LEAST_REPEATS
    table = Table(
        title=f"One step: {config.encoder.backbone}, {image_size} x {image_size}, {config.train.global_batch} pairs",
        caption="GFLOPs: a multiply-add is two operations; convolutions and matrix products only, so a level of the "
        "recursion costs time and no FLOPs. "
        + ("Time: this machine now, without reading, views and optimizer." if timed else _UNTIMED),
    )
    table.add_column("", no_wrap=True)
    for depth in depths:
        name = f"{objective.name}, depth {depth}" if len(depths) > 1 else objective.name
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("GFLOPs")
    table.add_row("  forward", *(f"{cost.forward / 1e9:.4f}" for cost in costs))
    if _is_papers(config, image_size):
        table.add_row("    the paper", *(f"{PAPER[d] / 1e9:.4f}" if d in PAPER else "-" for d in depths))
    table.add_row("    of it the loss", *(f"{cost.loss_forward / 1e9:.4f}" for cost in costs))
    table.add_row("  forward and backward", *(f"{cost.step / 1e9:.4f}" for cost in costs))
    table.add_row("    of it the loss", *(f"{cost.loss_step / 1e9:.4f}" for cost in costs))
    if timed:
        _add_times(table, step_times(config, image_size, [parts.make_objective(c, 0.0) for c in columns], repeats))
    return table


def _add_times(table: Table, times: list[StepTimes]) -> None:
    table.add_section()
    table.add_row("seconds")
    table.add_row("  median step", *(f"{time.step:.4f}" for time in times))
    table.add_row("    of it the loss", *(f"{time.loss:.4f}" for time in times))
    ranges = (f"{time.loss_range[0]:.4f}, {time.loss_range[1]:.4f}" for time in times)
    table.add_row("      from, to", *ranges)
    table.add_row("peak memory of all, MiB", *(f"{time.peak_bytes / 2**20:,.0f}" for time in times))


def _is_papers(config: Config, image_size: int) -> bool:
    encoder, train = config.encoder, config.train
    shape = (encoder.backbone, encoder.stem, encoder.embedding_dim, train.global_batch, image_size)
    return config.field.objective == "rkdo" and shape == ("resnet18", "imagenet", 64, 64, 32)
