"""HTML elements from nested calls. Whatever is not an element is text, and is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

_VOID = ("img", "meta", "br")


class Element(str):
    """Finished HTML. Only the functions of this module make it; every other string is text."""


def tag(name: str, /, *children: str | float | None, **attributes: str | float | None) -> Element:
    """One element.

    Args:
        name: such as "p".
        children: elements, or texts, which are escaped; None is left out.
        attributes: values are escaped; "class_" stands for class, and "_" for "-" inside a name; None is left out.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"')
    opening = f"<{' '.join(words)}>"
    return Element(opening if name in _VOID else f"{opening}{joined(children)}</{name}>")


def joined(children: Iterable[str | float | None], separator: str = "") -> Element:
    """Elements and texts in a row."""
    shown = (c if isinstance(c, Element) else html.escape(str(c)) for c in children if c is not None)
    return Element(separator.join(shown))


def table(header: Iterable[str], rows: Iterable[Iterable[str | float | None]], class_: str | None = None) -> Element:
    """A table in a box that scrolls sideways; the first cell of a row is its name."""
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header)))
    body = [
        tag("tr", *(tag("td" if n else "th", c, scope=None if n else "row") for n, c in enumerate(row))) for row in rows
    ]
    return tag("div", tag("table", head, tag("tbody", *body), class_=class_), class_="wide")


def image(data: bytes, kind: str, alt: str, width: int | None = None, class_: str | None = None) -> Element:
    """An image inside the page.

    Args:
        data: the file.
        kind: "svg+xml" or "png".
        alt: what it shows.
    """
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return tag("img", src=source, alt=alt, width=width, class_=class_)


def figure(data: bytes, kind: str, alt: str, caption: str) -> Element:
    """An image with words under it."""
    return tag("figure", tag("div", image(data, kind, alt), class_="wide"), tag("figcaption", caption))


def section(title: str, name: str, *children: Element | None) -> Element:
    """A section of the page, with a heading and an id."""
    return tag("section", tag("h2", title), *children, id=name)
