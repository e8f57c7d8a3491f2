"""List of all settings: for `rkdo settings`, the help of `rkdo train`, and docs/settings.md."""

from __future__ import annotations

import dataclasses
import difflib
import json
import textwrap
import types
import typing
from typing import Any, Literal

from rkdo_dist.config.sections import Config, ConfigError

_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
_COLUMN = 34  # where explanations begin


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: its dotted key, type and range in words, default as YAML, and what it does."""

    key: str
    kind: str
    default: str
    about: str
    free: bool

    @property
    def section(self) -> str:
        """The part of the key before the dot."""
        return self.key.partition(".")[0]


def settings(pattern: str = "") -> list[Setting]:
    """The settings whose key or explanation contains `pattern` (in any case), in the order of the sections.

    Raises:
        ConfigError: if there is none, with the nearest key.
    """
    found = [
        Setting(
            f"{section.name}.{item.name}",
            item.metadata["within"]
            if item.metadata["choices"]
            else _kind(typing.get_type_hints(type(section.default))[item.name], item.metadata["within"]),
            json.dumps(item.default).strip('"') if item.default != "" else '""',
            item.metadata["about"],
            item.metadata["free"],
        )
        for section in dataclasses.fields(Config)
        for item in dataclasses.fields(typing.cast(Any, section.default))
    ]
    matching = [s for s in found if pattern.lower() in s.key.lower() or pattern.lower() in s.about.lower()]
    if not matching:
        near = difflib.get_close_matches(pattern, [s.key for s in found], n=1, cutoff=0.4)
        raise ConfigError(f"no setting has {pattern!r} in it" + (f"; did you mean {near[0]!r}?" if near else ""))
    return matching


def values() -> dict[str, list[str]]:
    """The values of every setting that has a list of them, by key."""
    found = {}
    for section in dataclasses.fields(Config):
        hints = typing.get_type_hints(type(section.default))
        for item in dataclasses.fields(typing.cast(Any, section.default)):
            options = [o for o in (hints[item.name], *typing.get_args(hints[item.name])) if _listed(o)]
            words = item.metadata["choices"]() if item.metadata["choices"] else _listed(options[0]) if options else []
            if words:
                several = typing.get_origin(hints[item.name]) is tuple
                found[f"{section.name}.{item.name}"] = [f"[{word}]" if several else word for word in words]
    return found


def _listed(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    return [str(value) for value in typing.get_args(kind)] if typing.get_origin(kind) is Literal else []


def _kind(kind: Any, within: str) -> str:
    if kind is str and within:
        return within
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        words = ", ".join(options)
    elif typing.get_origin(kind) in (types.UnionType, typing.Union):
        words = " or ".join("null" if option is type(None) else _kind(option, "") for option in options)
    elif options and Ellipsis in options:
        words = f"list ({_kind(options[0], '')})"
    elif options:
        words = f"list of {len(options)} numbers"
    else:
        words = _KINDS[kind]
    return f"{words}; {within}" if within else words


def as_text(listed: list[Setting], width: int) -> str:
    """Keys with their defaults, and beside them what they do, in lines of at most `width` characters."""
    lines = []
    for number, one in enumerate(listed):
        if number and one.section != listed[number - 1].section:
            lines.append("")
        left = f"  {one.key}={one.default}"
        right = textwrap.wrap(f"{one.about} ({one.kind})", max(24, width - _COLUMN))
        if len(left) > _COLUMN - 2:
            lines.append(left)
            left = ""
        lines.append(f"{left:<{_COLUMN}}{right[0]}")
        lines += [" " * _COLUMN + line for line in right[1:]]
    return "\n".join(lines)


def as_markdown() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "<!-- Made by `make settings`; a test compares it with the code. -->",
        "",
        "Written in YAML (`section:`, then `key: value`) or on the command line (`section.key=value`).",
        "`rkdo settings PATTERN` shows those whose name or explanation holds PATTERN. Settings with a star leave",
        "results as they are, so a run may be continued under other values of them.",
    ]
    for section in dataclasses.fields(Config):
        about = (type(section.default).__doc__ or "").strip()
        lines += ["", f"## {section.name}", "", about, ""]
        lines += ["| setting | default | values | what it does |", "|---|---|---|---|"]
        for one in settings():
            if one.section == section.name:
                star = " \\*" if one.free else ""
                lines.append(f"| `{one.key}`{star} | `{one.default}` | {one.kind} | {one.about} |")
    return "\n".join(lines)
