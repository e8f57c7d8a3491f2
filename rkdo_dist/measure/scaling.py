"""`rkdo scale`: the same global batches on several numbers of processes, and what that bought.

Every size is measured by `rkdo measure` under a launcher of its own. Strong: one global batch at every size. Weak: the
global batch grows with the size, so that a process always has the same lanes; the configuration's global batch is that
of the smallest size.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rkdo_dist import addresses, documents, parts
from rkdo_dist import config as configuration
from rkdo_dist.config import Config
from rkdo_dist.files import write_atomic
from rkdo_dist.measure.ledger import sent_bytes
from rkdo_dist.measure.wire import bytes_agree
from rkdo_dist.training.shape import StepShape

RESULTS = "results.json"
_AGAIN = "measure again"
_KINDS: dict[Any, documents.Check] = {"int": documents.COUNT, "str": documents.TEXT, "bool": documents.FLAG}
_POINT = documents.shape(
    **dict.fromkeys(("way", "device", "device_kind"), documents.TEXT),
    **dict.fromkeys(("world", "machines", "cores", "threads"), documents.NATURAL),
    shape=documents.shape(
        **{item.name: _KINDS[item.type] for item in dataclasses.fields(StepShape)}
        | dict.fromkeys(("world", "lanes", "micro_batch"), documents.NATURAL)
    ),
    seconds=documents.POSITIVE,
    wire=documents.list_of(documents.row_of(documents.TEXT, documents.TEXT, documents.COUNT, documents.COUNT)),
    phases=documents.object_of(documents.NUMBER),
    peak_bytes=documents.list_of(documents.COUNT, 1),
    losses=documents.list_of(documents.maybe(documents.NUMBER)),
    batch_digests=documents.list_of(documents.TEXT),
)
_MEASURED = documents.shape(points=documents.list_of(_POINT, 1))
_RESULTS = documents.shape(mode=documents.TEXT, points=documents.list_of(_POINT, 1))


class ScalingError(ValueError):
    """A study cannot be made or read; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        config, overrides: of the runs, as for `rkdo train`.
        worlds: numbers of processes.
        weak: whether the global batch grows with them.
        steps: measured steps of each.
        ways: as for `rkdo measure`; empty: as the configuration says.
        launch_config: an Accelerate configuration for `accelerate launch`; None starts torchrun here.
    """

    config: Path
    overrides: tuple[str, ...]
    worlds: tuple[int, ...]
    weak: bool
    steps: int
    ways: tuple[str, ...]
    launch_config: Path | None = None


def check(plan: Plan) -> Config:
    """The configuration, after everything that can be refused before a process is started.

    Raises:
        ValueError: naming what to change.
    """
    base = configuration.load(plan.config, plan.overrides)
    if not plan.worlds or any(w < 1 for w in plan.worlds) or len(set(plan.worlds)) < len(plan.worlds):
        raise ScalingError(f"--world-sizes must be different positive numbers, got {','.join(map(str, plan.worlds))}")
    if plan.launch_config is not None and not plan.launch_config.is_file():
        raise ScalingError(f"--accelerate-config {plan.launch_config} is not a file")
    if plan.steps < 1:
        raise ScalingError(f"--steps must be at least 1, got {plan.steps}")
    settings = {world: _overrides(plan, base, world) for world in plan.worlds}
    for world, overrides in settings.items():
        config = configuration.load(plan.config, overrides)
        parts.check(config)
        for way in plan.ways or (config.run.reduction,):
            configuration.check_world(configuration.change(config, [f"run.reduction={way}"]), world)
    return base


def _overrides(plan: Plan, base: Config, world: int) -> list[str]:
    """The settings of one size."""
    grown = base.train.global_batch * world
    if not plan.weak:
        return list(plan.overrides)
    if grown % min(plan.worlds):
        raise ScalingError(f"--mode weak: {grown} pairs do not divide by the smallest size, {min(plan.worlds)}")
    return [*plan.overrides, f"train.global_batch={grown // min(plan.worlds)}"]


def run(plan: Plan, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure every size and write `out/results.json`.

    Args:
        say: told what is going on.

    Returns:
        What was written.

    Raises:
        ScalingError: if a size fails, with the last words of its processes.
    """
    base = check(plan)
    out.mkdir(parents=True, exist_ok=True)
    points = []
    for world in sorted(plan.worlds):
        file = out / f"measured-{world}.json"
        file.unlink(missing_ok=True)
        say(f"measuring on {world} process{'es' if world > 1 else ''}")
        _launch(plan, _overrides(plan, base, world), world, file)
        points += documents.read(file, _MEASURED, _AGAIN)["points"]
    return _write(out, "weak" if plan.weak else "strong", points)


