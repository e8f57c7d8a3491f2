"""The fused GPU kernel without a GPU: its arithmetic in triton's interpreter, its code through triton's compiler."""

from __future__ import annotations

import json
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

# Of the kernel that is compiled, see tests/triton_compile.py; the cases that need most registers and instructions.
WIDEST = {"excludes": True, "shifts": True, "divisible": False}
DAILY = [
    *({"arch": arch, **case} for arch in (80, 90) for case in ({}, WIDEST)),
    {"depth": 1, "excludes": True, "ones": ["rows", "positive", "excluded"]},
    {"depth": 8, **WIDEST},
    {"depth": 8, "dtype": "fp64", **WIDEST},
]
EVERY = [
    {"arch": arch, "depth": depth, "dtype": dtype, **case}
    for arch, depth, dtype in ((90, 1, "fp32"), (90, 5, "fp32"), (90, 8, "fp32"), (80, 8, "fp32"), (80, 8, "fp64"))
    for case in (
        {"flows": False, "excludes": True, "shifts": True},
        {"excludes": True, "divisible": False},
        {"ones": ["rows", "positive"]},
    )
]


def run(arguments: list[str], tmp_path: Path, **extra: str) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **extra}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernel_equals_the_oracle_in_the_interpreter(tmp_path: Path) -> None:
    assert "all agree" in run(["-W", "ignore", "-m", "tests.triton_cases"], tmp_path, TRITON_INTERPRET="1")


def assert_lean(cases: list[dict], tmp_path: Path) -> None:
    """It compiles for a GPU, holds everything in registers, and takes few instructions."""
    for case, found in zip(
        cases, json.loads(run(["-m", "tests.triton_compile", json.dumps(cases)], tmp_path)), strict=True
    ):
        assert found["spilled"] == 0, case
        if case.get("depth", 3) <= 3 and case.get("dtype", "fp32") == "fp32":
            assert 40 < found["per_entry"] <= 130, (case, found)


def test_the_kernel_compiles_for_gpus_without_spills_in_few_instructions(tmp_path: Path) -> None:
    assert_lean(DAILY, tmp_path)


@pytest.mark.nightly
def test_every_kind_of_specialisation_compiles_without_spills(tmp_path: Path) -> None:
    assert_lean(EVERY, tmp_path)


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
