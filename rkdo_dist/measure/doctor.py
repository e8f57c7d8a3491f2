"""`rkdo doctor`: what this machine and launch would do with a configuration, and everything that is wrong with it.

Runs on the ranks that a launcher has started, like training, and makes the same checks before the first step; nothing
is trained and no file is written.
"""

from __future__ import annotations

import os
import platform
import socket
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rkdo_dist import __version__, parts
from rkdo_dist import config as configuration
from rkdo_dist.config import Config
from rkdo_dist.console import Terminal, progress_bar
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.shards import open_shard
from rkdo_dist.exchange import group
from rkdo_dist.field.presets import named
from rkdo_dist.measure import reading, wire
from rkdo_dist.measure.ledger import sent_bytes
from rkdo_dist.ranks import surroundings
from rkdo_dist.ranks.agreement import code_digest
from rkdo_dist.ranks.arithmetic import arithmetic
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.training import machine, memory, micro_batch
from rkdo_dist.training.readiness import made_ready
from rkdo_dist.training.shape import StepShape, shape_of

_PACKAGES = ("torchvision", "accelerate", "deepspeed", "webdataset", "numpy")


def doctor(config: Config) -> int:
    """Check everything that training would check, and print what it would do.

    Returns:
        0; mistakes are raised.

    Raises:
        ValueError: for a mistake in the request, alike on every rank.
    """
    with surroundings.meet(config) as around:
        rt, index = around.runtime, around.index
        console = Terminal(markup=False) if rt.is_main else None
        ranks: list[Any] = group.gather_objects(_this_rank(rt))
        _print(console, _launch_table(config, rt, ranks))
        asked, config = config, micro_batch.resolved(config, rt, index, None)
        job, plan = made_ready(config, around, RunDirectory(config.run.dir))
        splits = dict.fromkeys([config.data.split, *(plan.splits if config.evaluate.at_end else ())])
        _check_shards(index, list(splits), console)
        shape = shape_of(config, job.encoder, job.objective(0), rt.world, rt.launch)
        lane = group.together(lambda: memory.lane_growth(config, rt, index, job.encoder), "measuring a forward pass")
        need = memory.needed(config, rt, index, shape, lane(shape.micro_batch))
        per_host = max(sum(r["host"] == other["host"] for r in ranks) for other in ranks)
        _print(
            console,
            _run_table(config, index, shape, asked.train.micro_batch == "auto", job.kernel),
            _wire_table(shape),
            _memory_table(need, rt, per_host),
        )
        _print(console, reading.advice(config, rt, index, job.encoder))
        _print(console, *([plan.note] if plan.note else []))
        _print(console, Text("nothing stands in the way of training", "green"))
    return 0


def _print(console: Console | None, *things: Any) -> None:
    for thing in things if console is not None else ():
        console.print(thing)  # type: ignore[union-attr]


def _check_shards(index: ShardIndex, splits: list[str], console: Console | None) -> None:
    """Verify length, SHA-256 and sample count of every shard; the ranks of a node share the work."""
    shards = [shard for split in splits for shard in index.split(split).shards]
    if index.address is not None:
        _print(console, f"{len(shards)} shards lie elsewhere: each is verified when it has been fetched")
        return
    place, places = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mine = shards[place::places]
    show = console if console is not None and console.is_terminal else Terminal(quiet=True)
    with progress_bar(show, disable=show.quiet, transient=True) as bar:
        task = bar.add_task("verifying shards", total=len(mine), note="")

        def verify() -> None:
            for shard in mine:
                open_shard(index, shard).close()
                bar.update(task, advance=1, note=index.name_of(shard))

        group.together(verify, "verifying the shards")
    size = sum(shard.bytes for shard in shards)
    _print(console, f"{len(shards)} shards verified ({_bytes(size)}): lengths, SHA-256 and sample counts")


def _this_rank(rt: Runtime) -> dict[str, Any]:
    name = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else platform.processor() or "CPU"
    return {"host": socket.gethostname(), "device": f"{rt.device} ({name})", "cores": machine.cores()}