def _launch(plan: Plan, overrides: Sequence[str], world: int, file: Path) -> None:
    if plan.launch_config is None and world == 1:
        launcher = []
    elif plan.launch_config is None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    else:
        where = ["--config_file", str(plan.launch_config), "--num_processes", str(world), "--main_process_port", "0"]
        launcher = ["-m", "accelerate.commands.launch", *where]
    command = [
        sys.executable,
        *launcher,
        "-m",
        "rkdo_dist",
        "measure",
        str(plan.config),
        *map(addresses.shown, overrides),
    ]
    command += ["--steps", str(plan.steps), "--out", str(file)]
    command += ["--ways", ",".join(plan.ways)] if plan.ways else []
    settings = configuration.flatten(configuration.load(plan.config, overrides))
    environment = addresses.handed_on({"OMP_NUM_THREADS": "1", **os.environ}, settings.values())
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment) as processes:
        try:
            said = processes.communicate()[0].splitlines()
        except BaseException:  # a request to stop: a launcher that is killed would leave its ranks behind
            processes.terminate()
            raise
    if processes.returncode or not file.is_file():
        last = [line for line in said if line.startswith("rkdo")][-1:] or said[-15:]
        raise ScalingError(f"measuring on {world} processes failed: " + "\n".join(last))


def _write(out: Path, mode: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    results = {"mode": mode, "points": points}
    write_atomic(out / RESULTS, json.dumps(results, indent=1) + "\n")
    return results


def read(folder: Path) -> dict[str, Any]:
    """The results of an earlier study, or those that `rkdo measure` has left in a folder (as on a cluster).

    Raises:
        ScalingError: if there are none, or they cannot be read.
    """
    try:
        if (folder / RESULTS).is_file():
            return documents.read(folder / RESULTS, _RESULTS, _AGAIN)
        files = sorted(folder.glob("*.json")) if folder.is_dir() else []
        points = [point for file in files for point in documents.read(file, _MEASURED, _AGAIN)["points"]]
        shapes = {point["shape"]["lanes"] * point["shape"]["micro_batch"] for point in points}
    except documents.DamagedError as error:
        raise ScalingError(str(error)) from None
    if not points:
        raise ScalingError(f"{folder} holds no {RESULTS} and no files of `rkdo measure`")
    return {"mode": "strong" if len(shapes) == 1 else "weak", "points": points}


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured point.

    Attributes:
        efficiency: pairs per second and process, as a share of the same way at the smallest size.
        oversubscribed: whether processes shared CPU cores, so the timings do not measure scaling.
        phases: seconds of a step by phase.
        sent: bytes that a process sends in a step, by purpose.
        same: "yes" where the losses and batches of all steps are those of the smallest size; otherwise what differs.
        exact_bytes: whether formula and ledger agree; None if they cannot be compared.
    """

    way: str
    world: int
    batch: int
    seconds: float
    speed: float
    efficiency: float
    oversubscribed: bool
    peak: int
    phases: dict[str, float]
    sent: dict[str, float]
    exact_bytes: bool | None
    same: str


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything a study reports."""

    mode: str
    rows: list[Row]
    machine: str
    cores: int


def study(results: dict[str, Any]) -> Study:
    """Evaluate results, as `read` and `run` give them."""
    facts = sorted(results["points"], key=lambda p: (p["way"], p["world"]))
    first = {p["way"]: p for p in reversed(facts)}
    rows = [_row(point, first[point["way"]]) for point in facts]
    machine = ", ".join(dict.fromkeys(p["device"] for p in facts))
    return Study(results["mode"], rows, machine, min(p["cores"] for p in facts))


def _row(facts: dict[str, Any], base: dict[str, Any]) -> Row:
    shape = StepShape(**facts["shape"])
    speed = shape.batch / facts["seconds"]
    base_batch = base["shape"]["lanes"] * base["shape"]["micro_batch"]
    sent: dict[str, float] = {}
    for purpose, operation, size, _ in facts["wire"]:
        sent[purpose] = sent.get(purpose, 0.0) + sent_bytes(operation, size, shape.world)
    threads = facts["threads"] * shape.world / facts["machines"]
    return Row(
        way=facts["way"],
        world=shape.world,
        batch=shape.batch,
        seconds=facts["seconds"],
        speed=speed,
        efficiency=speed / shape.world / (base_batch / base["seconds"] / base["world"]),
        oversubscribed=facts["device_kind"] == "cpu" and threads > facts["cores"],
        peak=max(facts["peak_bytes"]),
        phases=facts["phases"],
        sent=sent,
        exact_bytes=bytes_agree(shape, facts["wire"]),
        same=_sameness(facts, base),
    )


def _sameness(facts: dict[str, Any], base: dict[str, Any]) -> str:
    if facts is base:
        return "reference"
    if facts["shape"]["lanes"] != base["shape"]["lanes"]:
        return "-"
    if facts["batch_digests"] != base["batch_digests"]:
        return "NO: other samples"
    if facts["losses"] == base["losses"]:
        return "yes, every bit"
    pairs = zip(facts["losses"], base["losses"], strict=True)
    largest = max(abs(a - b) / abs(b) if a is not None and b else float("inf") for a, b in pairs)
    return f"samples; losses to {largest:.0e}" if facts["way"] != "exact" else f"NO: losses to {largest:.0e}"
