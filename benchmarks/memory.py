"""Memory of one step: the global batch is a hyper-parameter when activations are not kept.

    python benchmarks/memory.py

ResNet-18 on 32 x 32 images, micro-batches of 64, one CPU process with one thread; each case in a fresh process.
Prints the peak resident memory of the process and the seconds of one step.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch

from rkdo_dist.data.stream import MicroBatch
from rkdo_dist.encoders import Encoder
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks import runtime
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.step import Step, StepSettings

MICRO = 64
CASES = ((64, False), (512, False), (512, True), (4096, True))


def main() -> None:
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), sys.argv[2] == "True")
        return
    print("global batch  recompute  peak memory      step")
    for batch, recompute in CASES:
        subprocess.run([sys.executable, __file__, str(batch), str(recompute)], check=True)


def measure(batch: int, recompute: bool) -> None:
    rt = runtime.start(1, 300, "exact")
    torch.manual_seed(0)
    encoder = Encoder()
    optimizer = torch.optim.Adam(encoder.parameters())
    settings = StepSettings(seed=0, reduction="exact", recompute=recompute, views_together=True, exchange="gather")
    step = Step(encoder, lambda images, *_: images / 255.0 - 0.5, rt, settings)
    lanes = [lane(index) for index in range(batch // MICRO)]
    began = time.perf_counter()
    train_step(step, lanes, Objective.rkdo(), 0, 0)
    optimizer.step()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{batch:12d}  {recompute!s:>9}  {peak:8.2f} GiB  {seconds:6.1f} s", flush=True)


def lane(index: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(index)
    images = torch.randint(0, 256, (MICRO, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return MicroBatch([""] * MICRO, torch.arange(MICRO), images, torch.zeros(MICRO, dtype=torch.int64))


if __name__ == "__main__":
    main()
