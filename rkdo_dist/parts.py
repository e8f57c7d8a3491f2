"""Construction of the parts of a run from its configuration: the one place where settings become plain arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rkdo_dist import config as configuration
from rkdo_dist.addresses import shown
from rkdo_dist.config import Config, ConfigError, EncoderConfig, FieldConfig, ViewsConfig
from rkdo_dist.data.index import ShardIndex, load_index
from rkdo_dist.data.order import EpochPlan
from rkdo_dist.data.shards import unlabelled
from rkdo_dist.data.source import Progress, open_source
from rkdo_dist.data.views import Views
from rkdo_dist.encoders import Encoder, is_code
from rkdo_dist.field.affinity import AFFINITIES, Affinity, Clusters, Gaussian, Student
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.presets import PRESETS, Relation, named
from rkdo_dist.field.schedules import coupling
from rkdo_dist.lars import LARS

_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "lars": LARS}


def check(config: Config) -> None:
    """Build everything that needs no data: a value out of its range is an error before anything starts.

    Raises:
        ConfigError: naming the setting, its value and what is allowed.
    """
    _views(config, 1 if config.data.image_size is None else config.data.image_size)
    used = [name for name in (config.field.objective, config.field.switch_to) if name != "none"]
    for objective in dict.fromkeys(["rkdo", "icon", *used]):  # settings that this run does not use are checked too
        alone = dataclasses.replace(config.field, objective=objective, switch_to="none")
        for progress in (0.0, 1.0):
            make_objective(dataclasses.replace(config, field=alone), progress)
    outline(config.encoder)  # None: built, and refused, before the first step all the same


@contextlib.contextmanager
def _named(name: str, section: type, **elsewhere: str) -> Iterator[None]:
    """Turns a ValueError about an argument into one about the setting of that name.

    Args:
        name, section: of the section whose fields are the arguments.
        elsewhere: arguments that are settings of another section or name.
    """
    names = elsewhere | {item.name: f"{name}.{item.name}" for item in dataclasses.fields(section)}
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        for argument, key in names.items():
            if re.match(rf"{argument}\b", text):
                raise ConfigError(key + text.removeprefix(argument)) from error
        key = next((key for argument, key in names.items() if re.search(rf"\b{argument}\b", text)), name)
        raise ConfigError(f"{key}: {text}") from error


def open_index(config: Config, progress: Progress | None = None) -> ShardIndex:
    """The index of what `data.source` or `data.shards` names.

    Args:
        progress: for a folder that is indexed for the first time, see `data.folder`.

    Raises:
        ConfigError: if neither is set, or both.
        DataError: if it cannot be read, or leads elsewhere without `data.allow_remote`.
    """
    require_source(config)
    data = config.data
    if data.shards:
        return load_index(data.shards, allow_remote=data.allow_remote)
    return open_source(
        data.source,
        allow_remote=data.allow_remote,
        on_corrupt=data.on_corrupt,
        workers=data.workers > 0,
        progress=progress,
    )


def require_source(config: Config) -> None:
    """Check that a configuration says where its samples are.

    Raises:
        ConfigError: if neither `data.source` nor `data.shards` does, or both do.
    """
    if config.data.source and config.data.shards:
        raise ConfigError(
            f"data.source={shown(config.data.source)} and data.shards={shown(config.data.shards)} both say where the "
            "samples are: set one of them"
        )
    if not config.data.source and not config.data.shards:
        raise ConfigError(
            "data.source is not set: name a folder of images, or shards made by `rkdo prepare`, "
            "e.g. data.source=data/digits"
        )


def epoch_plan(config: Config, index: ShardIndex, epoch: int) -> EpochPlan:
    """The order of one epoch of the training split."""
    counts = index.split(config.data.split).counts
    train = config.train
    return EpochPlan(counts, config.run.seed, epoch, train.lanes, train.lane_size, config.data.shuffle_buffer)


def run_length(config: Config, index: ShardIndex) -> tuple[int, int]:
    """Steps in an epoch, and in the whole run.

    Raises:
        ConfigError: if the split is smaller than one global batch.
    """
    train, plan = config.train, epoch_plan(config, index, 0)
    if plan.steps == 0:
        raise ConfigError(
            f"split {config.data.split!r} of {index.root} has {plan.samples} samples, fewer than one global batch: "
            f"train.global_batch={train.global_batch} must be at most {plan.samples}"
        )
    steps = plan.steps
    if train.batches_per_epoch is not None:
        if train.batches_per_epoch > steps:
            raise ConfigError(f"train.batches_per_epoch={train.batches_per_epoch}, but an epoch has {steps} batches")
        steps = train.batches_per_epoch
    total = steps * train.epochs
    return steps, total if train.max_steps is None else min(total, train.max_steps)


def require_labels(config: Config, index: ShardIndex) -> None:
    """Refuse data without labels, or with some only, for an objective that needs them.

    Raises:
        ConfigError: naming the objective, the split and a sample.
    """
    used = [make_objective(config, progress) for progress in (0.0, 1.0)]
    needing = next((f"objective {objective.name}" for objective in used if objective.needs_labels), None)
    if supervisor_of(config) == "labels":
        needing = needing or "field.supervisor=labels"
    missing = [] if needing is None else unlabelled(index, config.data.split)
    if missing:
        samples = index.split(config.data.split).samples
        raise ConfigError(
            f"{needing} needs a label for every sample, but {len(missing)} of the {samples} samples of split "
            f"{config.data.split!r} have none (first {missing[0]}): use another field.objective or data.split"
        )


def check_data(config: Config, index: ShardIndex) -> None:
    """Whether a configuration fits the shards, as far as the index tells.

    Raises:
        ValueError: naming the setting.
    """
    run_length(config, index)
    make_objective(config, 0.0)
    make_views(config, index)


def make_encoder(
    config: Config, *, pretrained: bool = True, code: bool = True, backbone: torch.nn.Module | None = None
) -> Encoder:
    """The encoder, with weights drawn from `run.seed` or read from `encoder.weights`: the same on every rank.

    Args:
        pretrained: False leaves `encoder.weights` out, for an encoder that gets a checkpoint's weights anyway.
        code: whether a backbone named by an import path may be imported: False for a configuration that the user
            did not write but points at, such as that of a run.
        backbone: a module in place of `encoder.backbone`, which becomes part of the encoder.

    Raises:
        ValueError: as `Encoder`, or for code that must not be imported.
    """
    if backbone is None and not code and is_code(config.encoder.backbone):
        raise ConfigError(
            f"the run's encoder.backbone={config.encoder.backbone} is code, which is imported only where you name it: "
            f"add encoder.backbone={config.encoder.backbone}"
        )
    torch.manual_seed(config.run.seed)
    encoder = encoder_of(config.encoder, pretrained, backbone, unit_norm(config)).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d):  # as images are (`training.step`): others are converted each time
            module.to(memory_format=torch.channels_last)
    return encoder


@_named("encoder", EncoderConfig)
def encoder_of(
    section: EncoderConfig, pretrained: bool = True, backbone: torch.nn.Module | None = None, unit_norm: bool = True
) -> Encoder:
    """The encoder that a section describes, with weights from torch's global generator or `encoder.weights`.

    Raises:
        ConfigError: naming the setting.
    """
    return Encoder(
        section.backbone if backbone is None else backbone,
        section.head,
        section.embedding_dim,
        section.stem,
        head_width=section.head_width,
        head_depth=section.head_depth,
        weights=section.weights if pretrained else "none",
        freeze=section.freeze,
        unit_norm=unit_norm,
    )


@functools.lru_cache
def outline(section: EncoderConfig) -> Encoder | None:
    """The encoder with parameters that hold nothing, whatever their size; None if the backbone has no such form.

    Raises:
        ConfigError: naming the setting, its value and what is allowed.
    """
    if section.backbone.startswith("timm/") or is_code(section.backbone):
        return None
    with torch.random.fork_rng([]), torch.device("meta"):
        return encoder_of(section, pretrained=False)


def make_optimizer(config: Config, encoder: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the encoder's parameters that are trained.

    Without `train.decay_norms`, and with LARS, it has two groups: parameters of one dimension at most (biases; weights
    of batch, layer and group norm) have no weight decay. Those of more than one are weight matrices and filters.
    Adam and AdamW are torch's fused ones on a GPU.
    """
    train = config.train
    options: dict[str, Any] = {"momentum": 0.9} if train.optimizer == "sgd" else {}
    trained = [p for p in encoder.parameters() if p.requires_grad]
    if train.optimizer in ("adam", "adamw") and trained[0].is_cuda:
        options["fused"] = True  # one kernel for all weights
    groups: list[dict[str, Any]] = [{"params": trained}]
    if not train.decay_norms or train.optimizer == "lars":
        groups = [{"params": [p for p in trained if p.ndim > 1]}]
        groups.append({"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0})
    return _OPTIMIZERS[train.optimizer](
        [group for group in groups if group["params"]],
        lr=train.peak_rate,
        weight_decay=train.weight_decay,
        **options,
    )


def make_views(config: Config, index: ShardIndex) -> Views:
    """The augmentations, at the size of the images or the one asked for.

    Raises:
        ConfigError: if the images vary in size and none was asked for.
    """
    size = config.data.image_size
    if size is None:
        if index.image_size is None or index.image_size[0] != index.image_size[1]:
            raise ConfigError(f"the images of {index.root} are not squares of one size: set data.image_size, e.g. 224")
        size = index.image_size[0]
    return _views(config, size)


@_named("views", ViewsConfig, size="data.image_size")
def _views(config: Config, size: int) -> Views:
    arguments = {name: value for name, value in vars(config.views).items() if name != "teacher"}
    return Views(size, **arguments)


@_named("field", FieldConfig, final="field.coupling_end", share="field.learned_share")
def make_objective(config: Config, progress: float, epochs: float | None = None) -> Objective:
    """The objective at a share `progress` of the training done: clock, coupling schedule and switch depend on it.

    Args:
        progress: in [0, 1].
        epochs: of the whole run; `train.epochs` if None (`train.max_steps` may leave fewer).
    """
    f = config.field
    chosen = f.switch_to if f.switch_to != "none" and progress >= f.switch_at else f.objective
    name = named(chosen, f.recursion)
    recursion = PRESETS[name].recursion
    recursion = "none" if f.recursion == "none" and recursion == "in_batch" else recursion
    persists = recursion == "persistent"
    return Objective.of(
        name,
        temperature=f.temperature,
        pairing=f.pairing,
        debias=0.0 if persists else f.debias,  # of persistent rows the first ones alone
        supervisor="rows" if persists else _delivered(config, name),
        recursion=recursion,
        affinity=make_affinity(config, name),
        normaliser=f.normaliser if recursion == "none" else "row",
        depth=f.depth,
        coupling=coupling_at(config, progress, epochs),
        cooling=f.cooling,
        supervisor_grad=f.supervisor_grad,
        clock=f.clock,
        progress=progress,
        relation=relation_at(config, name, progress, epochs),
    )


def make_affinity(config: Config, objective: str) -> Affinity:
    """The affinity of a preset, with its parameter: of clusters, where none is set, the supervisor's uniform share."""
    f, kind = config.field, AFFINITIES[configuration.affinity_of(config, objective)]
    debias = (PRESETS[objective].debias or 0.0) if f.debias is None else f.debias
    given = {
        Gaussian: {"sigma": f.sigma},
        Student: {"degrees_of_freedom": f.degrees_of_freedom},
        Clusters: {"share": debias if f.learned_share is None else f.learned_share},
    }
    return kind(**given.get(kind, {}))


def unit_norm(config: Config) -> bool:
    """Whether the encoder brings embeddings to unit norm: if the objectives' affinity asks for it."""
    return all(make_affinity(config, name).unit_norm for name in configuration.used_objectives(config))


def relation_at(config: Config, name: str, progress: float, epochs: float | None = None) -> Relation | None:
    """The relation of a preset at a share `progress` of the training done (arguments as `make_objective`)."""
    relation = configuration.relation_of(config, name)
    if relation is None:
        return None
    f, whole = config.field, config.train.epochs if epochs is None else epochs
    done, start = min(whole, round(progress * whole, 9)), min(f.relation_start_epoch, whole)
    weight = coupling(f.relation_schedule, relation.weight, f.relation_end, done, whole, start)
    return dataclasses.replace(relation, weight=weight)


def supervisor_of(config: Config) -> str:
    """Whose rows the samples have at the beginning of a run: one of `presets.SUPERVISORS`, or a file's path."""
    own = PRESETS[named(config.field.objective, config.field.recursion)].supervisor
    return config.field.supervisor or (own if own == "labels" else "identity")


def _delivered(config: Config, name: str) -> str:
    """The supervisor that the field engine sees: of samples that are drawn, the other view alone."""
    given = config.field.supervisor or PRESETS[name].supervisor
    if config.field.value("delivery") == "sampled":
        return "identity"
    return given if given in ("identity", "labels") or config.field.supervisor is None else "rows"


def as_recorded(config: Config, objective: Objective, record: Mapping[str, Any]) -> Objective:
    """`objective` with the temperature that a step had, by its record in metrics.jsonl: it may have been learned.

    Without a record, as of a run whose journal is gone, the objective stays as it is.
    """
    if not config.field.learn_temperature or not record:
        return objective
    return objective.with_temperature(objective.temperature * record["temperature"] / objective.temperatures[-1])


def coupling_at(config: Config, progress: float, epochs: float | None = None) -> float:
    """The coupling strength alpha at a share `progress` of the training done (arguments as `make_objective`)."""
    f, whole = config.field, config.train.epochs if epochs is None else epochs
    done = min(whole, round(progress * whole, 9))  # in epochs; rounded, so that epoch 3 begins with its first step
    start = min(f.coupling_start_epoch, whole)
    if f.recursion == "persistent" and (math.floor(done) + 1) % f.coupling_every:
        return 0.0
    return coupling(f.coupling_schedule, f.coupling, f.coupling_end, done, whole, start)
