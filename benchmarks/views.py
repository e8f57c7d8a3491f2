"""Time of one random view: batched (rkdo_dist.data.views) against torchvision v2, which handles image
after image.

    python benchmarks/views.py [--rounds 7] [--out results.json]

One core (one thread), processor time of the thread, both in alternation in one process; the median of the
ratios of the rounds is what counts. torchvision gets uint8 tensors, as its documentation recommends, and
ends in the same float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torchvision.transforms import v2

from rkdo_dist.data.views import Views
from rkdo_dist.ranks.runtime import keep_freed_memory

CASES = ((8, 8, 64), (32, 32, 64), (64, 64, 64), (96, 64, 64), (96, 96, 64), (224, 224, 16), (256, 224, 16))


def theirs(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same chain in torchvision."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


def seconds(action: Callable[[], object]) -> float:
    """Processor time of this thread."""
    begin = time.thread_time()
    action()
    return time.thread_time() - begin


def measure(source: int, size: int, batch: int, rounds: int) -> dict[str, float]:
    """Microseconds per view for both, and the median ratio."""
    images = torch.randint(0, 256, (batch, 3, source, source), dtype=torch.uint8)
    ids, views, chain = torch.arange(batch), Views(size), theirs(size)
    ours_times, their_times = [], []
    for k in range(rounds + 1):
        ours = seconds(partial(views, images, ids, 0, k, 0))
        other = seconds(lambda: torch.stack([chain(image) for image in images]))
        if k:  # the first round warms up
            ours_times.append(ours / batch * 1e6)
            their_times.append(other / batch * 1e6)
    return {
        "image": source,
        "view": size,
        "batch": batch,
        "ours_us": round(statistics.median(ours_times), 1),
        "torchvision_us": round(statistics.median(their_times), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(ours_times, their_times, strict=True)), 3),
    }


def main() -> None:
    """Print a line for each case; write everything as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training; it serves both
    results = []
    for source, size, batch in CASES:
        result = measure(source, size, batch, arguments.rounds)
        results.append(result)
        print(
            f"{source:4d} -> {size:3d} pixels, batch {batch:3d}: {result['ours_us']:7.1f} us, "
            f"torchvision {result['torchvision_us']:7.1f} us, ratio {result['ratio']:.2f}",
            flush=True,
        )
    if arguments.out:
        versions = {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "machine": platform.machine(),
        }
        with open(arguments.out, "w") as file:
            json.dump({"versions": versions, "cases": results}, file, indent=1)


if __name__ == "__main__":
    main()
