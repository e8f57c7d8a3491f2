"""Commands that measure cost: their arguments, and the one call each makes."""

from __future__ import annotations

import argparse

from rkdo_dist.commands.arguments import (
    LENGTH,
    WAYS,
    Command,
    Range,
    add_config,
    add_overrides,
    configuration_of,
    file,
    folder,
    local,
    names,
    numbers,
    terminal,
)


def cost_commands(command: Command) -> None:
    """Add the commands."""
    add = command(
        "measure",
        _measure,
        "time, memory and traffic of a few steps on the ranks launched",
        "configs/digits-rkdo.yaml --out runs/cost/1.json",
    )
    add_config(add)
    add("--out", type=file, required=True, metavar="FILE", help="the facts, as JSON")
    add("--steps", type=LENGTH, default=5, metavar="N", help="steps that are measured (default 5)")
    add("--ways", type=names, default=(), metavar="A,B", help=WAYS)

    add = command(
        "scale",
        _scale,
        "the same run on several numbers of processes: a scaling study",
        "configs/digits-rkdo.yaml --world-sizes 1,2 --out runs/scale",
    )
    add("config", type=local, nargs="?", metavar="CONFIG", help="a YAML file (not with --from)")
    add_overrides(add, "as for train")
    add("--world-sizes", type=numbers, default=(1, 2), metavar="N,N", help="numbers of processes (default 1,2)")
    add("--mode", choices=("strong", "weak"), default="strong", help="one global batch, or one per process")
    add("--steps", type=LENGTH, default=5, metavar="N", help="steps that are measured (default 5)")
    add("--ways", type=names, default=(), metavar="A,B", help=WAYS)
    add("--accelerate-config", type=local, metavar="FILE", help="start through `accelerate launch` with this file")
    add("--out", type=folder, metavar="DIR", help="where results, figures and page go (default: --from's folder)")
    add("--from", dest="source", type=local, metavar="DIR", help="an earlier study, or files of `rkdo measure`")

    add = command(
        "flops",
        _flops,
        "what a step costs: FLOPs by depth, time, memory, share of the loss",
        "configs/paper/cifar10-rkdo.yaml train.global_batch=256",
    )
    add_config(add)
    add("--image-size", type=Range(1, 1 << 16), metavar="N", help="default: data.image_size, or 32")
    add("--repeats", type=LENGTH, default=3, metavar="N", help="steps to time; fewer than 3: count only (default 3)")


def _measure(options: argparse.Namespace) -> int:
    config = configuration_of(options)
    from rkdo_dist.measure.steps import measure

    measure(config, options.ways or (config.run.reduction,), options.steps, options.out)
    return 0


def _scale(options: argparse.Namespace) -> int:
    from rkdo_dist.console import say
    from rkdo_dist.measure import scaling
    from rkdo_dist.studies import scaling_tables, sheets

    console = sheets.console()
    if bool(options.source) == bool(options.config):
        raise scaling.ScalingError("give either a CONFIG to run, or --from DIR with measurements")
    if not (options.out or options.source):
        raise scaling.ScalingError("--out is missing: name a directory for the results, e.g. --out runs/scale")
    out = options.out or options.source
    if options.source:
        results = scaling.read(options.source)
    else:
        settings, weak, launch = tuple(options.overrides), options.mode == "weak", options.accelerate_config
        plan = scaling.Plan(options.config, settings, options.world_sizes, weak, options.steps, options.ways, launch)
        with console.status("starting") as status:
            results = scaling.run(plan, out, status.update)
    study = scaling.study(results)
    page = scaling_tables.write(study, out)
    sheets.show(console, scaling_tables.tables(study))
    for note in scaling_tables.notes(study):
        say(console, f"- {note}")
    say(console, f"page: {page}")
    return 0


def _flops(options: argparse.Namespace) -> int:
    config = configuration_of(options, relaunch=False)
    size = options.image_size or config.data.image_size or 32
    from rkdo_dist.measure.flops import cost_table

    console = terminal()
    with console.status("counting and timing"):
        table = cost_table(config, size, options.repeats)
    console.print(table)
    return 0
