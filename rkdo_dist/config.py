"""Configuration: small frozen sections, read from YAML and changed by dotted overrides.

An unknown or ill-typed key is an error that names the key, the allowed ones and the nearest match. A field marked
`free` does not change what is computed, so it may differ when a run is resumed.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A mistake in a configuration; the message names the key, its value and what to do."""


def free(default: Any) -> Any:
    """A field that does not affect results (workers, paths, how often something is written)."""
    return dataclasses.field(default=default, metadata={"free": True})


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """The objective over the global batch (`rkdo_dist.field`)."""

    objective: Literal["rkdo", "icon", "infonce"] = "rkdo"
    recursion: Literal["in_batch"] = "in_batch"
    depth: int = 3
    coupling: float = 0.5
    temperature: float = 0.5
    cooling: float = 0.1
    clock: Literal["depth", "training"] = "depth"
    pairing: Literal["cross", "joint"] = "cross"
    symmetric: bool = False
    supervisor_grad: Literal["flow", "stop"] = "flow"
    debias: float = 0.2
    exchange: Literal["gather", "ring"] = "gather"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are read (`rkdo_dist.data`)."""

    shards: str = free("")
    split: str = "train"
    image_size: int | None = None
    shuffle_buffer: int = 2048
    workers: int = free(1)
    on_corrupt: Literal["abort", "skip"] = "abort"


@dataclasses.dataclass(frozen=True)
class ViewsConfig:
    """The two random views of an image (`rkdo_dist.data.views`)."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    grayscale: float = 0.2
    mean: float = 0.5
    std: float = 0.5


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Backbone and projection head (`rkdo_dist.encoders`)."""

    backbone: str = "resnet18"
    stem: Literal["imagenet", "cifar"] = "imagenet"
    head: Literal["released", "paper"] = "released"
    embedding_dim: int = 64
    views: Literal["together", "apart"] = "together"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One global batch a step, and how many of them."""

    global_batch: int = 256
    micro_batch: int = 64
    epochs: int = 10
    batches_per_epoch: int | None = None
    max_steps: int | None = None
    recompute: bool = free(False)
    skip_nonfinite: int = 0
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    checkpoint_every: int | None = free(None)
    keep_checkpoints: int = free(2)
    evaluate_every: int | None = free(None)

    @property
    def lanes(self) -> int:
        """Micro-batches in a global batch (L)."""
        return self.global_batch // self.micro_batch


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How frozen features are judged (`rkdo_dist.evaluate`)."""

    protocol: Literal["full", "paper"] = free("full")
    train_split: str = free("train")
    test_split: str = free("test")
    at_end: bool = free(True)
    batch_size: int = free(256)
    neighbours: int = free(5)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The run directory and the arithmetic of the machine."""

    dir: str = free("")
    seed: int = 42
    resume: str = free("never")
    reduction: Literal["exact", "fast"] = "exact"
    threads: int = 1
    timeout: int = free(1800)


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections. `load` reads one from a file; `flatten` lists dotted keys and values."""

    field: FieldConfig = FieldConfig()
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    encoder: EncoderConfig = EncoderConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice (plain YAML silently keeps the last)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {str(key) for key in keys if keys.count(key) > 1}
    if twice:
        raise ConfigError(f"key given twice: {', '.join(sorted(twice))}")
    loader.flatten_mapping(node)
    return {loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `path` (YAML), changed by `overrides` ("section.key=value", values in YAML).

    Raises:
        ConfigError: unreadable file, unknown or ill-typed key, or a value out of range.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path} is not a valid configuration: {error}") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: expected sections (field:, data:, ...), found {type(tree).__name__}")
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    for override in overrides:
        _apply(merged, override)
    try:
        return from_tree(merged)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _apply(tree: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot or not name:
        full = next((flat for flat in _flat_names() if flat.split(".")[1] == key.strip()), "train.epochs")
        raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. {full}={text or 5}")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    if not isinstance(tree.get(section), dict):
        tree[section] = {} if tree.get(section) is None else tree[section]
    if not isinstance(tree[section], dict):
        raise ConfigError(f"section {section!r} is not a mapping")
    tree[section][name] = value


def from_tree(tree: Mapping[Any, Any]) -> Config:
    """A checked `Config` from nested mappings.

    Raises:
        ConfigError: as for `load`.
    """
    sections = typing.get_type_hints(Config)
    built = {}
    for section, values in tree.items():
        if section not in sections:
            raise ConfigError(_unknown(f"section {section!r}", str(section), list(sections), _flat_names()))
        built[section] = _section(str(section), sections[str(section)], values)
    config = Config(**built)
    check(config)
    return config


def _flat_names() -> list[str]:
    return list(flatten(Config()))


def _unknown(what: str, name: str, allowed: Sequence[str], also: Sequence[str] = ()) -> str:
    near = difflib.get_close_matches(name, [*allowed, *also], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"unknown {what}{hint} Allowed: {', '.join(allowed)}"
        if hint
        else f"unknown {what}. Allowed: {', '.join(allowed)}"
    )


def _section(section: str, kind: type, values: Any) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"section {section!r} must be a mapping of keys to values, got {values!r}")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            names = list(hints)
            raise ConfigError(
                _unknown(f"key '{section}.{name}'", str(name), names, ()).replace("mean '", f"mean '{section}.")
            )
        arguments[name] = _coerce(f"{section}.{name}", hints[name], value)
    return kind(**arguments)


def _coerce(key: str, kind: Any, value: Any) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in options:
            raise ConfigError(_unknown(f"value {value!r} for {key}", str(value), [str(o) for o in options]))
        return value
    if origin is types.UnionType:
        return None if value is None else _coerce(key, next(o for o in options if o is not type(None)), value)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(options):
            raise ConfigError(f"{key} needs a list of {len(options)} numbers, got {value!r}")
        return tuple(_coerce(key, option, item) for option, item in zip(options, value, strict=True))
    return _scalar(key, kind, value)


def _scalar(key: str, kind: type, value: Any) -> Any:
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except (TypeError, ValueError):
            pass
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is kind:
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{key} must be {names[kind]}, got {value!r} ({type(value).__name__})")


def flatten(config: Config) -> dict[str, Any]:
    """All values by dotted key, in the order of the sections."""
    return {f"{s}.{k}": v for s, values in dataclasses.asdict(config).items() for k, v in values.items()}


def decisive(config: Config) -> dict[str, Any]:
    """The values that affect results, by dotted key (everything not marked `free`)."""
    return {
        f"{section.name}.{item.name}": getattr(getattr(config, section.name), item.name)
        for section in dataclasses.fields(config)
        for item in dataclasses.fields(getattr(config, section.name))
        if not item.metadata.get("free")
    }


def digest(config: Config) -> str:
    """SHA-256 (hex) over everything that affects results."""
    return hashlib.sha256(json.dumps(decisive(config), sort_keys=True).encode()).hexdigest()


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, readable by `load`."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))
    return yaml.safe_dump(tree, sort_keys=False)


def check(config: Config) -> None:
    """Ranges of single values and of values that depend on each other.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    flat = flatten(config)
    positive = ("field.depth", "field.temperature", "data.shuffle_buffer", "data.image_size", "encoder.embedding_dim",
                "train.global_batch", "train.micro_batch", "train.epochs", "train.batches_per_epoch", "train.max_steps",
                "train.learning_rate", "train.checkpoint_every", "train.keep_checkpoints", "train.evaluate_every",
                "evaluate.batch_size", "evaluate.neighbours", "run.threads", "run.timeout", "views.std")  # fmt: skip
    for key in positive:
        if flat[key] is not None and not 0 < flat[key] < float("inf"):
            raise ConfigError(f"{key} must be greater than 0, got {flat[key]}")
    for key in ("data.workers", "train.warmup_steps", "train.skip_nonfinite", "train.weight_decay", "run.seed"):
        if not 0 <= flat[key] < float("inf"):
            raise ConfigError(f"{key} must not be negative, got {flat[key]}")
    for key in (
        "field.coupling",
        "field.debias",
        "views.flip",
        "views.jitter_probability",
        "views.grayscale",
    ):
        if not 0 <= flat[key] <= 1:
            raise ConfigError(f"{key} must lie in [0, 1], got {flat[key]}")
    if not 0 <= config.field.cooling < 1:
        raise ConfigError(
            f"field.cooling must lie in [0, 1): the last temperature must stay above 0, got {config.field.cooling}"
        )
    _check_views(config.views)
    _check_batch(config.train)


