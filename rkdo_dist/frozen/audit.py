"""`rkdo audit`: how good supervisors a run's encoder makes, on the ranks that a launcher has started.

The ranks share the embedding of the samples, in blocks that do not depend on their number; rank zero grades the rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from rkdo_dist import __version__, parts
from rkdo_dist import config as configuration
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.console import counting, say
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.order import Window, hash64, permutation
from rkdo_dist.data.samples import Cursor, Reading
from rkdo_dist.encoders import Encoder
from rkdo_dist.evaluate.evaluation import BLOCK
from rkdo_dist.evaluate.features import gather_features
from rkdo_dist.exchange import group
from rkdo_dist.exchange.transfer import upload
from rkdo_dist.files import write_atomic
from rkdo_dist.frozen.rows import Teachers, grade, own_class_share
from rkdo_dist.ranks import surroundings
from rkdo_dist.ranks.agreement import agree
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies import audit as shown
from rkdo_dist.studies import plots, sheets
from rkdo_dist.training.saving import own_checkpoint

SIZES, WALKS = (10, 20, 50), (2, 3)
_SAMPLES = 21  # the stream of draws of the samples


@dataclasses.dataclass(frozen=True)
class AuditRecipe:
    """What is audited.

    Attributes:
        samples: at most so many of the training split, drawn from `seed`; at least 8.
        seed: of the samples and their views.
        visits: V >= 2 views of each kind.
        temperature: of rows other than those over all samples by view.
        temperatures: of those, and the run's own.
        weights: "trained" or "ema".
    """

    samples: int = 2000
    seed: int = 42
    visits: int = 4
    temperature: float = 0.05
    temperatures: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    weights: str = "trained"

    def check(self) -> None:
        """Raises ValueError, naming the setting, for one that is out of its range."""
        for name, least in (("samples", 8), ("seed", 0), ("visits", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")


def audit(directory: Path, out: Path | None, recipe: AuditRecipe, overrides: Sequence[str] = ()) -> None:
    """Write audit.json, audit.png and audit.svg for the newest checkpoint of a run (collective).

    Args:
        directory: a run directory.
        out: where; None: RUN/audit, where `rkdo report` finds it. Files of an earlier audit are replaced.
        overrides: settings of the run that may change, such as data.source.

    Raises:
        ValueError: for a mistake in the request, on every rank; nothing is written then.
    """
    recipe.check()
    run = RunDirectory(directory)
    config = run.config(overrides)
    if configuration.decisive(config) != configuration.decisive(run.config()):
        raise ConfigError("only settings that do not change the run can be set here, such as data.source")
    out = directory / "audit" if out is None else out
    code = any(override.partition("=")[0] == "encoder.backbone" for override in overrides)
    with surroundings.meet(config) as around:
        rt, index = around.runtime, around.index
        agree({"audit": repr(recipe)})
        group.on_main(lambda: _check_out(out), "looking at --out")
        encoder = parts.make_encoder(config, pretrained=False, code=code).to(rt.device)
        found = own_checkpoint(run, config, rt)
        encoder.load_state_dict(group.together(lambda: found.weights(recipe.weights), "looking for the weights"))
        encoder.eval()
        n = group.together(lambda: index.split(config.data.split).samples, "looking up the split")
        group.together(lambda: _check_count(n), "looking up the split")
        chosen = np.sort(permutation(n, hash64(_SAMPLES, recipe.seed))[: recipe.samples])
        console = Console(stderr=True) if rt.is_main else None
        teachers = _teachers(config, rt, index, encoder, chosen, recipe, console)
        group.on_main(lambda: _write(out, config, recipe, teachers, found.step, n), "grading the rows")


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a directory")


def _check_count(n: int) -> None:
    if n < 8:
        raise ValueError(f"an audit needs at least 8 training samples, there are {n}")


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block of samples as `gather_features` takes it: `ids` are places among the chosen ones."""

    ids: Tensor
    images: Tensor
    labels: Tensor
    samples: Tensor


