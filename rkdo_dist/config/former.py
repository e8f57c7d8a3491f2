"""Settings of the first edition under their names of now, so that its files and runs are still read.

Kept for one version. A renamed setting works, with a line that says its new name; one that is gone is accepted at the
value that it always had.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from rkdo_dist.config.sections import Config, ConfigError, flatten


@dataclasses.dataclass(frozen=True)
class Former:
    """A setting that was.

    Attributes:
        default: its default, which says nothing now.
        now: the setting that took its place; "" if none did.
        values: the values of `now` for its own; the same ones if empty.
        beside: what `now` said beside it, where it was a setting already.
    """

    default: Any
    now: str = ""
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    beside: Any = None


FORMER = {
    "field.exchange": Former("gather", "run.reduction", {"ring": "ring"}, beside="fast"),
    "field.symmetric": Former(False, "field.pairing", {True: "symmetric"}, beside="cross"),
    "field.bank_temperature": Former(0.1),
    "views.jitter_probability": Former(0.8),
    "encoder.views": Former("together", "train.views"),
    "encoder.batch_norm": Former("lane"),
    "evaluate.batch_size": Former(256),
    "evaluate.neighbours": Former(5),
}
# What decided the results of a run in the first edition (`decisive`), for the digests in its checkpoints.
_DECISIVE = (
    "field.objective field.recursion field.columns field.stored field.bank_temperature field.depth field.coupling "
    "field.coupling_schedule field.coupling_end field.coupling_start_epoch field.temperature field.cooling field.clock "
    "field.pairing field.symmetric field.supervisor_grad field.debias field.switch_to field.switch_at field.exchange "
    "data.split data.image_size data.shuffle_buffer data.on_corrupt views.crop_scale views.flip views.jitter "
    "views.jitter_probability views.grayscale views.mean views.std encoder.backbone encoder.stem encoder.head "
    "encoder.embedding_dim encoder.views encoder.batch_norm train.global_batch train.micro_batch train.epochs "
    "train.batches_per_epoch train.max_steps train.skip_nonfinite train.optimizer train.learning_rate "
    "train.weight_decay train.schedule train.warmup_steps train.early_stop_slope train.early_stop_window run.seed "
    "run.reduction run.threads"
)

_said: set[str] = set()  # a run reads its settings more than once


def with_names_of_now(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    """Nested mappings, as a file has them, in which no setting has a former name.

    Raises:
        ConfigError: for one that is gone and had another value than its default, or that contradicts a setting of now.
    """
    new = {section: dict(values) if isinstance(values, Mapping) else values for section, values in tree.items()}
    field = new.get("field")
    if isinstance(field, dict) and "switch_at" in field and "supervisor" not in field:
        # Every setting, as a run of the first edition wrote it: the uniform share was I-Con's alone.
        field = {} if "icon" in (field.get("objective"), field.get("switch_to")) else field
        field.pop("debias", None)
    for key, former in FORMER.items():
        section, _, name = key.partition(".")
        if isinstance(new.get(section), dict) and name in new[section]:
            value = new[section].pop(name)
            if value != former.default:
                in_section, _, now = former.now.partition(".")
                if now and not former.values and now in (new.get(in_section) or {}):
                    _require_same(key, value, former, new[in_section][now], value)
                rename(new, key, value)
    return new


def rename(tree: dict[Any, Any], key: str, value: Any) -> None:
    """Set what `key`, a former setting, is now; whatever value it has there gives way unless it contradicts.

    Raises:
        ConfigError: as `with_names_of_now`.
    """
    former = FORMER[key]
    if not former.now:
        if value != former.default:
            raise ConfigError(f"{key} is no longer a setting, it is always {former.default}: leave it out, got {value}")
        return
    section, _, name = former.now.partition(".")
    values = tree[section] = dict(tree.get(section) or {})
    meant = value
    if former.values:
        said = values.get(name)
        said = flatten(Config())[former.now] if said is None else said
        if value == former.default:
            meant = former.beside if said in former.values.values() else said
        elif value not in former.values:
            raise ConfigError(f"{key}={value} is unknown, and {key} is {former.now} now: leave it out")
        else:
            meant = former.values[value]
            if said != former.beside:
                _require_same(key, value, former, said, meant)
    values[name] = meant
    line = f"{key} is called {former.now} now: use {former.now}={meant} (the former name works in this version only)"
    if line not in _said and os.environ.get("RANK", "0") == "0":
        _said.add(line)
        logging.getLogger(__name__).warning(line)


def _require_same(key: str, value: Any, former: Former, said: Any, meant: Any) -> None:
    if said != meant:
        raise ConfigError(f"{key}={value} contradicts {former.now}={said}: leave out {key}, it is {former.now} now")


def digest_of_first_edition(config: Config) -> str:
    """What `digest` was in the first edition, with which it marked its checkpoints."""
    now = flatten(config)
    if "icon" not in (config.field.objective, config.field.switch_to):
        now["field.debias"] = 0.2  # its default, which meant nothing
    for key, former in FORMER.items():
        now[key] = former.default
        for was, meant in former.values.items():
            if now[former.now] == meant:
                now[key], now[former.now] = was, former.beside
        if former.now and not former.values:
            now[key] = now[former.now]
    return hashlib.sha256(json.dumps({key: now[key] for key in _DECISIVE.split()}, sort_keys=True).encode()).hexdigest()
