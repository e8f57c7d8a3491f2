"""The paper's experiment: its runs, and its numbers beside ours.

`plan` lists the runs of a protocol; `Results` reads what they left and gives the cells of the tables. One run of ten
epochs serves the shorter durations too: nothing in a run depends on its length.
"""

from __future__ import annotations

import math
import statistics
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.addresses import said, shown
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.data.errors import DataError
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.remote import Address, is_url
from rkdo_dist.field.presets import PRESETS
from rkdo_dist.history import History
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies import datasets, published
from rkdo_dist.studies.published import Pair
from rkdo_dist.studies.runner import Planned
from rkdo_dist.studies.sheets import mean_sd
from rkdo_dist.studies.statistics import Paired, paired

OBJECTIVES = ("rkdo", "icon")
NAMES = {name: PRESETS[name].label for name in OBJECTIVES}
_BATCH = {"cifar10": 64, "cifar100": 64, "stl10": 32}
_SIZE = {"cifar10": None, "cifar100": None, "stl10": 64}  # the released code resizes STL-10


@dataclass(frozen=True)
class Request:
    """The request.

    Attributes:
        protocol: "paper": the released notebook's (an "epoch" is 11 batches, everything evaluated on the first 11
            test batches); "full": whole epochs, whole splits.
        changes: settings ("section.key=value") that differ from the protocol, for every run.
    """

    datasets: tuple[str, ...]
    protocol: str
    seeds: tuple[int, ...]
    epochs: tuple[int, ...]
    out: Path
    changes: tuple[str, ...] = ()

    def directory(self, dataset: str, objective: str, seed: int) -> Path:
        """Directory of a run."""
        return self.out / self.protocol / "runs" / f"{dataset}-{objective}-{seed}"

    @property
    def said(self) -> str:
        """The protocol and the changes to it, for titles."""
        return f"protocol {self.protocol}" + (f", changed: {shown(', '.join(self.changes))}" if self.changes else "")


def paper_config(request: Request, dataset: str, objective: str, seed: int, shards: str) -> Config:
    """The configuration of one run (`configs/paper/` has the same settings as files)."""
    batch, directory = _BATCH[dataset], request.directory(dataset, objective, seed)
    before = RunDirectory(directory)
    epochs = max(request.epochs)
    if (directory / "config.yaml").is_file():  # a longer run serves as well
        epochs = max(epochs, before.config().train.epochs)
    whole = request.protocol == "full"
    tree: dict[str, dict[str, Any]] = {
        "field": {"objective": objective},
        "data": {"shards": shards, "image_size": _SIZE[dataset]},
        "encoder": {"backbone": "resnet18", "stem": "imagenet", "head": "released"},
        "train": {
            "global_batch": batch,
            "micro_batch": batch,
            "epochs": epochs,
            "views": "apart",
            "batches_per_epoch": None if whole else 11,
            "learning_rate": 1e-3,
            "weight_decay": 1e-5,
            "evaluate_at": sorted(e for e in {*published.EPOCHS, *request.epochs} if e <= epochs),
            "checkpoint_every": 200 if whole else None,
            "keep_checkpoints": 1,
        },
        "evaluate": {"protocol": request.protocol},
        "run": {"dir": str(directory), "seed": seed, "resume": "auto"},
    }
    config = configuration.change(configuration.from_tree(tree), request.changes)
    parts.check(config)
    return config


def plan(request: Request, dataset: str, shards: str) -> list[Planned]:
    """The runs of a data set.

    Raises:
        ValueError: if the shards cannot be read, or do not hold what the runs need.
    """
    planned = []
    for seed in request.seeds:
        for objective in OBJECTIVES:
            config = paper_config(request, dataset, objective, seed, shards)
            index = parts.open_index(config)
            _, steps = parts.run_length(config, index)
            planned.append(Planned(config, steps))
    index.split(config.evaluate.test_split)
    return planned


