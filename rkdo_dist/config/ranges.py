"""Ranges of settings, and of settings that depend on each other or on the number of ranks."""

from __future__ import annotations

from rkdo_dist.config.sections import Config, ConfigError, TrainConfig, ViewsConfig, flatten

_POSITIVE = (
    "field.depth", "field.temperature", "field.stored", "field.bank_temperature",
    "data.shuffle_buffer", "data.image_size", "encoder.embedding_dim",
    "train.global_batch", "train.micro_batch", "train.epochs", "train.batches_per_epoch", "train.max_steps",
    "train.learning_rate", "train.checkpoint_every", "train.keep_checkpoints", "train.evaluate_every",
    "evaluate.batch_size", "evaluate.neighbours", "run.threads", "run.timeout", "views.std",
)  # fmt: skip


def check(config: Config) -> None:
    """Ranges of single values and of values that depend on each other.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    flat = flatten(config)
    for key in _POSITIVE:
        if flat[key] is not None and not 0 < flat[key] < float("inf"):
            raise ConfigError(f"{key} must be greater than 0, got {flat[key]}")
    for key in ("data.workers", "train.warmup_steps", "train.skip_nonfinite", "train.weight_decay", "run.seed"):
        if not 0 <= flat[key] < float("inf"):
            raise ConfigError(f"{key} must not be negative, got {flat[key]}")
    for key in (
        "field.coupling",
        "field.coupling_end",
        "field.switch_at",
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
    _check_times(config)
    if config.field.recursion == "persistent":
        _check_persistent(config)


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


def _check_persistent(config: Config) -> None:
    """What rows that live across iterations go with."""
    field = config.field
    if "rkdo" not in (field.objective, field.switch_to):
        raise ConfigError(
            f"field.recursion=persistent is a form of field.objective=rkdo; field.objective={field.objective} "
            "has no recursion: leave field.recursion=in_batch with it"
        )
    for key, value, needed in (
        ("field.pairing", field.pairing, "cross"),
        ("field.symmetric", field.symmetric, False),
        ("field.exchange", field.exchange, "gather"),
        ("data.on_corrupt", config.data.on_corrupt, "abort"),
    ):
        if value != needed:
            shown = str(needed).lower() if isinstance(needed, bool) else needed
            raise ConfigError(f"field.recursion=persistent needs {key}={shown}, got {value}")


def _check_times(config: Config) -> None:
    """What happens at some time of the run must have a time in the run."""
    field, train = config.field, config.train
    if not 0 <= field.coupling_start_epoch <= train.epochs:
        raise ConfigError(
            f"field.coupling_start_epoch must lie in [0, train.epochs={train.epochs}], got {field.coupling_start_epoch}"
        )
    late = [epoch for epoch in train.evaluate_at if not 1 <= epoch <= train.epochs]
    if late:
        raise ConfigError(f"train.evaluate_at must hold epochs from 1 to train.epochs={train.epochs}, got {late[0]}")
    if train.early_stop_slope is not None and not 0 <= train.early_stop_slope < float("inf"):
        raise ConfigError(
            f"train.early_stop_slope must be a fall of the loss per step, at least 0, got {train.early_stop_slope}"
        )
    if train.early_stop_window < 3:
        raise ConfigError(f"train.early_stop_window must be at least 3 steps, got {train.early_stop_window}")


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
    if config.run.reduction == "exact":
        _check_exact(config, world)


def _check_exact(config: Config, world: int) -> None:
    """What does not go with sums in an order of their own."""
    if world & (world - 1):
        raise ConfigError(
            f"run.reduction=exact needs a power of two of ranks, got {world}: use 2, 4, 8, ... or run.reduction=fast"
        )
    if config.field.exchange == "ring" and world > 1:
        raise ConfigError(
            "field.exchange=ring sums column gradients in the order of the ring: "
            "use run.reduction=fast with it, or field.exchange=gather"
        )
    if config.encoder.batch_norm == "sync":
        raise ConfigError(
            "encoder.batch_norm=sync normalises over the micro-batches of all ranks, so results depend on their "
            "number: use run.reduction=fast with it, or encoder.batch_norm=lane"
        )


def _suggest_micro_batch(train: TrainConfig, world: int) -> str:
    if train.global_batch % world:
        return f"Choose a train.global_batch that {world} divides."
    rows = train.global_batch // world
    size = max(d for d in range(1, min(rows, train.micro_batch) + 1) if rows % d == 0)
    return f"For example train.micro_batch={size}."
