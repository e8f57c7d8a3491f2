"""JSON documents on disk: the one loader of the files that a run, a data set or a study holds.

A document is an object of known form. What is damaged, or of a later format, is refused with the file's name and the
place in it; keys that are not known are left alone. Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rkdo_dist.files import read_regular
from rkdo_dist.printable import shortened

Check = Callable[[Any, str], str]  # a value and its place -> what is wrong with it, "" if nothing is


class DamagedError(ValueError):
    """A file does not hold what it should; the message names it and says what to do."""


def _plain(what: str, test: Callable[[Any], bool]) -> Check:
    def check(value: Any, place: str) -> str:
        return "" if test(value) else f"{place} must be {what}, got {_short(value)}"

    return check


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | type(None)) else f"a {type(value).__name__}"
    return shortened(text)


COUNT = _plain("a whole number from 0", lambda v: type(v) is int and 0 <= v < 1 << 62)
NATURAL = _plain("a whole number from 1", lambda v: type(v) is int and 0 < v < 1 << 62)
POSITIVE = _plain("a finite number above 0", lambda v: type(v) in (int, float) and 0 < v < 1e300)
SHARE = _plain("a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1)
NUMBER = _plain("a finite number", lambda v: type(v) in (int, float) and abs(v) < 1e300)
ANY_NUMBER = _plain("a number", lambda v: type(v) is float or (type(v) is int and abs(v) < 1e300))  # also NaN, infinity
TEXT = _plain("text", lambda v: isinstance(v, str))
FLAG = _plain("true or false", lambda v: isinstance(v, bool))
OBJECT = _plain("an object", lambda v: isinstance(v, dict))
LIST = _plain("a list", lambda v: isinstance(v, list))


def maybe(kind: Check) -> Check:
    """The same, or null."""
    return lambda value, place: "" if value is None else kind(value, place)


def either(*kinds: Check) -> Check:
    """One of several kinds; the complaint is the first one's."""
    return lambda value, place: "" if any(not kind(value, place) for kind in kinds) else kinds[0](value, place)


def list_of(kind: Check, least: int = 0) -> Check:
    """A list of one kind, of at least so many values."""

    def check(value: Any, place: str) -> str:
        wrong = LIST(value, place)
        if not wrong and len(value) < least:
            return f"{place} has {len(value)} values"
        return wrong or next((said for k, v in enumerate(value) if (said := kind(v, f"{place}[{k}]"))), "")

    return check


def row_of(*kinds: Check) -> Check:
    """A list of as many values as there are kinds."""

    def check(value: Any, place: str) -> str:
        if not isinstance(value, list) or len(value) != len(kinds):
            return f"{place} must be a list of {len(kinds)} values, got {_short(value)}"
        found = (kind(v, f"{place}[{k}]") for k, (kind, v) in enumerate(zip(kinds, value, strict=True)))
        return next((said for said in found if said), "")

    return check


def object_of(kind: Check) -> Check:
    """An object whose values are of one kind."""

    def check(value: Any, place: str) -> str:
        wrong = OBJECT(value, place)
        return wrong or next((said for k, v in value.items() if (said := kind(v, f"{place}.{k}"))), "")

    return check


def shape(**kinds: Check) -> Check:
    """An object with these keys; a key whose name here ends with "_" may be missing (without the "_")."""

    def check(value: Any, place: str) -> str:
        if wrong := OBJECT(value, place or "it"):
            return wrong
        for name, kind in kinds.items():
            key = name.removesuffix("_")
            where = f"{place}.{key}" if place else key
            if key not in value:
                if key == name:
                    return f"{where} is missing"
            elif wrong := kind(value[key], where):
                return wrong
        return ""

    return check


def parsed(content: bytes | str, where: str, form: Check, advice: str, newest: int = 1) -> dict[str, Any]:
    """The object in a document's text.

    Args:
        where: its name in messages.
        form: what it must hold, a `shape`.
        advice: what to do about a damaged one.
        newest: the latest `format` that is read; a document without one is of the first.

    Raises:
        DamagedError: if it holds anything else, or is of a later format.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DamagedError(f"{where} is damaged: it is not a JSON object; {advice}")
    kind = found.get("format", 1)
    if type(kind) is int and kind > newest:
        raise DamagedError(
            f"{where} is of format {kind}, of a later version of rkdo_dist; this one reads formats up to {newest}"
        )
    if wrong := form(found, ""):
        raise DamagedError(f"{where} is damaged: {wrong}; {advice}")
    return found


def read(
    path: str | os.PathLike[str],
    form: Check,
    advice: str = "put it back, or remove it",
    newest: int = 1,
    limit: int = 64 << 20,
) -> dict[str, Any]:
    """The object in a JSON file; arguments as `parsed`.

    Args:
        limit: bytes that the file may have.

    Raises:
        DamagedError: as `parsed`.
        OSError: if it cannot be read, or is a pipe or a device.
    """
    return parsed(read_regular(path, limit), str(Path(path)), form, advice, newest)
