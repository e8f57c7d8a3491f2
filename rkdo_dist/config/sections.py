"""The settings: small frozen sections, and which of them affect results.

A field of a section is a setting: it has a type, a default, a sentence for people and a range in words, from which
`rkdo settings` and docs/settings.md are made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rkdo_dist.field import presets

# What an objective has of its own.
OWN = ("temperature", "pairing", "affinity", "debias", "delivery", *presets.RELATION)


LEAST_TEMPERATURE = 0.01  # of one that is learned, as CLIP's


class ConfigError(ValueError):
    """A mistake in a configuration; the message names the key, its value and what to do."""


def setting(
    default: Any,
    about: str,
    within: str = "",
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    free: bool = False,
    choices: Callable[[], Sequence[str]] | None = None,
) -> Any:
    """A field of a section.

    Args:
        about: what it does, for `rkdo settings` and docs/settings.md.
        within: its range in words, if the object that the section builds checks it.
        least, above, most: its range, if no other object does: checked when it is read.
        free: whether it leaves results as they are (workers, paths, how often something is written).
        choices: the values that it may have, where a list says them that others may add to.
    """
    bounds = {"least": least, "above": above, "most": most}
    words = (
        within
        or ", ".join(choices() if choices else [])
        or " and ".join(
            f"{word} {bound:g}"
            for word, bound in zip(("at least", "above", "at most"), bounds.values(), strict=True)
            if bound is not None
        )
    )
    metadata = {"about": about, "within": words, "free": free, "choices": choices, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """The objective over the global batch (`rkdo_dist.field`)."""

    objective: str = setting("rkdo", f"what is minimised ({presets.titles()})", choices=presets.choices)
    supervisor: str | None = setting(
        None,
        "who supervises, p(0): identity (the other view), labels (samples of the same label), neighbours (the nearest "
        "ones in field.features), or a file of rows (.npz, .parquet); null: the objective's own",
    )
    delivery: Literal["restricted", "sampled"] | None = setting(
        None,
        "how p(0) reaches the loss: each row restricted to the batch, or one sample drawn of it, whose view is the "
        "second one; null: the objective's own (restricted; snapshot sampled)",
    )
    features: str = setting(
        "", "features that neighbours are nearest in: a .npz of `rkdo embed`; empty: those of the untrained encoder"
    )
    walk: int = setting(1, "steps s of a walk over the neighbours: rows (P + ... + P^s) / s", least=1, most=100)
    recursion: Literal["none", "in_batch", "persistent", "restart"] = setting(
        "in_batch",
        "where RKDO's rows recur: nowhere, inside a step, across iterations (a row of every sample is kept), or with "
        "restart, from the relation that a teacher sees",
    )
    columns: Literal["batch", "queue", "bank"] | None = setting(
        None,
        "what rows recur over: the batch, a bank of all samples (persistent rows), a queue of the teacher's keys "
        "or a bank of one for every sample (restart); null: the objective's own (batch; sce, ressl, co2 queue)",
    )
    queue: int | None = setting(
        None,
        "keys in the queue, a multiple of train.global_batch; null: the objective's own (4096; co2 65536)",
        least=2,
    )
    relation: Literal["mixed", "apart"] | None = setting(
        None,
        "recursion with restart: the relation shares one row with the other view, or is a term of its own without "
        "its column; null: the objective's own (mixed; ressl, co2 apart)",
    )
    relation_weight: float | None = setting(
        None,
        "share a of the relation: below 1 if mixed; null: the objective's own (0.5; ressl 1, co2 10/11)",
        least=0,
        most=1,
    )
    relation_schedule: Literal["constant", "linear", "cosine", "step"] = setting(
        "constant", "how that share goes from field.relation_weight to field.relation_end, from its start epoch on"
    )
    relation_end: float = setting(
        0.0, "share of the relation at the end, unless the schedule is constant", least=0, most=1
    )
    relation_start_epoch: float = setting(0.0, "epoch before which the relation's share is 0", least=0)
    teacher: Literal["student", "ema", "snapshot"] | None = setting(
        None,
        "whose embeddings the relation is made of: those of the encoder as it is, of its average (train.ema), or of "
        "all samples at the last snapshot; null: the objective's own (student; sce, ressl, co2 ema)",
    )
    snapshot_every: int | None = setting(None, "epochs between snapshots; null: the objective's own (5)", least=1)
    relation_momentum: float | None = setting(
        None, "share of a row that stays when a snapshot is taken; null: the objective's own (0)", least=0, most=1
    )
    relation_mean: Literal["arithmetic", "geometric"] | None = setting(
        None, "how a row and that of a new snapshot are put together; null: the objective's own (arithmetic)"
    )
    teacher_temperature: float | None = setting(
        None, "temperature of the relation; null: the objective's own (0.05; ressl, co2 0.04)", least=1e-4, most=1e4
    )
    neighbours: int | None = setting(
        None,
        "nearest samples that supervise (null: 20), or columns that a relation is made of, 0 for all (null: 0)",
        least=0,
    )
    mutual: bool | None = setting(None, "whether neighbours must be that of each other; null: false")
    confidence: Literal["none", "entropy", "agreement"] | None = setting(
        None,
        "what a row's relation_weight is multiplied by: 1, how peaked its relation is, or how much of it the snapshot "
        "before had; null: none",
    )
    affinity: Literal["cosine", "gaussian", "student", "clusters"] | None = setting(
        None,
        "how closeness is measured: the cosine, or a gaussian or Student's t of the distance, of embeddings without "
        "unit norm; or the chance to share a cluster (embeddings are then logits of encoder.embedding_dim clusters); "
        f"null: the objective's own ({presets.own('affinity')})",
    )
    sigma: float = setting(presets.SIGMA, "width of field.affinity=gaussian", least=1e-4, most=1e4)
    degrees_of_freedom: float = setting(
        presets.DEGREES_OF_FREEDOM, "of field.affinity=student: 2 as in t-SimCLR, 1 as in t-SNE", least=1e-2, most=1e6
    )
    learned_share: float | None = setting(
        None,
        "uniform share of the learned rows of field.affinity=clusters; null: as that of the supervisor (field.debias)",
        least=0,
        most=1,
    )
    normaliser: Literal["row", "field"] = setting(
        "row", "what the learned distribution sums to 1 over: each row, or all rows together as in t-SNE (no recursion)"
    )
    stored: int = setting(256, "entries of a persistent row, or of a walk's, that are stored", least=1)
    store: Literal["device", "host"] = setting("device", "where persistent rows are kept", free=True)
    depth: int = setting(presets.DEPTH, "levels D of the recursion inside a step", least=1, most=100)
    coupling: float = setting(
        presets.COUPLING, "coupling alpha: how much of the learned row a row takes on", "in [0, 1]"
    )
    coupling_schedule: Literal["constant", "linear", "cosine", "step"] = setting(
        "constant", "how the coupling goes from field.coupling to field.coupling_end over the run"
    )
    coupling_end: float = setting(0.0, "coupling at the end of the run, unless the schedule is constant", "in [0, 1]")
    coupling_start_epoch: float = setting(0.0, "epoch before which the coupling is 0, at most train.epochs", least=0)
    coupling_every: int = setting(
        1, "persistent rows move in every K-th epoch alone; in the others q is fitted", least=1
    )
    temperature: float | None = setting(
        None,
        f"temperature tau of the softmax; null: the objective's own ({presets.own('temperature')})",
        least=1e-4,
        most=1e4,
    )
    learn_temperature: bool = setting(
        False, f"train tau with the encoder, from field.temperature on and never below {LEAST_TEMPERATURE}"
    )
    cooling: float = setting(presets.COOLING, "share beta of the temperature that cooling takes away", "in [0, 1)")
    clock: Literal["depth", "training"] = setting(
        "depth", "what cools the temperature: recursion levels (released code) or training steps (the paper's text)"
    )
    pairing: Literal["cross", "symmetric", "joint"] | None = setting(
        None,
        "view 1 against view 2 (released code), the mean of both directions (CLIP), or both views against both "
        f"(NT-Xent, the paper's eq. 4); null: the objective's own ({presets.own('pairing')})",
    )
    supervisor_grad: Literal["flow", "stop"] = setting(
        "flow", "whether the gradient flows through the supervisor (released code)"
    )
    debias: float | None = setting(
        None,
        f"uniform share of p(0), as in label smoothing; null: the objective's own ({presets.own('debias')})",
        "in [0, 1]",
    )
    switch_to: str = setting(
        "none",
        "another objective from field.switch_at on; icon is the paper's hybrid",
        choices=lambda: ["none", *presets.choices()],
    )
    switch_at: float = setting(0.5, "share of the run after which field.switch_to takes over", least=0, most=1)

    def value(self, name: str) -> Any:
        """A setting of `OWN`: as given, else the objective's own; None if that of `switch_to` differs."""
        given = getattr(self, name)
        if given is not None:
            return given
        used = [presets.named(x, self.recursion) for x in (self.objective, self.switch_to) if x != "none"]
        own = {presets.own_setting(presets.PRESETS[x], name, self.affinity) for x in used}
        return own.pop() if len(own) == 1 else None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are read (`rkdo_dist.data`)."""

    source: str = setting(
        "",
        "folder of images, or shards://, imagefolder://, torchvision://NAME?root=, hf://datasets/NAME, module:function",
        free=True,
    )
    shards: str = setting("", "directory or address of shards with index.json: a source of that kind", free=True)
    allow_remote: bool = setting(False, "follow an index on this machine to shards elsewhere", free=True)
    split: str = setting("train", "split to train on")
    image_size: int | None = setting(None, "side of the square images; null: that of the shards", least=1, most=1 << 14)
    shuffle_buffer: int = setting(2048, "most samples that are mixed with each other", least=1, most=1 << 40)
    workers: int = setting(1, "loader workers of each process", least=0, most=1024, free=True)
    on_corrupt: Literal["abort", "skip"] = setting(
        "abort", "stop at damaged samples, or replace them, alike on any number of processes, and count them"
    )


@dataclasses.dataclass(frozen=True)
class ViewsConfig:
    """The two random views of an image: the arguments of `rkdo_dist.data.views.Views`."""

    crop_scale: tuple[float, float] = setting(
        (0.2, 1.0), "smallest and largest share of the image in a crop", "0 < low <= high <= 1"
    )
    flip: float = setting(0.5, "probability of a horizontal flip", "in [0, 1]")
    jitter: tuple[float, float, float, float] = setting(
        (0.4, 0.4, 0.4, 0.1), "strength of brightness, contrast, saturation and hue", "at least 0, hue at most 0.5"
    )
    grayscale: float = setting(0.2, "probability of a grey image", "in [0, 1]")
    blur: float | tuple[float, ...] = setting(
        0.0, "probability of a Gaussian blur, or one for each of the two views", "in [0, 1]"
    )
    solarize: float | tuple[float, ...] = setting(
        0.0, "probability that bright pixels are inverted, or one for each of the two views", "in [0, 1]"
    )
    teacher: Literal["strong", "weak", "plain"] | None = setting(
        None,
        "what a teacher (field.teacher) sees: a view like the others, crop and flip alone, or the central square; "
        "null: the objective's own (sce, ressl weak; co2 strong)",
    )
    mean: float | tuple[float, ...] = setting(
        0.5, "what is subtracted from pixels in [0, 1], or one for each channel", least=-1000, most=1000
    )
    std: float | tuple[float, ...] = setting(
        0.5, "what pixels are divided by, or one for each channel", least=1e-3, most=1000
    )


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Backbone and projection head (`rkdo_dist.encoders.Encoder`)."""

    backbone: str = setting(
        "resnet18", "torchvision's NAME, timm/NAME, cifar_resnet8 and the like, or your package.module:factory"
    )
    stem: Literal["imagenet", "cifar"] = setting("imagenet", "a ResNet's first layers, for large or for small images")
    head: Literal["released", "paper"] = setting("released", "projection head, without or with batch norm")
    embedding_dim: int = setting(64, "width d of the embeddings", least=1, most=1 << 20)
    head_width: int | None = setting(
        None, "width of the head's hidden layers (none: the features')", least=1, most=1 << 20
    )
    head_depth: int = setting(2, "linear layers of the head", least=1, most=100)
    weights: str = setting(
        "none", "what the backbone begins with: none, DEFAULT (the library's pretrained), a file, hf://OWNER/NAME"
    )
    freeze: int | str = setting(
        "none", "what of the backbone is not trained: its first parts by number, all up to a part's name, or backbone"
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One global batch a step, and how many of them."""

    global_batch: int = setting(256, "samples in a step, whatever the machine", least=2, most=1 << 30)
    micro_batch: int | Literal["auto"] = setting(
        64,
        "samples embedded at a time; a divisor of train.global_batch; auto: the largest whose step fits the memory",
        least=1,
    )
    epochs: int = setting(10, "length of the run", least=1)
    batches_per_epoch: int | None = setting(None, "steps that count as an epoch; null: all of the split", least=1)
    max_steps: int | None = setting(None, "end the run after so many steps", least=1)
    views: Literal["together", "apart"] = setting(
        "together", "both views in one forward pass, or in two (the released code)"
    )
    recompute: bool = setting(False, "embed again in the backward pass: less memory, same numbers", free=True)
    compile: bool = setting(False, "torch.compile the encoder's training pass: same but for rounding", free=True)
    skip_nonfinite: int = setting(0, "steps in a row that may be skipped because of NaN or Inf", least=0)
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = setting(
        "adam", "the optimizer (sgd and lars have momentum 0.9, lars the trust coefficient 0.001)"
    )
    learning_rate: float = setting(1e-3, "the largest learning rate", above=0, most=1000)
    scale_lr: Literal["none", "linear", "sqrt"] = setting(
        "none", "multiply train.learning_rate by train.global_batch / 256, or by its square root"
    )
    weight_decay: float = setting(1e-5, "weight decay", least=0, most=1000)
    decay_norms: bool = setting(True, "weight decay of biases and norms too (never with lars)")
    clip_gradient: float | None = setting(
        None, "largest norm of the gradient of all weights; null: any", least=1e-9, most=1e9
    )
    schedule: Literal["constant", "cosine"] = setting("constant", "of the learning rate; cosine ends at 0")
    warmup_steps: int = setting(0, "steps of linear warm-up", least=0)
    warmup_epochs: float | None = setting(None, "the same in epochs, instead of train.warmup_steps", least=0)
    ema: float | None = setting(
        None,
        "decay of a moving average of the weights, kept beside the trained ones; null: none, or that of the "
        "objective's teacher (sce, ressl 0.99; co2 0.999)",
        least=0,
        most=1,
    )
    early_stop_slope: float | None = setting(
        None, "end the run when the loss falls by less than this per step (paper, 6.2.4)", least=0
    )
    early_stop_window: int = setting(100, "steps over which that slope is taken", least=3, most=1_000_000)
    checkpoint_every: int | None = setting(None, "steps between checkpoints; null: the last alone", least=1, free=True)
    keep_checkpoints: int = setting(2, "checkpoints that are kept", least=1, free=True)
    evaluate_every: int | None = setting(None, "epochs between evaluations", least=1, free=True)
    evaluate_at: tuple[int, ...] = setting(
        (), "epochs after which to evaluate, at most train.epochs", least=1, free=True
    )

    @property
    def lanes(self) -> int:
        """Micro-batches in a global batch (L)."""
        return self.global_batch // self.lane_size

    @property
    def lane_size(self) -> int:
        """Samples of a micro-batch.

        Raises:
            ConfigError: for "auto", which a command that trains replaces by a number.
        """
        if self.micro_batch == "auto":
            raise ConfigError(
                "train.micro_batch=auto is chosen by `rkdo train` and `rkdo doctor`: name a number here, or use "
                "the one in config.yaml of a run"
            )
        return self.micro_batch

    @property
    def peak_rate(self) -> float:
        """The largest learning rate in effect: `learning_rate`, scaled with the batch as `scale_lr` says."""
        share = self.global_batch / 256
        return self.learning_rate * {"none": 1.0, "linear": share, "sqrt": math.sqrt(share)}[self.scale_lr]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How frozen features are evaluated (`rkdo_dist.evaluate`)."""

    protocol: Literal["full", "paper"] = setting(
        "full", "whole splits, or the paper's first 11 batches of the test split", free=True
    )
    train_split: str = setting("train", "split that classifiers are fitted on", free=True)
    test_split: str = setting("test", "split that is scored", free=True)
    at_end: bool = setting(True, "whether training ends with an evaluation", free=True)
    weights: Literal["trained", "ema"] = setting("trained", "as trained, or their average (train.ema)", free=True)
    probes: tuple[Literal["linear", "knn"], ...] = setting(
        (), "accuracies on a few labelled images while training, as curves in metrics.jsonl", free=True
    )
    probe_every: int | None = setting(None, "steps between probes; null: once an epoch", least=1, free=True)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The run directory and the arithmetic of the machine."""

    dir: str = setting("", "the run directory; empty: runs/NAME-DATE-TIME by the configuration's name", free=True)
    seed: int = setting(42, "seed of everything random", least=0)
    resume: str = setting(
        "never", "never; auto: continue what run.dir holds; or another run's directory, to continue it here", free=True
    )
    branch: str = setting(
        "none", "a complete run whose weights and optimizer begin this one, under its own settings; {seed}: run.seed"
    )
    reduction: Literal["exact", "fast", "ring"] = setting(
        "exact",
        "sums in a fixed order, with the same bits on 1, 2, 4, ... processes; in the backend's order; or that with "
        "columns passed around a ring, at most two blocks of them at a time",
    )
    threads: int = setting(1, "CPU threads of each process; on a CPU the arithmetic depends on it", least=1, most=4096)
    timeout: int = setting(1800, "seconds after which a silent process is lost", least=1, most=10_000_000, free=True)
    matmul_precision: Literal["highest", "high"] | None = setting(
        None, "of float32 on a GPU: highest, or high (TF32); null: highest for run.reduction=exact, else high"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = setting(
        (), "written beside metrics.jsonl", free=True
    )


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
    """All values by dotted key, in the order of the sections; what is left to the objective is its own value."""
    flat = {f"{s}.{k}": v for s, values in dataclasses.asdict(config).items() for k, v in values.items()}
    views = {x.view for x in (relation_of(config, name) for name in used_objectives(config)) if x is not None}
    flat["train.ema"] = decay_of(config)
    flat["views.teacher"] = views.pop() if len(views) == 1 else config.views.teacher
    return flat | {f"field.{name}": config.field.value(name) for name in OWN}


def decay_of(config: Config) -> float | None:
    """Decay of the average of the weights: `train.ema`, else that of an objective's own teacher; None: no average."""
    relations = (relation_of(config, name) for name in used_objectives(config))
    own = [x.decay for x in relations if x is not None and x.teacher == "ema" and x.decay is not None]
    return config.train.ema if config.train.ema is not None or not own else own[0]


def used_objectives(config: Config) -> list[str]:
    """The presets that a run uses: its objective's, and that which it is switched to."""
    field = config.field
    return [presets.named(x, field.recursion) for x in (field.objective, field.switch_to) if x != "none"]


def affinity_of(config: Config, objective: str) -> str:
    """The name of the affinity of a preset, or that which the settings say otherwise."""
    return config.field.affinity or presets.PRESETS[objective].affinity


def relation_of(config: Config, objective: str) -> presets.Relation | None:
    """The relation of a preset with what the settings say otherwise; None if it does not recur with restart."""
    own = presets.PRESETS[objective].relation
    if own is None:
        return None
    given = {attribute: getattr(config.field, name) for name, attribute in presets.RELATION.items()}
    usual = {"student": "strong", "snapshot": "plain"}.get(config.field.teacher or own.teacher, "")
    view = config.views.teacher or own.view or usual
    given = {attribute: value for attribute, value in given.items() if value is not None}
    return dataclasses.replace(own, view=view, **given)


def decisive(config: Config) -> dict[str, Any]:
    """The values that affect results, by dotted key (everything not marked `free`)."""
    flat = flatten(config)
    return {
        f"{section.name}.{item.name}": flat[f"{section.name}.{item.name}"]
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
        or field.relation_schedule != "constant"
        or field.switch_to != "none"
    )
