"""Commands that read finished runs: their arguments, and the one call each makes."""

from __future__ import annotations

import argparse
from pathlib import Path

from rkdo_dist.commands.arguments import Command, file, folder, local, terminal


def reading_commands(command: Command) -> None:
    """Add the commands."""
    add = command("compare", _compare, "a table and a figure of several runs", "runs/a runs/b --figure runs/loss.png")
    add("directories", type=local, nargs="+", metavar="RUN", help="run directories")
    add("--figure", type=file, metavar="FILE", help="save the loss curves here (.png or .svg)")

    add = command("report", _report, "one self-contained HTML page of any runs", "runs/a runs/b")
    add("directories", type=local, nargs="+", metavar="RUN", help="run directories, finished or not")
    add("--out", type=file, metavar="FILE", help="default: RUN/report.html, or report.html for several runs")

    add = command("field", _field, "a picture of how rows of a persistent field evolve", "runs/persistent")
    add("directory", type=local, metavar="RUN", help="a run with field.recursion=persistent")
    add("--out", type=folder, metavar="DIR", help="write field.png and field.svg here (default: RUN)")


def _compare(options: argparse.Namespace) -> int:
    from rkdo_dist.console import say
    from rkdo_dist.studies import plots, sheets
    from rkdo_dist.studies.report.charts import write_loss_chart
    from rkdo_dist.studies.report.groups import overview, read_groups

    if options.figure:
        plots.check_kind(options.figure)
    groups, remarks = read_groups(options.directories)
    console = sheets.console()
    sheets.show(console, [overview(groups)])
    for remark in remarks:
        say(console, remark)
    if options.figure and write_loss_chart(groups, options.figure):
        say(console, f"figure: {options.figure}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from rkdo_dist.console import say
    from rkdo_dist.studies import sheets
    from rkdo_dist.studies.report.page import write_report

    runs = options.directories
    out = options.out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    console = terminal(stderr=True)
    with console.status("reading the runs") as status:
        table = write_report(runs, out, status.update)
    sheets.show(sheets.console(), [table])
    say(console, f"report: {out}")
    return 0


def _field(options: argparse.Namespace) -> int:
    from rkdo_dist.console import say
    from rkdo_dist.studies.field_figure import write_figure

    console = terminal(stderr=True)
    with console.status("drawing"):
        paths = write_figure(options.directory, options.out or options.directory)
    say(console, f"figure: {paths[0]}")
    return 0