def _read(config: Config, index: ShardIndex, chosen: np.ndarray, rt: Runtime) -> Iterator[tuple[int, _Block]]:
    """This rank's blocks of the chosen samples, which are read by their place."""
    split = index.split(config.data.split)
    ends = np.cumsum(split.counts)
    cursor = Cursor(Reading(index, split, config.data.image_size))
    try:
        for number in range(rt.rank, -(-len(chosen) // BLOCK), rt.world):
            ids = chosen[number * BLOCK : (number + 1) * BLOCK]
            shards = np.searchsorted(ends, ids, side="right")
            places = ids - ends[shards] + np.asarray(split.counts)[shards]
            windows = [Window(int(s), int(k), int(k) + 1) for s, k in zip(shards, places, strict=True)]
            read = list(cursor.samples(windows))
            images = torch.stack([torch.as_tensor(np.asarray(one.image)) for one in read])
            labels = torch.tensor([one.label for one in read])
            first = number * BLOCK
            yield number, _Block(torch.arange(first, first + len(ids)), images, labels, torch.from_numpy(ids))
    finally:
        cursor.close()


def _teachers(
    config: Config,
    rt: Runtime,
    index: ShardIndex,
    encoder: Encoder,
    chosen: np.ndarray,
    recipe: AuditRecipe,
    console: Console | None,
) -> Teachers | None:
    """Embeddings of the chosen samples in every view, on rank zero."""
    views = parts.make_views(config, index)
    weak = views.weak()
    total = -(-len(chosen) // BLOCK)

    def embedded(images: Tensor, kind: int, samples: Tensor) -> Tensor:
        """The plain view for kind 0, else the strong and the weak view of visit `kind` - 1, side by side."""
        images = upload(images, rt.device)
        with rt.autocast():
            if kind == 0:
                return encoder(views.plain(images)).float()
            pair = [encoder(made(images, samples, recipe.seed, kind - 1, 0)) for made in (strong, weak)]
        return torch.cat(pair, 1).float()

    strong, found = views, []
    with counting(console, "embedding") if console is not None else contextlib.nullcontext() as progress:
        for kind in range(recipe.visits + 1):
            current: list[Tensor] = []

            def noted(current: list[Tensor] = current, kind: int = kind) -> Iterator[tuple[int, _Block]]:
                for number, block in _read(config, index, chosen, rt):
                    current[:] = [block.samples]
                    yield number, block
                    if progress is not None:
                        progress(kind * total + min(total, number + rt.world), (recipe.visits + 1) * total, "")

            def embed(images: Tensor, current: list[Tensor] = current, kind: int = kind) -> tuple[Tensor, Tensor]:
                made = embedded(images, kind, current[0])
                return made, made[:, :1]

            found.append(gather_features(noted(), embed, len(chosen), device=rt.device))
    if found[0] is None:
        return None
    arrays = [torch.from_numpy(one.backbone) for one in found if one is not None]
    pairs = [array.chunk(2, dim=1) for array in arrays[1:]]
    unit = torch.nn.functional.normalize
    return Teachers(
        unit(arrays[0]),
        [unit(pair[1].contiguous()) for pair in pairs],
        [unit(pair[0].contiguous()) for pair in pairs],
        torch.from_numpy(found[0].labels),
    )


def _write(out: Path, config: Config, recipe: AuditRecipe, teachers: Teachers | None, step: int, n: int) -> None:
    assert teachers is not None
    count, batch = len(teachers.labels), config.train.global_batch
    own = parts.make_objective(config, 1.0).temperature
    sizes = sorted({min(k, count - 1) for k in SIZES})
    temperatures = sorted({*recipe.temperatures, round(own, 6)})
    rows, unlabelled = grade(teachers, temperatures, recipe.temperature, sizes, WALKS)
    graded = [row for row in rows if row["precision"] is not None]
    strong = [row for row in rows if row["group"] == "view" and row["view"] == "strong"]
    student = {row["temperature"]: row["precision"] for row in strong}
    result = {
        "step": step,
        "split": config.data.split,
        "samples": count,
        "of": n,
        "labelled": int((teachers.labels >= 0).sum()),
        "seed": recipe.seed,
        "weights": recipe.weights,
        "temperature": recipe.temperature,
        "visits": recipe.visits,
        "base": own_class_share(teachers.labels),
        "student": student[round(own, 6)],
        "best": max(graded, key=lambda row: row["precision"]) if graded else None,
        "rows": rows,
        "unlabelled": unlabelled,
        "batch": batch,
        "kept": (batch - 1) / (n - 1),
        "version": __version__,
    }
    result["words"] = shown.sentences(result)
    out.mkdir(parents=True, exist_ok=True)
    drawn = shown.figure(result)
    if drawn is not None:
        plots.save(drawn, out, "audit")
    write_atomic(out / shown.FILE, json.dumps(result, indent=2) + "\n")
    console = sheets.console()
    sheets.show(console, [shown.table(result)])
    for sentence in result["words"]:
        console.print(sentence, width=80, markup=False, highlight=False)
    say(Console(stderr=True), f"audit: {out}")
