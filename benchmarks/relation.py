"""What a recursion with restart costs: steps with and without it in alternation in one run.

    python benchmarks/relation.py [--batch 256] [--rounds 3] [--small]
    python benchmarks/relation.py --snapshot

ResNet-18 on CIFAR-10's shapes (random images): InfoNCE, whose encoder sees two views with gradient; a relation of the
student's own second view; one of an averaged teacher's keys over the batch (a third view, without gradient); and SCE,
ReSSL's and CO2's form, in which the teacher's keys take the place of the second view. Ratios are medians over rounds of
neighbouring steps, in processor time of all threads, so that other work on the machine adds little to it. `--snapshot`
trains an epoch of the digits at 32 x 32 (ResNet-20) and takes a snapshot of them, data included in both.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.stream import MicroBatch
from rkdo_dist.encoders import Encoder
from rkdo_dist.exchange.columns import ExactColumns
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.presets import PRESETS, Relation
from rkdo_dist.ranks import runtime
from rkdo_dist.ranks.signals import StopRequest
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.training import loop
from rkdo_dist.training.average import WeightAverage
from rkdo_dist.training.exact import exact_field
from rkdo_dist.training.job import build
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.relation import RelationalField
from rkdo_dist.training.step import Step, StepSettings

LANE, D = 64, 128  # pairs in a micro-batch, width of the embeddings
KINDS = {
    "InfoNCE": None,
    "batch, own keys": Relation(view="strong"),
    "batch, ema": Relation(teacher="ema", view="weak"),
    "batch, ema, 20 mutual": Relation(teacher="ema", view="weak", neighbours=20, mutual=True),
    "SCE, queue of 4096": PRESETS["sce"].relation,
}


def objective_of(relation: Relation | None) -> Objective:
    """InfoNCE, or the objective of a relation."""
    return Objective.infonce(0.1) if relation is None else Objective.of("restart", relation=relation)


def steps(batch: int, rounds: int, threads: int, stem: str) -> None:
    """Whole steps side by side."""
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    rt = runtime.start(threads, 60, "exact")

    def view(x: Tensor, ids: Tensor, epoch: int, number: int) -> Tensor:
        return x.float() / 128 - 1 + 0.1 * number

    settings = StepSettings(seed=0, reduction="exact", recompute=False, views_together=True, exchange="gather")
    made = {}
    for name, relation in KINDS.items():
        torch.manual_seed(0)
        encoder = Encoder("resnet18", "released", D, stem)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
        average = WeightAverage(encoder, 0.99) if relation is not None and relation.teacher == "ema" else None
        kept = None if relation is None else filled(relation, batch)
        made[name] = Step(encoder, view, rt, settings, optimizer, None, average, kept), objective_of(relation)
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 1):
        ids = torch.arange(batch) + batch * number
        lanes = [
            MicroBatch([str(int(i)) for i in part], part, images[at : at + LANE], torch.zeros(LANE, dtype=torch.int64))
            for at, part in zip(range(0, batch, LANE), ids.split(LANE), strict=True)
        ]
        for name, (step, objective) in made.items():
            began = time.process_time()
            train_step(step, lanes, objective, 0, number)
            if number:  # the first round warms up
                times[name].append(time.process_time() - began)
    print(f"ResNet-18 ({stem} stem), {batch} pairs of 32 x 32, d = {D}, {threads} threads")
    report(times, "s a step", 1)


def filled(relation: Relation, batch: int) -> RelationalField:
    """With a full queue."""
    kept = RelationalField(relation, 1 << 16, D, False, torch.device("cpu"))
    if kept.queue is not None:
        for start in range(0, relation.queue, batch):
            ids = torch.arange(batch) - 1 - start - batch
            kept.queue.put(unit(batch, start), ids, ids)
            kept.queue.advance(batch)
    return kept


def alone(batch: int, rounds: int) -> None:
    """The field without an encoder."""
    u, v, k = (unit(batch, seed).split(LANE) for seed in range(3))
    pairs = list(zip(u, v, strict=True))
    fields = {name: None if relation is None else filled(relation, batch) for name, relation in KINDS.items()}
    times: dict[str, list[float]] = {name: [] for name in fields}
    for number in range(rounds + 1):
        for name, kept in fields.items():
            objective, ids = objective_of(KINDS[name]), torch.arange(batch)
            began = time.process_time()
            if kept is None:
                exact_field(pairs, objective, 0)
            else:
                kept.begin(k, ids, ids)
                kept.field(pairs, objective, ExactColumns(), merged=False)
                kept.commit()
            if number:
                times[name].append(time.process_time() - began)
    print(f"the field alone, {batch} pairs")
    report(times, "ms", 1000)


def snapshot(threads: int) -> None:
    """A snapshot beside an epoch, in a real run."""
    with tempfile.TemporaryDirectory() as folder:
        prepare("digits", Path(folder) / "digits")
        words = [f"data.shards={folder}/digits", "data.image_size=32", "data.workers=0", "field.objective=snapshot"]
        words += ["encoder.backbone=cifar_resnet20", "train.micro_batch=64", "train.epochs=3", f"run.dir={folder}/run"]
        config = configuration.change(configuration.Config(), words)
        index, rt = parts.open_index(config), runtime.start(threads, 60, "exact")
        job = build(config, rt, index, RunDirectory(config.run.dir))
        job.supervise()
        job.begin()
        assert job.snapshots is not None
        assert job.persistent is not None
        epochs, taken = [], []
        with contextlib.closing(loop.steps(job, StopRequest())) as training:  # type: ignore[type-var]
            for _ in range(3):
                began = time.process_time()
                for _ in range(job.steps_per_epoch):
                    next(training)
                epochs.append(time.process_time() - began)
                began = time.process_time()
                job.snapshots.take(0, job.encoder, job.persistent.store)
                taken.append(time.process_time() - began)
        n = index.split("train").samples
        ratio = statistics.median(a / b for a, b in zip(taken[1:], epochs[1:], strict=True))  # the first have warmed up
        print(f"{n} samples at 32 x 32, cifar_resnet20, {job.steps_per_epoch} steps of {config.train.global_batch}")
        each = f"epoch {epochs[1]:7.3f} s   snapshot {taken[1]:7.3f} s"
        print(f"  {each}   ratio {ratio:.3f}, every 5 epochs {ratio / 5:.3f}")


def report(times: dict[str, list[float]], unit_: str, factor: float) -> None:
    """A line each: the median, and the ratio to InfoNCE."""
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found, times["InfoNCE"], strict=True))
        print(f"  {name:22s} {factor * statistics.median(found):9.3f} {unit_}   ratio {ratio:5.2f}")


def unit(rows: int, seed: int) -> Tensor:
    """Unit-norm embeddings."""
    return functional.normalize(torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default="imagenet", help="cifar: 12 times the work")
    parser.add_argument("--snapshot", action="store_true", help="a snapshot against an epoch")
    parser.add_argument("--small", action="store_true", help="a smoke test")
    arguments = parser.parse_args()
    if arguments.snapshot:
        snapshot(arguments.threads)
        return
    batch = LANE if arguments.small else arguments.batch
    steps(batch, arguments.rounds, arguments.threads, arguments.stem)
    alone(batch, arguments.rounds)


if __name__ == "__main__":
    main()
