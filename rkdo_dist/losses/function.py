"""The field loss as an autograd function: rows of this rank, columns of all.

Where all columns are resident, forward computes loss and gradients in one pass over the field, and backward only
scales them and sends the columns' share home. On a ring, forward makes the walks for the loss and backward one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rkdo_dist.exchange.columns import GatheredColumns, LocalColumns, RingColumns
from rkdo_dist.exchange.group import Group
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.tiled import FieldRows, computing_dtype

Columns = LocalColumns | GatheredColumns | RingColumns
EXCHANGES = ("gather", "ring", "local")


def columns_of(exchange: str, group: Group) -> Columns:
    """The columns that travel as `exchange` says, one of `EXCHANGES`."""
    if exchange == "local":
        return LocalColumns()
    return RingColumns(group) if exchange == "ring" else GatheredColumns(group)


@dataclass(frozen=True)
class Call:
    """One call of a loss: what does not take part in autograd.

    Attributes:
        objective: what to compute, with this call's temperature.
        columns: how columns travel.
        labels: (B,) labels of the global batch, for objectives that need them.
        parts: whether the parts are asked for.
        differentiable: whether a backward pass may follow.
    """

    objective: Objective
    columns: Columns
    labels: Tensor | None
    parts: bool
    differentiable: bool

    def own_block(self, u: Tensor, v: Tensor) -> Tensor:
        """This rank's columns (V, b, d) in the computing precision, contiguous."""
        views, dtype = {"u": u.detach(), "v": v.detach()}, computing_dtype(u.dtype)
        chosen = [views[name].to(dtype) for name in self.objective.column_views]
        return torch.stack(chosen) if len(chosen) > 1 else chosen[0].contiguous()[None]

    def rows(self, u: Tensor, v: Tensor) -> FieldRows:
        """This rank's rows of the field."""
        b, columns = len(u), self.columns
        batch = columns.world * b
        block = batch if columns.resident else b
        views = {"u": u.detach(), "v": v.detach()}
        return FieldRows(self.objective, views, batch, columns.rank * b, block, self.labels, self.parts)


def field_loss(u: Tensor, v: Tensor, temperature: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """Mean over this rank's rows of their losses, differentiable once, and the parts without gradient.

    Args:
        u, v: this rank's embeddings (b, d).
        temperature: scalar tau0, only for its gradient: `call.objective` has its value already.
        call: everything else.

    Returns:
        The loss, and the parts (P,) in the order of `Objective.part_names` (empty if not asked for).
    """
    loss, parts = _FieldFunction.apply(u, v, temperature, call)
    return loss, parts


class _FieldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, temperature: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        with torch.autocast(u.device.type, enabled=False):
            own, field = call.own_block(u, v), call.rows(u, v)
            home = _walk(call, field, own)
            field.release()
            loss = (field.loss() / len(u)).to(own.dtype)
            parts = torch.stack(list(field.parts().values())) / len(u) if call.parts else loss.new_empty(0)
        parts = parts.to(own.dtype)
        ctx.mark_non_differentiable(parts)
        if call.differentiable:
            ctx.save_for_backward(u, v, temperature)
            ctx.call, ctx.field, ctx.home = call, field, home
        return loss, parts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients below would look like constants
            raise RuntimeError("the field loss has no second derivative; field.objectives.dense has")
        u, v, temperature = ctx.saved_tensors  # raises if u or v were changed in place since
        call, field = ctx.call, ctx.field
        scale = gradient / len(u)
        with torch.autocast(u.device.type, enabled=False):
            home = _gradients_home(call, field, call.own_block(u, v), ctx.home, scale)
            found = {name: rows * scale for name, rows in field.gradients.items()}
            for name, part in zip(call.objective.column_views, home, strict=True):
                found[name] += part
            slope = None
            if temperature is not None:
                slope = (field.temperature_gradient() * scale).to(temperature.dtype).view_as(temperature)
        return found["u"].to(u.dtype), found["v"].to(v.dtype), slope, None


def _walk(call: Call, field: FieldRows, own: Tensor) -> Tensor | None:
    """Everything the loss needs; with resident columns also all gradients (those of the columns are returned)."""
    columns = call.columns
    if isinstance(columns, RingColumns):
        for walk in field.walks:
            for first, block in columns.walk(own):
                field.visit(walk, block, first)
        return None
    block = columns.gather(own)
    if call.differentiable:
        home = torch.zeros_like(block)
        field.fused(block, home)
        return home
    for walk in field.walks:
        field.visit(walk, block, 0)
    return None


def _gradients_home(call: Call, field: FieldRows, own: Tensor, home: Tensor | None, scale: Tensor) -> Tensor:
    """The gradient of this rank's columns (V, b, d), summed over ranks, times each rank's `scale`."""
    if isinstance(call.columns, RingColumns):
        field.clear_gradients()

        def visit(block: Tensor, first: int, gradient: Tensor) -> None:
            field.differentiate(block, first, gradient)
            gradient.mul_(scale)

        return call.columns.walk_home(own, visit)
    assert home is not None
    return call.columns.send_home(home * scale)
