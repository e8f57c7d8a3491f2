"""The command line itself: help with an example that can be typed, at 80 columns, and at once."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

import pytest

from rkdo_dist import cli


def commands() -> dict[str, argparse.ArgumentParser]:
    (added,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return added.choices


@pytest.mark.parametrize("name", commands())
def test_help_ends_with_an_example_that_can_be_typed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = commands()[name].format_help()
    assert max(map(len, text.splitlines())) <= 80
    example = text.split("example:\n")[1].splitlines()[0].strip()
    rkdo, command, *arguments = shlex.split(example)
    assert (rkdo, command) == ("rkdo", name)
    options = cli.parsed([command, *arguments])
    assert options.words == [command, *arguments]


def test_help_and_settings_do_not_wait_for_torch() -> None:
    code = "import sys; from rkdo_dist import cli; cli.parsed(['status', 'x']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    for words in (["--help"], ["train", "--help"], ["settings", "coupling"]):
        check = (
            "import sys\nfrom rkdo_dist import cli\n"
            f"try: cli.main({words!r})\nexcept SystemExit as end: assert not end.code\n"
            "assert 'torch' not in sys.modules and 'rich' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


def test_settings_may_stand_between_options() -> None:
    words = ["measure", "train.epochs=2", "a.yaml", "--steps", "3", "run.seed=1", "--out", "x", "data.workers=0"]
    options = cli.parsed(words)
    assert sorted([options.config, *options.overrides]) == ["a.yaml", "data.workers=0", "run.seed=1", "train.epochs=2"]
    for wrong in (["status", "x", "run.seed=1"], ["train", "a.yaml", "--fast"]):
        with pytest.raises(SystemExit):
            cli.parsed(wrong)
