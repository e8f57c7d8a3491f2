"""RKDO on a strip of similarities as one fused GPU kernel: one program per row, four reads of it, one write.

Imported only for CUDA tensors where triton is installed; the package works without. Under TRITON_INTERPRET=1 the same
code runs on the CPU, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkdo_dist.field.kernels import RowSums
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.places import Place
from rkdo_dist.field.recursive_kernel import RecursiveKernel, gradient_coefficients
from rkdo_dist.field.supervisors import Supervisor

TILE = 2048  # levels times columns of a row in registers at a time: 4 warps hold it without spilling


@triton.jit
def _levels(x_ptr, j, columns, excluded, top, ratio):  # type: ignore[no-untyped-def]
    """x - top (BLOCK,), where it takes part (BLOCK,), and ratio_t (x - top) of every level (LEVELS, BLOCK)."""
    inside = (j < columns) & (j != excluded)
    x = tl.load(x_ptr + j, mask=inside, other=0.0) - top
    x = tl.where(inside, x, 0.0)
    return x, inside, ratio[:, None] * x[None, :]


@triton.jit
def _ratios(logits, log_z, inside, hot, share, kept, is_level, tiny):  # type: ignore[no-untyped-def]
    """q(s), p(t) and log p(t) - log q(t), each (LEVELS, BLOCK); 0 outside the levels and columns that take part."""
    log_q = logits - log_z[:, None]
    q = tl.where(inside[None, :], tl.exp(log_q), 0.0)
    p = tl.sum(share[:, :, None] * q[None, :, :], axis=1) + kept[:, None] * hot[None, :]
    log_ratio = tl.log(tl.maximum(p, tiny)) - log_q
    return q, p, tl.where(is_level[:, None] & inside[None, :], log_ratio, 0.0)


@triton.jit
def _field_rows(  # type: ignore[no-untyped-def]
    x_ptr, sums_ptr, table_ptr, share_ptr, stride, rows, columns, positive, excluded, depth, tiny,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr, EXCLUDES: tl.constexpr, FLOWS: tl.constexpr,
):  # fmt: skip
    """One row: its sums to sums (2 + 3 LEVELS, rows), and x <- d loss / d x.

    table (4, LEVELS): ratio, kept share of p(0), direct factor of q(s), derivative at the positive (first entry).
    share[t, s]: q(s) in p(t), and so log p(t) - log q(t) in the derivative by q(s).
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    positive += row
    if EXCLUDES:
        excluded += row
    level, block = tl.arange(0, LEVELS), tl.arange(0, BLOCK)
    ratio, kept = tl.load(table_ptr + level), tl.load(table_ptr + LEVELS + level)
    direct, on_positive = tl.load(table_ptr + 2 * LEVELS + level), tl.load(table_ptr + 3 * LEVELS)
    share = tl.load(share_ptr + level[:, None] * LEVELS + level[None, :])
    is_level = (level >= 1) & (level <= depth)

    peak = tl.full((BLOCK,), -float("inf"), dtype=ratio.dtype)
    for start in range(0, columns, BLOCK):
        j = start + block
        inside = (j < columns) & (j != excluded)
        peak = tl.maximum(peak, tl.load(x_ptr + j, mask=inside, other=-float("inf")))
    top = tl.max(peak, axis=0)

    z, mean = tl.zeros((LEVELS,), dtype=ratio.dtype), tl.zeros((LEVELS,), dtype=ratio.dtype)
    for start in range(0, columns, BLOCK):
        x, inside, logits = _levels(x_ptr, start + block, columns, excluded, top, ratio)
        e = tl.where(inside[None, :], tl.exp(logits), 0.0)
        z += tl.sum(e, axis=1)
        mean += tl.sum(e * x[None, :], axis=1)
    log_z = tl.log(z)

    divergence, through_p = tl.zeros((LEVELS,), dtype=ratio.dtype), tl.zeros((LEVELS,), dtype=ratio.dtype)
    at_positive = tl.zeros((BLOCK,), dtype=ratio.dtype)
    for start in range(0, columns, BLOCK):
        x, inside, logits = _levels(x_ptr, start + block, columns, excluded, top, ratio)
        hot = tl.where(start + block == positive, 1.0, 0.0).to(ratio.dtype)
        q, p, log_ratio = _ratios(logits, log_z, inside, hot, share, kept, is_level, tiny)
        divergence += tl.sum(p * log_ratio, axis=1)
        at_positive += x * hot
        if FLOWS:
            g = tl.sum(share[:, :, None] * log_ratio[:, None, :], axis=0)
            through_p += tl.sum(q * g, axis=1)

    tl.store(sums_ptr + row, top)
    tl.store(sums_ptr + rows + row, tl.sum(at_positive, axis=0))
    by_level = sums_ptr + (2 + level) * rows + row
    tl.store(by_level, z)
    tl.store(by_level + LEVELS * rows, mean)
    tl.store(by_level + 2 * LEVELS * rows, divergence)

    for start in range(0, columns, BLOCK):
        j = start + block
        x, inside, logits = _levels(x_ptr, j, columns, excluded, top, ratio)
        hot = tl.where(j == positive, 1.0, 0.0).to(ratio.dtype)
        q, p, log_ratio = _ratios(logits, log_z, inside, hot, share, kept, is_level, tiny)
        factor = tl.zeros((LEVELS, BLOCK), dtype=ratio.dtype) + direct[:, None]
        if FLOWS:
            g = tl.sum(share[:, :, None] * log_ratio[:, None, :], axis=0)
            factor += ratio[:, None] * (g - through_p[:, None])
        gradient = tl.sum(q * factor, axis=0) - on_positive * hot
        tl.debug_barrier()  # threads that hold copies of x must have read it before any thread overwrites it
        tl.store(x_ptr + j, tl.where(inside, gradient, 0.0), mask=j < columns)


