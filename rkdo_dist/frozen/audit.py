"""`rkdo audit`: how good supervisors a run's encoder makes, on the ranks that a launcher has started.

The ranks share the embedding of the samples, in blocks that do not depend on their number; rank zero grades the rows.
"""

from __future__ import annotations

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
from rkdo_dist.console import Terminal, counting, say
from rkdo_dist.data.index import Progress, ShardIndex
from rkdo_dist.data.order import hash64, permutation
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
from rkdo_dist.studies.field_figure import pictures_of
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
        console = Terminal(stderr=True) if rt.is_main else None
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
    """A block of samples as `gather_features` takes it: `ids` are places among the chosen ones, `images` (m, k, 3, S,
    S) float32 their views, one or two."""

    ids: Tensor
    images: Tensor
    labels: Tensor


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
    random = views, views.weak()
    total, kinds = -(-len(chosen) // BLOCK), recipe.visits + 1

    def drawn(kind: int, progress: Progress) -> Iterator[tuple[int, _Block]]:
        """This rank's blocks: the plain view for kind 0, else the strong and the weak one of visit `kind` - 1."""
        for number in range(rt.rank, total, rt.world):
            samples = chosen[number * BLOCK : (number + 1) * BLOCK]
            seen = pictures_of(index, config.data.split, config.data.image_size, samples.tolist()).values()
            images = upload(torch.from_numpy(np.stack([one.image.transpose(2, 0, 1) for one in seen])), rt.device)
            ids = torch.from_numpy(samples)
            with torch.no_grad(), rt.autocast():
                visit = [view(images, ids, recipe.seed, kind - 1, 0) for view in random if kind]
                made = visit or [views.plain(images)]
            places = number * BLOCK + torch.arange(len(samples))
            yield number, _Block(places, torch.stack(made, 1), torch.tensor([one.label for one in seen]))
            progress(kind * total + min(total, number + rt.world), kinds * total, "")

    def embed(images: Tensor) -> tuple[Tensor, Tensor]:
        with rt.autocast():
            found = [encoder(view) for view in images.unbind(1)]
        return found[0], found[-1]

    with counting(console, "embedding") as progress:
        found = [gather_features(drawn(kind, progress), embed, len(chosen), device=rt.device) for kind in range(kinds)]
    visits = [one for one in found if one is not None]
    if not visits:
        return None

    def unit(embeddings: np.ndarray) -> Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(embeddings))

    return Teachers(
        unit(visits[0].backbone),
        [unit(one.embeddings) for one in visits[1:]],
        [unit(one.backbone) for one in visits[1:]],
        torch.from_numpy(visits[0].labels),
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
    say(Terminal(stderr=True), f"audit: {out}")
