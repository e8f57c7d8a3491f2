"""`rkdo map`: a two-dimensional map of frozen features by exact t-SNE or SNE, with or without the recursion, judged."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rkdo_dist import __version__
from rkdo_dist.console import Terminal, counting, say
from rkdo_dist.evaluate import maps
from rkdo_dist.files import write_atomic
from rkdo_dist.frozen import sne
from rkdo_dist.frozen.features import Features, read_features
from rkdo_dist.ranks.launch import launched_ranks
from rkdo_dist.studies import plots, sheets
from rkdo_dist.studies.palette import style
from rkdo_dist.training.machine import available_bytes

JUDGED, NEIGHBOURS = 2000, 5  # samples of the trustworthiness, evenly spaced; its neighbours
_BLOCKS = 200 * 2**20  # bytes of arrays that do not grow with n

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class MapRecipe:
    """How a map is made.

    Attributes:
        perplexity: of the rows of p(0), in (1, n - 1).
        affinity, normaliser, freedom: see `sne.Kernel`.
        couplings: of the recursion, each in [0, 1): a map for each.
        iterations: of gradient descent; p recurs after the first 250.
        samples: at most so many, evenly spaced; None: all.
    """

    perplexity: float = 30.0
    affinity: str = "student"
    normaliser: str = "field"
    freedom: float = 1.0
    couplings: tuple[float, ...] = (0.0,)
    iterations: int = 750
    samples: int | None = None

    def check(self, n: int) -> None:
        """Raises ValueError, naming the setting, unless n samples can be mapped so."""
        if n < 4:
            raise ValueError(f"a map needs at least 4 samples, got {n}")
        if not 1 < self.perplexity < n - 1:
            raise ValueError(f"--perplexity must be in (1, {n - 1}) for {n} samples, got {self.perplexity}")
        if not 0.01 <= self.freedom <= 1e6:
            raise ValueError(f"--freedom must be above 0, from 0.01 to 1e6, got {self.freedom}")
        if self.iterations <= sne.EARLY:
            raise ValueError(f"--iterations must be above {sne.EARLY} (the early ones), got {self.iterations}")
        for coupling in self.couplings:
            if not 0 <= coupling < 1:
                raise ValueError(f"--couplings must be in [0, 1), got {coupling}")
        arrays = 2 if any(self.couplings) else 1
        need, there = arrays * 4 * n * n + _BLOCKS, available_bytes(torch.device("cpu"))
        if need > there:
            raise ValueError(
                f"a map of {n:,} samples holds {arrays} arrays of n x n numbers: {need / 2**30:.1f} GiB, but "
                f"{there / 2**30:.1f} GiB are free: take fewer with --samples"
            )


def draw_map(path: Path, out: Path, recipe: MapRecipe, *, array: str = "features", labels: Path | None = None) -> None:
    """Write map.json, map.npz, map.png and .svg, and for several couplings couplings.png and .svg, into `out`.

    One process; memory beyond the features: one n x n array of float32, two with a coupling, and 200 MiB. On one
    thread, so that the same map comes out everywhere.

    Args:
        path, array, labels: see `read_features`.
        out: a directory that is empty or not there.

    Raises:
        ValueError: for a mistake in the request; nothing is written then.
    """
    if launched_ranks() > 1:
        raise ValueError("rkdo map runs in one process: start it without a launcher")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not an empty directory: choose another")
    data = read_features(path, array, labels)
    count = len(data.values) if recipe.samples is None else min(recipe.samples, len(data.values))
    if recipe.samples is not None and recipe.samples < 4:
        raise ValueError(f"--samples must be at least 4, got {recipe.samples}")
    recipe.check(count)
    chosen = np.unique(np.linspace(0, len(data.values) - 1, count).astype(int))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = _maps(data.values[chosen], recipe)
    finally:
        torch.set_num_threads(threads)
    _write(out, data, chosen, recipe, found)


def tsne(x: Array, iterations: int = 500) -> Array:
    """An exact t-SNE map (n, 2) of (n, f) features, n >= 8, for illustration; also where scikit-learn's tree fails."""
    perplexity, kernel = min(maps.PERPLEXITY, (len(x) - 1) / 3), sne.Kernel()
    p = sne.supervisor(torch.from_numpy(x), perplexity, kernel)
    return np.asarray(sne.fit(p, _start(x), kernel, iterations))


def _start(x: Array) -> torch.Tensor:
    """Where maps begin, as scikit-learn's do: the plane of the principal components, made small."""
    plane, _ = maps.principal_components(x)
    return torch.from_numpy(plane / max(plane[:, 0].std(), 1e-300) * 1e-4).float()


