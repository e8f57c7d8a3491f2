"""Checks of the built documentation site (mkdocs runs this hook): no page may need the network to be read."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

# Attributes by which a page loads something; <a href> only leads elsewhere.
_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
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


def on_post_build(config: object, **_: object) -> None:
    """Fail the build if a page needs the network."""
    from mkdocs.exceptions import PluginError

    found = remote_loads(Path(config["site_dir"]))  # type: ignore[index]
    if found:
        raise PluginError("pages that need the network:\n" + "\n".join(found))
