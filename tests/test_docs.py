"""The documentation site: pages short enough to read, nothing that needs the network, every page in the navigation.

`make docs` builds it strictly, which checks links and anchors.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_can_be_read(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    if page.name != "settings.md":  # generated, one row per setting
        assert len(lines) <= 150
        assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
    assert all((ROOT / name).is_file() for name in SNIPPET.findall("\n".join(lines)))


def test_the_readme_can_be_read() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    assert not [line for line in lines if len(line) > 120]


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert {str(page.relative_to(ROOT / "docs")) for page in PAGES} == listed


def test_files_that_the_pages_name_are_there() -> None:
    for page in PAGES:
        if page.parent.name == "log":  # keeps the names of its day
            continue
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"(?:configs|launch|benchmarks|examples)/[\w./-]+\.\w+", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize(
    ("name", "text", "remote"),
    [
        ("script.html", '<script src="https://unpkg.com/mermaid.js"></script>', True),
        ("font.html", '<link rel="stylesheet" href="//fonts.googleapis.com/css">', True),
        ("image.html", '<img src="HTTP://example.org/a.png">', True),
        ("diagram.html", '<pre class="mermaid">graph</pre>', True),
        ("style.css", '@import "https://example.org/a.css";', True),
        ("font.css", "@font-face { src: url(//example.org/a.woff) }", True),
        ("link.html", '<a href="https://arxiv.org">paper</a><img src="figures/a.svg">', False),
        ("local.css", "a { background: url(a.svg) }", False),
    ],
)
def test_what_a_page_would_fetch_is_found(tmp_path: Path, name: str, text: str, remote: bool) -> None:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "tools" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert bool(hooks.remote_loads(tmp_path)) == remote


def test_settings_that_the_pages_name_exist() -> None:
    from rkdo_dist import config

    known = set(config.flatten(config.Config()))
    sections = "|".join(sorted({key.partition(".")[0] for key in known}))
    found = {
        f"{page.name}: {name}"
        for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
        if page.parent.name != "log" and page.name != "settings.md"  # the log keeps the names of its day
        for name in re.findall(rf"(?<![\w/.-])(?:{sections})\.[a-z_]+\b(?![\w/(.*])", page.read_text(encoding="utf-8"))
        if name not in known and not name.endswith((".py", ".md"))
    }
    assert not found


def test_the_tests_of_promises_exist_and_run_as_often_as_the_page_says() -> None:
    page = (ROOT / "docs" / "promises.md").read_text()
    rows = re.findall(r"^\| .+ \| `tests/(\w+\.py)::(\w+)` \| every (change|night) \|$", page, flags=re.M)
    assert len(rows) + 2 == len(re.findall(r"^\|", page, flags=re.M)), "a row is not of the form of the others"
    assert re.search(r"^Last run with all numbers.* 20\d\d-\d\d-\d\d: ", page, flags=re.M)
    for file, name, often in rows:
        found = re.search(rf"((?:^@.*\n(?:^[ )].*\n)*)*)^def {name}\(", (ROOT / "tests" / file).read_text(), flags=re.M)
        assert found, f"{file}::{name}"
        decorated = [line for line in found[1].splitlines() if line.startswith("@pytest.mark.nightly")]
        assert bool(decorated) == (often == "night"), f"{file}::{name}"
