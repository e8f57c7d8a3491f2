"""Clusters of many features: time by stage beside k-means, and the largest resident memory beside the features'.

    python benchmarks/cluster.py [--samples 60000] [--width 784] [--steps 600] [--threads 1] [--out FILE]

Synthetic features (40 groups of correlated normals, 10 labels), one process of `rkdo cluster` with its defaults, and
before it one on 300 samples, whose memory is that of the libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

GROUPS, LABELS, RANK = 40, 10, 12


def features(samples: int, width: int) -> dict[str, Any]:
    """Groups of normals with a covariance of low rank each, and some noise."""
    drawn = np.random.default_rng(1)
    values, group = np.empty((samples, width), np.float32), drawn.integers(0, GROUPS, samples)
    for k in range(GROUPS):
        here = np.flatnonzero(group == k)
        spread = drawn.normal(size=(RANK, width))
        values[here] = drawn.normal(size=width) + 0.8 * drawn.normal(size=(len(here), RANK)) @ spread / RANK**0.5
    values += 0.5 * drawn.standard_normal(values.shape, dtype=np.float32)
    return {"features": values, "labels": group % LABELS}


def measured(folder: Path, samples: int, options: argparse.Namespace) -> dict[str, Any]:
    """The result of a clustering, and `memory`: its largest resident memory in bytes."""
    path, out = folder / f"{samples}.npz", folder / f"{samples}"
    np.savez(path, **features(samples, options.width))
    words = [sys.executable, "-m", "rkdo_dist", "cluster", str(path), "--clusters", str(LABELS), "--out", str(out)]
    words += ["--steps", str(options.steps), "--threads", str(options.threads)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("rkdo cluster failed")
    return json.loads((out / "clusters.json").read_text()) | {"memory": 1024 * usage.ru_maxrss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("samples", 60000), ("width", 784), ("steps", 600), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = measured(Path(folder), 300, options)["memory"]
        found = measured(Path(folder), options.samples, options)
    seconds, size = found["seconds"], 4 * options.samples * options.width
    own = found["memory"] - base
    print(f"{options.samples:,} x {options.width}, {options.steps} steps, {options.threads} thread(s)")
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(
        f"neighbours and heads against k-means: {(seconds['neighbours'] + seconds['heads']) / seconds['kmeans']:.1f} x"
    )
    print(f"memory beyond the libraries' {base / 1e6:.0f} MB: {own / 1e6:.0f} MB, {own / size:.1f} x the features")
    if options.out:
        kept = {**vars(options), "out": None, "seconds": seconds, "base": base, "memory": own, "features": size}
        options.out.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
