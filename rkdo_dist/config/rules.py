"""Rules between settings, and between settings and the number of ranks."""

from __future__ import annotations

from rkdo_dist.addresses import holds_address
from rkdo_dist.config.sections import (
    LEAST_TEMPERATURE,
    Config,
    ConfigError,
    TrainConfig,
    affinity_of,
    decay_of,
    relation_of,
    used_objectives,
)
from rkdo_dist.field import presets
from rkdo_dist.field.presets import PRESETS, SUPERVISORS


def check(config: Config) -> None:
    """Check the rules between settings. (The range of each alone is checked by what it builds: `parts.check`.)

    Raises:
        ConfigError: naming both settings, their values and what to do.
    """
    field, train, run = config.field, config.train, config.run
    if train.micro_batch != "auto" and train.global_batch % train.micro_batch:
        raise ConfigError(
            f"train.global_batch={train.global_batch} does not divide into micro-batches of "
            f"train.micro_batch={train.micro_batch}; choose a divisor of {train.global_batch}"
        )
    if field.coupling_start_epoch > train.epochs:
        raise ConfigError(
            f"field.coupling_start_epoch must lie in [0, train.epochs={train.epochs}], got {field.coupling_start_epoch}"
        )
    if train.warmup_epochs is not None:
        if train.warmup_steps:
            raise ConfigError(
                f"train.warmup_steps={train.warmup_steps} and train.warmup_epochs={train.warmup_epochs} both say how "
                "long the warm-up is: set one of them"
            )
        if train.warmup_epochs > train.epochs:
            raise ConfigError(
                f"train.warmup_epochs must lie in [0, train.epochs={train.epochs}], got {train.warmup_epochs}"
            )
    late = [epoch for epoch in train.evaluate_at if epoch > train.epochs]
    if late:
        raise ConfigError(f"train.evaluate_at must hold epochs from 1 to train.epochs={train.epochs}, got {late[0]}")
    if holds_address(run.dir):
        raise ConfigError(f"run.dir must be a path on this machine, got the address {run.dir}")
    if run.dir and run.resume == run.dir:
        raise ConfigError(
            f"run.resume={run.resume} is run.dir itself: use run.resume=auto to continue it where it is, "
            "or another run.dir to continue it there"
        )
    if config.evaluate.weights == "ema" and decay_of(config) is None:
        raise ConfigError(
            "evaluate.weights=ema needs an average of the weights: train with train.ema, e.g. train.ema=0.99, "
            "or use evaluate.weights=trained"
        )
    for key, objective in (("objective", field.objective), ("switch_to", field.switch_to)):
        preset = PRESETS.get(objective)
        if preset is not None and preset.fixes_pairing and field.pairing not in (None, preset.pairing):
            raise ConfigError(
                f"field.{key}={objective} needs field.pairing={preset.pairing}, got {field.pairing}: "
                "leave field.pairing out, or choose another objective"
            )
    _check_affinity(config)
    _check_supervisor(config)
    if field.recursion == "persistent":
        _check_persistent(config)
    _check_restart(config)
    if field.learn_temperature:
        _check_learned_temperature(config)


def _check_learned_temperature(config: Config) -> None:
    """Rules of a temperature that is trained."""
    kinds = {PRESETS[name].recursion for name in used_objectives(config)} & {"persistent", "restart"}
    if kinds:
        raise ConfigError(
            f"field.learn_temperature=true is not defined where rows recur over iterations or from a teacher "
            f"(field.recursion={kinds.pop()}): leave one of them out"
        )
    initial = config.field.value("temperature")
    if initial is None:
        raise ConfigError(
            f"field.learn_temperature=true needs one temperature to start from, but field.objective="
            f"{config.field.objective} and field.switch_to={config.field.switch_to} have different ones: set "
            "field.temperature"
        )
    if initial < LEAST_TEMPERATURE:
        raise ConfigError(
            f"field.learn_temperature=true keeps the temperature at {LEAST_TEMPERATURE} at least, got "
            f"field.temperature={initial}"
        )


