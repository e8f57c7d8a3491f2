"""Configuration from YAML and dotted overrides, checked, and back to YAML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from rkdo_dist import addresses
from rkdo_dist.config.former import FORMER, rename, with_names_of_now
from rkdo_dist.config.rules import check
from rkdo_dist.config.sections import Config, ConfigError, flatten
from rkdo_dist.files import at_home, read_regular


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice (plain YAML silently keeps the last)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {str(key) for key in keys if keys.count(key) > 1}
    if twice:
        raise ConfigError(f"key given twice: {', '.join(sorted(twice))}")
    loader.flatten_mapping(node)
    return {loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value}


def _number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """A number, unless YAML reads one that nobody means: 12:30:45 as 45045 (base 60), 010 as 8 (base 8)."""
    if re.search(r":|^[-+]?0\d+$", node.value):
        return node.value  # text, which no setting that is a number takes
    return loader.construct_yaml_int(node) if node.tag.endswith("int") else loader.construct_yaml_float(node)


_MOST_BYTES, _MOST_NODES = 1 << 20, 10_000


def _bounded(text: str) -> Any:
    """YAML whose aliases, followed, make no more than `_MOST_NODES` values.

    Raises:
        yaml.YAMLError: if they make more, or refer to what they are in.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node and itself, each alias counted as what it stands for; `known` by the node's identity."""
    if id(node) not in known:
        known[id(node)] = _MOST_NODES + 1  # until it is counted: whoever meets it now is inside it
        inside = [] if isinstance(node, yaml.ScalarNode) else node.value
        below = [x for item in inside for x in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count(x, known) for x in below)
    if known[id(node)] > _MOST_NODES:
        raise yaml.YAMLError(f"it has more than {_MOST_NODES} values (aliases counted as what they stand for)")
    return known[id(node)]


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


