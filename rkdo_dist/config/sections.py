"""The settings: small frozen sections, and which of them affect results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal


class ConfigError(ValueError):
    """A mistake in a configuration; the message names the key, its value and what to do."""


def free(default: Any) -> Any:
    """A field that does not affect results (workers, paths, how often something is written)."""
    return dataclasses.field(default=default, metadata={"free": True})


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """The objective over the global batch (`rkdo_dist.field`)."""

    objective: Literal["rkdo", "icon", "infonce"] = "rkdo"
    recursion: Literal["in_batch", "persistent"] = "in_batch"
    columns: Literal["batch", "bank"] = "batch"
    stored: int = 256
    bank_temperature: float = 0.1
    store: Literal["device", "host"] = free("device")
    depth: int = 3
    coupling: float = 0.5
    coupling_schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    coupling_end: float = 0.0
    coupling_start_epoch: float = 0.0
    temperature: float = 0.5
    cooling: float = 0.1
    clock: Literal["depth", "training"] = "depth"
    pairing: Literal["cross", "joint"] = "cross"
    symmetric: bool = False
    supervisor_grad: Literal["flow", "stop"] = "flow"
    debias: float = 0.2
    switch_to: Literal["none", "rkdo", "icon", "infonce"] = "none"
    switch_at: float = 0.5
    exchange: Literal["gather", "ring"] = "gather"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are read (`rkdo_dist.data`)."""

    shards: str = free("")
    allow_remote: bool = free(False)
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
    batch_norm: Literal["lane", "sync"] = "lane"


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
    early_stop_slope: float | None = None
    early_stop_window: int = 100
    checkpoint_every: int | None = free(None)
    keep_checkpoints: int = free(2)
    evaluate_every: int | None = free(None)
    evaluate_at: tuple[int, ...] = free(())

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
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = free(())


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


def decisive_tree(config: Config) -> dict[str, dict[str, Any]]:
    """`decisive` as nested mappings, which `from_tree` reads."""
    tree: dict[str, dict[str, Any]] = {}
    for key, value in decisive(config).items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def digest(config: Config) -> str:
    """SHA-256 (hex) over everything that affects results."""
    return hashlib.sha256(json.dumps(decisive(config), sort_keys=True).encode()).hexdigest()


def follows_length(config: Config) -> bool:
    """Whether a step depends on the total number of steps, so that a run must not be made longer once it has begun."""
    field = config.field
    cools = field.clock == "training" or (field.recursion == "persistent" and field.cooling > 0)
    return (
        config.train.schedule != "constant"
        or cools
        or field.coupling_schedule != "constant"
        or field.switch_to != "none"
    )
