"""Every command of the README is run: by make itself, or here, in the README's order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What this test is run by, or what an interactive shell needs.
BY_MAKE = re.compile(r"make (demo|test)$|source \.venv/bin/activate$")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_make_has_the_targets_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


def test_files_that_the_readme_names_are_there() -> None:
    for name in re.findall(r"(?:configs|launch|benchmarks)/[\w./-]+\.\w+", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path) -> None:
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = 0
    for line in commands():
        if BY_MAKE.match(line):
            continue
        answer = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert answer.returncode == 0, f"{line}\n{answer.stdout}\n{answer.stderr}"
        ran += 1
    assert ran >= 6


def test_the_python_example_runs() -> None:
    (example,) = blocks("python")
    answer = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
