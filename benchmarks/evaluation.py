"""Linear evaluation and k-NN of features on the ranks beside scikit-learn's on one, in one run.

    python benchmarks/evaluation.py [--train 50000] [--test 10000] [--width 512] [--classes 10] [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/evaluation.py     # ours alone: processor time and memory of each rank

Synthetic features: classes that overlap, scales from 0.1 to 10. One thread. Prints accuracies, processor seconds and by
how much the peak of resident memory rose.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from rkdo_dist.evaluate import linear, scores
from rkdo_dist.evaluate.features import OwnFeatures
from rkdo_dist.evaluate.full_protocol import Labelled, knn_accuracy
from rkdo_dist.exchange import group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("train", 50_000), ("test", 10_000), ("width", 512), ("classes", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    train, test = (features(n, asked.width, asked.classes, k) for k, n in enumerate((asked.train, asked.test)))
    mine = [own(*of) for of in (train, test)]
    cases: dict[str, Callable[[], float]] = {
        "linear, on the ranks": lambda: linear.linear_accuracy(*(x for of in mine for x in (of.backbone, of.labels))),
        "k-NN, on the ranks": lambda: knn_accuracy(Labelled.of(mine[0], "backbone"), Labelled.of(mine[1], "backbone")),
    }
    if group.world_size() == 1:
        cases = {
            "linear, scikit-learn": lambda: scores.linear_evaluation(*train, *test, standardise=True),
            "linear, on the ranks": cases["linear, on the ranks"],
            "k-NN, numpy": lambda: scores.knn_accuracy(*train, *test),
            "k-NN, on the ranks": cases["k-NN, on the ranks"],
        }
    found = {}
    for name, score in cases.items():
        before, began, wall = peak(), time.process_time(), time.perf_counter()
        accuracy = score()
        found[name] = {
            "accuracy": accuracy,
            "processor_seconds": round(time.process_time() - began, 2),
            "seconds": round(time.perf_counter() - wall, 2),
            "more_megabytes": round((peak() - before) / 2**10, 1),
        }
    everyones = group.gather_objects(found)
    if group.rank() == 0:
        for rank, of in enumerate(everyones):
            for name, facts in of.items():  # type: ignore[attr-defined]
                print(f"rank {rank}  {name:22}", "  ".join(f"{key} {value}" for key, value in facts.items()))
        if asked.json is not None:
            about = {**{k: v for k, v in vars(asked).items() if k != "json"}, "torch": torch.__version__, "threads": 1}
            text = json.dumps({"date": time.strftime("%Y-%m-%d"), **about, "ranks": everyones}, indent=1)
            asked.json.write_text(text + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


def features(samples: int, width: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, width) float32 and labels (n,), the same classes for every seed."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width)).astype(np.float32)
    labels = draw.integers(classes, size=samples)
    x = 0.1 * centres[labels] + draw.standard_normal((samples, width), dtype=np.float32)
    return x * np.geomspace(0.1, 10, width).astype(np.float32) + 1, labels


def own(x: np.ndarray, labels: np.ndarray) -> OwnFeatures:
    """This rank's blocks, as they are embedded."""
    rows = np.arange(len(x))
    rows = rows[rows // linear.BLOCK % group.world_size() == group.rank()]
    part = torch.from_numpy(x[rows])
    return OwnFeatures(torch.from_numpy(rows), torch.from_numpy(labels[rows]), part, part)


def peak() -> int:
    """KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
