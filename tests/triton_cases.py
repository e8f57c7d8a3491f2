"""Run as a program under TRITON_INTERPRET=1 by tests/test_triton.py: the fused kernel against the dense oracle."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from rkdo_dist.field import fused, triton_kernels
from rkdo_dist.field.affinity import Clusters, Gaussian, Student
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.field.tiled import value_and_gradient
from rkdo_dist.field.triton_kernels import TritonKernel
from rkdo_dist.losses import RKDOLoss
from tests import fields

OBJECTIVES = [
    Objective.rkdo(),
    Objective.rkdo(pairing="joint"),
    Objective.rkdo(symmetric=True),
    Objective.rkdo(supervisor_grad="stop"),
    Objective.rkdo(1, 0.3),
    Objective.rkdo(5, (0.0, 1.0, 0.2, 0.5, 0.0), 0.2, 0.5, "joint"),
    Objective.rkdo(2, 1.0, 0.01),
    Objective.rkdo(2, 0.0, 3.0),
    Objective.rkdo(3, (0.0, 0.5, 0.5)),
    Objective.rkdo(8, 0.3, 0.2, 0.5),
    replace(Objective.rkdo(1, 1.0, 0.005, pairing="joint"), supervisor_grad="stop"),
    Objective.rkdo(affinity=Student(2.0), pairing="joint"),
    Objective.rkdo(affinity=Gaussian(0.3)),
    Objective.rkdo(affinity=Clusters(0.1), symmetric=True),
]


def compare(objective: Objective, batch: int, dtype: torch.dtype, tolerance: float) -> None:
    """Value, parts and gradients of all rows in two calls."""
    u, v = (x.to(dtype) for x in fields.embeddings(batch, 6, copies=2))
    x, y = (z.double().requires_grad_() for z in (u, v))
    loss, parts = dense(objective, x, y)
    expected, cut = torch.autograd.grad(loss, (x, y)), batch // 3
    found = {"u": torch.zeros_like(x), "v": torch.zeros_like(y)}
    value, noise = 0.0, tolerance * max(1.0, 0.02 / min(objective.temperatures))
    totals = dict.fromkeys(parts, 0.0)
    for start, stop in ((0, cut), (cut, batch)):
        result = value_and_gradient(objective, u[start:stop], v[start:stop], u, v, start)
        found["u"][start:stop] += result.rows_u
        found["v"][start:stop] += result.rows_v
        found["u"] += 0 if result.columns_u is None else result.columns_u
        found["v"] += 0 if result.columns_v is None else result.columns_v
        value += float(result.loss) / batch
        totals = {name: totals[name] + float(result.parts[name]) / batch for name in totals}
    scale = max(1.0, float(parts["cross_entropy"]))
    assert abs(value - float(loss)) <= noise * scale, (objective, value, float(loss))
    for name, part in parts.items():
        assert abs(totals[name] - float(part)) <= noise * scale, (objective, name)
    for gradient, truth in zip(found.values(), expected, strict=True):
        error = float((gradient / batch - truth).norm())
        assert error <= noise * (float(truth.norm()) + 1 / min(objective.temperatures)), (objective, error)


def compare_long_rows(objective: Objective, samples: int, dtype: torch.dtype, tolerance: float) -> None:
    """A few rows of more columns than the kernel has in registers at a time."""
    u, v = (x.to(dtype) for x in fields.embeddings(samples, 6))
    x, y = (z.double().requires_grad_() for z in (u, v))
    loss, _ = dense(objective, x, y, rows=torch.arange(3))
    (expected,) = torch.autograd.grad(loss, y)
    result = value_and_gradient(objective, u[:3], v[:3], u, v, 0)
    found = torch.zeros_like(y)
    found[:3] += result.rows_v
    found += result.columns_v
    assert abs(float(result.loss) / 3 - float(loss)) <= tolerance * float(loss)
    assert float((found / 3 - expected).norm()) <= tolerance * float(expected.norm())


def as_the_launcher_passes(argument: Any, convert: Any = interpreter._implicit_cvt) -> Any:
    """The interpreter hands plain numbers on as they are; on a GPU they are float32."""
    return float(np.float32(argument)) if isinstance(argument, float) else convert(argument)


def check_the_check() -> None:
    """It finds nothing wrong with the kernel as it is, and what is wrong with others."""
    device, objective = torch.device("cpu"), Objective.rkdo(2)
    small = mock.patch.multiple(fused, ROWS=3, SAMPLES=50)
    with small:
        for good in (objective, Objective.rkdo(3, pairing="joint", affinity="student")):
            for dtype in (torch.float32, torch.float64):
                assert fused.self_check(good, dtype, device) is None, fused.self_check(good, dtype, device)
        assert fused.self_check(Objective.infonce(), torch.float32, device) is None

        def launch(*_: object, **__: object) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

        with mock.patch.object(TritonKernel, "fused", launch):
            verdict = fused.self_check(objective, torch.float32, device)
        assert verdict == "RuntimeError: Failed to find C compiler.", verdict
        table = triton_kernels._table
        # a control: every constant is off by a hundredth
        with mock.patch.object(triton_kernels, "_table", lambda *a: table(*a) * 1.01):
            verdict = fused.self_check(objective, torch.float32, device)
        assert verdict is not None
        assert "differs from the eager kernel's" in verdict, verdict
    u, v = fields.embeddings(6, 4)
    expected = RKDOLoss()(u, v)
    with mock.patch.object(TritonKernel, "fused", launch), mock.patch.object(fused, "_settled", None):
        fused.settle(False)
        assert abs(float(RKDOLoss()(u, v) - expected)) < 1e-12


def main() -> None:
    """All objectives, in both precisions, with rows that are no multiple of anything."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    spied = mock.patch.object(TritonKernel, "fused", autospec=True, side_effect=TritonKernel.fused)
    rounded = mock.patch.object(interpreter, "_implicit_cvt", as_the_launcher_passes)
    with spied as calls, rounded:
        for objective in OBJECTIVES:
            compare(objective, 7, torch.float64, 1e-11)
            compare(objective, 7, torch.float32, 1e-5)
        assert calls.call_count > 2 * len(OBJECTIVES), "the kernel was not used"
        compare_long_rows(Objective.rkdo(), 1100, torch.float32, 1e-5)
        compare_long_rows(Objective.rkdo(pairing="joint"), 300, torch.float64, 1e-11)
        u, v = (x.requires_grad_() for x in fields.embeddings(6, 4))
        loss, expected = RKDOLoss()(u, v), dense(Objective.rkdo(), u, v)[0]
        found, truth = torch.autograd.grad(loss, u)[0], torch.autograd.grad(expected, u)[0]
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
        seen = calls.call_count
        value_and_gradient(Objective.rkdo(9), u.detach(), v.detach(), u.detach(), v.detach(), 0)
        assert calls.call_count == seen, "more levels than registers hold take the eager kernel"
    check_the_check()
    print("all agree")


if __name__ == "__main__":
    main()
