"""The command line itself: help with an example that can be typed, at 80 columns, and at once."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rkdo_dist import cli
from tests.conftest import ROOT
from tests.launching import environment


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


def failing(error: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`rkdo status x` with a command that fails."""
    code = "from rkdo_dist import cli\nfrom rkdo_dist.commands import runs\n"
    code += f"def fails(options): raise {error}\nruns._status = fails; cli.main()"
    words = [sys.executable, "-c", code, "status", "x"]
    return subprocess.run(
        words, capture_output=True, text=True, env={**environment(), **variables}, cwd=ROOT, timeout=120, check=False
    )


def test_a_fault_is_one_line_and_its_traceback_is_in_a_file(tmp_path: Path) -> None:
    error = "KeyError('http://user:CANARY@example.org/x')"
    done = failing(error, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    (file,) = tmp_path.glob("rkdo-fault-*.txt")
    assert "this is a fault of rkdo, please report it: KeyError" in done.stderr
    assert str(file) in done.stderr
    written = file.read_text()
    assert "in fails" in written
    assert "CANARY" not in written + done.stderr
    assert "Traceback" in failing(error, RKDO_TRACEBACK="1").stderr


@pytest.mark.parametrize("error", ["MemoryError()", 'RuntimeError("[enforce fail] can\'t allocate memory: 1 TB")'])
def test_too_little_memory_is_one_line_with_what_to_do(error: str) -> None:
    done = failing(error)
    assert done.returncode == 2
    assert "out of memory: lower train.micro_batch" in done.stderr