def data_note(dataset: str, index: ShardIndex) -> str:
    """Remark on the images; "" if they are the original pixels of the paper's data set."""
    if datasets.known_as(index) != dataset:
        return f"{datasets.name_of(index)}: not a data set of the paper, so no published numbers stand beside it."
    with tarfile.open(index.file_of(index.split("train").shards[0])) as tar:
        names = (member.name.lower() for member in tar if member.isfile())
        first = next((name for name in names if not name.endswith((".cls", ".json", ".txt"))), "")
    if first.endswith((".jpg", ".jpeg")):
        title = datasets.TITLES[dataset]
        return f"{title}: images stored as JPEG, which is lossy; the paper used the original pixels."
    return ""


def locations(given: Sequence[str], datasets: Sequence[str]) -> dict[str, str]:
    """Directories of the shards of each data set.

    Args:
        given: "DIR" (data set X is in DIR/X, or in DIR itself if only one is asked for and its index is there) or
            "X=DIR"; without any, "data".

    Raises:
        ConfigError: for a data set that is not asked for.
    """
    found: dict[str, str] = {}
    general = "data"
    for text in given:
        name, equals, place = text.partition("=")
        if equals and name in published.DATASETS:
            if name not in datasets:
                raise ConfigError(f"--data {text}: {name} is not among --datasets {','.join(datasets)}")
            found[name] = place
        else:
            general = text
    for name in datasets:
        if is_url(general):
            found.setdefault(name, Address(general).below(name).url)
        else:
            alone = len(datasets) == 1 and (Path(general) / "index.json").is_file()
            found.setdefault(name, general if alone else str(Path(general) / name))
    return found


def missing(dataset: str, place: str, error: DataError) -> str:
    """Advice on a data set that is missing."""
    return (
        f"{datasets.TITLES[dataset]} is left out: {said(str(error))}\n"
        f"  prepare it with: rkdo prepare {dataset} --out {shown(place)}   (--root DIR if its files are here already), "
        f"or give its directory with --data {dataset}=DIR"
    )


@dataclass(frozen=True)
class Cell:
    """Values of both objectives by seed, in the same order.

    Attributes:
        rkdo, icon: of the seeds that both have.
        published: the paper's, None where it has none.
        second: RKDO's and I-Con's mean and standard deviation in the author's second run, None where there is none.
        published_p: p-values (paired t-test) of the author's first and second run; () where seeds are not known.
    """

    rkdo: list[float]
    icon: list[float]
    published: published.Row | None
    second: Pair | None = None
    published_p: tuple[float, ...] = ()

    @property
    def seeds(self) -> int:
        return len(self.rkdo)

    @property
    def paired(self) -> Paired | None:
        """RKDO against I-Con, seed by seed; None without values."""
        return paired(self.rkdo, self.icon) if self.rkdo else None

    @property
    def published_percent(self) -> float:
        """The paper's percentage, NaN where it has none."""
        return math.nan if self.published is None else self.published.percent

    def away(self, objective: str) -> float:
        """Our mean minus the published one, in published standard deviations; NaN where one is missing."""
        if self.published is None or not self.seeds:
            return math.nan
        mean, sd = getattr(self.published, objective)
        return (mean_sd(getattr(self, objective))[0] - mean) / sd

    def percent(self, lower_is_better: bool = False) -> float:
        """RKDO's mean over I-Con's in per cent; for losses, how much lower it is."""
        if not self.seeds:
            return math.nan
        a, b = mean_sd(self.rkdo)[0], mean_sd(self.icon)[0]
        return 100 * ((b - a) if lower_is_better else (a - b)) / b if b else math.nan


