"""What an affinity costs beside the cosine: forward and backward of the loss, in one run, and the memory it takes.

    python benchmarks/affinities.py [--batches 4096 16384] [--rows 2048] [--dim 64] [--rounds 3] [--out FILE.json]

The gradients of `--rows` rows against all columns of the batch, float32, one CPU thread, processor time: ratios are
medians over rounds, each affinity beside the cosine of its round. Clusters are as many as dimensions. Memory is the
growth of the peak of a fresh process that computes the whole batch once, inputs and gradients not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rkdo_dist.field.affinity import Affinity, Clusters, Cosine, Gaussian, Student
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.tiled import value_and_gradient

AFFINITIES: dict[str, Affinity] = {a.name: a for a in (Cosine(), Gaussian(4.0), Student(2.0), Clusters(0.2))}
OBJECTIVES: dict[str, Callable[..., Objective]] = {"icon": Objective.icon, "rkdo": Objective.rkdo}


def embeddings(objective: Objective, batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """Both views (B, d) float32."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(batch, dim, generator=generator) for _ in range(2))
    return (normalize(u, dim=1), normalize(v, dim=1)) if objective.affinity.unit_norm else (u, v)


def compute(objective: Objective, u: Tensor, v: Tensor, rows: int) -> float:
    """Processor seconds of the gradients of the first `rows` of a batch."""
    began = time.process_time()
    value_and_gradient(objective, u[:rows], v[:rows], u, v, 0, parts=False, temperature=False)
    return time.process_time() - began


def resident(what: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def memory(kind: str, affinity: str, batch: int, dim: int) -> None:
    """Print the extra MB of the whole batch: called in a fresh process."""
    torch.set_num_threads(1)
    objective = OBJECTIVES[kind](affinity=AFFINITIES[affinity])
    compute(objective, *embeddings(objective, 256, dim), 256)
    u, v = embeddings(objective, batch, dim)
    Path("/proc/self/clear_refs").write_text("5")
    before, gradients = resident("VmRSS"), 3 * u.numel() * u.element_size() / 2**20
    compute(objective, u, v, batch)
    print(resident("VmHWM") - before - gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        kind, affinity, batch = arguments.memory
        memory(kind, affinity, int(batch), arguments.dim)
        return
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for affinity in AFFINITIES.values():  # libraries load what they need at the first call
        objective = Objective.rkdo(affinity=affinity)
        compute(objective, *embeddings(objective, 256, arguments.dim), 256)
    for batch in arguments.batches:
        rows = min(batch, arguments.rows)
        for kind, make in OBJECTIVES.items():
            seconds: dict[str, list[float]] = {name: [] for name in AFFINITIES}
            for _ in range(arguments.rounds):
                for name, affinity in AFFINITIES.items():
                    objective = make(affinity=affinity)
                    seconds[name].append(compute(objective, *embeddings(objective, batch, arguments.dim), rows))
            for name in AFFINITIES:
                ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["cosine"], strict=True))
                words = [sys.executable, __file__, "--dim", str(arguments.dim), "--memory", kind, name, str(batch)]
                extra = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
                median = statistics.median(seconds[name])
                found.append({"batch": batch, "rows": rows, "objective": kind, "affinity": name})
                found[-1] |= {"seconds": round(median, 4), "ratio": round(ratio, 3), "extra_mb": round(extra, 1)}
                print(f"B = {batch:6d}  {kind:5s} {name:9s} {median:7.3f} s  {ratio:5.2f}  {extra:6.1f} MB", flush=True)
    if arguments.out:
        about = {"torch": torch.__version__, "machine": platform.machine(), "dim": arguments.dim, "threads": 1}
        arguments.out.write_text(json.dumps({**about, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