def _check_affinity(config: Config) -> None:
    """Rules of affinities, which ask for different embeddings."""
    field, used = config.field, {affinity_of(config, name) for name in used_objectives(config)}
    if len(used) > 1:
        raise ConfigError(
            f"field.objective={field.objective} and field.switch_to={field.switch_to} have different affinities "
            f"({', '.join(sorted(used))}), which ask for different embeddings: set field.affinity"
        )
    still = ("none",) if field.recursion != "none" else ("none", "in_batch")
    recurring = [name for name in used_objectives(config) if PRESETS[name].recursion not in still]
    if field.normaliser == "field" and recurring:
        raise ConfigError(
            f"field.normaliser=field goes with objectives without recursion, whose rows need not sum to 1, but "
            f"{recurring[0]} recurs: choose another field.objective, or field.normaliser=row"
        )
    affinity = used.pop()
    if affinity == "clusters" and config.encoder.embedding_dim < 2:
        raise ConfigError(
            f"encoder.embedding_dim={config.encoder.embedding_dim} is the number of clusters of "
            "field.affinity=clusters: it must be at least 2"
        )
    if field.recursion == "persistent" and field.columns == "bank" and affinity != "cosine":
        raise ConfigError(
            f"field.columns=bank is searched by cosines, got field.affinity={affinity}: use field.columns=batch"
        )


def _check_supervisor(config: Config) -> None:
    """Rules of who supervises, and of how rows are delivered."""
    field = config.field
    given = field.supervisor
    if given is not None and given not in SUPERVISORS and not given.endswith((".npz", ".parquet")):
        raise ConfigError(
            f"field.supervisor must be {', '.join(SUPERVISORS)}, or a .npz or .parquet file of rows, got {given!r}"
        )
    for key, value in (("features", field.features), ("walk", None if field.walk == 1 else field.walk)):
        if value and given != "neighbours":
            raise ConfigError(f"field.{key}={value} is for field.supervisor=neighbours, got {given}: leave it out")
    used = [PRESETS[name] for name in used_objectives(config)]
    if field.value("delivery") is None:
        raise ConfigError(
            f"field.objective={field.objective} and field.switch_to={field.switch_to} are delivered differently: set "
            "field.delivery=sampled"
        )
    if field.value("delivery") == "sampled":
        if field.recursion == "persistent":
            raise ConfigError(
                "field.delivery=sampled draws the samples of an epoch when it begins, but rows of "
                "field.recursion=persistent move at every step: use field.delivery=restricted"
            )
        listed = [preset.supervisor for preset in used if preset.supervisor not in ("identity", "labels", "rows")]
        if listed and given is None:
            raise ConfigError(
                f"field.delivery=sampled draws of rows over the samples, but {listed[0]} lists positions in a batch: "
                "set field.supervisor, or use field.delivery=restricted"
            )
        if given is None and len({preset.supervisor for preset in used}) > 1:
            raise ConfigError(
                f"field.delivery=sampled needs one supervisor, but field.objective={field.objective} and "
                f"field.switch_to={field.switch_to} have different ones: set field.supervisor"
            )
    elif given not in (None, "identity", "labels") and config.data.on_corrupt == "skip":
        raise ConfigError(
            f"field.supervisor={given}, restricted to the batch, needs data.on_corrupt=abort, got skip, since a sample "
            "that takes another's place may be in the batch twice: or use field.delivery=sampled"
        )
    if field.coupling_every > 1 and field.recursion != "persistent":
        raise ConfigError(
            f"field.coupling_every={field.coupling_every} is for rows that live across steps: add "
            "field.recursion=persistent, or leave it out"
        )


