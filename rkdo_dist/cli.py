"""The command line: every command's arguments and help, and the one call it makes.

Imports of a command's code are inside its function, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rkdo_dist import __version__
from rkdo_dist.addresses import Parser
from rkdo_dist.export.commands import output_commands
from rkdo_dist.faults import OUT_OF_MEMORY, fault, out_of_memory
from rkdo_dist.frozen.commands import frozen_commands

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rkdo_dist.config import Config
    from rkdo_dist.data.index import ShardIndex

USER_ERROR, INTERRUPTED = 2, 130
_EXTRAS = {  # that bring a module; all others come with "train"
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "fsspec": "object-stores",
    "gcsfs": "object-stores",
    "huggingface_hub": "hub",
    "mlflow": "mlflow",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "pyarrow": "parquet",
    "s3fs": "object-stores",
    "tensorboard": "tracking",
    "timm": "timm",
    "transformers": "deepspeed",
    "wandb": "tracking",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 lost a peer, 2 a mistake in the request, 75 pre-empted, 130 interrupted."""
    if arguments is None:
        sys.excepthook = fault
        _open_closed_streams()
    options = parsed(list(sys.argv[1:] if arguments is None else arguments))
    from rkdo_dist.diagnostics import logger, show_diagnostics

    show_diagnostics()
    try:
        code = options.run(options)
    except KeyboardInterrupt:
        logger.info("interrupted")
        code = INTERRUPTED
    except ModuleNotFoundError as error:
        if not error.name or "." in error.name:  # not a library, but a fault in one or here
            raise
        extra = _EXTRAS.get(error.name, "train")
        logger.error("this command needs %s, which is not installed: pip install 'rkdo_dist[%s]'", error.name, extra)
        code = USER_ERROR
    except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        if os.environ.get("RKDO_TRACEBACK") or not _is_users(error):
            raise
        logger.error("%s", OUT_OF_MEMORY if out_of_memory(error) else error)
        code = getattr(error, "exit_code", USER_ERROR)
    if arguments is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a late Ctrl-C must not change how a finished command ends
    sys.stdout.flush()  # stderr is not buffered
    sys.exit(code)


