# mypy: disable-error-code="assignment"
"""RKDO on a strip of similarities as one fused GPU kernel: one program per row, three reads of it, one write.

Imported only for CUDA tensors where triton is installed; the package works without. Under TRITON_INTERPRET=1 the same
code runs on the CPU, which is how it is tested where there is no GPU; compiled for GPUs it is counted instruction by
instruction (tests/test_triton.py). Every constant comes in a table, in the precision of the strip: triton's launcher
rounds plain numbers to float32.

Exponentials and logarithms are those of base 2, which a GPU has instructions for. With q(s), and w(t) =
(1 - alpha(t)) w(t-1) + alpha(t) q(t-1) / tau(t-1), what the loss hands on through p is the sum of w(t) times log p(t)
- log q(t) over t: a chain, as p itself is.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkdo_dist.field.kernels import MOST_LEVELS, RowSums
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.places import Place
from rkdo_dist.field.recursive_kernel import RecursiveKernel
from rkdo_dist.field.supervisors import Supervisor

WARPS = 8
ENTRIES = {torch.float32: 4, torch.float64: 1}  # of a row in the registers of a thread at a time
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LOW = tl.constexpr(-1e30)  # a logit whose exponential is 0, and 0 times which is 0


@triton.jit
def _log2(x, APPROXIMATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The logarithm; the GPU's instruction for it (off by 2^-22 at most) where tl.log2 is a polynomial of 25."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def _strip(x_ptr, j, columns, excluded, top, EXCLUDES: tl.constexpr):  # type: ignore[no-untyped-def]
    """x - top at columns j (BLOCK,), very low where a column does not take part."""
    inside = j < columns
    if EXCLUDES:
        inside = inside & (j != excluded)
    return tl.load(x_ptr + j, mask=inside, other=_LOW) - top


@triton.jit
def _field_rows(  # type: ignore[no-untyped-def]
    x_ptr, sums_ptr, table_ptr, stride, rows, columns, positive, excluded,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, EXCLUDES: tl.constexpr, FLOWS: tl.constexpr, SHIFTS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """One row: its sums to sums (3 + 3 DEPTH, rows), in the order of the stores below, and x <- d loss / d x.

    table: what `_table` returns. Tuples hold one value per level.
    """
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * stride
    sums_ptr += row
    positive += row
    if EXCLUDES:
        excluded += row
    block = tl.arange(0, BLOCK)
    tiny = tl.load(table_ptr)
    unit, direct, alpha, through, zeros = (), (), (), (), ()
    none = tl.zeros((BLOCK,), dtype=tiny.dtype)
    for t in tl.static_range(DEPTH + 1):
        unit += (tl.load(table_ptr + 1 + t),)
        direct += (tl.load(table_ptr + 2 + DEPTH + t),)
    for t in tl.static_range(DEPTH):
        alpha += (tl.load(table_ptr + 3 + 2 * DEPTH + t),)
        through += (tl.load(table_ptr + 3 + 3 * DEPTH + t),)
        zeros += (none,)

    top = tl.zeros((), dtype=tiny.dtype)
    if SHIFTS:  # else x is bounded, and exp(x) does not overflow
        peak = none + _LOW
        for start in range(0, columns, BLOCK):
            peak = tl.maximum(peak, _strip(x_ptr, start + block, columns, excluded, top, EXCLUDES))
        top = tl.max(peak, axis=0)
    tl.store(sums_ptr, top)
    tl.store(sums_ptr + rows, tl.load(x_ptr + positive) - top)

    z, mean = zeros + (none,), zeros  # noqa: RUF005
    for start in range(0, columns, BLOCK):
        x = _strip(x_ptr, start + block, columns, excluded, top, EXCLUDES)
        new_z, new_mean = (), ()
        for t in tl.static_range(DEPTH + 1):
            e = tl.exp2(x * unit[t])
            new_z += (z[t] + e,)
            if t < DEPTH:
                new_mean += (mean[t] + e * x,)
        z, mean = new_z, new_mean
    log_z = ()
    for t in tl.static_range(DEPTH + 1):
        total = tl.sum(z[t], axis=0)
        log_z += (tl.log2(total),)
        tl.store(sums_ptr + (2 + t) * rows, total)
        if t < DEPTH:
            tl.store(sums_ptr + (3 + DEPTH + t) * rows, tl.sum(mean[t], axis=0))

    divergence, flow = zeros, zeros  # sums over columns of p(t) rho(t), and of q(s) times the derivative by p(s + 1)
    for start in range(0, columns, BLOCK):
        x = _strip(x_ptr, start + block, columns, excluded, top, EXCLUDES)
        p = tl.where(start + block == positive, 1.0, 0.0).to(x.dtype)
        q, rho, new = (), (), ()
        for t in tl.static_range(DEPTH):
            q += (tl.exp2(x * unit[t] - log_z[t]),)
            p += alpha[t] * (q[t] - p)
            rho += (_log2(tl.maximum(p, tiny), APPROXIMATE) - (x * unit[t + 1] - log_z[t + 1]),)
            new += (divergence[t] + p * rho[t],)
        divergence = new
        if FLOWS:
            g, new = none, ()
            for t in tl.static_range(DEPTH):
                if t > 0:
                    g -= alpha[DEPTH - t] * g
                g += rho[DEPTH - 1 - t]
                new = (flow[DEPTH - 1 - t] + q[DEPTH - 1 - t] * g,) + new  # noqa: RUF005
            flow = new
    factor = ()  # of q(s) in the gradient
    for t in tl.static_range(DEPTH):
        tl.store(sums_ptr + (3 + 2 * DEPTH + t) * rows, tl.sum(divergence[t], axis=0))
        if FLOWS:
            factor += (direct[t] - through[t] * tl.sum(flow[t], axis=0),)
        else:
            factor += (direct[t],)

    for start in range(0, columns, BLOCK):
        j = start + block
        x = _strip(x_ptr, j, columns, excluded, top, EXCLUDES)
        p = tl.where(j == positive, 1.0, 0.0).to(x.dtype)
        gradient, w = direct[DEPTH] * tl.exp2(x * unit[DEPTH] - log_z[DEPTH]), none
        for t in tl.static_range(DEPTH):
            q = tl.exp2(x * unit[t] - log_z[t])
            p += alpha[t] * (q - p)
            gradient += factor[t] * q
            gradient -= direct[t + 1] * p
            if FLOWS:
                w -= alpha[t] * w
                w += through[t] * q
                gradient += w * (_log2(tl.maximum(p, tiny), APPROXIMATE) - (x * unit[t + 1] - log_z[t + 1]))
        tl.debug_barrier()  # threads that hold copies of x must have read it before any thread overwrites it
        tl.store(x_ptr + j, gradient, mask=j < columns)


@lru_cache(maxsize=64)
def _table(ratio: tuple[float, ...], alpha: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Constants of an objective: the least number; tau(D) / tau(s) in units of log 2, s = 0..D; itself, but for s = 0;
    alpha(t), t = 1..D; what q(t - 1) adds to w(t), for a logarithm of base 2."""
    unit = [r / math.log(2) for r in ratio]
    through = [a * r * math.log(2) for a, r in zip(alpha, ratio, strict=False)]
    values = [torch.finfo(dtype).tiny, *unit, 0.0, *ratio[1:], *alpha, *through]
    return torch.tensor(values, dtype=dtype, device=device)


