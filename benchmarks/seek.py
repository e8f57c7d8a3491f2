"""Resuming in the middle of an epoch: the time to the first batch at 0 % and at 90 %.

    python benchmarks/seek.py SHARDS [--split train]

SHARDS is a directory made by `rkdo prepare`. Both places are read in alternation, several epochs each; a seek reads at
most the shards that hold its samples, never the epoch from its start.
"""

from __future__ import annotations

import argparse
import statistics
import time

from rkdo_dist.data.index import load_index
from rkdo_dist.data.order import EpochPlan
from rkdo_dist.data.stream import lane_stream

LANES, MICRO = 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--split", default="train")
    options = parser.parse_args()
    index = load_index(options.shards)
    steps = EpochPlan(index.split(options.split).counts, 0, 0, LANES, MICRO).steps
    times: dict[float, list[float]] = {0.0: [], 0.9: []}
    for epoch in range(12):
        for share, found in times.items():
            began = time.perf_counter()
            stream = lane_stream(
                index,
                options.split,
                seed=0,
                all_lanes=LANES,
                micro_batch=MICRO,
                epoch=epoch,
                start_step=int(share * steps),
            )
            next(stream)
            found.append(time.perf_counter() - began)
            stream.close()
    start, late = (statistics.median(found) for found in times.values())
    print(f"epoch of {steps} steps: first batch at 0 % after {start * 1e3:.1f} ms, at 90 % after {late * 1e3:.1f} ms, "
          f"ratio {late / start:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
