"""The field loss and its gradients in one call, without autograd: rows of the field against columns that are all there.

What rows are and how they are visited is in `field.rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.rows import FieldRows, add_through_pool, computing_dtype, field_normaliser
from rkdo_dist.field.supervisors import Supervisor


@dataclass(frozen=True)
class FieldResult:
    """Sums over b rows and their gradients; B columns, d wide.

    Attributes:
        loss: sum of the row losses, float64 scalar.
        parts: sums of the rows' parts (names in `Objective.part_names`), float64 scalars; empty if not asked.
        rows_u, rows_v: gradient of `loss` with respect to the rows, (b, d); zeros where they are not used.
        columns_u, columns_v: gradient with respect to the columns, (B, d), or None where they are not used.
        temperature: derivative of `loss` with respect to tau0, float64 scalar, or None if not asked.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    rows_u: Tensor
    rows_v: Tensor
    columns_u: Tensor | None
    columns_v: Tensor | None
    temperature: Tensor | None


def value_and_gradient(
    objective: Objective,
    rows_u: Tensor,
    rows_v: Tensor,
    columns_u: Tensor,
    columns_v: Tensor,
    first_row: int,
    labels: Tensor | None = None,
    parts: bool = True,
    supervisor: Supervisor | None = None,
    temperature: bool = True,
    log_normaliser: Tensor | None = None,
) -> FieldResult:
    """Sum of the losses of b consecutive samples of the global batch, and all its gradients, without
    autograd.

    The result is a function of the arguments alone, bit for bit: no rank, world size or thread count enters,
    beyond what the matrix product of the backend makes of them.

    Args:
        objective: what to compute.
        rows_u, rows_v: embeddings (b, d) of both views of samples first_row..first_row + b - 1, of unit norm if the
            affinity asks for it; float32 or float64 (computed in this precision), bfloat16 or float16 (in float32).
        columns_u, columns_v: embeddings (B, d) of the whole global batch, B >= 2.
        first_row: index of the first of these samples in the global batch.
        labels: (B,) integers of the whole global batch, for objectives that need them.
        parts: whether to fill `parts`, which costs a few more passes over a strip.
        supervisor: p of these rows, for an objective whose supervisor is "rows"; None: the identity.
        temperature: whether to fill `temperature`, which costs a strip where the affinity links.
        log_normaliser: for normaliser="field" and rows that are not the whole batch: see `field_normaliser`.

    Raises:
        ValueError: if labels are missing, shapes or dtypes disagree, the rows do not lie within the batch, or the
            normaliser of the field is missing.
    """
    whole = {"u": rows_u, "v": rows_v}, {"u": columns_u, "v": columns_v}
    with torch.no_grad():
        field, columns = _of_whole_columns(objective, *whole, first_row, labels, parts, supervisor, temperature)
        if objective.normaliser == "field":
            if log_normaliser is None and len(rows_u) < len(columns_u):
                raise ValueError("normaliser='field' needs log_normaliser, unless the rows are the whole batch")
            field.normalise_by(
                field_normaliser(field.log_sum(columns)[None], len(rows_u) * len(objective.slices))
                if log_normaliser is None
                else log_normaliser
            )
        found = torch.zeros_like(columns)
        field.fused(columns, found)
        field.release()
        if field.pooled_gradient is not None:
            add_through_pool(objective, columns, field.pooled_gradient, found)
        home = dict(zip(objective.column_views, found.unbind(), strict=True))
        return FieldResult(
            loss=field.loss(),
            parts=field.parts() if parts else {},
            rows_u=field.gradients["u"],
            rows_v=field.gradients["v"] if "v" in field.gradients else torch.zeros_like(field.gradients["u"]),
            columns_u=home.get("u"),
            columns_v=home["v"],
            temperature=field.temperature_gradient() if temperature else None,
        )


def log_sum(
    objective: Objective,
    rows_u: Tensor,
    rows_v: Tensor,
    columns_u: Tensor,
    columns_v: Tensor,
    first_row: int,
) -> Tensor:
    """log of the sum of exp(l / tau) over the columns of consecutive rows, float64 scalar; arguments as for
    `value_and_gradient`."""
    with torch.no_grad():
        whole = {"u": rows_u, "v": rows_v}, {"u": columns_u, "v": columns_v}
        anyone = replace(objective, supervisor="rows")  # the sums do not depend on p
        field, columns = _of_whole_columns(anyone, *whole, first_row)
        return field.log_sum(columns)


def _of_whole_columns(
    objective: Objective,
    rows: dict[str, Tensor],
    columns: dict[str, Tensor],
    first_row: int,
    labels: Tensor | None = None,
    parts: bool = False,
    supervisor: Supervisor | None = None,
    temperature: bool = False,
) -> tuple[FieldRows, Tensor]:
    """Rows, and the columns (V, B, d) of the whole batch, which are there at once."""
    _require_matching(rows["u"], rows["v"], columns["u"], columns["v"])
    dtype, names = computing_dtype(rows["u"].dtype), objective.column_views
    block = torch.stack([columns[n].to(dtype) for n in names]) if len(names) > 1 else columns["v"].to(dtype)[None]
    batch, pooled = block.shape[1], objective.affinity.pool(block, block.shape[0] * block.shape[1])
    return FieldRows(objective, rows, batch, first_row, batch, labels, parts, supervisor, temperature, pooled), block


def _require_matching(rows_u: Tensor, rows_v: Tensor, columns_u: Tensor, columns_v: Tensor) -> None:
    named = {"rows_u": rows_u, "rows_v": rows_v, "columns_u": columns_u, "columns_v": columns_v}
    if any(x.dim() != 2 for x in named.values()) or rows_u.shape != rows_v.shape or columns_u.shape != columns_v.shape:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise ValueError(f"rows must be (b, d) and columns (B, d), alike in both views; got {shapes}")
    if rows_u.shape[1] != columns_u.shape[1] or len({(x.dtype, x.device) for x in named.values()}) > 1:
        kinds = ", ".join(f"{name} d = {x.shape[1]} {x.dtype} on {x.device}" for name, x in named.items())
        raise ValueError(f"rows and columns must agree in d, dtype and device; got {kinds}")
    if len(rows_u) == 0 or len(columns_u) < 2:
        raise ValueError(f"need at least one row and two samples, got {len(rows_u)} and {len(columns_u)}")
