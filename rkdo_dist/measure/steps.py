"""`rkdo measure`: the cost of a few steps of a configuration on the ranks that a launcher has started.

The steps are those of training (same samples, same arithmetic), with the stopwatch on. Nothing of a run is written,
only one JSON file with the facts of every way asked for. `rkdo scale` starts this at several sizes; on a cluster, start
it under your own launcher at each size and let `rkdo scale --from` put the files together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from rkdo_dist import __version__
from rkdo_dist import config as configuration
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.stream import Batch
from rkdo_dist.exchange import group
from rkdo_dist.files import write_atomic
from rkdo_dist.measure import ledger
from rkdo_dist.measure.ledger import Ledger
from rkdo_dist.measure.stopwatch import COMPUTE, DATA, EXCHANGE, FIELD, OPTIMIZER, Stopwatch
from rkdo_dist.ranks import surroundings
from rkdo_dist.ranks.agreement import agree
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.ranks.signals import StopRequest
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.training import machine
from rkdo_dist.training.job import Job, build
from rkdo_dist.training.loop import steps
from rkdo_dist.training.shape import shape_of

WARM_UP = 2  # steps that are made but not measured: DDP orders its buckets anew after the first


def measure(config: Config, ways: Sequence[str], steps: int, out: Path) -> None:
    """Measure `steps` steps with each of `ways` as `run.reduction` and write the facts to `out` (rank zero).

    Raises:
        ValueError: for a mistake in the request, alike on every rank.
    """
    asked = {way: configuration.change(config, [f"run.reduction={way}"]) for way in ways}
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    with surroundings.meet(config, "exact" if "exact" in ways else "fast") as around:
        rt = around.runtime
        agree({"ways": list(ways), "steps": steps})
        if rt.zero_stage and "exact" in ways:
            raise ConfigError(f"{rt.strategy} sums gradients itself: measure --ways fast or ring")
        for way in ways:
            configuration.check_world(asked[way], rt.world)
        points = [_measured(asked[way], way, rt, around.index, steps) for way in ways]
        settings = configuration.flatten(configuration.without_secrets(config))
        facts = {"version": __version__, "settings": settings, "points": points}
        group.on_main(lambda: write_atomic(out, json.dumps(facts, indent=1)), f"writing {out}")


def _measured(config: Config, way: str, rt: Runtime, index: ShardIndex, steps: int) -> dict[str, Any]:
    """The facts of one way, on every rank alike."""
    gc.collect()
    machine.reset_peak(rt.device)
    rt = dataclasses.replace(rt, reduction=config.run.reduction)
    wanted = WARM_UP + steps
    job = group.together(lambda: _job(config, rt, index, wanted), "building the run")
    job.supervise()
    shape = shape_of(config, job.encoder, job.objective(0), rt.world, rt.launch)
    records = list(_steps(job, Stopwatch(rt.device), wanted))
    facts = _combined(records[WARM_UP:])
    ranks: list[Any] = group.gather_objects({
        "host": socket.gethostname(),
        "peak_bytes": machine.peak_bytes(rt.device),
        "phases": facts.pop("phases"),
    })  # fmt: skip
    return {
        "way": way,
        "world": rt.world,
        "machines": len({r["host"] for r in ranks}),
        "device": _device_name(rt),
        "device_kind": rt.device.type,
        "cores": machine.cores(),
        "threads": config.run.threads,
        "precision": rt.precision,
        "shape": dataclasses.asdict(shape),
        **facts,
        "phases": {name: statistics.fmean(r["phases"][name] for r in ranks) for name in ranks[0]["phases"]},
        "peak_bytes": [r["peak_bytes"] for r in ranks],
        "losses": [r["loss"] for r in records],
        "batch_digests": [r["digest"] for r in records],
    }


def _job(config: Config, rt: Runtime, index: ShardIndex, steps: int) -> Job:
    job = build(config, rt, index, RunDirectory(config.run.dir))
    if job.total_steps < steps:
        raise ConfigError(
            f"the run has {job.total_steps} steps, but {steps} are needed ({WARM_UP} of them to warm up): "
            "raise train.epochs or train.max_steps"
        )
    return job


def _steps(job: Job, watch: Stopwatch, wanted: int) -> Iterator[dict[str, Any]]:
    """Train on, yielding time, phases, ledger, loss and digest of each step."""
    job.begin()
    step, strategy = job.step, job.step.strategy
    watch.timed(step, "make_view", DATA)
    watch.timed(step, "embed", COMPUTE)
    watch.timed(strategy, "field", FIELD)
    watch.timed(strategy, "backward", COMPUTE)
    watch.timed(strategy, "exchange", EXCHANGE)
    watch.timed(strategy, "update", OPTIMIZER)
    job.stream = lambda read=job.stream: _timed(read(), watch)  # type: ignore[method-assign,misc]
    with (
        ledger.counting(lambda: watch.phase(EXCHANGE)) as book,
        contextlib.closing(steps(job, StopRequest())) as training,  # type: ignore[type-var]
    ):
        _count_ddp(strategy.model, book)
        began = time.perf_counter()
        for _ in range(wanted):
            facts, _ = next(training)
            yield {
                "seconds": time.perf_counter() - began,
                "phases": watch.split(),
                "book": book.take(),
                "loss": facts.loss,
                "digest": facts.digest,
            }
            began = time.perf_counter()
            watch.split()


def _timed(stream: Iterator[Batch], watch: Stopwatch) -> Iterator[Batch]:
    """The stream, whose reading counts as data."""
    with contextlib.closing(stream):  # type: ignore[type-var]
        while True:
            with watch.phase(DATA):
                batch = next(stream, None)
            if batch is None:
                return
            yield batch


def _count_ddp(model: nn.Module, book: Ledger) -> None:
    """Note from now on what DDP sends, by a hook that makes the all-reduce DDP would make."""

    def noted(bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if group.world_size() > 1:  # under a launcher one process has a DDP of its own, which sends nothing
            book.note((ledger.GRADIENTS, "all_reduce"), ledger.size(bucket.buffer()))
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.register_comm_hook(None, lambda _, bucket: noted(bucket))  # DDP reads annotations, a lambda has none


def _combined(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over steps, and the ledger of a step (steps send alike, except for rows of a persistent field)."""
    books = [r["book"] for r in records]
    entries = sorted({entry for book in books for entry in book.calls})
    wire = []
    for entry in entries:
        payload, calls = (statistics.fmean(getattr(b, kind)[entry] for b in books) for kind in ("payload", "calls"))
        wire.append([*entry, round(payload), round(calls)])
    seconds = statistics.median(r["seconds"] for r in records)
    phases = {name: statistics.median(r["phases"][name] for r in records) for name in records[0]["phases"]}
    return {
        "steps": len(records),
        "seconds": seconds,
        "seconds_of_steps": [r["seconds"] for r in records],
        "phases": {**phases, "other": max(0.0, seconds - sum(phases.values()))},
        "wire": wire,
    }


def _device_name(rt: Runtime) -> str:
    if rt.device.type == "cuda":
        return torch.cuda.get_device_name(rt.device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as handle:
        for line in handle:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or os.uname().machine
