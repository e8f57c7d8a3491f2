"""Run as a program under TRITON_INTERPRET=1 by tests/test_triton.py: the fused kernel against the dense oracle."""

from __future__ import annotations

import os
from unittest import mock

import torch

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


def main() -> None:
    """All objectives, in both precisions, with rows that are no multiple of anything."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    with mock.patch.object(TritonKernel, "fused", autospec=True, side_effect=TritonKernel.fused) as fused:
        for objective in OBJECTIVES:
            compare(objective, 7, torch.float64, 1e-11)
            compare(objective, 7, torch.float32, 1e-5)
        compare(Objective.rkdo(), 600, torch.float32, 1e-5)  # more columns than a block of the kernel
        u, v = (x.requires_grad_() for x in fields.embeddings(6, 4))
        loss, expected = RKDOLoss()(u, v), dense(Objective.rkdo(), u, v)[0]
        found, truth = torch.autograd.grad(loss, u)[0], torch.autograd.grad(expected, u)[0]
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
    assert fused.call_count > 2 * len(OBJECTIVES), "the kernel was not used"
    print("all agree")


if __name__ == "__main__":
    main()