def _launch_table(config: Config, rt: Runtime, ranks: list[Any]) -> Table:
    hosts = list(dict.fromkeys(r["host"] for r in ranks))
    devices = list(dict.fromkeys(r["device"] for r in ranks))
    cores = min(r["cores"] for r in ranks)
    backend = torch.distributed.get_backend() if group.is_distributed() else "none (one process)"
    table = _table("This launch", "", "")
    table.add_row(
        "processes", f"{rt.world} on {len(hosts)} machine{'s' if len(hosts) > 1 else ''} ({', '.join(hosts)})"
    )
    table.add_row("devices", ", ".join(devices))
    busy = max(sum(r["host"] == host for r in ranks) for host in hosts) * config.run.threads
    shared = f"; {busy} threads share them" if rt.device.type == "cpu" and busy > cores else ""
    table.add_row("CPU cores of a machine", f"{cores}, {config.run.threads} thread(s) per process{shared}")
    table.add_row("backend", str(backend))
    table.add_row("strategy", rt.strategy)
    table.add_row("precision", {"no": "float32"}.get(rt.precision, rt.precision))
    note = (
        "" if rt.reduction == config.run.reduction else f" (run.reduction={config.run.reduction} is not possible here)"
    )
    table.add_row("reduction", rt.reduction + note)
    if rt.device.type == "cuda":
        numbers = arithmetic(rt.device)
        table.add_row("libraries", ", ".join(f"{name} {numbers[name]}" for name in ("CUDA", "cuDNN", "NCCL")))
        tf32 = [what for what in ("products", "convolutions") if numbers[f"TF32 in {what}"] == "True"]
        table.add_row("float32 on the GPU", f"TF32 in {' and '.join(tf32)}" if tf32 else "full (no TF32)")
        only = numbers["deterministic algorithms"] == "True"
        table.add_row("algorithms", "deterministic ones only" if only else "the fastest")
    table.add_row("rkdo_dist", f"{__version__}, code {code_digest()[:12]}")
    table.add_row("torch", torch.__version__)
    table.add_row("other packages", ", ".join(f"{name} {version}" for name, version in _versions().items()))
    table.add_row("python", f"{platform.python_version()}, {platform.platform(terse=True)}")
    return table


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _run_table(config: Config, index: ShardIndex, shape: StepShape, chosen: bool, kernel: str) -> Table:
    steps, total = parts.run_length(config, index)
    f, train = config.field, config.train
    table = _table("This run", "", "")
    table.add_row(
        "data", f"{index.root}, split {config.data.split}: {index.split(config.data.split).samples:,} samples"
    )
    table.add_row("index digest", index.digest()[:16])
    table.add_row("settings digest", configuration.digest(config)[:16])
    table.add_row("objective", f"{named(f.objective, f.recursion)}, depth {f.depth}, pairing {f.value('pairing')}")
    table.add_row("kernel of the field", kernel)
    table.add_row("encoder", f"{config.encoder.backbone}, {shape.parameters:,} parameters, d = {shape.dimension}")
    lanes = f"{shape.lanes} lanes of {shape.micro_batch}{' (auto)' if chosen else ''}"
    table.add_row("step", f"{shape.batch} pairs = {lanes}; {shape.rows} per process")
    table.add_row("memory policy", "embed again (recompute)" if train.recompute else "keep activations")
    table.add_row("optimizer", f"{train.optimizer}, learning rate {train.peak_rate:g} at most")
    table.add_row("length", f"{total} steps, {steps} an epoch")
    table.add_row("run.dir", config.run.dir or "not set (runs/NAME-DATE-TIME)")
    return table


def _wire_table(shape: StepShape) -> Table:
    table = _table("Sent by each process in a step (formula)", "for", "collective", "calls", "bytes")
    book = wire.step_payloads(shape)
    total = 0.0
    for (purpose, operation), payload in sorted(book.payload.items(), key=lambda item: -item[1]):
        sent = sent_bytes(operation, payload, shape.world)
        total += sent
        table.add_row(purpose, operation, str(book.calls[purpose, operation]), _bytes(sent))
    table.add_section()
    table.add_row(
        "all" if shape.world > 1 else "nothing: one process", "", str(sum(book.calls.values())), _bytes(total)
    )
    if shape.strategy.startswith("zero"):
        table.caption = "DeepSpeed's own part by the formula of its paper; it cannot be counted here"
    elif shape.persistent:
        table.caption = "rows of the persistent field travel too; how many depends on the samples that meet"
    elif shape.relational:
        table.caption = "a teacher's keys travel too, b (d + 4) numbers; columns from a queue do not"
    return table


def _memory_table(need: dict[str, int], rt: Runtime, per_host: int) -> Table:
    table = _table("Memory of a process at the peak of a step (estimate)", "for", "bytes")
    for name, size in need.items():
        table.add_row(name, _bytes(size))
    table.add_section()
    total = sum(need.values())
    table.add_row("all of these", _bytes(total))
    there = machine.available_bytes(rt.device)
    on_cpu = rt.device.type == "cpu"
    if on_cpu:
        table.add_row("this process so far (torch and its libraries)", _bytes(machine.peak_bytes(rt.device)))
        table.add_row(f"free on this machine, for {per_host} process(es)", _bytes(there))
    else:
        table.add_row("the device has", _bytes(there))
    if total * (per_host if on_cpu else 1) > there:
        table.caption = Text("this does not fit: lower train.micro_batch, or use train.recompute=true", "red")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if column in ("bytes", "calls") else "left", no_wrap=number == 0)
    return table


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
