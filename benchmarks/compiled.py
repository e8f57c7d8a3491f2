"""Forward and backward pass of an encoder, compiled (`train.compile`) against eager, interleaved in one process.

    python benchmarks/compiled.py --backbone cifar_resnet8 --images 64 --size 32

Prints the processor time of compiling and of the best pass of each, and their ratio.
"""

from __future__ import annotations

import argparse
import time

import torch

from rkdo_dist.batch_norm import BatchStatistics
from rkdo_dist.encoders import Encoder
from rkdo_dist.ranks import runtime
from rkdo_dist.training.compiled import compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="cifar_resnet8")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    rt = runtime.start(1, 600, "fast")
    encoder = Encoder(given.backbone).to(rt.device).to(memory_format=torch.channels_last)
    shape = (given.images, 3, given.size, given.size)
    began = time.process_time(), time.perf_counter()
    model = compiled(encoder, shape, rt)
    print(
        f"compiling: {time.process_time() - began[0]:.1f} s here, {time.perf_counter() - began[1]:.1f} s by the clock"
    )
    images = torch.rand(shape, device=rt.device).contiguous(memory_format=torch.channels_last)
    trained, best = list(encoder.parameters()), {"eager": float("inf"), "compiled": float("inf")}
    for _ in range(given.rounds):
        for name, network in (("eager", encoder), ("compiled", model)):
            began_pass = time.process_time()
            with BatchStatistics(encoder).discarding():
                out = network(images)
            torch.autograd.grad(out.square().mul(images.mean()).sum(), trained)
            best[name] = min(best[name], time.process_time() - began_pass)
    print(f"{given.backbone}, {given.images} images of {given.size} px: ", end="")
    print(", ".join(f"{name} {seconds:.4f} s" for name, seconds in best.items()), end=", ")
    print(f"ratio {best['compiled'] / best['eager']:.2f}")
    runtime.finish(intact=True)


if __name__ == "__main__":
    main()
