"""What commands print: in 80 columns, which a pipe has too, no line is longer and no word is broken."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from examples.theory import statements
from tests.jobs import command

COMMANDS = {
    "settings": "settings",
    "doctor": "doctor CONFIG data.shards=DIGITS",
    "flops": "flops CONFIG data.shards=DIGITS --image-size 8",
    "prepare": "prepare digits --out DIGITS",
    "index": "index DIGITS",
    "evaluate": "evaluate RUN",
    "status": "status RUN",
    "compare": "compare RUN",
    "verify-theory": "verify-theory",
}


def words(text: str) -> set[str]:
    """Words of at least two letters; numbers may differ between two calls."""
    return set(re.findall(r"[^\W\d_]{2,}", text))


@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_is_too_long_and_no_word_is_broken(
    name: str, small: list[str], reference: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = statements.measure
    monkeypatch.setattr(statements, "measure", lambda **options: measured(shapes=((4, 2),), **options))
    monkeypatch.chdir(tmp_path)  # short paths: a path is never broken
    shutil.copytree(digits, "digits")
    if "RUN" in COMMANDS[name]:
        shutil.copytree(reference, "run")
    places = {"CONFIG": small[1], "DIGITS": "digits", "RUN": "run"}
    asked = [re.sub("CONFIG|DIGITS|RUN", lambda found: places[found[0]], word) for word in COMMANDS[name].split()]
    said = {}
    for width in ("", "400"):  # without a width, as in a pipe, it is 80
        monkeypatch.setenv("COLUMNS", width)
        code, said[width] = command(asked)
        assert code == 0, said[width]
    long = [line for line in said[""].splitlines() if len(line.rstrip()) > 80 and str(tmp_path) not in line]
    assert not long, "\n".join(long)
    assert "\u2026" not in said[""]
    broken = words(said[""]) - words(said["400"])
    assert not broken, (broken, said[""])
