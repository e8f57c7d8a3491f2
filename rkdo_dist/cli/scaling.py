"""`rkdo doctor`, `rkdo measure` and `rkdo scale`: what a launch would do, what a step costs, what scaling bought."""

from __future__ import annotations

import argparse
from pathlib import Path

_WAYS = "some of exact, gather, ring (fast sums with gathered or ring columns); default: as the configuration says"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's commands."""
    doctor = commands.add_parser("doctor", help="check a configuration, shards and launch, without training")
    doctor.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/digits-rkdo.yaml")
    doctor.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train")
    doctor.set_defaults(run=_doctor)

    measure = commands.add_parser("measure", help="time, memory and traffic of a few steps on the ranks launched")
    measure.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/digits-rkdo.yaml")
    measure.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train")
    measure.add_argument("--out", required=True, metavar="FILE", help="the facts, as JSON")
    measure.add_argument("--steps", type=int, default=5, metavar="N", help="steps that are measured (default 5)")
    measure.add_argument("--ways", default="", metavar="A,B", help=_WAYS)
    measure.set_defaults(run=_measure)

    scale = commands.add_parser("scale", help="the same run on several numbers of processes: a scaling study")
    scale.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file (not with --from)")
    scale.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train")
    scale.add_argument("--world-sizes", default="1,2", metavar="N,N", help="numbers of processes (default 1,2)")
    scale.add_argument(
        "--mode", choices=("strong", "weak"), default="strong", help="one global batch, or one per process"
    )
    scale.add_argument("--steps", type=int, default=5, metavar="N", help="steps that are measured (default 5)")
    scale.add_argument("--ways", default="", metavar="A,B", help=_WAYS)
    scale.add_argument("--accelerate-config", metavar="FILE", help="start through `accelerate launch` with this file")
    scale.add_argument("--out", metavar="DIR", help="where results, figures and page go (default: --from's folder)")
    scale.add_argument("--from", dest="source", metavar="DIR", help="an earlier study, or files of `rkdo measure`")
    scale.add_argument("--project", default="", metavar="N,N", help="numbers of devices to project to, e.g. 8,64,512")
    scale.add_argument("--interconnect", default="nvlink+ib400", metavar="A+B", help="links inside and between nodes")
    scale.add_argument("--device-speed", type=float, default=1.0, metavar="X", help="of the projection, here = 1")
    scale.set_defaults(run=_scale)


def _doctor(options: argparse.Namespace, words: list[str]) -> int:
    from rkdo_dist import config as configuration

    config = configuration.load(options.config, options.overrides)
    from rkdo_dist.ranks.relaunch import with_all_ranks

    with_all_ranks(words)
    from rkdo_dist.measure.doctor import doctor

    return doctor(config)


def _measure(options: argparse.Namespace, words: list[str]) -> int:
    from rkdo_dist import config as configuration

    config = configuration.load(options.config, options.overrides)
    from rkdo_dist.ranks.relaunch import with_all_ranks

    with_all_ranks(words)
    from rkdo_dist.measure.steps import measure, way_of

    ways = options.ways.split(",") if options.ways else [way_of(config)]
    measure(config, ways, options.steps, Path(options.out))
    return 0


def _scale(options: argparse.Namespace, words: list[str]) -> int:
    from rich.console import Console

    from rkdo_dist.studies import scaling
    from rkdo_dist.studies.links import interconnect
    from rkdo_dist.studies.scaling_figures import draw
    from rkdo_dist.studies.scaling_page import terminal_tables, write_page

    console = Console()
    worlds = _numbers("--project", options.project)
    interconnect(options.interconnect)  # before anything is run
    if bool(options.source) == bool(options.config):
        raise scaling.ScalingError("give either a CONFIG to run, or --from DIR with measurements")
    if not (options.out or options.source):
        raise scaling.ScalingError("--out is missing: name a directory for the results, e.g. --out runs/scale")
    out = Path(options.out or options.source)
    if options.source:
        results = scaling.read(Path(options.source))
    else:
        ways = tuple(options.ways.split(",")) if options.ways else ()
        launch = Path(options.accelerate_config) if options.accelerate_config else None
        sizes = tuple(_numbers("--world-sizes", options.world_sizes))
        plan = scaling.Plan(
            Path(options.config), tuple(options.overrides), sizes, options.mode == "weak", options.steps, ways, launch
        )
        with console.status("starting") as status:
            results = scaling.run(plan, out, status.update)
    study = scaling.study(results, worlds, options.interconnect, options.device_speed)
    page = out / "scaling.html"
    write_page(study, draw(study, out), page)
    for shown in terminal_tables(study):
        console.print(shown)
    console.print(f"page: {page}", soft_wrap=True)
    return 0


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word]
    except ValueError:
        raise ValueError(f"{option} needs whole numbers with commas, e.g. 1,2,4; got {text!r}") from None
