"""Commands that explain: `rkdo report`, `rkdo flops`, `rkdo verify-theory`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's commands."""
    report = commands.add_parser("report", help="one self-contained HTML page of any runs")
    report.add_argument("directories", nargs="+", metavar="RUN", help="run directories, finished or not")
    report.add_argument("--out", metavar="FILE", help="default: RUN/report.html, or report.html for several runs")
    report.set_defaults(run=_report)

    flops = commands.add_parser("flops", help="what a step costs: FLOPs by depth, time, memory, share of the loss")
    flops.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/paper/cifar10-rkdo.yaml")
    flops.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. train.global_batch=256")
    flops.add_argument("--image-size", type=int, metavar="N", help="default: data.image_size, or 32")
    flops.add_argument("--repeats", type=int, default=3, metavar="N", help="steps to time; 0: count only (default 3)")
    flops.set_defaults(run=_flops)

    theory = commands.add_parser(
        "verify-theory", help="measure the paper's lemmas and theorem on explicit distributions"
    )
    theory.add_argument("--out", metavar="DIR", help="write theory.json and a figure here (.png and .svg)")
    theory.add_argument("--repeats", type=int, default=1, metavar="N", help="random draws of every kind (default 1)")
    theory.set_defaults(run=_verify_theory)


def _report(options: argparse.Namespace, words: list[str]) -> int:
    from rich.console import Console

    from rkdo_dist.studies.report.page import write_report

    directories = [Path(d) for d in options.directories]
    out = Path(options.out) if options.out else (directories[0] if len(directories) == 1 else Path()) / "report.html"
    console = Console(stderr=True)
    with console.status("reading the runs") as status:
        write_report(directories, out, status.update)
    console.print(f"report: {out}", soft_wrap=True)
    return 0


def _flops(options: argparse.Namespace, words: list[str]) -> int:
    from rich.console import Console

    from rkdo_dist import config as configuration

    config = configuration.load(options.config, options.overrides)
    size = options.image_size or config.data.image_size or 32
    if size < 1 or options.repeats < 0:
        raise ValueError(f"--image-size must be at least 1 and --repeats 0, got {size} and {options.repeats}")
    from rkdo_dist.studies.flops_table import cost_table

    console = Console()
    with console.status("counting and timing"):
        table = cost_table(config, size, options.repeats)
    console.print(table)
    return 0


def _verify_theory(options: argparse.Namespace, words: list[str]) -> int:
    if not (Path(__file__).resolve().parents[2] / "examples" / "theory").is_dir():
        raise ValueError("verify-theory is an example of the repository: run `python -m examples.theory` in a checkout")
    from examples.theory.__main__ import verify

    return verify(Path(options.out) if options.out else None, options.repeats)
