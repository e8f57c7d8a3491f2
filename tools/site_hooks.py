"""Hooks of the documentation site: files of the repository as pages, and a check that no page needs the network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

# Attributes by which a page loads something; <a href> only leads elsewhere.
_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)  # a line that stands for a file of the repository
_REMOTE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
_CSS_REMOTE = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])(?:https?:)?//""", re.IGNORECASE)


class _Loads(HTMLParser):
    """Everything a page would fetch from another host."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        target = values.get(_LOADS.get(tag, ""), "") or ""
        if _REMOTE.match(target) and values.get("rel") != "canonical":
            self.remote.append(f"<{tag}> loads {target}")
        if "mermaid" in (values.get("class") or "").split():
            self.remote.append("a mermaid diagram, whose script comes from another host")


def remote_loads(site: Path) -> list[str]:
    """What the pages and style sheets under `site` would fetch from other hosts, one line each."""
    found = []
    for page in sorted(site.rglob("*.html")):
        loads = _Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        found += [f"{page.relative_to(site)}: {line}" for line in loads.remote]
    for sheet in sorted(site.rglob("*.css")):
        if _CSS_REMOTE.search(sheet.read_text(encoding="utf-8")):
            found.append(f"{sheet.relative_to(site)}: a style sheet that loads from another host")
    return found


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put included files in place, with links as they are seen from docs/: before mkdocs checks them."""

    def included(match: re.Match[str]) -> str:
        return (ROOT / match[1]).read_text(encoding="utf-8").replace("](docs/", "](")

    return INCLUDE.sub(included, markdown)


def on_post_build(config: object, **_: object) -> None:
    """Fail the build if a page needs the network."""
    from mkdocs.exceptions import PluginError

    found = remote_loads(Path(config["site_dir"]))  # type: ignore[index]
    if found:
        raise PluginError("pages that need the network:\n" + "\n".join(found))
