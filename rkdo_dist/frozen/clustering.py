"""`rkdo cluster`: clusters of frozen features, on the ranks that a launcher has started, beside those of k-means.

Every rank reads the features, finds the nearest neighbours of its share of the samples and trains its share of the
heads; a share is a matter of who, never of what, so the result is the same, bit for bit, on any number of ranks. About
ten times in a job everything goes into one small file, from which `--resume` continues on any number of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from rkdo_dist import __version__, documents
from rkdo_dist.console import Terminal, counting, say
from rkdo_dist.evaluate import scores
from rkdo_dist.exchange import group
from rkdo_dist.field import neighbours as field_neighbours
from rkdo_dist.files import write_atomic
from rkdo_dist.frozen.cluster_page import Clustering, source_of, write_page
from rkdo_dist.frozen.features import Features, read_features
from rkdo_dist.frozen.heads import Heads, Recipe, pairs, probabilities, random_neighbours, standardised
from rkdo_dist.lock import NAME, DirectoryLock
from rkdo_dist.ranks import surroundings
from rkdo_dist.ranks.agreement import agree
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.studies import sheets
from rkdo_dist.training.machine import available_bytes

RESULT, CHECKPOINT = "clusters.json", "checkpoint.npz"
SAVES = 10  # in a job
TILE = 4096  # samples of a tile in the search for neighbours
TIMEOUT = 1800  # seconds, as the default of run.timeout
_MOMENTS = 6  # arrays of a head: weight and bias, and two moments of each

Array = NDArray[Any]

_SCORES = dict.fromkeys(("accuracy", "nmi", "ari"), documents.maybe(documents.NUMBER))
_FORM = documents.shape(
    **_SCORES,
    kmeans=documents.shape(**_SCORES),
    balance=documents.shape(smallest=documents.COUNT, largest=documents.COUNT),
    request=documents.shape(control=documents.TEXT),
    labelled=documents.COUNT,
    losses=documents.LIST,
    loss=documents.NUMBER,
    samples=documents.COUNT,
    clusters=documents.COUNT,
)


def cluster(
    path: Path,
    out: Path,
    recipe: Recipe,
    *,
    array: str = "features",
    labels: Path | None = None,
    images: str | None = None,
    kmeans: bool = True,
    resume: bool = False,
    threads: int = 1,
) -> None:
    """Find clusters and write them (collective): clusters.json, assignments.npz, clusters.html, clusters.png and .svg.

    Args:
        path, array, labels: see `read_features`.
        out: a directory that is empty or not there.
        images: as data.source: where the samples' pictures are, for the page; features of `rkdo embed` only.
        kmeans: whether k-means is run for comparison, where labels are known; on one process, while others wait.
        resume: continue what is in `out` already; a finished one is shown.
        threads: of each process; on a CPU the bits depend on it.

    Raises:
        ValueError: for a mistake in the request, on every rank; nothing is written then.
    """
    with contextlib.ExitStack() as held, surroundings.joined(threads, TIMEOUT, "exact") as around:
        rt = around.runtime
        data = group.together(lambda: read_features(path, array, labels), f"reading {path}")
        request = {"features": data.digest, "version": __version__, **dataclasses.asdict(recipe)}
        agree(request)
        group.together(lambda: _check(data, recipe, images, rt.device), "checking the request")
        values = group.together(lambda: standardised(data.values), "centring the features")
        group.on_main(lambda: held.callback(_claimed(out, resume).release), "looking at --out")
        finished = group.from_rank_zero((out / RESULT).exists())
        console = Terminal(stderr=True) if rt.is_main else None
        if finished:
            group.on_main(lambda: _same(_read(out)["request"], request, out), "looking at --out")
            if console is not None:
                say(console, f"complete already: {out}")
        else:
            _find(data, values, out, recipe, request, images, kmeans, rt, console)
        group.on_main(lambda: _show(_read(out), out), "showing the result")


def _check(data: Features, recipe: Recipe, images: str | None, device: torch.device) -> None:
    recipe.check(len(data.values))
    need = 16 * recipe.heads * recipe.clusters * data.values.shape[1]  # weights, gradients, two moments; float32
    there = available_bytes(device)
    if need > there:
        raise ValueError(
            f"--heads {recipe.heads} of {recipe.clusters} clusters need {need / 2**30:.1f} GiB, but "
            f"{there / 2**30:.1f} GiB are free: take fewer"
        )
    if images is not None:
        source_of(data, images)


def _find(
    data: Features,
    values: Tensor,
    out: Path,
    recipe: Recipe,
    request: dict[str, Any],
    images: str | None,
    kmeans: bool,
    rt: Runtime,
    console: Console | None,
) -> None:
    began = time.perf_counter()
    saved = group.from_rank_zero(group.on_main(lambda: _saved(out, request), "reading the checkpoint"))
    with counting(console, "neighbours") as progress:
        graph = _graph(values, recipe, rt, progress) if saved is None else torch.from_numpy(saved["neighbours"])
    heads = Heads(values.to(rt.device), recipe, range(recipe.heads)[rt.rank :: rt.world])
    if saved is None:
        _save(out, request, graph, heads)
    else:
        heads.load(int(saved["step"]), _of_arrays(saved, recipe.heads))
    searched = time.perf_counter()
    every = -(-recipe.steps // SAVES)
    with counting(console, "training heads") as progress:
        for first, second in pairs(recipe, graph, range(heads.step, recipe.steps)):
            losses = heads.train(first, second)
            lowest = f"smallest loss {min(losses.values()):.4f}" if losses else ""
            progress(heads.step, recipe.steps, lowest)
            if heads.step % every == 0 and heads.step < recipe.steps:
                _save(out, request, graph, heads)
    judged = _merged(heads.judge(graph))
    best = min(judged, key=lambda number: (judged[number][0], number))
    weights = _merged(heads.state())[best]
    trained = time.perf_counter()
    seconds = {"neighbours": searched - began, "heads": trained - searched}
    machine = {"processes": rt.world, "threads": torch.get_num_threads(), "device": rt.device.type}
    made: dict[str, Any] = {
        "request": request,
        "head": best,
        "loss": judged[best][0],
        "own_loss": judged[best][1],
        "losses": [judged[number][0] for number in sorted(judged)],
        "machine": {**machine, "torch": torch.__version__},
    }

    def written() -> None:
        phi = probabilities(values.to(rt.device), *(x.to(rt.device) for x in (weights[0], weights[3]))).cpu().numpy()
        _write(out, data, values.numpy(), phi, recipe, made, seconds, images, kmeans)

    with counting(console, "k-means and the page"):
        group.on_main(written, "writing the result")


def _graph(values: Tensor, recipe: Recipe, rt: Runtime, progress: Callable[[int, int, str], None]) -> Tensor:
    """The k nearest other samples (n, k) int32 of every sample by Euclidean distance, each rank its share of tiles."""
    n = len(values)
    if recipe.control == "random":
        return random_neighbours(recipe, n)
    starts, mine = range(0, n, TILE), {}
    for number in range(rt.rank, len(starts), rt.world):
        queries = _lifted(values, starts[number], rt.device, query=True)
        tiles = ((start, _lifted(values, start, rt.device, query=False)) for start in starts)
        mine[number] = field_neighbours.search(queries, starts[number], recipe.neighbours, n, tiles)[0].cpu()
        progress(min(len(starts), number + rt.world), len(starts), "")
    everything = _merged(mine)
    return torch.cat([everything[number] for number in range(len(starts))])


def _lifted(values: Tensor, start: int, device: torch.device, query: bool) -> Tensor:
    """A tile with one column more, so that inner products of queries and columns rank as distances do."""
    x = values[start : start + TILE].to(device)
    return torch.cat([x, torch.ones_like(x[:, :1]) if query else x.square().sum(1, keepdim=True) / -2], 1)


def _merged(mine: dict[int, Any]) -> dict[int, Any]:
    """The entries of all ranks, on every rank."""
    return {number: value for part in group.gather_objects(mine) for number, value in part.items()}  # type: ignore[attr-defined]


# -- the directory and its checkpoint ----------------------------------------------------------------------------------


def _claimed(out: Path, resume: bool) -> DirectoryLock:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a directory")
    there = sorted(p.name for p in out.iterdir() if p.name != NAME) if out.exists() else []
    if there and not resume:
        raise ValueError(f"--out {out} holds {there[0]}: choose another directory, or continue it with --resume")
    if there and not {RESULT, CHECKPOINT} & set(there):
        raise ValueError(f"--out {out} holds {there[0]} and no {CHECKPOINT}: there is nothing to resume")
    out.mkdir(parents=True, exist_ok=True)
    return DirectoryLock(out)


def _read(out: Path) -> dict[str, Any]:
    return documents.read(out / RESULT, _FORM, "remove it to begin again")


def _same(theirs: dict[str, Any], mine: dict[str, Any], out: Path) -> None:
    for name, value in mine.items():
        if name != "version" and theirs.get(name) != value:
            raise ValueError(f"{out} was made with {name} = {theirs.get(name)}, not {value}: choose another --out")


def _saved(out: Path, request: dict[str, Any]) -> dict[str, Array] | None:
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = {name: file[name] for name in file.files}
            theirs = documents.parsed(str(saved["request"]), "its request", documents.OBJECT, "")
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to begin again") from None
    _same(theirs, request, out)
    return saved


def _save(out: Path, request: dict[str, Any], graph: Tensor, heads: Heads) -> None:
    """Collective: gathers the heads of all ranks."""
    everything = _merged(heads.state())

    def write() -> None:
        arrays = {"request": np.array(json.dumps(request)), "step": np.array(heads.step), "neighbours": graph.numpy()}
        for number, tensors in everything.items():
            arrays |= {f"head {number} {k}": x.numpy() for k, x in enumerate(tensors)}
        write_atomic(out / CHECKPOINT, _npz(arrays))

    group.on_main(write, "writing the checkpoint")


def _of_arrays(saved: dict[str, Array], heads: int) -> dict[int, list[Tensor]]:
    return {h: [torch.from_numpy(saved[f"head {h} {k}"]) for k in range(_MOMENTS)] for h in range(heads)}


def _npz(arrays: dict[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


# -- the result --------------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    data: Features,
    values: Array,
    phi: Array,
    recipe: Recipe,
    made: dict[str, Any],
    seconds: dict[str, float],
    images: str | None,
    kmeans: bool,
) -> None:
    """All files; clusters are numbered by falling size, and clusters.json comes last."""
    found = phi.argmax(1)
    order = np.argsort(-np.bincount(found, minlength=recipe.clusters), kind="stable")
    phi = np.ascontiguousarray(phi[:, order])
    assignments = np.argsort(order)[found]
    sizes = np.bincount(assignments, minlength=recipe.clusters)
    shares = sizes[sizes > 0] / len(found)
    known = data.known()
    began = time.perf_counter()
    none: Mapping[str, float | None] = dict.fromkeys(_SCORES)
    ours, theirs = none, none
    if len(known):
        labels = data.labels[known]  # type: ignore[index]
        ours = scores.clusters_agreement(labels, assignments[known])
        if kmeans:
            theirs = scores.clusters_agreement(labels, scores.kmeans(values, recipe.clusters, recipe.seed)[known])
            seconds |= {"kmeans": time.perf_counter() - began}
    result = {
        **ours,
        "kmeans": theirs,
        "balance": {
            "largest": int(sizes.max()),
            "smallest": int(sizes.min()),
            "empty": int((sizes == 0).sum()),
            "entropy": float(-(shares * np.log(shares)).sum() / np.log(recipe.clusters)),
        },
        **made,
        "samples": len(values),
        "labelled": len(known),
        "width": values.shape[1],
        "clusters": recipe.clusters,
        "seed": recipe.seed,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    names = {"keys": data.keys} if data.keys is not None else {"positions": np.arange(len(values))}
    more = {"splits": data.splits} if data.splits is not None else {}
    arrays = {**names, **more, "assignments": assignments, "probabilities": phi}
    write_atomic(out / "assignments.npz", _npz(arrays))
    write_page(out, Clustering(data, values, assignments, phi, result), images)
    write_atomic(out / RESULT, json.dumps(result, indent=2) + "\n")
    (out / CHECKPOINT).unlink(missing_ok=True)


def _show(result: dict[str, Any], out: Path) -> None:
    sheets.show(sheets.console(), [table(result)])
    say(Terminal(stderr=True), f"clusters: {out}")


def table(result: dict[str, Any]) -> sheets.Sheet:
    """Scores of a clusters.json beside k-means."""
    rows = [
        [name, *(sheets.number(some[key]) for key in _SCORES)]
        for name, some in (("clusters", result), ("k-means", result["kmeans"]))
    ]
    balance = result["balance"]
    caption = (
        f"{result['samples']:,} samples, {result['clusters']} clusters of {balance['smallest']:,} to "
        f"{balance['largest']:,} samples; loss {result['loss']:.4f} (best of {len(result['losses'])} heads, chosen by "
        "the loss alone)."
    )
    if result["labelled"] < result["samples"]:
        caption += f" Scores on {result['labelled']:,} labelled samples." if result["labelled"] else " No labels."
    if result["request"]["control"] != "none":
        caption += " CONTROL: random neighbours; no evidence of anything."
    return sheets.Sheet("clusters", "Clusters", ("", "accuracy", "NMI", "ARI"), caption, rows)