# What YAML's constructors raise for a value that is none of its kind, such as 2001-99-99 or !!bool maybe.
_INVALID = (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `path` (YAML), changed by `overrides` ("section.key=value", values in YAML).

    Raises:
        ConfigError: unreadable file, unknown or ill-typed key, or a value out of range.
    """
    path = Path(at_home(str(path)))
    if not path.exists() and path.parts[:1] == ("configs",) and _shipped(path).is_file():
        path = _shipped(path)
    try:
        tree = _bounded(read_regular(path, _MOST_BYTES).decode())
    except OSError as error:
        reason = f"cannot read the configuration {path}: {error.strerror or error}"
        raise ConfigError(f"{reason}{_instead(path)}") from error
    except _INVALID as error:
        raise ConfigError(f"{path} is not a valid configuration: {_reason(error)}") from None
    if tree is None:  # an empty file
        tree = {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: expected sections (field:, data:, ...), found {type(tree).__name__}")
    try:
        return from_tree(_changed(with_names_of_now(tree), overrides))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _instead(path: Path) -> str:
    """What may have been meant by a path at which there is no configuration."""
    if (path / "config.yaml").is_file():
        return f"; it is a run: `rkdo train {path / 'config.yaml'} run.resume=auto` continues it"
    there = [str(found) for found in path.parent.glob("*.yaml")]
    there += [f"configs/{found.name}" for found in _shipped(Path("configs")).glob("*.yaml")]
    by_name = {Path(found).stem: found for found in reversed(there)}
    near = difflib.get_close_matches(path.stem, by_name, n=1, cutoff=0.5)
    near = [by_name[name] for name in near if by_name[name] != str(path)]  # a link that leads nowhere is there
    return f"; did you mean {near[0]}?" if near else ""


def _shipped(path: Path) -> Path:
    """Where a path below `configs/`, which comes with the wheel, lies in the package or in its checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / path if (package / "configs").is_dir() else package.parent / path


def change(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with dotted overrides, checked again.

    Raises:
        ConfigError: as for `load`.
    """
    return from_tree(_changed(dataclasses.asdict(config), overrides))


def listed(text: str) -> list[Any]:
    """The values of a list in YAML without its brackets: "1, 3" or "[0.2, 1], [0.5, 1]" or "icon, rkdo".

    Raises:
        ConfigError: if it is none, or empty.
    """
    try:
        values = _bounded(f"[{text}]")
    except _INVALID:
        values = None
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{text!r} is not a list of values, such as 1,3,5")
    return values


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with values as Python has them, by dotted key or nested by section, checked again.

    Raises:
        ConfigError: as for `load`.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and "." not in str(key):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[str(key)] = value
    return from_tree(_with(dataclasses.asdict(config), flat))


def _changed(tree: dict[Any, Any], overrides: Sequence[str]) -> dict[Any, Any]:
    return _with(tree, dict(map(_parsed, overrides)))


def _with(tree: dict[Any, Any], values: Mapping[str, Any]) -> dict[Any, Any]:
    """`tree` with values by dotted key; those by a former name come last, because their meaning depends on others."""
    for asked, other in (("source", "shards"), ("shards", "source")):  # one of them says where the samples are
        if f"data.{asked}" in values and f"data.{other}" not in values and isinstance(tree.get("data"), dict):
            tree["data"].pop(other, None)
    for key in sorted(values, key=lambda key: key in FORMER):
        _set(tree, key, values[key])
    return tree


def _reason(error: Exception) -> str:
    """The error and its place, without YAML's excerpt, which may begin in the middle of an address with a secret."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"


def _parsed(override: str) -> tuple[str, Any]:
    """Key and value of "section.key=value"."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {brief(override)} is not of the form {_form(key, text)}")
    try:
        return key.strip(), _bounded(text)
    except _INVALID as error:
        raise ConfigError(f"override {brief(override)}: the value is not valid YAML: {_reason(error)}") from None


def _form(key: str, value: Any) -> str:
    full = next((flat for flat in _flat_names() if flat.split(".")[1] == key.strip()), None)
    return f"section.key=value, e.g. {'train.epochs=5' if full is None else f'{full}={value or 5}'}"


def _set(tree: dict[Any, Any], key: str, value: Any) -> None:
    section, dot, name = key.partition(".")
    if not dot or not name:
        raise ConfigError(f"override {brief(key)} is not of the form {_form(key, value)}")
    if key in FORMER:
        rename(tree, key, value)
        return
    if not isinstance(tree.get(section), dict):
        tree[section] = {} if tree.get(section) is None else tree[section]
    if not isinstance(tree[section], dict):
        raise ConfigError(f"section {section!r} is not a mapping")
    tree[section][name] = str(value) if isinstance(value, Path) else value


def from_tree(tree: Mapping[Any, Any]) -> Config:
    """A checked `Config` from nested mappings.

    Raises:
        ConfigError: as for `load`.
    """
    sections = typing.get_type_hints(Config)
    built = {}
    for section, values in with_names_of_now(tree).items():
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
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {what}{hint} Allowed: {', '.join(allowed)}"


def _section(section: str, kind: type, values: Any) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"section {section!r} must be a mapping of keys to values, got {brief(values)}")
    hints = typing.get_type_hints(kind)
    declared = {item.name: item for item in dataclasses.fields(kind)}
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            names = list(hints)
            raise ConfigError(
                _unknown(f"key '{section}.{name}'", str(name), names, ()).replace("mean '", f"mean '{section}.")
            )
        arguments[name] = _coerce(f"{section}.{name}", hints[name], value)
        choices = declared[name].metadata["choices"]
        if choices is not None and arguments[name] not in choices():
            raise ConfigError(_unknown(f"value {brief(value)} for {section}.{name}", str(value), choices()))
        _check_range(f"{section}.{name}", declared[name].metadata, arguments[name])
    return kind(**arguments)


def _check_range(key: str, bounds: Mapping[str, Any], value: Any) -> None:
    least, above, most = (bounds[name] for name in ("least", "above", "most"))
    if least is None and above is None:
        return
    for number in value if isinstance(value, tuple) else (value,):
        if (
            number is not None
            and not isinstance(number, str)
            and not (
                (least is None or number >= least)
                and (above is None or number > above)
                and (number <= most if most is not None else number < float("inf"))
            )
        ):
            raise ConfigError(f"{key} must be {bounds['within']}, got {number}")


def brief(value: Any) -> str:
    """A value as text of at most 80 characters: what is wrong with it must not fill the screen."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a number of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_EXAMPLES = {int: "[1, 2]", float: "[0.5, 1.0]"}


def _coerce(key: str, kind: Any, value: Any) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in options:
            raise ConfigError(_unknown(f"value {brief(value)} for {key}", str(value), [str(o) for o in options]))
        return value
    if origin in (types.UnionType, typing.Union):
        several = isinstance(value, list | tuple)
        kinds = [o for o in options if o is not type(None) and (typing.get_origin(o) is tuple) == several]
        kinds = [o for o in kinds if (typing.get_origin(o) is Literal) == isinstance(value, str)] or kinds
        kinds = kinds or [o for o in options if o is not type(None)]
        if value is None and type(None) in options:
            return None
        return _coerce(key, type(value) if type(value) in kinds else kinds[-1], value)
    if origin is tuple and Ellipsis in options:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{key} needs a list, e.g. {_EXAMPLES.get(options[0], '[name]')}, got {brief(value)}")
        return tuple(_coerce(key, options[0], item) for item in value)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(options):
            raise ConfigError(f"{key} needs a list of {len(options)} numbers, got {brief(value)}")
        return tuple(_coerce(key, option, item) for option, item in zip(options, value, strict=True))
    return _scalar(key, kind, value)


def _scalar(key: str, kind: type, value: Any) -> Any:
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except (TypeError, ValueError):
            pass
        except OverflowError:
            raise ConfigError(f"{key} must be a number below 1.8e308, got {brief(value)}") from None
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is int and type(value) is int and not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(f"{key} must be a whole number below 2^63, got {brief(value)}")
    if kind is str and type(value) is str and _NO_TEXT.search(value):
        raise ConfigError(f"{key} holds characters that no name or address has: {brief(value)}")
    if type(value) is kind:
        return at_home(value) if isinstance(value, str) else value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{key} must be {names[kind]}, got {brief(value)} ({type(value).__name__})")


def without_secrets(config: Config) -> Config:
    """The configuration as it may be written down: addresses have no password and no query (`rkdo_dist.addresses`)."""
    sections = {}
    for section, values in dataclasses.asdict(config).items():
        hidden = {k: addresses.shown(v) for k, v in values.items() if isinstance(v, str) and addresses.shown(v) != v}
        sections[section] = dataclasses.replace(getattr(config, section), **hidden)
    return dataclasses.replace(config, **sections)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, readable by `load`; addresses without their secret parts."""
    tree = json.loads(json.dumps(dataclasses.asdict(without_secrets(config))))
    return yaml.safe_dump(tree, sort_keys=False)