class TritonKernel(RecursiveKernel):
    """`RecursiveKernel` whose `fused` is one launch; the walks over column blocks are inherited.

    Args:
        objective, supervisor, rows, columns, dtype, device: as for `RecursiveKernel`, with p(0) the identity. The parts
            cost nothing here.
    """

    def __init__(
        self,
        objective: Objective,
        supervisor: Supervisor,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(objective, supervisor, rows, columns, dtype, device, parts=True)
        depth, alpha = objective.depth, objective.couplings
        self._depth = depth
        self._size = triton.next_power_of_2(depth + 1)
        table, share = torch.zeros(4, self._size, dtype=dtype), torch.zeros(self._size, self._size, dtype=dtype)
        table[0, : depth + 1] = torch.tensor(self._ratio, dtype=dtype)
        table[2, : depth + 1] = torch.tensor(gradient_coefficients(alpha, self._ratio)[1], dtype=dtype)
        table[3, 0] = self._on_positive
        for t in range(1, depth + 1):
            table[1, t] = math.prod(1 - a for a in alpha[:t])
            for s in range(t):
                share[t, s] = alpha[s] * math.prod(1 - a for a in alpha[s + 1 : t])
        self._kernel_table, self._share = table.to(device), share.to(device)

    def fused(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """All columns at once: fill `sums` from x (r, N) and turn x into d loss / d x."""
        assert place.positive is not None
        rows, columns = x.shape
        found = x.new_empty(2 + 3 * self._size, rows)
        excludes = place.excluded is not None
        with torch.cuda.device_of(x):  # does nothing for a CPU tensor
            _field_rows[(rows,)](
                x, found, self._kernel_table, self._share, x.stride(0), rows, columns,
                place.positive, place.excluded if excludes else -1, self._depth, self._tiny,
                LEVELS=self._size, BLOCK=TILE // self._size, EXCLUDES=excludes, FLOWS=self.flows,
            )  # fmt: skip
        depth, by_level = self._depth, found[2:].unflatten(0, (3, self._size))
        sums.shift.copy_(found[0])
        sums.positive[0].copy_(found[1])
        sums.positive[1].copy_(found[1].exp())
        sums.z.copy_(by_level[0, : depth + 1])
        sums.mean.copy_(by_level[1, :depth])
        for t in range(1, depth + 1):  # as the walks leave it: before the constant and the scale are restored
            unscaled = by_level[2, t] - self._constant(t, sums.z)
            sums.log_ratio[t - 1].copy_(unscaled * sums.z[-1] / self._scale_of_p[t - 1])
