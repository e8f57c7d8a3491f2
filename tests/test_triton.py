"""The fused GPU kernel without a GPU: its arithmetic in triton's interpreter, its code through triton's compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rkdo_dist import RKDOLoss
from rkdo_dist.field.objectives import Objective, dense
from tests import fields

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parent.parent

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rkdo_dist.field import triton_kernels as kernels

pointers = ("x_ptr", "sums_ptr", "table_ptr", "share_ptr")
numbers = ("stride", "rows", "columns", "positive", "excluded", "depth")
for levels, excludes, flows in ((2, False, True), (4, True, True), (4, False, False)):
    sizes = {"LEVELS": levels, "BLOCK": kernels.TILE // levels, "EXCLUDES": excludes, "FLOWS": flows}
    signature = {**dict.fromkeys(pointers, "*fp32"), **dict.fromkeys(numbers, "i32"), "tiny": "fp32"}
    signature |= dict.fromkeys(sizes, "constexpr")
    source = ASTSource(kernels._field_rows, signature, constexprs=sizes)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
print("compiled")
"""


def run(arguments: list[str], tmp_path: Path, **extra: str) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **extra}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernel_equals_the_oracle_in_the_interpreter(tmp_path: Path) -> None:
    assert "all agree" in run(["-W", "ignore", "-m", "tests.triton_cases"], tmp_path, TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    assert "compiled" in run(["-c", COMPILE], tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pairing", ["cross", "joint"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_on_a_gpu_equals_the_oracle(dtype: torch.dtype, pairing: str) -> None:
    u, v = (x.cuda().to(dtype).requires_grad_() for x in fields.embeddings(1000, 64))
    loss_fn, objective = RKDOLoss(pairing=pairing), Objective.rkdo(pairing=pairing)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        loss = loss_fn(u, v)
    expected, _ = dense(objective, u.double(), v.double())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for found, truth in zip(torch.autograd.grad(loss, (u, v)), torch.autograd.grad(expected, (u, v)), strict=True):
        error = (found.double() - truth.double()).norm() / truth.double().norm()
        assert error < max(tolerance, torch.finfo(dtype).eps)
