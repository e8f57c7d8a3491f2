"""Addresses that may contain a secret: their public part, and how a child process gets the rest.

A token stands before the host (user:password@host) or in the query (?token=...). Neither is written to a file, put into
a name or among the arguments of a process, or shown: not even in the message that refuses the address. What a child
process needs travels in its environment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import unquote

from rkdo_dist.printable import printable

VARIABLE = "RKDO_ADDRESSES"  # whole addresses with blanks between them
# A pathlib.Path loses the second /, others add a third. Repetitions have bounds, so that long texts take no long time.
_SCHEME = r"(?:(?i:https?):/+|[a-zA-Z][a-zA-Z0-9+.-]{1,30}:/{1,2})"
_OPTIONS = ("torchvision:", "imagefolder:")  # their query is not secret, and needed
# user:password@ with blanks in it; where a / follows what may be a port, there is no login.
_SPACED = r"[^/?#@:\n]*:(?:[^/\n]*|(?!\d*(?:[/?#\s,;)'\"]|$))(?:(?!://)[^\n])*)@"
_ADDRESS = re.compile(rf"{_SCHEME}(?:{_SPACED})?(?:(?!{_SCHEME})\S)*")
# Of what is no address, but may be meant as one: http//..., http:\\..., user:password@host.
_NEARLY = re.compile(r"\W*(?:https?|ftp|s3|gs|hf)(?:\W{1,2}[/\\]|[/\\]{2})", re.IGNORECASE)
_NEARLY_SPACED = re.compile(
    rf"\b((?:https?|ftp|s3|gs|hf)\W{{0,2}}[/\\])[/\\]*{_SPACED}([^\s?#'\"]*)[^\s'\"]*", re.IGNORECASE
)
_LOGIN = re.compile(r"[:\uff1a](?![/\\]|\d+[/\\])")  # before an @, the colon of no port and no //
_SECRET = re.compile(
    r"((?:[?&;][\w.-]{0,60}(?:token|secret|sig|password|passwd|pwd|credential|key|auth)"
    r"|\b(?:token|secret|passw(?:or)?d|pwd))[\w.-]{0,60}=)[^\s&;'\"]+",
    re.IGNORECASE,
)
_NO_PORT = re.compile(r":(?!\d*$)")
_CLOSING = "]})>\"'`,;:."


def shown(text: str) -> str:
    """`text` with every address in it reduced to scheme, host and path."""
    return _ADDRESS.sub(lambda found: _reduced(found[0]), text)


def _reduced(address: str) -> str:
    scheme = re.match(_SCHEME, address)
    assert scheme is not None  # `_ADDRESS` begins with it
    if scheme[0].startswith(_OPTIONS):
        return address
    rest = address[scheme.end() :]
    closed = _closing(rest)
    rest = rest.removesuffix(closed)
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    host = place.partition("/")[0]
    if _has_no_port(host) and "@" not in host:  # a password with / or ? in it
        place = re.split(r"[?#]", rest.rpartition("@")[2], maxsplit=1)[0] if "@" in rest else ""
        host = place.partition("/")[0]
    place = host.rpartition("@")[2] + place[len(host) :]
    if _has_no_port(place.partition("/")[0]):  # user@password:host
        place = ""
    return scheme[0] + place + closed


def _closing(text: str) -> str:
    """What ends a text and no address."""
    return text[len(text.rstrip(_CLOSING)) :]


def _has_no_port(host: str) -> bool:
    """Whether what follows the colon of a host, behind the ] of an IPv6 one, is no port."""
    return _NO_PORT.search(host.rpartition("]")[2]) is not None


def said(text: str) -> str:
    """`text` as a message quotes it: `shown`, and what only looks like an address loses login and query too.

    Not for what is read again: a path may look like that.
    """
    return re.sub(r"\S+", lambda found: _hushed(found[0]), _NEARLY_SPACED.sub(r"\1\2", shown(text)))


def _hushed(word: str) -> str:
    silent, plain = _without_login(word), unquote(word)
    if plain != word and (without := _without_login(plain)) != plain:
        word, silent = plain, without
    if silent != word or _NEARLY.match(word):
        place = re.split(r"[?#]", silent, maxsplit=1)[0]
        silent = place if place == silent else place + _closing(silent)
    return _SECRET.sub(r"\1...", silent)


def _without_login(word: str) -> str:
    *before, last = word.split("@")
    kept = ""
    for part in before:
        colon = _LOGIN.search(part)
        if colon is None:
            kept += f"{part}@"
        else:
            kept += part[: max(part.rfind(end, 0, colon.start()) for end in "/\\='\"") + 1]
    return kept + last


def holds_address(text: str) -> bool:
    """Whether `text` is an address, or holds one, as data.source=http://... does."""
    return re.search(r"[a-zA-Z][a-zA-Z0-9+.-]+://", text) is not None


def whole(address: str) -> str:
    """The address with its secret parts, if the environment variable `RKDO_ADDRESSES` has it; otherwise as it is."""
    if shown(address) != address:
        return address
    return next((known for known in os.environ.get(VARIABLE, "").split() if shown(known) == address), address)


def handed_on(variables: Mapping[str, str], texts: Iterable[object]) -> dict[str, str]:
    """The environment of a child process that is told only the shown forms of some addresses.

    Args:
        variables: the environment otherwise.
        texts: settings; those that are addresses with a secret part are handed on.
    """
    found = [address for text in texts if isinstance(text, str) for address in _ADDRESS.findall(text)]
    secret = [address for address in found if shown(address) != address]
    if not secret:
        return dict(variables)
    secret = [address.replace(" ", "%20") for address in secret]
    return {**variables, VARIABLE: " ".join([*secret, *variables.get(VARIABLE, "").split()])}


@contextlib.contextmanager
def shown_arguments() -> Iterator[None]:
    """While entered, the arguments of this process have no secret parts for libraries that keep them (W&B does)."""
    whole_words = sys.argv
    sys.argv = [shown(word) for word in whole_words]
    try:
        yield
    finally:
        sys.argv = whole_words


class Parser(argparse.ArgumentParser):
    """Its errors quote what was asked for in one line, addresses without their secrets; options are written out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        super().error(printable(said(" ".join(message.split()))))