class TritonKernel(RecursiveKernel):
    """`RecursiveKernel` whose `fused` is one launch; the walks over column blocks are inherited.

    Args:
        objective, supervisor, rows, columns, dtype, device: as for `RecursiveKernel`, with p(0) the identity and at
            most `MOST_LEVELS` levels. The parts cost little here.
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
        assert objective.depth <= MOST_LEVELS, "deeper recursions do not fit a thread's registers"
        self._kernel_table = _table(tuple(self._ratio), objective.couplings, dtype, device)

    def fused(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """All columns at once: fill `sums` from x (r, N) and turn x into d loss / d x."""
        assert place.positive is not None
        (rows, columns), depth = x.shape, len(self._alpha)
        found = x.new_empty(3 + 3 * depth, rows)
        excludes = place.excluded is not None
        with torch.cuda.device_of(x):  # does nothing for a CPU tensor
            _field_rows[(rows,)](
                x, found, self._kernel_table, x.stride(0), rows, columns,
                place.positive, place.excluded if excludes else -1,
                DEPTH=depth, BLOCK=32 * WARPS * ENTRIES[x.dtype], EXCLUDES=excludes, FLOWS=self.flows,
                SHIFTS=self.shifts, APPROXIMATE=x.dtype == torch.float32 and not _INTERPRETED, num_warps=WARPS,
            )  # fmt: skip
        top, positive, z, mean, divergence = found.split((1, 1, depth + 1, depth, depth))
        # as the walks leave it: logits are those of log q(D), and constants not yet restored
        log_z = z[-1].log()
        sums.shift.copy_(top[0])
        sums.positive[0].copy_(positive[0] - log_z)
        sums.positive[1].copy_((positive[0] - log_z).exp())
        sums.z.copy_(z)
        sums.mean.copy_(mean / z[:-1] - log_z)
        sums.log_ratio.copy_(divergence * math.log(2) - self._constants(self._log_z(z)))