def _maps(x: Array, recipe: MapRecipe) -> list[dict[str, Any]]:
    """For each coupling its map (n, 2) and scores."""
    kernel = sne.Kernel(recipe.affinity, recipe.normaliser, recipe.freedom)
    start = _start(x)
    first = sne.supervisor(torch.from_numpy(x), recipe.perplexity, kernel)
    judged = np.unique(np.linspace(0, len(x) - 1, JUDGED).astype(int))
    found = []
    with counting(Terminal(stderr=True), "mapping") as progress:
        total = recipe.iterations * len(recipe.couplings)
        for number, coupling in enumerate(recipe.couplings):
            p = first.clone() if coupling else first
            before = number * recipe.iterations
            note = f"coupling {coupling:g}"

            def moved(done: int, before: int = before, note: str = note) -> None:
                progress(before + done, total, note)

            y = sne.fit(p, start, kernel, recipe.iterations, coupling, moved)
            scores = {
                "coupling": coupling,
                "kl": sne.divergence(first, y, kernel),
                "own_loss": sne.divergence(p, y, kernel),
                "trustworthiness": maps.trustworthiness(x[judged], y[judged].numpy(), min(NEIGHBOURS, len(x) // 2 - 1)),
            }
            if not all(math.isfinite(value) for value in scores.values()):
                raise ArithmeticError(f"the map with coupling {coupling:g} has diverged: take a smaller coupling")
            found.append({**scores, "map": y.numpy()})
    return found


def _write(out: Path, data: Features, chosen: Array, recipe: MapRecipe, found: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    labels = data.labels[chosen] if data.labels is not None else None
    named = {"keys": data.keys[chosen]} if data.keys is not None else {}
    arrays = {"positions": chosen, **named, **({"labels": labels} if labels is not None else {})}
    planes = np.stack([one.pop("map") for one in found])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, map=planes[0], maps=planes)  # type: ignore[arg-type]
    write_atomic(out / "map.npz", buffer.getvalue())
    plots.save(map_figure(planes[0], labels, data.classes), out, "map")
    if len(found) > 1:
        plots.save(couplings_figure(found), out, "couplings")
    result = {
        **{name: value for name, value in found[0].items() if name != "coupling"},
        "couplings": found,
        "samples": len(chosen),
        "of": len(data.values),
        "settings": {**dataclasses.asdict(recipe), "trusted_samples": min(JUDGED, len(chosen))},
        "features": data.digest,
        "version": __version__,
    }
    write_atomic(out / "map.json", json.dumps(result, indent=2) + "\n")
    sheets.show(sheets.console(), [table(found)])
    say(Terminal(stderr=True), f"map: {out}")


def table(found: Sequence[dict[str, Any]]) -> sheets.Sheet:
    """Scores of the maps by coupling."""
    rows = [
        [f"{one['coupling']:g}", *(sheets.number(one[name]) for name in ("kl", "own_loss", "trustworthiness"))]
        for one in found
    ]
    caption = "Trustworthiness: whether neighbours in the map are neighbours among the features; 1 is best."
    return sheets.Sheet("map", "Map", ("coupling", "KL to p(0)", "own loss", "trustworthiness"), caption, rows)


def map_figure(plane: Array, labels: Array | None, classes: Sequence[str]) -> Any:
    """A matplotlib figure of the map, coloured by label where there are labels."""
    drawn, (panel,) = plots.panels(1, 1, (6.4, 5.6))
    groups = np.full(len(plane), -1) if labels is None else labels
    for place, text in plots.clouds(panel, plane, groups, lambda one: classes[one] if one < len(classes) else str(one)):
        plots.named(panel, place, text)
    plots.bare(panel)
    return drawn


def couplings_figure(found: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure: KL to p(0), own loss and trustworthiness over the coupling."""
    found = sorted(found, key=lambda one: one["coupling"])
    drawn, (left, right) = plots.panels(1, 2, (8.4, 3.8))
    x, ticks = range(len(found)), [f"{one['coupling']:g}" for one in found]
    left.plot(x, [one["kl"] for one in found], **style(0).curve, label="KL to p(0)")
    left.plot(x, [one["own_loss"] for one in found], **style(1).curve, label="own loss")
    left.set_title("Own loss, and loss against p(0)")
    left.set_ylabel("nats")
    left.set_ylim(bottom=0)
    right.plot(x, [one["trustworthiness"] for one in found], **style(2).curve)
    right.set_title("Trustworthiness of the map (1 is best)")
    for panel in (left, right):
        panel.set_xticks(list(x), ticks)
        panel.set_xlabel("coupling of the recursion")
    plots.calm(right)
    plots.legend_below(drawn)
    return drawn
