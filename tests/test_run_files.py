"""Damaged files of a run directory: each message names the file, and no reader ends in a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs import command, metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> list[str]:
    """A run of two steps with an evaluation of each; treat it as read-only."""
    from tests.conftest import SMALL

    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(SMALL)
    arguments = ["train", str(folder / "small.yaml"), f"data.shards={digits}", f"run.dir={folder / 'run'}"]
    code, text = command([*arguments, "train.max_steps=2", "evaluate.at_end=true"])
    assert code == 0, text
    return arguments


READERS: dict[str, Callable[[Path], list[str]]] = {
    "status": lambda run: ["status", str(run)],
    "report": lambda run: ["report", str(run), "--out", str(run.with_name("report.html"))],
    "compare": lambda run: ["compare", str(run)],
}
BROKEN = {"empty": b"", "garbage": b"{", "list": b"[]\n", "not text": b"\xff\xfe\n", "deep": b"[" * 9999}
FILES = ["status.json", "metrics.jsonl", "evaluations/2.json", "environment.json", "config.yaml"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", BROKEN)
def test_every_reader_names_the_damaged_file(whole: list[str], tmp_path: Path, name: str, damage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[-1].removeprefix("run.dir="), run)
    (run / name).write_bytes(BROKEN[damage])
    refused = 0
    resume = [*whole, f"run.dir={run}", "run.resume=auto"]
    for reader, words in {**{r: words(run) for r, words in READERS.items()}, "resume": resume}.items():
        code, text = command(words)
        assert "Traceback" not in text, (reader, text)
        if code:
            assert code == 2, (reader, text)
            assert str(run / name) in text or f"{run} holds a run with other settings" in text, (reader, text)
            refused += 1
    assert refused


LINES = {
    "another step": b'{"step": 2, "epoch": 0, "loss": 1.0}\n',
    "no loss": b'{"step": 1, "epoch": 0}\n',
    "loss as text": b'{"step": 1, "epoch": 0, "loss": "x"}\n',
    "no epoch": b'{"step": 1, "loss": 1.0}\n',
    "nothing": b"{}\n",
    "no JSON": b"nonsense\n",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_damaged_line_is_not_carried_on(whole: list[str], tmp_path: Path, line: bytes) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[-1].removeprefix("run.dir="), run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([line, *lines[1:]]))
    code, text = command([*whole, f"run.dir={run}", "run.resume=auto"])
    assert code == 2
    assert f"{run / 'metrics.jsonl'}: line 1 is not the record of step 1" in " ".join(text.split())


def test_a_journal_that_is_too_short_or_longer(whole: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[-1].removeprefix("run.dir="), run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0])
    code, text = command([*whole, f"run.dir={run}", "run.resume=auto"])
    assert code == 2
    assert "metrics.jsonl ends at step 1, before the checkpoint of step 2" in " ".join(text.split())
    (run / "metrics.jsonl").write_bytes(b"".join([*lines, b'{"step": 3, "loss": 1.0, "half a li']))
    (run / "evaluations" / "notes.json").write_text("mine")
    code, text = command([*whole, f"run.dir={run}", "run.resume=auto", "train.max_steps=3"])
    assert code == 0, text
    assert [record["step"] for record in metrics(run)] == [1, 2, 3]


def test_a_path_is_no_markup(whole: list[str], tmp_path: Path) -> None:
    """What rich would read as the end of a colour that was never begun, or drop as a style."""
    for name in ("[/red]", "[bold]x", "m[/red]"):
        run = tmp_path / name
        words = [*whole, f"run.dir='{run}'", "train.max_steps=1", "evaluate.at_end=true"]
        for arguments in (words, [*words, "run.resume=auto"], ["report", str(run)], ["compare", str(run)]):
            code, text = command(arguments)
            assert code == 0, text
        assert f"done: {run}" in command([*words, "run.resume=auto"])[1]
    data = tmp_path / "d[/x]"
    for _ in range(2):
        code, text = command(["prepare", "digits", "--out", str(data)])
        assert code == 0, text
    code, text = command(["doctor", whole[1], f"data.shards='{data}'", f"run.dir='{tmp_path / '[/z]'}'"])
    assert code == 0, text
    out = tmp_path / "[/sweep]"
    code, text = command(
        ["sweep", whole[1], "--vary", "field.depth=0", "--set", f"data.shards='{data}'", "--out", str(out)]
    )
    assert code == 2, text
