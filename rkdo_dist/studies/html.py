"""Self-contained HTML pages from nested calls. Everything that is not an element is text, and is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from rkdo_dist.files import write_atomic
from rkdo_dist.studies.palette import PAGE
from rkdo_dist.studies.sheets import Sheet

_FEW = 3  # columns that a narrow screen has room for
_MEDIA = {"svg": "svg+xml"}
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


def table(header: Sequence[str], rows: Iterable[Iterable[str | float | None]], class_: str = "") -> Element:
    """A table; the first cell of a row is its name. A wide one becomes a list of its rows on a narrow screen.

    Args:
        header: of the columns, which every cell repeats where the head is not shown.
        class_: "text" for columns that are no numbers.
    """
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header)))
    body = [
        tag("tr", *(_cell(n, c, title) for n, (c, title) in enumerate(zip(row, header, strict=True)))) for row in rows
    ]
    kind = " ".join(word for word in (class_, "many" if len(header) > _FEW else "") if word)
    return tag("div", tag("table", head, tag("tbody", *body), class_=kind or None), class_="wide")


def _cell(number: int, content: str | float | None, title: str) -> Element:
    if number:
        return tag("td", content, data_label=" ".join(title.split()))
    return tag("th", content, scope="row")


def image(data: bytes, kind: str, alt: str, width: int | None = None, class_: str | None = None) -> Element:
    """An image inside the page.

    Args:
        data: the file.
        kind: "svg" or "png".
        alt: what it shows.
    """
    source = f"data:image/{_MEDIA.get(kind, kind)};base64,{base64.b64encode(data).decode()}"
    return tag("img", src=source, alt=alt, width=width, class_=class_)


def figure(pieces: Sequence[tuple[str, bytes]], kind: str, alt: str, caption: str, class_: str = "panels") -> Element:
    """Images that stand side by side where there is room, with a caption.

    Args:
        pieces: (title, file) each, as `plots.pieces` makes them; one called "legend" has a line of its own.
        class_: "panels", or "panels small" or "panels large" for images that need little room or much.
    """
    shown = [image(data, kind, f"{alt}: {title}" if title else alt) for title, data in pieces if title != "legend"]
    below = [image(data, kind, f"{alt}: legend", class_="legend") for title, data in pieces if title == "legend"]
    return tag("figure", tag("div", *shown, class_=class_), *below, tag("figcaption", caption))


def section(title: str, name: str, *children: Element | None) -> Element:
    """A section of the page, with a heading and an id."""
    return tag("section", tag("h2", title), *children, id=name)


def sheet(table_: Sheet, class_: str = "") -> Element:
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


def _colours(scheme: str) -> str:
    return " ".join(f"--{name}: {value};" for name, value in PAGE[scheme].items())


_STYLE = f"""
:root {{ color-scheme: light dark; {_colours("light")} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_colours("dark")} }} }}
""" + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 "Source Sans 3", "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
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
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 400; }
.text th, .text td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 3.5rem; }
.text thead th { overflow-wrap: normal; }
figure { margin: 1.2rem 0 1.8rem; }
figcaption { margin-top: .4rem; }
.panels { display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-start; }
.panels img { flex: 1 1 17.5rem; min-width: 0; max-width: min(100%, 29.5rem); height: auto; background: #fff;
  border-radius: 4px; }
.large img { flex-basis: 27rem; max-width: min(100%, 32rem); }
.small img { flex: 1 1 8.5rem; max-width: min(100%, 15rem); }
.legend { display: block; max-width: 100%; height: auto; margin-top: .6rem; background: #fff; border-radius: 4px; }
details summary { cursor: pointer; color: var(--accent); margin: .8rem 0; }
.sheet td, .sheet td:first-child { border: 0; padding: .15rem 0 .5rem; width: 86px; min-width: 86px; text-align: center;
  font-size: .75rem; color: var(--soft); white-space: normal; }
.sheet td span { display: block; line-height: 1.2; margin-top: .15rem; }
.sheet img { image-rendering: pixelated; border: 3px solid transparent; width: 62px; height: 62px;
  display: inline-block; }
.sheet .query, .sheet td.query:first-child { padding-right: 1.6rem; color: var(--ink); font-weight: 600; }
.sheet .right img { border-color: var(--good); }
.sheet .wrong img { border: 3px dashed var(--bad); }
.sheet .wrong { color: var(--bad); }
@media (max-width: 44rem) {
  main { padding: 1.2rem .9rem 3rem; }
  h1 { font-size: 1.6rem; }
  table:not(.sheet):not(.many) th, table:not(.sheet):not(.many) td { white-space: normal; padding-right: .6rem; }
  .many thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .many, .many tbody, .many tr, .many th, .many td { display: block; }
  .many tr { border-bottom: 2px solid var(--line); padding: .5rem 0; }
  .many tbody th { border: 0; font-weight: 600; white-space: normal; overflow-wrap: anywhere; }
  .many tbody td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0;
    text-align: right; white-space: normal; }
  .many tbody td::before { content: attr(data-label); color: var(--soft); text-align: left; flex: none;
    max-width: 50%; }
  .sheet tr { display: flex; flex-wrap: wrap; border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .sheet .query, .sheet td.query:first-child { padding-right: 0; }
}
@media print {
  :root { color-scheme: light; LIGHT }
  main { max-width: none; padding: 0; }
  body { font-size: 10.5pt; }
  h1, h2, h3, summary { break-after: avoid; }
  h2 { margin-top: 1.4rem; }
  figure, tr, .verdict, .remark { break-inside: avoid; }
  h2 + p, h2 + div, h2 + figure, h3 + p, h3 + div { break-before: avoid; }
  p, figcaption { orphans: 3; widows: 3; break-before: avoid; }
  thead { display: table-header-group; }
  .wide { overflow: visible; }
  table:not(.sheet) { width: 100%; font-size: 8.5pt; }
  table.many { font-size: 7pt; }
  table:not(.sheet) th, table:not(.sheet) td { white-space: normal; overflow-wrap: anywhere; padding-right: .5rem; }
  table:not(.sheet) thead th { overflow-wrap: normal; }
  .panels img { max-width: 3.4in; flex-basis: 2.2in; }
  .large img { max-width: 4.6in; flex-basis: 4.2in; }
  .small img { max-width: 1.7in; flex-basis: 1.2in; }
  details::details-content { content-visibility: visible; block-size: auto; display: block; }
}
""".replace("LIGHT", _colours("light"))
