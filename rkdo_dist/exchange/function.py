"""The loss of a rank's rows against the columns of all ranks, as a function of autograd.

Where all columns are resident, forward computes loss and gradients in one pass over the field, and backward only
scales them and sends the columns' share home. On a ring, forward makes the walks for the loss and backward one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rkdo_dist.exchange.columns import GatheredColumns, LocalColumns, RingColumns, UnevenColumns
from rkdo_dist.exchange.inputs import Shares
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.rows import FieldRows, add_through_pool, computing_dtype, field_normaliser
from rkdo_dist.field.supervisors import Supervisor

Columns = LocalColumns | GatheredColumns | UnevenColumns | RingColumns


@dataclass(frozen=True)
class Call:
    """One call of a loss: what does not take part in autograd.

    Attributes:
        objective: what to compute, with this call's temperature.
        columns: how columns travel.
        shares: every rank's rows and extra columns.
        labels: of all columns, for objectives that need them.
        supervisor: of this rank's rows, where it is given.
        parts: whether the parts are asked for.
        differentiable: whether a backward pass may follow.
    """

    objective: Objective
    columns: Columns
    shares: Shares
    labels: Tensor | None
    supervisor: Supervisor | None
    parts: bool
    differentiable: bool

    def own_block(self, u: Tensor, v: Tensor, extra: Tensor | None) -> Tensor:
        """This rank's columns (V, b + m, d) in the computing precision, contiguous."""
        views, dtype = {"u": u.detach(), "v": v.detach()}, computing_dtype(u.dtype)
        chosen = [views[name].to(dtype) for name in self.objective.column_views]
        if extra is not None:  # columns whose samples have no rows
            chosen = [torch.cat([chosen[0], extra.detach().to(dtype)])]
        return torch.stack(chosen) if len(chosen) > 1 else chosen[0].contiguous()[None]

    def rows(self, u: Tensor, v: Tensor, own: Tensor, temperature: bool) -> FieldRows:
        """This rank's rows of the field; collective where lifts need to know of all columns.

        Args:
            own: this rank's columns.
            temperature: whether its gradient will be asked for.
        """
        columns, counts = self.columns, self.shares.columns
        batch, first = sum(counts), sum(counts[: columns.rank])
        views = {"u": u.detach(), "v": v.detach()}
        block = batch if columns.resident else len(u)
        pooled = self.objective.affinity.pool(own, len(own) * batch)
        return FieldRows(
            self.objective,
            views,
            batch,
            first,
            block,
            self.labels,
            self.parts,
            self.supervisor,
            temperature=temperature,
            pooled=None if pooled is None else columns.of_all(pooled).sum(0),
        )


class FieldFunction(torch.autograd.Function):
    """Of a rank's rows u, v (b, d), its extra columns (m, d) or None, and the temperature as a scalar or None."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """There is none: RuntimeError."""
        raise RuntimeError("the field loss has no forward-mode derivative; field.objectives.dense has")

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, v: Tensor, extra: Tensor | None, temperature: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        """The mean loss, a scalar, and its parts (P,), empty if not asked for, without gradient."""
        rows = call.shares.mean_rows
        with torch.autocast(u.device.type, enabled=False):
            own = call.own_block(u, v, extra)
            field = call.rows(u, v, own, temperature is not None)
            home = _walk(call, field, own)
            field.release()
            loss = (field.loss() / rows).to(own.dtype)
            parts = torch.stack(list(field.parts().values())) / rows if call.parts else loss.new_empty(0)
        parts = parts.to(own.dtype)
        ctx.mark_non_differentiable(parts)
        if call.differentiable:
            ctx.save_for_backward(u, v, extra, temperature)
            ctx.call, ctx.field, ctx.home = call, field, home
        return loss, parts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what `forward` was given; a second derivative is refused."""
        if torch.is_grad_enabled():  # create_graph=True: the gradients below would look like constants
            raise RuntimeError("the field loss has no second derivative; field.objectives.dense has")
        u, v, extra, temperature = ctx.saved_tensors  # raises if u or v were changed in place since
        call, field = ctx.call, ctx.field
        scale, again = gradient / call.shares.mean_rows, _backward_again()

        def scaled(x: Tensor) -> Tensor:
            return x * scale if again else x.mul_(scale)  # what was kept becomes what is handed on

        with torch.autocast(u.device.type, enabled=False):
            home = None if ctx.home is None else scaled(ctx.home)
            home = _gradients_home(call, field, call.own_block(u, v, extra), home, scale)
            slope = None
            if temperature is not None and ctx.needs_input_grad[3]:
                # Of all ranks, so that a temperature that no wrapper averages is the same everywhere.
                slopes = call.columns.of_all(field.temperature_gradient() * scale)
                slope = slopes.mean(0).to(temperature).view_as(temperature)
            found = {name: scaled(rows) for name, rows in field.gradients.items()}
            for name, part in zip(call.objective.column_views, home[:, : len(u)], strict=True):
                found[name] = found[name].add_(part) if name in found else part
            more = None if extra is None else home[0, len(u) :].to(extra.dtype)
        if not again:
            ctx.field = ctx.home = None
        return found["u"].to(u.dtype), found["v"].to(v.dtype), more, slope, None


def _backward_again() -> bool:
    """Whether the graph is kept for a second backward pass (as if, in a torch that does not say)."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or bool(keeps())


def _walk(call: Call, field: FieldRows, own: Tensor) -> Tensor | None:
    """Everything the loss needs; with resident columns also all gradients (those of the columns are returned)."""
    columns, block = call.columns, own
    if not isinstance(columns, RingColumns):
        block = columns.gather(own)

    def walk() -> None:
        for visit in field.walks:
            for first, part in columns.walk(own) if isinstance(columns, RingColumns) else [(0, block)]:
                field.visit(visit, part, first)

    if call.objective.normaliser == "field":
        walk()
        rows = sum(call.shares.rows) * len(call.objective.slices)
        field.normalise_by(field_normaliser(columns.of_all(field.log_sum()), rows))
    if not columns.resident:
        walk()
        return None
    if call.differentiable:
        home = torch.zeros_like(block)
        field.fused(block, home)
        return home
    field.measure(block)
    return None


def _gradients_home(call: Call, field: FieldRows, own: Tensor, home: Tensor | None, scale: Tensor) -> Tensor:
    """The gradient of this rank's columns (V, b, d), summed over ranks, times each rank's `scale`."""
    if isinstance(call.columns, RingColumns):
        field.clear_gradients()

        def visit(block: Tensor, first: int, gradient: Tensor) -> None:
            field.differentiate(block, first, gradient)
            gradient.mul_(scale)

        home = call.columns.walk_home(own, visit)
    else:
        assert home is not None
        home = call.columns.send_home(home)
    if field.pooled_gradient is not None:
        add_through_pool(call.objective, own, call.columns.of_all(field.pooled_gradient * scale).sum(0), home)
    return home
