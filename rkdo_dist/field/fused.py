"""Whether the fused kernel of in-batch recursion is used: where it has been compared with the eager one.

A GPU's compiler, driver and libraries are the machine's own, so a device's first use is a small problem through both
kernels. Where the fused one raises (a container without a C compiler) or differs, a process goes on with the eager one.
Ranks of one job must not differ in it: `self_check` gives the verdict to agree on, `settle` is what follows from it.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from rkdo_dist.field.kernels import MOST_LEVELS, RowSums
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.places import Place
from rkdo_dist.field.recursive_kernel import RecursiveKernel
from rkdo_dist.field.supervisors import Identity

ROWS, SAMPLES = 64, 257  # of the problem that both kernels are given
TOLERANCE = 1e-5

_settled: bool | None = None


def fusible(objective: Objective, device: torch.device) -> bool:
    """Whether there is a fused kernel for it: p(0) is the identity, and triton and a device for it are there."""
    simple = objective.recursion == "in_batch" and objective.supervisor == "identity" and objective.debias == 0
    there = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return simple and objective.depth <= MOST_LEVELS and there and find_spec("triton") is not None


def chosen(objective: Objective, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the fused kernel is to be used; on a GPU its first use is preceded by a check."""
    if not fusible(objective, device):
        return False
    if _settled is not None:
        return _settled
    return device.type != "cuda" or _trusted(dtype, device)


def settle(fused: bool) -> None:
    """Use the fused kernel in this process from now on, or the eager one: what the ranks of a job have agreed on."""
    global _settled
    _settled = fused


def self_check(objective: Objective, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with the fused kernel on a device, in one line; None if nothing is.

    Of 64 rows against 257 samples, values and gradients of both kernels must agree to 1e-5. None also where there is
    no fused kernel for the objective.

    Args:
        objective: of the run: its depth, temperatures, pairing, affinity and supervisor_grad are what is checked.
        dtype: of the computation, float32 or float64.
    """
    if not fusible(objective, device):
        return None
    try:
        from rkdo_dist.field.triton_kernels import TritonKernel

        for piece in objective.slices:
            columns = SAMPLES * len(piece.columns)
            generator = torch.Generator().manual_seed(0)
            x = (2 * torch.rand(ROWS, columns, generator=generator) - 1) / objective.temperatures[-1]
            place, found = Place(piece, 0, SAMPLES - ROWS, 0, SAMPLES), []
            supervisor = Identity(ROWS, device, objective.column_count(SAMPLES), 0.0)
            given = objective, supervisor, ROWS, columns, dtype, device
            for kernel in (TritonKernel(*given), RecursiveKernel(*given, parts=True)):
                strip, sums = x.to(device, dtype, copy=True), RowSums.zeros(objective.depth, ROWS, dtype, device)
                kernel.fused(strip, sums, place)
                found.append((torch.stack(kernel.row_parts(sums)), strip))
            # a logit is off by its size times the precision: 1e-5 at a temperature of 0.02
            allowed = TOLERANCE * max(1.0, 0.02 / min(objective.temperatures))
            for what, one, other in zip(("value", "gradient"), *found, strict=True):
                error = _difference(one, other)
                if not error <= allowed:
                    return f"its {what} differs from the eager kernel's by {error:.1e} ({dtype}, {objective.pairing})"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative, in the norm."""
    return float((one.double() - other.double()).norm() / other.double().norm())


@lru_cache
def _trusted(dtype: torch.dtype, device: torch.device) -> bool:
    for objective in (Objective.rkdo(), replace(Objective.rkdo(pairing="joint"), supervisor_grad="stop")):
        wrong = self_check(objective, dtype, device)
        if wrong is not None:
            warnings.warn(f"the fused kernel is not used on {device}: {wrong}", stacklevel=2)
            return False
    return True