class Results:
    """Records of the runs of a request.

    Attributes:
        strangers: data sets that are not those of the paper, which their index tells, with their own names.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.runs: dict[tuple[str, str, int], History] = {}
        self.strangers: dict[str, str] = {}
        for dataset in request.datasets:
            for objective in OBJECTIVES:
                for seed in request.seeds:
                    directory = request.directory(dataset, objective, seed)
                    if (directory / "metrics.jsonl").is_file():
                        history = RunDirectory(directory).history()
                        if history.epochs:
                            self.runs[dataset, objective, seed] = history
            first = next((run for (d, _, _), run in self.runs.items() if d == dataset), None)
            index = None if first is None else datasets.index_of(first.config)
            if index is not None and datasets.known_as(index) != dataset:
                self.strangers[dataset] = datasets.name_of(index)

    def title(self, dataset: str) -> str:
        """What a data set is called."""
        return self.strangers.get(dataset, datasets.TITLES[dataset])

    def known(self, dataset: str) -> str:
        """The same for programs: the name in the request, unless the data are others."""
        return self.strangers.get(dataset, dataset)

    def theirs(self, dataset: str, row: published.Row | None) -> published.Row | None:
        """Published numbers, unless the data are others."""
        return None if dataset in self.strangers else row

    def of(self, dataset: str, objective: str) -> dict[int, History]:
        """The runs of a data set and objective by seed."""
        return {seed: run for (d, o, seed), run in self.runs.items() if (d, o) == (dataset, objective)}

    def longest(self, dataset: str) -> int:
        """Epochs of the longest run of a data set."""
        return max((len(run.epochs) for (d, _, _), run in self.runs.items() if d == dataset), default=0)

    def loss(self, dataset: str, epochs: int, attained: bool = False) -> Cell:
        """Mean loss of an epoch (Table 1), or its attained share."""

        def value(run: History) -> float | None:
            if len(run.epochs) < epochs or run.steps < epochs * run.steps_per_epoch:
                return None
            return run.epochs[epochs - 1].attained if attained else run.epochs[epochs - 1].loss

        row = None if attained else published.TABLE_1.get((dataset, epochs))
        return self._cell(dataset, value, value, row, None if row is None else published.SECOND_LOSSES[dataset, epochs])

    def score(self, dataset: str, epochs: int, metric: str, later: int | None = None) -> Cell:
        """A score after an epoch (Tables 2 and 4); `later`: I-Con's after that one instead (Table 3)."""
        row: published.Row | None = None
        second: Pair | None = None
        p: tuple[float, ...] = ()
        if later is None and metric == "linear_accuracy":
            row = published.TABLE_2.get((dataset, epochs))
            if row is not None:
                runs = [published.accuracies(dataset, epochs, run) for run in (0, 1)]
                rkdo, icon = ((statistics.fmean(side), statistics.pstdev(side)) for side in runs[1])
                second, p = (rkdo, icon), tuple(paired(*sides).t_p for sides in runs)
        elif later is None and epochs == published.TABLE_4_EPOCHS:
            row, second = published.TABLE_4.get((dataset, metric)), published.SECOND_SCORES.get((dataset, metric))

        def after(epoch: int) -> Callable[[History], float | None]:
            def value(run: History) -> float | None:
                scores = run.after_epoch(epoch)
                return scores.get(metric) if scores.get("protocol") == self.request.protocol else None

            return value

        return self._cell(dataset, after(epochs), after(later or epochs), row, second, p)

    def at_uniform(self, dataset: str) -> tuple[float, float] | None:
        """Both objectives' values for an untrained encoder; None without runs."""
        first, second = (
            next((run.epochs[0].at_uniform for run in self.of(dataset, objective).values()), None)
            for objective in OBJECTIVES
        )
        return None if first is None or second is None else (first, second)

    def _cell(
        self,
        dataset: str,
        of_rkdo: Callable[[History], float | None],
        of_icon: Callable[[History], float | None],
        row: published.Row | None,
        again: Pair | None = None,
        p: tuple[float, ...] = (),
    ) -> Cell:
        a, b = [], []
        first, second = (self.of(dataset, objective) for objective in OBJECTIVES)
        for seed in self.request.seeds:
            x = of_rkdo(first[seed]) if seed in first else None
            y = of_icon(second[seed]) if seed in second else None
            if x is not None and y is not None:
                a.append(float(x))
                b.append(float(y))
        return Cell(a, b, row, again, p) if self.theirs(dataset, row) is not None else Cell(a, b, None)