def _check_persistent(config: Config) -> None:
    """Rules of rows that persist across iterations."""
    field = config.field
    if "rkdo" not in (field.objective, field.switch_to):
        raise ConfigError(
            f"field.recursion=persistent is a form of field.objective=rkdo; field.objective={field.objective} "
            "has no recursion: leave field.recursion=in_batch with it"
        )
    if field.pairing == "joint" and field.value("columns") == "bank":
        raise ConfigError(
            "field.pairing=joint needs field.columns=batch, got bank: the bank has one embedding of a sample, but rows "
            "have a column for each of its views"
        )
    for key, value, needed in (
        ("field.pairing", None if field.pairing in ("cross", "joint") else field.pairing, "cross or joint"),
        ("data.on_corrupt", config.data.on_corrupt, "abort"),
    ):
        if value not in (None, needed):
            raise ConfigError(f"field.recursion=persistent needs {key}={needed}, got {value}")
    if field.supervisor == "labels":
        raise ConfigError(
            "field.recursion=persistent stores field.stored entries of a row, and a row of field.supervisor=labels has "
            "as many as its class: use field.recursion=in_batch, or give rows in a file"
        )
    if field.supervisor not in (None, "identity") and field.switch_to not in ("none", "rkdo"):
        raise ConfigError(
            f"field.switch_to={field.switch_to} goes back to p(0), which rows of field.recursion=persistent no longer "
            f"hold: leave out field.switch_to, or field.supervisor={field.supervisor}"
        )
    if config.run.reduction == "ring":
        raise ConfigError("field.recursion=persistent needs run.reduction=exact or fast, got ring")


def _check_restart(config: Config) -> None:
    """Rules of rows that share p with a relation."""
    field, train, names = config.field, config.train, used_objectives(config)
    if field.recursion == "restart" and "restart" not in names:
        raise ConfigError(
            f"field.recursion=restart is a form of field.objective=rkdo, got field.objective={field.objective}: leave "
            "field.recursion out (sce, ressl, co2 and snapshot recur so by themselves)"
        )
    found = {x for x in (relation_of(config, name) for name in names) if x is not None}
    if not found:
        given = {f"field.{name}": getattr(field, name) for name in presets.RELATION}
        given |= {"views.teacher": config.views.teacher}
        if field.supervisor == "neighbours":
            given |= {"field.neighbours": None, "field.mutual": None}
        if field.columns != "queue":
            given.pop("field.columns")
        for key, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"{key}={value} is for a recursion with restart: add field.recursion=restart, choose "
                    f"field.objective=sce, ressl, co2 or snapshot, or leave {key} out"
                )
        return
    if len(found) > 1:
        raise ConfigError(
            f"field.objective={field.objective} and field.switch_to={field.switch_to} have different relations: a run "
            "has one teacher and one queue"
        )
    relation = found.pop()
    for key, value, needed in (
        ("supervisor", field.supervisor, "identity"),
        ("delivery", field.value("delivery"), "sampled" if relation.teacher == "snapshot" else "restricted"),
        ("debias", field.debias or None, "0"),
    ):
        if value not in (None, needed):
            raise ConfigError(
                f"recursion with restart from field.teacher={relation.teacher} needs field.{key}={needed}, got {value}"
            )
    if field.relation_start_epoch > train.epochs:
        raise ConfigError(
            f"field.relation_start_epoch must lie in [0, train.epochs={train.epochs}], got {field.relation_start_epoch}"
        )
    if relation.form == "mixed" and field.relation_end == 1:
        raise ConfigError("field.relation_end=1 leaves nothing for the other view: choose an end below 1")
    if relation.teacher == "snapshot":
        _check_snapshot(relation)
        return
    for key in ("relation_momentum", "relation_mean", "snapshot_every"):
        if getattr(field, key) not in (None, getattr(presets.Relation(), presets.RELATION[key])):
            raise ConfigError(
                f"field.{key}={getattr(field, key)} is for field.teacher=snapshot, whose rows are kept; those of "
                f"field.teacher={relation.teacher} are made anew at every step: leave it out"
            )
    if relation.confidence == "agreement":
        raise ConfigError(
            "field.confidence=agreement compares a row with the one before, which only field.teacher=snapshot keeps: "
            "use field.confidence=entropy"
        )
    if field.pairing not in (None, "cross"):
        raise ConfigError(f"a recursion with restart needs field.pairing=cross, got {field.pairing}: a row has one key")
    if relation.columns == "bank" and relation.neighbours:
        raise ConfigError(
            f"field.columns=bank takes all samples into the relation, got field.neighbours={relation.neighbours}: "
            "leave it out, or use field.teacher=snapshot, whose neighbours are of all samples"
        )
    if relation.teacher == "ema" and decay_of(config) is None:
        raise ConfigError("field.teacher=ema needs the average of the weights: set train.ema, e.g. train.ema=0.99")
    if not relation.view:
        raise ConfigError(f"field.teacher={relation.teacher} needs its view: set views.teacher=weak, plain or strong")
    if relation.form == "mixed" and relation.weight == 1:
        raise ConfigError(
            "field.relation_weight=1 leaves nothing for the other view with field.relation=mixed: choose a weight "
            "below 1, or field.relation=apart"
        )
    if relation.columns == "queue" and relation.queue % train.global_batch:
        raise ConfigError(
            f"field.queue={relation.queue} must be a multiple of train.global_batch={train.global_batch}: steps enter "
            "it and leave it whole"
        )
    if relation.mutual and (not relation.neighbours or relation.columns != "batch"):
        raise ConfigError(
            "field.mutual=true needs field.neighbours above 0 and field.columns=batch: old keys have no neighbours of "
            "their own"
        )
    if config.run.reduction == "ring":
        raise ConfigError("a recursion with restart needs run.reduction=exact or fast, got ring: rows see all keys")