def _open_closed_streams() -> None:
    """Nothing in place of standard streams that were closed (`>&-`): the next files opened would take their numbers."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def parsed(words: list[str]) -> argparse.Namespace:
    """The options; settings may stand before, between and after them (argparse takes a list in one piece only)."""
    parser = _parser()
    commands = _commands_of(parser)
    if words and not words[0].startswith("-") and words[0] not in commands:
        near = difflib.get_close_matches(words[0], commands, n=1)
        hint = f"did you mean: {shlex.join(['rkdo', near[0], *words[1:]])}" if near else "`rkdo --help` lists them"
        parser.error(f"there is no command {words[0]!r}; {hint}")
    options, rest = parser.parse_known_args(words)
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(settings) < len(rest) or (rest and not hasattr(options, "overrides")):
        known = [option for action in commands[words[0]]._actions for option in action.option_strings]
        near = difflib.get_close_matches(rest[0].partition("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint} (rkdo {words[0]} --help)")
    if rest:
        options.overrides = [*options.overrides, *settings]
    _config_first(options)
    options.words = words
    return options


def _commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (added,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return added.choices


def _config_first(options: argparse.Namespace) -> None:
    """Where a setting stands before the configuration, argparse takes it for that."""
    config, overrides = getattr(options, "config", None), getattr(options, "overrides", [])
    other = next((word for word in overrides if "=" not in word), None)
    if config is not None and other is not None and "=" in str(config) and not Path(config).exists():
        options.overrides = [str(config) if word is other else word for word in overrides]
        options.config = type(config)(other)


def _is_users(error: BaseException) -> bool:
    """Whether an error speaks to the user (a message of ours) rather than of a fault in the program."""
    from rkdo_dist.exchange.group import RankError

    return isinstance(error, ValueError | OSError | RankError | ArithmeticError) or out_of_memory(error)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


# -- arguments ---------------------------------------------------------------------------------------------------------

Run = Callable[[argparse.Namespace], int]
Add = Callable[..., argparse.Action]  # a parser's add_argument
Command = Callable[[str, Run, str, str], Add]  # name, what it runs, what it does, an example
_CONFIG = "a YAML file, such as configs/digits-rkdo.yaml"
_WAYS = "values of run.reduction: some of exact, fast, ring (default: as the configuration says)"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="rkdo",
        description="Recursive KL Divergence Optimization: prepare data, train, evaluate, compare.",
        epilog="example:\n  rkdo train configs/digits-rkdo.yaml train.epochs=2 run.dir=runs/first\n\n"
        "`rkdo COMMAND --help` has an example of every command.\n"
        "Set RKDO_TRACEBACK=1 to see the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rkdo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Run, about: str, example: str) -> Add:
        added = commands.add_parser(
            name,
            help=about,
            description=textwrap.fill(f"{about[0].upper()}{about[1:]}.", 78),
            epilog=f"example:\n  rkdo {name} {example}" + (_settings_text() if name == "train" else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added.add_argument

    groups = (_data_commands, _run_commands, output_commands, frozen_commands)
    for add in (*groups, _reading_commands, _study_commands, _cost_commands):
        add(command)
    return parser


def _settings_text() -> str:
    try:
        from rkdo_dist.config import listing
    except ModuleNotFoundError:  # installed without the trainer
        return ""

    text = listing.as_text(listing.settings(), shutil.get_terminal_size().columns)
    return f"\n\nsettings and their defaults (rkdo settings PATTERN shows some of them):\n\n{text}"


def _data_commands(command: Command) -> None:
    add = command("init", _init, "write starting configurations and a launch script", "mine --data path/to/pictures")
    add("directory", type=Path, metavar="DIR", help="where they go")
    add("--data", metavar="SOURCE", help="as data.source: a folder of images, shards, an address (default: the digits)")
    add("--force", action="store_true", help="replace files that are there")

    add = command(
        "prepare", _prepare, "turn a data set into WebDataset shards with an index", "digits --out data/digits"
    )
    add("source", metavar="SOURCE", help="digits, cifar10, cifar100, stl10, imagefolder, or the path of images")
    add("--out", required=True, metavar="DIR", help="where the shards go")
    add("--root", metavar="PATH", help="files already there: torchvision's root, an image folder or a tar of one")
    add("--shard-size", type=int, metavar="N", help="samples per shard")
    add("--force", action="store_true", help="rebuild what is complete")

    add = command("index", _index, "describe existing shards, or read a folder of images through once", "data/mine")
    add(
        "shards",
        nargs="+",
        metavar="DIR_OR_URL",
        help="a directory of tar files, tar files or URLs, or any data.source",
    )
    add("--out", metavar="DIR", help="where index.json of shards goes (default: beside them)")


def _run_commands(command: Command) -> None:
    add = command("train", _train, "train an encoder", "configs/digits-rkdo.yaml train.epochs=5 run.dir=runs/five")
    _add_config(add)

    add = command("settings", _settings, "every setting: its default, its range, what it does", "temperature")
    add("pattern", nargs="?", default="", metavar="PATTERN", help="those with this in their name or explanation")
    add("--markdown", action="store_true", help="all of them as docs/settings.md")

    add = command("completion", _completion, "a script that completes commands and settings in your shell", "bash")
    add("shell", choices=("bash", "zsh", "fish"), help='bash: eval "$(rkdo completion bash)" in ~/.bashrc')

    add = command(
        "evaluate", _evaluate, "evaluate the newest checkpoint of a run", "runs/digits-rkdo evaluate.protocol=paper"
    )
    add("directory", type=Path, metavar="RUN", help="a run directory")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. evaluate.protocol=paper")

    add = command("status", _status, "how a run stands (its first word is for scripts)", "runs/digits-rkdo")
    add("directory", type=Path, metavar="RUN", help="a run directory")

    add = command(
        "doctor", _doctor, "check a configuration, shards and launch, without training", "configs/digits-rkdo.yaml"
    )
    _add_config(add)


def _reading_commands(command: Command) -> None:
    add = command("compare", _compare, "a table and a figure of several runs", "runs/a runs/b --figure runs/loss.png")
    add("directories", type=Path, nargs="+", metavar="RUN", help="run directories")
    add("--figure", type=Path, metavar="FILE", help="save the loss curves here (.png or .svg)")

    add = command("report", _report, "one self-contained HTML page of any runs", "runs/a runs/b")
    add("directories", type=Path, nargs="+", metavar="RUN", help="run directories, finished or not")
    add("--out", type=Path, metavar="FILE", help="default: RUN/report.html, or report.html for several runs")

    add = command("field", _field, "a picture of how rows of a persistent field evolve", "runs/persistent")
    add("directory", type=Path, metavar="RUN", help="a run with field.recursion=persistent")
    add("--out", type=Path, metavar="DIR", help="write field.png and field.svg here (default: RUN)")


def _study_commands(command: Command) -> None:
    add = command(
        "sweep",
        _sweep,
        "train over a grid of settings: one table, a figure per pair of keys",
        "configs/digits-rkdo.yaml --vary field.depth=1,3 --seeds 1,2,3",
    )
    add("config", metavar="CONFIG", help=_CONFIG)
    add("--vary", action="append", default=[], metavar="KEY=V1,V2", help="values of a setting; once per key")
    add("--variant", action="append", default=[], metavar="'NAME: KEY=VALUE ...'", help="settings by a name; repeat it")
    add("--only", type=_names, default=(), metavar="NAME,...", help="run only these variants")
    add("--seeds", type=_numbers, default=None, metavar="N,...", help="default: the one of CONFIG")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all runs")
    add("--metric", type=_names, default=("linear_accuracy",), metavar="A,B", help="scores of the evaluations")
    add("--out", type=Path, default=Path("runs/sweep"), metavar="DIR")
    add("--processes", type=int, default=1, metavar="N", help="runs at a time")

    add = command(
        "reproduce",
        _reproduce,
        "the paper's tables and figures, beside the published numbers",
        "--datasets cifar10 --data data --out runs/reproduce",
    )
    add("--datasets", type=_names, default=("cifar10", "cifar100", "stl10"), metavar="A,B,...")
    add("--protocol", choices=("paper", "full"), default="paper", help="as evaluate.protocol")
    add("--seeds", type=_numbers, default=(42, 123, 456, 789, 101), metavar="N,...")
    add("--epochs", type=_numbers, default=(1, 2, 5, 10), metavar="N,...")
    add("--data", action="append", default=[], metavar="DIR", help="DIR/<data set> hold the shards, or DATASET=DIR")
    add("--out", type=Path, default=Path("runs/reproduce"), metavar="DIR")
    add("--processes", type=int, default=1, metavar="N", help="runs at a time")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all runs; tables say so")

    add = command(
        "verify-theory",
        _verify_theory,
        "measure the paper's lemmas and theorem on explicit distributions",
        "--out runs/theory",
    )
    add("--out", type=Path, metavar="DIR", help="write theory.json and a figure here (.png and .svg)")
    add("--repeats", type=int, default=1, metavar="N", help="random draws of every kind (default 1)")


def _cost_commands(command: Command) -> None:
    add = command(
        "measure",
        _measure,
        "time, memory and traffic of a few steps on the ranks launched",
        "configs/digits-rkdo.yaml --out runs/cost/1.json",
    )
    _add_config(add)
    add("--out", type=Path, required=True, metavar="FILE", help="the facts, as JSON")
    add("--steps", type=int, default=5, metavar="N", help="steps that are measured (default 5)")
    add("--ways", type=_names, default=(), metavar="A,B", help=_WAYS)

    add = command(
        "scale",
        _scale,
        "the same run on several numbers of processes: a scaling study",
        "configs/digits-rkdo.yaml --world-sizes 1,2 --out runs/scale",
    )
    add("config", type=Path, nargs="?", metavar="CONFIG", help="a YAML file (not with --from)")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="as for train")
    add("--world-sizes", type=_numbers, default=(1, 2), metavar="N,N", help="numbers of processes (default 1,2)")
    add("--mode", choices=("strong", "weak"), default="strong", help="one global batch, or one per process")
    add("--steps", type=int, default=5, metavar="N", help="steps that are measured (default 5)")
    add("--ways", type=_names, default=(), metavar="A,B", help=_WAYS)
    add("--accelerate-config", type=Path, metavar="FILE", help="start through `accelerate launch` with this file")
    add("--out", type=Path, metavar="DIR", help="where results, figures and page go (default: --from's folder)")
    add("--from", dest="source", type=Path, metavar="DIR", help="an earlier study, or files of `rkdo measure`")

    add = command(
        "flops",
        _flops,
        "what a step costs: FLOPs by depth, time, memory, share of the loss",
        "configs/paper/cifar10-rkdo.yaml train.global_batch=256",
    )
    _add_config(add)
    add("--image-size", type=int, metavar="N", help="default: data.image_size, or 32")
    add("--repeats", type=int, default=3, metavar="N", help="steps to time; 0: count only (default 3)")


def _add_config(add: Add) -> None:
    add("config", metavar="CONFIG", help=_CONFIG)
    add("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. train.epochs=5 run.dir=runs/five")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs whole numbers with commas, e.g. 1,2,4; got {text!r}") from None


def _init(options: argparse.Namespace) -> int:
    from rkdo_dist.start import init

    for path in init(options.directory, options.data, options.force):
        print(path)
    print(f"next: {options.directory}/train.sh")
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from rkdo_dist.console import counting
    from rkdo_dist.data.prepare import prepare

    console = _console(stderr=True)
    with counting(console, f"preparing {options.source}") as progress:
        size, force = options.shard_size, options.force
        made = prepare(options.source, options.out, options.root, shard_size=size, force=force, progress=progress)
    console.print(_split_table(made))
    console.print("written" if made.built else "complete already: nothing to do (--force rebuilds it)")
    return 0


def _index(options: argparse.Namespace) -> int:
    from rkdo_dist.console import counting
    from rkdo_dist.data.source import index

    console = _console(stderr=True)
    with counting(console, "indexing") as progress:
        made = index(options.shards, options.out, progress)
    console.print(_split_table(made), *made.notes, sep="\n", soft_wrap=True, markup=False, highlight=False)
    return 0


def _split_table(index: ShardIndex) -> Table:
    from rkdo_dist.console import table

    size = "varies" if index.image_size is None else "x".join(map(str, index.image_size))
    rows = [(s.name, f"{s.samples:,}", len(s.shards), len(index.classes), size) for s in index.splits.values()]
    return table(index.place, ("split", "samples", "shards", "classes", "image size"), rows)


# -- runs, on the ranks that a launcher has started --------------------------------------------------------------------


def _load(options: argparse.Namespace, relaunch: bool = True) -> Config:
    """The configuration asked for, checked as far as it can be without data; then all ranks that were promised."""
    from rkdo_dist import config

    loaded = config.load(options.config, options.overrides)
    from rkdo_dist import parts  # torch: after a misspelt key has been named

    parts.check(loaded)
    if relaunch:
        from rkdo_dist.ranks.relaunch import with_all_ranks

        with_all_ranks(options.words)
    return loaded


def _train(options: argparse.Namespace) -> int:
    config = _load(options)
    from rkdo_dist.training.main import Given, train

    return train(config, Given(name=Path(options.config).stem)).code


def _settings(options: argparse.Namespace) -> int:
    from rkdo_dist.config import listing

    width = shutil.get_terminal_size().columns
    print(listing.as_markdown() if options.markdown else listing.as_text(listing.settings(options.pattern), width))
    return 0


def _completion(options: argparse.Namespace) -> int:
    from rkdo_dist.completion import commands_of, script
    from rkdo_dist.config import listing

    settings = {one.key: one.about for one in listing.settings()}
    print(script(options.shell, commands_of(_parser(), settings, listing.values())), end="")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from rkdo_dist.ranks.relaunch import with_all_ranks
    from rkdo_dist.training.main import evaluate_run

    with_all_ranks(options.words)

    evaluate_run(options.directory, options.overrides)
    return 0


def _status(options: argparse.Namespace) -> int:
    from rkdo_dist.rundir import RunDirectory

    status = RunDirectory(options.directory).status()
    print(f"{status['status']} at step {status['step']}")
    for word in ("message", "remark"):
        if word in status:
            print(status[word])
    return 0


def _doctor(options: argparse.Namespace) -> int:
    config = _load(options)
    from rkdo_dist.measure.doctor import doctor

    return doctor(config)


# -- reading finished runs ---------------------------------------------------------------------------------------------


def _compare(options: argparse.Namespace) -> int:
    from rkdo_dist.console import say
    from rkdo_dist.studies import sheets
    from rkdo_dist.studies.report.charts import write_loss_chart
    from rkdo_dist.studies.report.groups import overview, read_groups

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
    console = _console(stderr=True)
    with console.status("reading the runs") as status:
        table = write_report(runs, out, status.update)
    sheets.show(sheets.console(), [table])
    say(console, f"report: {out}")
    return 0


def _field(options: argparse.Namespace) -> int:
    from rkdo_dist.console import say
    from rkdo_dist.studies.field_figure import write_figure

    console = _console(stderr=True)
    with console.status("drawing"):
        paths = write_figure(options.directory, options.out or options.directory)
    say(console, f"figure: {paths[0]}")
    return 0


# -- studies of many runs ----------------------------------------------------------------------------------------------


def _sweep(options: argparse.Namespace) -> int:
    from rkdo_dist import config as configuration
    from rkdo_dist.studies import sheets
    from rkdo_dist.studies.grid import Sweep, axis, only, variants
    from rkdo_dist.studies.sweep import sweep

    if not options.vary and not options.variant:
        raise ValueError("say what to vary: --vary KEY=V1,V2, or --variant 'NAME: KEY=VALUE ...' at least twice")
    if not options.metric:
        raise ValueError("--metric needs the name of a score, such as linear_accuracy")

    base = configuration.load(options.config, options.set)
    seeds = (base.run.seed,) if options.seeds is None else options.seeds
    if options.only and not options.variant:
        raise ValueError("--only chooses among variants: give them with --variant")
    axes = [axis(text) for text in options.vary]
    if options.variant:
        named = variants(options.variant)
        axes.append(only(named, options.only) if options.only else named)
    asked = Sweep(base, tuple(axes), seeds, options.out, options.metric[0], options.metric[1:])
    return sweep(asked, options.processes, sheets.console())


def _reproduce(options: argparse.Namespace) -> int:
    from rkdo_dist.studies import sheets
    from rkdo_dist.studies.paper import Request
    from rkdo_dist.studies.reproduce import reproduce

    o = options
    request = Request(o.datasets, o.protocol, o.seeds, o.epochs, o.out, tuple(o.set))
    return reproduce(request, tuple(o.data), o.processes, sheets.console())


def _verify_theory(options: argparse.Namespace) -> int:
    if not (Path(__file__).resolve().parents[1] / "examples" / "theory").is_dir():
        raise ValueError("verify-theory is an example of the repository: run `python -m examples.theory` in a checkout")
    from examples.theory.__main__ import verify

    return verify(options.out, options.repeats)


# -- cost --------------------------------------------------------------------------------------------------------------


def _measure(options: argparse.Namespace) -> int:
    config = _load(options)
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
    config = _load(options, relaunch=False)
    size = options.image_size or config.data.image_size or 32
    if size < 1 or options.repeats < 0:
        raise ValueError(f"--image-size must be at least 1 and --repeats 0, got {size} and {options.repeats}")
    from rkdo_dist.measure.flops import cost_table

    console = _console()
    with console.status("counting and timing"):
        table = cost_table(config, size, options.repeats)
    console.print(table)
    return 0
