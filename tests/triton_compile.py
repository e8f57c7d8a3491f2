"""Run as a program by tests/test_triton.py: the fused kernel through the compilers of triton and CUDA, without a GPU.

Prints, for every case of the command line (JSON: a list of `compiled` arguments), the SASS instructions per entry of
the field, and the loads and stores of registers that did not fit, as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rkdo_dist.field import triton_kernels as kernels

POINTERS = ("x_ptr", "sums_ptr", "table_ptr")
NUMBERS = ("stride", "rows", "columns", "positive", "excluded")
WIDTHS = {"128": 16, "64": 8}  # bytes of a load


def compiled(
    arch: int = 90,
    depth: int = 3,
    dtype: str = "fp32",
    excludes: bool = False,
    flows: bool = True,
    shifts: bool = False,
    ones: tuple[str, ...] = (),
    divisible: bool = True,
) -> list[str]:
    """SASS instructions and labels of one specialisation.

    Args:
        arch: 80 or 90.
        ones: numbers that are 1, which triton compiles in.
        divisible: whether the others are known to be divisible by 16, as far as they can be.
    """
    narrow, kernel = dtype == "fp32", kernels._field_rows
    block = 32 * kernels.WARPS * kernels.ENTRIES[torch.float32 if narrow else torch.float64]
    constants = {"DEPTH": depth, "BLOCK": block, "EXCLUDES": excludes, "FLOWS": flows, "SHIFTS": shifts}
    constants |= {"APPROXIMATE": narrow, **dict.fromkeys(ones, 1)}
    signature = {**dict.fromkeys(POINTERS, f"*{dtype}"), **dict.fromkeys(NUMBERS, "i32")}
    signature |= dict.fromkeys(constants, "constexpr")
    known = [name for name in (*POINTERS, *NUMBERS) if name in POINTERS or (divisible and name not in ones)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in known}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": kernels.WARPS})
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        found = subprocess.run([str(disassembler), "-c", file.name], capture_output=True, text=True, check=True)
    pattern = re.compile(r"\s*(?:(\.L_x_\d+):|/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);)")
    return [m[1] or m[2] for m in map(pattern.match, found.stdout.splitlines()) if m]


def per_entry(lines: list[str], size: int) -> float:
    """Instructions of all loops over columns, each divided by the entries that it loads in a turn.

    Args:
        size: bytes of an entry.
    """
    labels = {line: at for at, line in enumerate(lines) if line.startswith(".L_x_")}
    total = 0.0
    for at, line in enumerate(lines):
        target = re.search(r"BRA\S*\s.*?`\((\.L_x_\d+)\)", line)
        if not target or labels.get(target[1], at) >= at:
            continue
        body = [part for part in lines[labels[target[1]] : at + 1] if part not in labels]
        loads = [part.split()[0] for part in body if part.startswith("LDG")]  # LDG.E, LDG.E.64, LDG.E.128
        entries = sum(WIDTHS.get(load.rsplit(".", 1)[-1], 4) // size for load in loads)
        if entries:  # else it is a loop within one exponential
            total += len(body) / entries
    return total


def main() -> None:
    """Every case of the command line."""
    results = []
    for case in json.loads(sys.argv[1]):
        lines = compiled(**case)
        spilled = sum(line.startswith(("LDL", "STL")) for line in lines)
        size = 4 if case.get("dtype", "fp32") == "fp32" else 8
        results.append({"per_entry": per_entry(lines, size), "spilled": spilled})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
