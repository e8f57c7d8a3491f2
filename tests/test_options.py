"""Options of every command: a number has its range, a path its kind, and what is outside is refused in one line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from rkdo_dist import cli
from rkdo_dist.commands.arguments import Range, file, folder, given, local, names, numbers
from rkdo_dist.config import load
from tests.jobs import command

COMMANDS = cli._commands_of(cli._parser())
FREE = {("train", "config"), ("doctor", "config"), ("measure", "config"), ("flops", "config"), ("sweep", "config")}


def test_every_option_is_described() -> None:
    bare = [(name, action.dest) for name, parser in COMMANDS.items() for action in parser._actions if not action.help]
    assert not bare


def options(kind: object) -> Iterator[tuple[str, argparse.Action]]:
    for name, parser in COMMANDS.items():
        for action in parser._actions:
            if action.type == kind or (isinstance(kind, type) and isinstance(action.type, kind)):
                yield name, action


def words_for(name: str, action: argparse.Action, value: str) -> list[str]:
    """A command in which one argument has this value, and others that must be there something plausible."""
    words = [name]
    for other in COMMANDS[name]._actions:
        if other is action or (other.required and other.nargs not in ("*", "?")):
            text = value if other is action else next(iter(other.choices)) if other.choices else "1"
            words += [f"{other.option_strings[0]}={text}"] if other.option_strings else [text]
    return words


def refused(name: str, action: argparse.Action, value: str, *said: str) -> None:
    code, text = command(words_for(name, action, value))
    assert code == 2, (name, action.dest, value, text)
    last = text.strip().splitlines()[-1]
    assert last.startswith(f"rkdo {name}: error: argument {'/'.join(action.option_strings) or action.metavar}"), text
    assert len(last) < 400
    assert all(word in last for word in said), text


def test_every_argument_that_is_no_plain_text_has_a_kind_with_bounds() -> None:
    known = {local, file, folder, given, names, numbers}
    for name, parser in COMMANDS.items():
        for action in parser._actions:
            if action.nargs == 0 or action.choices or isinstance(action.type, Range) or action.type in known:
                continue
            plain = action.metavar in ("KEY=VALUE", "KEY=V1,V2", "'NAME: KEY=VALUE ...'", "NAME", "PATTERN")
            lists = action.dest in ("couplings", "data")
            assert plain or lists or (name, action.dest) in FREE, f"rkdo {name}: {action.dest} takes anything"


def test_numbers_beyond_their_range() -> None:
    tested = 0
    for name, action in options(Range):
        assert isinstance(action.type, Range)
        least, most = action.type.least, action.type.most
        whole = isinstance(most, int)
        values = [str(least - 1), str(most * 10 + 1), "9" * 5000, "nan", "inf", "-inf", "1e400", "", "text", "\u00b2"]
        for value in [*values, "1.5" if whole else "0x1p3"]:
            with pytest.raises(argparse.ArgumentTypeError, match="needs a whole number" if whole else "needs a number"):
                action.type(value)
        refused(name, action, values[tested % len(values)], "needs a", f"from {least:,} to {most:,}")
        tested += 1
    assert tested > 25


@pytest.mark.parametrize("kind", [local, file, folder, given])
def test_paths_that_are_empty_or_of_another_kind(kind: object, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, action in options(kind):
        refused(name, action, "", "needs a name or a path")
        if kind is file:
            refused(name, action, str(tmp_path), "needs a file, but", "is a directory")
        if kind in (file, folder):
            refused(name, action, str(tmp_path / "file" / "x" / "y.npz"), "needs a directory, but", "is a file")


def test_home_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert given("~/x") == str(local("~/x")) == str(folder("~/x")) == str(file("~/x")) == f"{tmp_path}/x"
    (tmp_path / "c.yaml").write_text("run: {dir: ~/run}\ndata: {source: 'imagefolder://~/x?labels=none'}\n")
    read = load("~/c.yaml", ["encoder.weights=~/f.npz", "data.shards=./~/x"])
    assert (read.run.dir, read.encoder.weights) == (f"{tmp_path}/run", f"{tmp_path}/f.npz")
    assert (read.data.source, read.data.shards) == ("", "./~/x")
    assert load("~/c.yaml").data.source == f"imagefolder://{tmp_path}/x?labels=none"


def test_what_must_be_there_is_named_without_what_need_not() -> None:
    code, text = command(["train"])
    assert code == 2
    assert text.strip().endswith("the following arguments are required: CONFIG")


def test_options_are_written_out() -> None:
    code, text = command(["sweep", "config.yaml", "--out", "x", "--vari", "field.depth=1,2"])
    assert code == 2
    assert "unrecognized arguments: --vari" in text
    assert "did you mean --var" in text
