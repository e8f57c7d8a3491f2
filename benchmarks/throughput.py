"""End-to-end training throughput against two baselines, in alternation in one run.

    python benchmarks/throughput.py SHARDS [--batch 256] [--steps 6] [--rounds 3] [--threads 2] [--backbone resnet18]

    synthetic   the ceiling: the same encoder, loss and optimizer in a bare loop over view tensors already in memory
    rkdo_dist   everything: shards, verification, decoding, views, two-pass step, journal
    lightly     its SimCLR recipe: image folder, PIL transforms, DataLoader, two forwards, NTXentLoss (needs `lightly`)

All use the same encoder, batch, optimizer and number of threads, and as many loader processes as suit them best
(--workers for rkdo_dist, the better of 1 and 2 for lightly). Every block starts a fresh loader and drops its first
steps. Prints pairs/s (medians over rounds), and the two ratios as medians of the rounds' ratios. `SHARDS` holds
square images of one size, such as CIFAR-10 prepared by `rkdo prepare`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from rkdo_dist import RKDOLoss, parts
from rkdo_dist import config as configuration
from rkdo_dist.config import Config
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.ranks import runtime
from rkdo_dist.ranks.signals import StopRequest
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.training.job import build
from rkdo_dist.training.journal import Journal
from rkdo_dist.training.loop import steps

WARM_UP = 2
IMAGES = 4096  # extracted for lightly's image folder


def main() -> None:
    options = arguments()
    settings = configuration.load(
        Path(__file__).parent.parent / "configs" / "cifar10-rkdo.yaml",
        [
            f"data.shards={options.shards}", f"data.workers={options.workers}", f"encoder.backbone={options.backbone}",
            f"encoder.stem={options.stem}", f"train.global_batch={options.batch}", f"train.micro_batch={options.batch}",
            f"run.threads={options.threads}",
        ],
    )  # fmt: skip
    rt = runtime.start(settings.run.threads, settings.run.timeout, settings.run.reduction)
    index = parts.open_index(settings)
    with tempfile.TemporaryDirectory() as folder:
        contestants: dict[str, Callable[[], Iterator[None]]] = {
            "synthetic": lambda: synthetic(settings, index, rt),
            "rkdo_dist": lambda: ours(settings, index, rt, Path(folder) / "run"),
        }
        if not options.without_lightly:
            extract(settings, index, Path(folder) / "images")
            for workers in (1, 2):
                contestants[f"lightly, {workers} workers"] = lambda n=workers: lightly(  # type: ignore[misc]
                    settings, index, rt, Path(folder) / "images", n
                )
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(options.rounds):
            for name, make in contestants.items():
                rates[name].append(options.batch / seconds_a_step(make(), options.steps, rt.device))
                print(f"{name:20} {rates[name][-1]:8.1f} pairs/s", flush=True)
    report(rates, options, str(rt.device))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--stem", default="imagenet")
    parser.add_argument("--without-lightly", action="store_true")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def seconds_a_step(run: Iterator[None], steps: int, device: torch.device) -> float:
    """Time of a step in the middle of a run, which is then closed."""
    with contextlib.closing(run):  # type: ignore[type-var]
        for _ in itertools.islice(run, WARM_UP):
            pass
        finish(device)
        began = time.perf_counter()
        for _ in itertools.islice(run, steps):
            pass
        finish(device)
        return (time.perf_counter() - began) / steps


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synthetic(settings: Config, index: ShardIndex, rt: runtime.Runtime) -> Iterator[None]:
    """A bare loop: nothing but the arithmetic of the model, the loss and the optimizer."""
    size, (height, width) = settings.train.global_batch, index.image_size or (32, 32)
    encoder = parts.make_encoder(settings).to(rt.device)
    optimizer = parts.make_optimizer(settings, encoder)
    loss_of, views = RKDOLoss(), torch.randn(2 * size, 3, height, width, device=rt.device)
    views = views.contiguous(memory_format=torch.channels_last)  # as `training.step` does: a ceiling must have it too
    while True:
        with rt.autocast():
            u, v = encoder(views).chunk(2)
        loss = loss_of(u, v)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def ours(settings: Config, index: ShardIndex, rt: runtime.Runtime, where: Path) -> Iterator[None]:
    """Training, a step at a time, with its journal."""
    where.mkdir(exist_ok=True)
    job = build(settings, rt, index, RunDirectory(where))
    job.begin()
    with (
        Journal(where / "metrics.jsonl", 0, job.total_steps, settings.train.epochs, quiet(), "rkdo") as journal,
        contextlib.closing(steps(job, StopRequest())) as training,  # type: ignore[type-var]
    ):
        for _, record in training:
            journal.step(record)
            yield


def quiet():  # type: ignore[no-untyped-def]
    from rich.console import Console

    return Console(file=io.StringIO())


def extract(settings: Config, index: ShardIndex, folder: Path) -> None:
    """The first images of the training shards as an image folder, the same bytes."""
    written = 0
    for shard in index.split(settings.data.split).shards:
        with tarfile.open(index.root / shard.name) as archive:
            for member in archive:
                if not member.name.endswith((".jpg", ".png")):
                    continue
                stream = archive.extractfile(member)
                assert stream is not None
                target = folder / str(written % 10) / Path(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(stream.read())
                written += 1
                if written == IMAGES:
                    return


def lightly(settings: Config, index: ShardIndex, rt: runtime.Runtime, folder: Path, workers: int) -> Iterator[None]:
    """SimCLR as lightly's documentation trains it on CIFAR-10, with our encoder in place of its ResNet-18 and head."""
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    size = (index.image_size or (32, 32))[0]
    data = LightlyDataset(str(folder), transform=SimCLRTransform(input_size=size, gaussian_blur=0.0))
    loader = torch.utils.data.DataLoader(
        data, batch_size=settings.train.global_batch, shuffle=True, drop_last=True, num_workers=workers
    )
    encoder = parts.make_encoder(settings).to(rt.device)
    optimizer = parts.make_optimizer(settings, encoder)
    loss_of = NTXentLoss(temperature=0.5)
    while True:
        for batch in loader:
            first, second = (view.to(rt.device) for view in batch[0])
            with rt.autocast():
                z0, z1 = encoder(first), encoder(second)
            loss = loss_of(z0, z1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def report(rates: dict[str, list[float]], options: argparse.Namespace, device: str) -> None:
    middle = {name: statistics.median(values) for name, values in rates.items()}
    shares = {"share of synthetic": paired_median(rates["rkdo_dist"], rates["synthetic"])}
    theirs = [name for name in rates if name.startswith("lightly")]
    if theirs:
        best = max(theirs, key=lambda name: middle[name])
        shares[f"times {best}"] = paired_median(rates["rkdo_dist"], rates[best])
    print(f"\n{options.backbone}, batch {options.batch}, {options.threads} threads, {device}")
    for name, value in middle.items():
        print(f"{name:24} {value:8.1f} pairs/s")
    for name, value in shares.items():
        print(f"rkdo_dist: {name:24} {value:6.3f}")
    if options.out:
        found = {"machine": platform.processor() or platform.machine(), "device": device, **vars(options)}
        found |= {"out": str(options.out.name), "shards": "", "rates": rates, "ratios": shares}
        options.out.write_text(json.dumps(found, indent=1))


def paired_median(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    main()