def _check_snapshot(relation: presets.Relation) -> None:
    """Rules of a relation between snapshots of all samples."""
    for key, value, needed in (
        ("field.columns", relation.columns, "batch"),
        ("field.relation", relation.form, "mixed"),
        ("views.teacher", relation.view, "plain"),
    ):
        if value != needed:
            raise ConfigError(
                f"field.teacher=snapshot needs {key}={needed}, got {value}: it embeds every image once, as it is, and "
                "second views are drawn of its rows"
            )
    if not relation.neighbours:
        raise ConfigError("field.teacher=snapshot needs field.neighbours above 0, e.g. field.neighbours=20")
    if relation.weight == 1:
        raise ConfigError("field.relation_weight=1 leaves nothing for the other view: choose a weight below 1")
    if relation.momentum == 1:
        raise ConfigError("field.relation_momentum=1 never takes on a new row: choose a momentum below 1")


def check_world(config: Config, world: int) -> None:
    """Check that `world` ranks can share the micro-batches (lanes) of a step.

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


def check_strategy(config: Config, zero_stage: int) -> None:
    """Check that a strategy can do what is asked for.

    Args:
        zero_stage: of DeepSpeed's ZeRO, 0 without it.

    Raises:
        ConfigError: saying why not.
    """
    if decay_of(config) is not None and zero_stage == 3:
        raise ConfigError(
            f"train.ema={decay_of(config)} keeps whole weights on every rank, which ZeRO stage 3 shards: use stage 1 "
            "or 2, DDP, or leave train.ema out"
        )
    if zero_stage and any(relation_of(config, name) is not None for name in used_objectives(config)):
        raise ConfigError("a recursion with restart runs on one process or under DDP, not under DeepSpeed's ZeRO")
    if config.train.optimizer == "lars" and zero_stage:
        raise ConfigError(
            "train.optimizer=lars needs the norm of every weight, and DeepSpeed's ZeRO shards them as one flat vector: "
            "use one process, DDP, or another train.optimizer"
        )


def _suggest_micro_batch(train: TrainConfig, world: int) -> str:
    if train.global_batch % world:
        return f"Choose a train.global_batch that {world} divides."
    rows = train.global_batch // world
    size = max(d for d in range(1, min(rows, train.lane_size) + 1) if rows % d == 0)
    return f"For example train.micro_batch={size}."