def _check_views(views: ViewsConfig) -> None:
    low, high = views.crop_scale
    if not 0 < low <= high <= 1:
        raise ConfigError(
            f"views.crop_scale must be [low, high] with 0 < low <= high <= 1, got {list(views.crop_scale)}"
        )
    if any(not 0 <= value <= 1 for value in views.jitter[:3]) or not 0 <= views.jitter[3] <= 0.5:
        raise ConfigError(
            "views.jitter must be [brightness, contrast, saturation] in [0, 1] and hue in [0, 0.5], "
            f"got {list(views.jitter)}"
        )


def _check_batch(train: TrainConfig) -> None:
    if train.global_batch % train.micro_batch:
        raise ConfigError(
            f"train.global_batch={train.global_batch} does not divide into micro-batches of "
            f"train.micro_batch={train.micro_batch}; choose a divisor of {train.global_batch}"
        )
    if train.global_batch < 2:
        raise ConfigError("train.global_batch must be at least 2: one sample has nothing to be compared with")


def check_world(config: Config, world: int) -> None:
    """Whether `world` ranks can share the lanes of a step.

    Raises:
        ConfigError: saying which setting to change.
    """
    lanes, train = config.train.lanes, config.train
    if lanes % world:
        raise ConfigError(
            f"{world} ranks cannot share a step of {lanes} lanes (train.global_batch={train.global_batch} / "
            f"train.micro_batch={train.micro_batch}): the number of ranks must divide the lanes. "
            f"{_suggest_micro_batch(train, world)}"
        )
    if config.run.reduction == "exact" and world & (world - 1):
        raise ConfigError(
            f"run.reduction=exact needs a power of two of ranks, got {world}: use 2, 4, 8, ... or run.reduction=fast"
        )
    if config.run.reduction == "exact" and config.field.exchange == "ring" and world > 1:
        raise ConfigError(
            "field.exchange=ring sums column gradients in the order of the ring: "
            "use run.reduction=fast with it, or field.exchange=gather"
        )


def _suggest_micro_batch(train: TrainConfig, world: int) -> str:
    if train.global_batch % world:
        return f"Choose a train.global_batch that {world} divides."
    rows = train.global_batch // world
    size = max(d for d in range(1, min(rows, train.micro_batch) + 1) if rows % d == 0)
    return f"For example train.micro_batch={size}."
