"""Names and messages that hold control characters: seen, not obeyed; a message is one line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from rkdo_dist.console import Terminal, progress_bar, say, table
from rkdo_dist.diagnostics import logger
from rkdo_dist.printable import printable
from tests.jobs import command

HOSTILE = "\x1b[2Ja\rb\x07c\u202ed\ud800\x9b31m"
SEEN = "\\x1b[2Ja\\rb\\x07c\\u202ed\\ud800\\x9b31m"


def test_what_steers_a_terminal_is_spelt_out() -> None:
    assert printable(HOSTILE) == SEEN
    assert printable("gr\u00fc\u00df \u4e2d\n\U0001f600\t|") == "gr\u00fc\u00df \u4e2d\n\U0001f600\t|"


@pytest.mark.parametrize("colours", [False, True])
def test_tables_lines_and_bars(colours: bool) -> None:
    text = io.StringIO()
    console = Terminal(file=text, width=300, force_terminal=colours)
    console.print(table(HOSTILE, ("a", "b"), [(HOSTILE, "[/red]")]))
    say(console, HOSTILE, "red")
    with progress_bar(console) as bar:
        bar.add_task(HOSTILE, total=1, note=HOSTILE)
    found = text.getvalue()
    assert "[2Ja" in found
    assert "[/red]" in found
    assert "\x1b[2Ja" not in found
    assert not {"\x07", "\u202e", "\ud800", "\x9b"} & set(found)
    assert ("\x1b[31m" in found) == colours  # our own colour


def test_commands(small: list[str], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "propagate", False)  # pytest's report of the records could not be written
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "status.json").write_text(
        json.dumps({"status": HOSTILE.replace("\ud800", ""), "step": 2, "message": "\x1b]0;x"})
    )
    broken = tmp_path / "broken.yaml"
    broken.write_text("field: {}\n\0")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    code, text = command(["train", str(tmp_path / "loop.yaml")])
    assert (code, "did you mean" in text) == (2, False)
    for words, ends in (
        (["status", str(run)], 0),
        (["train", f"{HOSTILE}\n.yaml"], 2),
        (["train", str(broken)], 2),
        (["train", small[1], f"run.dir={HOSTILE}"], 2),
        (["train", small[1], f'data.source="{HOSTILE!r}\\n"'], 2),
        (["compare", f"{HOSTILE}\n"], 2),
        ([f"{HOSTILE}\n"], 2),
        (["init", str(tmp_path / "\udcff"), "--data", f"\x1b[2J\n{tmp_path}"], 2),
    ):
        code, text = command(words)
        assert code == ends, (words, text)
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\ud800", "\r"} & set(text), words
        said = [line for line in text.splitlines() if line and not line.startswith(("usage:", "  "))]
        assert len(said) == (2 if ends == 0 else 1), text
