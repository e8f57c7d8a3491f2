"""Configuration: small frozen sections, read from YAML and changed by dotted overrides.

An unknown or ill-typed key is an error that names the key, the allowed ones and the nearest match. A setting marked
`free` does not change what is computed, so it may differ when a run is resumed. What needs no data is checked by
building it (`parts.check`); only what settings ask of each other is checked here.
"""

from rkdo_dist.config.former import digest_of_first_edition
from rkdo_dist.config.reading import change, from_tree, listed, load, to_yaml, with_values, without_secrets
from rkdo_dist.config.rules import check, check_strategy, check_world
from rkdo_dist.config.sections import (
    LEAST_TEMPERATURE,
    Config,
    ConfigError,
    DataConfig,
    EncoderConfig,
    EvaluateConfig,
    FieldConfig,
    RunConfig,
    TrainConfig,
    ViewsConfig,
    affinity_of,
    decay_of,
    decisive,
    decisive_tree,
    digest,
    flatten,
    follows_length,
    relation_of,
    used_objectives,
)

__all__ = [
    "LEAST_TEMPERATURE",
    "Config",
    "ConfigError",
    "DataConfig",
    "EncoderConfig",
    "EvaluateConfig",
    "FieldConfig",
    "RunConfig",
    "TrainConfig",
    "ViewsConfig",
    "affinity_of",
    "change",
    "check",
    "check_strategy",
    "check_world",
    "decay_of",
    "decisive",
    "decisive_tree",
    "digest",
    "digest_of_first_edition",
    "flatten",
    "follows_length",
    "from_tree",
    "listed",
    "load",
    "relation_of",
    "to_yaml",
    "used_objectives",
    "with_values",
    "without_secrets",
]
