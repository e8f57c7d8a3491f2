"""`rkdo cluster`, `rkdo map` and `rkdo audit`: their arguments, and the one call each makes (imported when made)."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from rkdo_dist.commands.arguments import (
    COUNT,
    LENGTH,
    SEED,
    SHARE,
    Add,
    Command,
    Range,
    add_overrides,
    folder,
    given,
    local,
)

_FEATURES = "an .npz, .parquet or .safetensors, such as `rkdo embed` writes, or an idx file (MNIST's format)"


def frozen_commands(command: Command) -> None:
    """Add the commands."""
    add = command(
        "cluster",
        _cluster,
        "find clusters in frozen features, beside k-means",
        "features.npz --clusters 10 --out runs/clusters",
    )
    _add_features(add)
    add("--clusters", type=COUNT, required=True, metavar="C", help="how many")
    add("--seed", type=SEED, default=42, metavar="S", help="of everything random (default 42)")
    add("--neighbours", type=COUNT, default=10, metavar="K", help="of the graph of nearest neighbours (default 10)")
    add("--walk", type=COUNT, default=1, metavar="S", help="longest walk to the second view, in steps (default 1)")
    add("--debias", type=SHARE, default=0.4, metavar="A", help="uniform share of p and q (default 0.4)")
    add("--heads", type=COUNT, default=10, metavar="H", help="linear heads; the smallest loss counts (default 10)")
    add("--batch", type=COUNT, metavar="B", help="samples of a step (default: 128, or 8 C if that is more)")
    add("--steps", type=LENGTH, default=600, metavar="N", help="of the optimizer (default 600)")
    add("--learning-rate", type=Range(0.0, 1e6), metavar="R", help="of Adam (default: 3.2 by the number of features)")
    add("--coupling", type=SHARE, default=0.0, metavar="A", help="of an in-batch recursion of p (default 0: none)")
    add("--depth", type=COUNT, default=3, metavar="D", help="levels of that recursion (default 3)")
    add("--control", choices=("none", "random"), default="none", help="random: neighbours are random samples")
    add("--images", type=given, metavar="SOURCE", help="the samples' pictures, as data.source, for the page")
    add("--no-kmeans", dest="kmeans", action="store_false", help="leave k-means out: for much data, it has one process")
    add("--resume", action="store_true", help="continue what DIR holds, on any number of processes")
    add("--threads", type=Range(1, 4096), default=1, metavar="N", help="CPU threads of each process (default 1)")

    add = command(
        "map",
        _map,
        "draw a map of frozen features by exact t-SNE or SNE, with or without the recursion",
        "features.npz --perplexity 30 --out runs/map",
    )
    _add_features(add)
    add(
        "--perplexity",
        type=Range(0.0, 1e9),
        default=30.0,
        metavar="P",
        help="neighbours of a row of p(0), softly (default 30)",
    )
    add("--affinity", choices=("student", "gaussian"), default="student", help="of the map (default student: t-SNE)")
    add("--normaliser", choices=("field", "row"), default="field", help="one number for all pairs, or one a row (SNE)")
    add("--freedom", type=Range(0.0, 1e6), default=1.0, metavar="NU", help="degrees of freedom of student (default 1)")
    add("--couplings", type=_shares, default=(0.0,), metavar="A,B", help="a map for each; 0: no recursion (default)")
    add("--iterations", type=LENGTH, default=750, metavar="N", help="of gradient descent (default 750)")
    add("--samples", type=COUNT, metavar="N", help="at most so many, evenly spaced (default: all)")

    add = command(
        "audit",
        _audit,
        "how good supervisors a run's encoder makes, by view, temperature, neighbours and memory",
        "runs/digits-rkdo --out runs/digits-rkdo/audit",
    )
    add("directory", type=local, metavar="RUN", help="a run directory; its newest checkpoint is audited")
    add("--out", type=folder, metavar="DIR", help="default: RUN/audit, where rkdo report finds it")
    add("--samples", type=COUNT, default=2000, metavar="N", help="training samples, drawn from the seed (default 2000)")
    add("--seed", type=SEED, default=42, metavar="S", help="of the samples and their views (default 42)")
    add("--visits", type=Range(0, 1000), default=4, metavar="V", help="views of each kind, for the memory (default 4)")
    add(
        "--temperature",
        type=Range(0.0, 1e6),
        default=0.05,
        metavar="T",
        help="of rows of neighbours and memory (default 0.05)",
    )
    add("--weights", choices=("trained", "ema"), default="trained", help="which weights (default trained)")
    add_overrides(add, "e.g. data.source=... if the data have moved")


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs numbers with commas, e.g. 0,0.01,0.1; got {text!r}") from None


def _add_features(add: Add) -> None:
    add("features", type=local, metavar="FEATURES", help=_FEATURES)
    add("--out", type=folder, required=True, metavar="DIR", help="where everything is written")
    add("--array", default="features", metavar="NAME", help="the array to take, such as embeddings (default features)")
    add("--labels", type=local, metavar="FILE", help="labels from another file, such as an idx file")


def _settings(options: argparse.Namespace, recipe: type) -> dict[str, Any]:
    """The options that are fields of a recipe."""
    return {item.name: getattr(options, item.name) for item in dataclasses.fields(recipe)}


def _cluster(options: argparse.Namespace) -> int:
    o = options
    from rkdo_dist.ranks.relaunch import with_all_ranks

    with_all_ranks(o.words)
    from rkdo_dist.frozen.clustering import cluster
    from rkdo_dist.frozen.heads import Recipe

    recipe = Recipe(**_settings(o, Recipe))
    files = {"array": o.array, "labels": o.labels, "images": o.images}
    cluster(o.features, o.out, recipe, kmeans=o.kmeans, resume=o.resume, threads=o.threads, **files)
    return 0


def _map(options: argparse.Namespace) -> int:
    o = options
    from rkdo_dist.frozen.mapping import MapRecipe, draw_map

    recipe = MapRecipe(**_settings(o, MapRecipe))
    draw_map(o.features, o.out, recipe, array=o.array, labels=o.labels)
    return 0


def _audit(options: argparse.Namespace) -> int:
    o = options
    from rkdo_dist.ranks.relaunch import with_all_ranks

    with_all_ranks(o.words)
    from rkdo_dist.frozen.audit import AuditRecipe, audit

    recipe = AuditRecipe(o.samples, o.seed, o.visits, o.temperature, weights=o.weights)
    audit(o.directory, o.out, recipe, o.overrides)
    return 0
