"""Exact against fast reduction: what a fixed order of summation costs, in time and traffic.

    python benchmarks/reduction.py [--ranks 2 4] [--steps 6]

Starts its own ranks (gloo, one thread each). Whole training steps of ResNet-18 on 32 x 32 images, exact and fast in
alternation in one run, and the gradient's reduction alone. Traffic is counted, not measured: both send and receive
2 (W - 1) / W of the gradient per rank (all-to-all and all-gather against the two halves of a ring all-reduce).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from rkdo_dist.data.stream import MicroBatch
from rkdo_dist.encoders import Encoder
from rkdo_dist.exchange import group
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks import runtime
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.step import Step, StepSettings

LANES, MICRO = 8, 32
ALONE = 5  # reductions alone after each step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options.steps)
        return
    for ranks in options.ranks:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        subprocess.run([*launcher, __file__, "--steps", str(options.steps)], check=True)


def measure(steps: int) -> None:
    """One world size: alternate the two reductions and print medians and their ratio."""
    rt = runtime.start(1, 300, "exact")
    own = range(rt.rank * LANES // rt.world, (rt.rank + 1) * LANES // rt.world)
    kinds = {}
    for kind in ("exact", "fast"):
        torch.manual_seed(0)
        encoder = Encoder()
        settings = StepSettings(seed=0, reduction=kind, recompute=False, views_together=True, exchange="gather")
        kinds[kind] = (encoder, Step(encoder, lambda images, *_: images / 255.0 - 0.5, rt, settings))
    times: dict[str, list[float]] = {name: [] for name in ("exact", "fast", "tree", "backend")}
    flat = torch.randn(sum(p.numel() for p in encoder.parameters()))
    reduce = group.ExactAllReduce(flat.numel(), flat)
    for number in range(steps + 1):
        lanes = [lane(number, index) for index in own]
        for kind, (_, step) in kinds.items():
            work = (step, lanes, Objective.rkdo(), 0, number)
            times[kind].append(timed(lambda work=work: train_step(*work)))
        for _ in range(ALONE):
            times["tree"].append(timed(reduce.reduce))
            times["backend"].append(timed(lambda: dist.all_reduce(flat)))
    if rt.is_main:
        report(rt.world, flat.numel() * flat.element_size(), {k: statistics.median(v[1:]) for k, v in times.items()})
    runtime.finish(intact=True)


def lane(step: int, index: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(1000 * step + index)
    images = torch.randint(0, 256, (MICRO, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return MicroBatch([""] * MICRO, torch.arange(MICRO), images, torch.zeros(MICRO, dtype=torch.int64))


def timed(action) -> float:  # type: ignore[no-untyped-def]
    group.barrier()
    began = time.perf_counter()
    action()
    group.barrier()
    return time.perf_counter() - began


def report(world: int, size: int, seconds: dict[str, float]) -> None:
    traffic = 2 * (world - 1) / world * size / 1e6
    print(f"W = {world}: global batch {LANES * MICRO}, ResNet-18, gradient {size / 1e6:.1f} MB")
    print(f"  step        exact {seconds['exact']:.3f} s   fast {seconds['fast']:.3f} s   "
          f"ratio {seconds['exact'] / seconds['fast']:.3f}")  # fmt: skip
    print(f"  reduction   tree  {seconds['tree']:.3f} s   backend {seconds['backend']:.3f} s   "
          f"ratio {seconds['tree'] / seconds['backend']:.3f}")  # fmt: skip
    print(f"  exact costs {seconds['exact'] / seconds['fast'] - 1:+.1%} of a fast step; "
          f"traffic per rank: {traffic:.1f} MB sent for either")  # fmt: skip


if __name__ == "__main__":
    main()
