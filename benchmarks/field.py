"""What a persistent field costs: steps with and without it in alternation in one run, and a store of ImageNet's size.

    python benchmarks/field.py step [--batch 512] [--rounds 3] [--small]
    python benchmarks/field.py size [--samples 1280000] [--columns batch|bank] [--ranks 2]

`step` trains ResNet-18 on CIFAR-10's shapes (random images, 50,000 samples) with in-batch recursion, InfoNCE, and the
persistent field with batch columns and with the bank; the rows have been filled before, so that all K entries are in
use. Ratios are medians over rounds of neighbouring steps. `size` runs the field alone on synthetic embeddings and
prints the peak of the resident memory of all ranks together, libraries counted for each.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn import functional

from rkdo_dist.exchange.store import RowStore
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.persistent import Rows
from rkdo_dist.training.exact import exact_field
from rkdo_dist.training.persistent import PersistentField

LANE, D = 64, 64  # pairs in a micro-batch, width of the embeddings


def schedule(samples: int, batch: int) -> Callable[[int], Tensor]:
    """Batches that go through a permutation of the samples again and again."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    per_epoch = samples // batch
    return lambda step: order[step % per_epoch * batch : (step % per_epoch + 1) * batch]


def filled(store: RowStore, d: int) -> None:
    """Give every row K entries and every sample an embedding."""
    generator = torch.Generator().manual_seed(1)
    own, k = store.rows.columns.shape
    n = store.shards.samples
    first = torch.arange(store.first, store.stop)
    for start in range(0, own, 1 << 12):
        stop = min(own, start + (1 << 12))
        jumps = torch.randint(1, n // k, (stop - start, k), generator=generator).cumsum(1)
        jumps[:, 0] = 0
        store.rows.columns[start:stop] = ((first[start:stop, None] + jumps) % n).int()
        p = torch.rand(stop - start, k, generator=generator).sort(1, descending=True).values
        store.rows.probabilities[start:stop] = 0.9 * p / p.sum(1, keepdim=True)
        store.rows.rest[start:stop] = 0.1
        if store.bank is not None:
            x = torch.randn(stop - start, d, generator=generator)
            store.bank[start:stop] = functional.normalize(x, dim=1)
            store.seen[start:stop] = True


def steps(arguments: argparse.Namespace) -> None:
    """Step times side by side."""
    from rkdo_dist.data.stream import MicroBatch  # here, so that `size` measures the field and not what these load
    from rkdo_dist.encoders import Encoder
    from rkdo_dist.ranks import runtime
    from rkdo_dist.training.loop import train_step
    from rkdo_dist.training.step import Step, StepSettings

    batch, samples, k = arguments.batch, 50_000, arguments.stored
    if arguments.small:
        batch, samples, k = 2 * LANE, 4096, 64
    plan, device = schedule(samples, batch), torch.device("cpu")
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    rt = runtime.start(arguments.threads, 60, "exact")

    def view(x: Tensor, ids: Tensor, epoch: int, number: int) -> Tensor:
        return x.float() / 128 - 1 + 0.1 * number

    settings = StepSettings(seed=0, reduction="exact", recompute=False, views_together=True, exchange="gather")
    kinds: dict[str, tuple[PersistentField | None, Objective]] = {
        "infonce": (None, Objective.infonce()),
        "rkdo, in the batch": (None, Objective.rkdo()),
    }
    for columns in ("batch", "bank"):
        store = RowStore(samples, k, D if columns == "bank" else None)
        filled(store, D)
        memory = PersistentField(store, columns, 0.1, plan, device)
        kinds[f"persistent, {columns}"] = (memory, Objective.persistent(0.3))
    made = {}
    for name, (rows, objective) in kinds.items():
        torch.manual_seed(0)
        encoder = Encoder("resnet18", "released", D, arguments.stem)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
        made[name] = Step(encoder, view, rt, settings, optimizer, rows), objective
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(arguments.rounds + 1):
        ids = plan(number)
        lanes = [
            MicroBatch([str(int(i)) for i in part], part, images[at : at + LANE], torch.zeros(LANE, dtype=torch.int64))
            for at, part in zip(range(0, batch, LANE), ids.split(LANE), strict=True)
        ]
        for name, (step, objective) in made.items():
            began = time.perf_counter()
            train_step(step, lanes, objective, 0, number)
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - began)
    what = f"ResNet-18 ({arguments.stem} stem), {batch} pairs of 32 x 32, n = {samples}, K = {k}, d = {D}"
    print(f"{what}, {arguments.threads} threads")
    base = times["rkdo, in the batch"]
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        print(f"  {name:20s} {statistics.median(found):7.3f} s a step   {100 * (ratio - 1):+6.1f} % against in-batch")
    alone(arguments, batch, samples, k, plan, statistics.median(base))


