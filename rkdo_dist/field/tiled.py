"""The field loss and its gradients in bounded memory: strips of rows against all columns, no B x B matrix.

A strip holds a few rows and every column, so a row's normalisers and gradient corrections are known as soon
as its
similarities are: one pass, no recomputation, no autograd graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rkdo_dist.field.objectives import Objective, Slice

STRIP_ELEMENTS = 1 << 17  # entries of one strip of rows


@dataclass(frozen=True)
class FieldResult:
    """Sums over rows and their gradients; b rows, B columns, d wide.

    Attributes:
        loss: sum of the row losses, float64 scalar.
        parts: sums of the rows' parts (names in `Objective.part_names`), float64 scalars.
        rows_u, rows_v: gradient of `loss` with respect to the rows, (b, d); zeros where they are not used.
        columns_u, columns_v: gradient with respect to the columns, (B, d), or None where they are not used.
        temperature: derivative of `loss` with respect to tau0, float64 scalar.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    rows_u: Tensor
    rows_v: Tensor
    columns_u: Tensor | None
    columns_v: Tensor | None
    temperature: Tensor


def value_and_gradient(
    objective: Objective,
    rows_u: Tensor,
    rows_v: Tensor,
    columns_u: Tensor,
    columns_v: Tensor,
    first_row: int,
    labels: Tensor | None = None,
) -> FieldResult:
    """Sum of the losses of b consecutive samples of the global batch, and all its gradients, without
    autograd.

    The result is a function of the arguments alone, bit for bit: no rank, world size or thread count
    enters, beyond what the matrix product of the backend makes of them.

    Args:
        objective: what to compute.
        rows_u, rows_v: unit-norm embeddings (b, d) of both views of samples first_row..first_row + b - 1;
            float32 or float64 (computed in this precision), bfloat16 or float16 (computed in float32).
        columns_u, columns_v: embeddings (B, d) of the whole global batch.
        first_row: index of the first of these samples in the global batch.
        labels: (B,) integers of the whole global batch, for objectives that need them.

    Raises:
        ValueError: if labels are missing or the rows do not lie within the batch.
    """
    b, batch = rows_u.shape[0], columns_v.shape[0]
    if not 0 <= first_row <= batch - b:
        raise ValueError(f"rows {first_row}..{first_row + b - 1} do not lie within a batch of {batch}")
    if objective.needs_labels and labels is None:
        raise ValueError("a supervised objective needs labels")
    dtype = torch.float64 if rows_u.dtype == torch.float64 else torch.float32
    rows = {"u": rows_u.to(dtype), "v": rows_v.to(dtype)}
    columns = {"u": columns_u.to(dtype), "v": columns_v.to(dtype)}
    row_gradients = {name: torch.zeros_like(x) for name, x in rows.items()}
    column_gradients: dict[str, Tensor] = {}
    sums = torch.zeros(len(objective.part_names), dtype=torch.float64, device=rows_u.device)
    slope = sums.new_zeros(())
    with torch.no_grad():
        for piece in objective.slices:
            c = torch.cat([columns[name] for name in piece.columns])
            dc = torch.zeros_like(c)
            step = max(1, STRIP_ELEMENTS // len(c))
            for start in range(0, b, step):
                x = rows[piece.rows][start : start + step]
                s, dtau, parts = _strip(objective, piece, x @ c.T, first_row + start, batch, labels)
                s *= piece.weight
                row_gradients[piece.rows][start : start + step] += s @ c
                dc += s.T @ x
                sums += piece.weight * parts.double().sum(1)
                slope += piece.weight * dtau.double().sum()
            for name, part in zip(piece.columns, dc.split(batch), strict=True):
                column_gradients[name] = column_gradients[name] + part if name in column_gradients else part
    named = dict(zip(objective.part_names, sums.unbind(), strict=True))
    return FieldResult(
        loss=named["cross_entropy"] - named["entropy_p"],
        parts=named,
        rows_u=row_gradients["u"],
        rows_v=row_gradients["v"],
        columns_u=column_gradients.get("u"),
        columns_v=column_gradients.get("v"),
        temperature=slope,
    )


def _strip(
    objective: Objective, piece: Slice, s: Tensor, first: int, batch: int, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient with respect to similarities (r, N), to tau0 (r,), and the parts (P, r) of consecutive
    rows."""
    r = s.shape[0]
    index = torch.arange(r, device=s.device)
    tiny = torch.finfo(s.dtype).tiny
    excluded = None if piece.excluded is None else (index, index + first + piece.excluded * batch)
    p = torch.zeros_like(s)
    if labels is None or not objective.needs_labels:
        p[index, index + first + piece.positive * batch] = 1
    else:
        same = labels[first : first + r, None] == labels.repeat(len(piece.columns))[None, :]
        p.copy_(same)
        if excluded is not None:
            p[excluded] = 0
        p /= p.sum(1, keepdim=True)
    positive = p > 0
    counts = positive.sum(1)
    log_q: list[Tensor] = []
    for tau in objective.temperatures:
        logits = s / tau
        if excluded is not None:
            logits[excluded] = -torch.inf
        log_q.append(torch.log_softmax(logits, dim=1))
        if excluded is not None:
            log_q[-1][excluded] = 0  # p = q = 0 there: any finite number gives contribution 0
    q = [x.exp() for x in log_q]
    if excluded is not None:
        for x in q:
            x[excluded] = 0
    ps, ratios, crosses, entropies = [], [], [], []
    for t, alpha in enumerate(objective.couplings, start=1):
        p = (1 - alpha) * p + alpha * q[t - 1]
        log_p = p.clamp_min(tiny).log()
        ps.append(p)
        ratios.append(log_p - log_q[t])
        crosses.append(-(p * log_q[t]).sum(1))
        entropies.append(-(p * log_p).sum(1))
    slope = s.new_zeros(r)
    ds = torch.zeros_like(s)
    adjoint = torch.zeros_like(s)  # derivative with respect to p(t)
    for t in range(objective.depth, -1, -1):
        dz = torch.zeros_like(s)  # derivative with respect to s / tau(t)
        if t > 0:
            dz += q[t] - ps[t - 1]
        if t < objective.depth and objective.supervisor_grad == "flow":
            flow = objective.couplings[t] * adjoint
            dz += q[t] * (flow - (q[t] * flow).sum(1, keepdim=True))
        if t > 0:
            adjoint = ratios[t - 1] + (1 - objective.couplings[t] if t < objective.depth else 0) * adjoint
        ds += dz / objective.temperatures[t]
        slope -= (dz * s).sum(1) / (objective.temperatures[t] * objective.temperature)
    values = [c - h for c, h in zip(crosses, entropies, strict=True)]
    mass = torch.where(positive, q[-1], 0).sum(1)
    known = {n: objective.at_uniform(batch, n) for n in set(counts.tolist())}
    uniform = s.new_tensor([known[n] for n in counts.tolist()])
    parts = [*values, torch.stack(crosses).sum(0), torch.stack(entropies).sum(0), mass, uniform]
    return ds, slope, torch.stack(parts)
