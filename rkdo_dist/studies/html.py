"""Self-contained HTML pages from nested calls. Everything that is not an element is text, and is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from pathlib import Path

from rkdo_dist.files import write_atomic
from rkdo_dist.studies.sheets import Sheet

_VOID = ("img", "meta", "br")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is fetched, nothing runs


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
    """An image with a caption."""
    return tag("figure", tag("div", image(data, kind, alt), class_="wide"), tag("figcaption", caption))


def section(title: str, name: str, *children: Element | None) -> Element:
    """A section of the page, with a heading and an id."""
    return tag("section", tag("h2", title), *children, id=name)


def sheet(table_: Sheet, class_: str | None = None) -> Element:
    """A table with its caption as a note below."""
    note = tag("p", table_.caption, class_="note") if table_.caption else None
    return joined([table(table_.columns, table_.rows, class_), note])


def write(path: Path, title: str, *children: Element | None) -> Path:
    """Write a page that needs no other file and asks for none; its directory is made if it is not there."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Element(_STYLE)),
    )
    page = tag("html", head, tag("body", tag("main", *children)), lang="en")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, f"<!doctype html>\n{page}\n")
    return path


_STYLE = """
:root { color-scheme: light;
  --ink: #1d2326; --soft: #5b6468; --line: #d9dee0; --accent: #1f6f8b; --bad: #c8553d; --good: #6a8d2f; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 "Source Sans 3", "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p { max-width: 46rem; margin: .5rem 0 .9rem; }
.scope, .note, figcaption, caption { color: var(--soft); }
.note, figcaption { font-size: .9rem; max-width: 46rem; }
.verdict { border-left: 3px solid var(--accent); padding-left: .9rem; }
.remark { border-left: 3px solid var(--bad); padding-left: .9rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .9rem .32rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; }
tbody th { font-weight: 400; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { max-width: 100%; height: auto; display: block; }
@media (max-width: 44rem) { main { padding: 1.2rem .9rem 3rem; } figure .wide img { max-width: none; width: 42rem; } }
@media print { .wide { overflow: visible; } figure, table { break-inside: avoid; } details > * { display: block; } }
figcaption { margin-top: .4rem; }
details summary { cursor: pointer; color: var(--accent); margin: .8rem 0; }
.text th, .text td { text-align: left; }
.sheet td, .sheet td:first-child { border: 0; padding: .15rem 0 .5rem; width: 86px; min-width: 86px; text-align: center;
  font-size: .75rem; color: var(--soft); }
.sheet td span { display: block; line-height: 1.2; margin-top: .15rem; }
.sheet img { image-rendering: pixelated; border: 3px solid transparent; width: 62px; height: 62px;
  display: inline-block; }
.sheet .query, .sheet td.query:first-child { padding-right: 1.6rem; color: var(--ink); font-weight: 600; }
.sheet .right img { border-color: var(--good); }
.sheet .wrong img { border-color: var(--bad); }
.sheet .wrong { color: var(--bad); }
"""