def alone(
    arguments: argparse.Namespace, batch: int, samples: int, k: int, plan: Callable[[int], Tensor], step: float
) -> None:
    """The field without an encoder: what the ratios above should amount to, measured with less noise."""
    lanes = lanes_of(batch, D, 0)
    for columns in ("batch", "bank"):
        store = RowStore(samples, k, D if columns == "bank" else None)
        filled(store, D)
        memory = PersistentField(store, columns, 0.1, plan, torch.device("cpu"))
        times: dict[str, list[float]] = {"with": [], "without": []}
        for number in range(arguments.rounds + 1):
            for name, rows, objective in (
                ("without", None, Objective.rkdo()),
                ("with", memory, Objective.persistent(0.3)),
            ):
                began = time.perf_counter()
                if rows is not None:
                    rows.begin(number, plan(number))
                exact_field(lanes, objective, 0, rows)
                if rows is not None:
                    rows.commit()
                if number:
                    times[name].append(time.perf_counter() - began)
        more = statistics.median(a - b for a, b in zip(times["with"], times["without"], strict=True))
        print(f"  field alone, {columns:5s}   {1000 * more:+7.1f} ms, {100 * more / step:+.1f} % of the step above")


def lanes_of(rows: int, d: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Lanes of unit-norm embeddings."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (functional.normalize(torch.randn(rows, d, generator=generator), dim=1) for _ in range(2))
    return list(zip(u.split(LANE), v.split(LANE), strict=True))


def size(rank: int, world: int, arguments: argparse.Namespace, folder: str) -> None:
    """A field of many samples over `world` ranks; rank zero prints the sum of all peaks."""
    torch.set_num_threads(1)
    before = _resident()
    meeting = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    batch, n = arguments.batch, arguments.samples
    store = RowStore(n, arguments.stored, D if arguments.columns == "bank" else None)
    filled(store, D)
    plan = schedule(n, batch)
    memory = PersistentField(store, arguments.columns, 0.1, plan, torch.device("cpu"))
    b, times = batch // world, []
    for step in range(arguments.rounds + 1):
        lanes = lanes_of(b, D, step * world + rank)
        began = time.perf_counter()
        memory.begin(step, plan(step)[rank * b : (rank + 1) * b])
        exact_field(lanes, Objective.persistent(0.3), rank * len(lanes), memory)
        store.finish()
        times.append(time.perf_counter() - began)
    totals = _sums(store.rows)
    peak = torch.tensor([_resident(), before, _proportional()], dtype=torch.float64)
    dist.all_reduce(peak)
    most, libraries, proportional = peak.tolist()
    if rank == 0:
        need = n * (8 * arguments.stored + 4 + (257 if arguments.columns == "bank" else 0)) / 1e9
        print(
            f"n = {n:,}, K = {arguments.stored}, columns {arguments.columns}, {world} ranks: rows {need:.2f} GB, "
            f"peak of all ranks together {most:.2f} GB ({libraries:.2f} of it Python, torch and libraries; "
            f"{proportional:.2f} GB at the end with shared pages counted once), "
            f"{statistics.median(times[1:]):.2f} s a step of {batch}; rows sum to 1 within {totals:.1e}"
        )
    dist.destroy_process_group()


def _resident() -> float:
    """The largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _proportional() -> float:
    """Memory of this process now, in GB, with its share of pages that it shares with others; Linux only."""
    try:
        with open("/proc/self/smaps_rollup") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e9
    except OSError:
        return float("nan")


def _sums(rows: Rows) -> float:
    """How far from 1 any row's sum is."""
    parts = zip(rows.probabilities.split(1 << 14), rows.rest.split(1 << 14), strict=True)
    return max(float((p.double().sum(1) + rest - 1).abs().max()) for p, rest in parts)


def main() -> None:
    """Choose what to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "size"))
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--stored", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default="imagenet", help="cifar: 12 times the work")
    parser.add_argument("--small", action="store_true", help="a smoke test")
    parser.add_argument("--samples", type=int, default=1_280_000)
    parser.add_argument("--columns", choices=("batch", "bank"), default="batch")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what == "step":
        steps(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(size, (arguments.ranks, arguments, folder), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
