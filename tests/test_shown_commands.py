"""Commands that README and docs show: every one parses and names commands, files and settings that exist.

`make nightly` also runs them, page by page, as a shell does.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rkdo_dist import cli
from rkdo_dist import config as configuration
from tests.launching import environment

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
# `make nightly` runs blocks of "bash"; those of "sh" need other nodes or hours and are only checked.
SHELL = ("bash", "sh")
OTHERS = ("cp", "mkdir", "sbatch", "source", "pip")
BY_HAND = re.compile(r"make \w+|source ")
SETTING = re.compile(r"\b([a-z_]+\.[a-z_]+)=")
FILE = re.compile(r"(?:configs|launch|benchmarks|examples|tests|tools)/[\w./-]*\w")


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands(page: Path, *languages: str) -> list[str]:
    lines = "".join(blocks(page, *languages)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def check(line: str) -> str:
    """The program that a line starts, after it has been checked as far as it can be without running it."""
    words = shlex.split(line, comments=True)
    settings = configuration.flatten(configuration.Config())
    for key in SETTING.findall(" ".join(words)):
        assert key in settings, f"{line}: no setting is called {key}"
    for name in FILE.findall(line):
        assert (ROOT / name).exists(), f"{line}: {name} is not there"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
    elif words[0] == "accelerate":
        check(shlex.join(["rkdo", *words[words.index("rkdo_dist") + 1 :]]))
    elif words[0].startswith("launch/"):
        assert os.access(ROOT / words[0], os.X_OK), line
    elif words[0] == "python" and words[1].startswith("examples/"):
        compile((ROOT / words[1]).read_text("utf-8"), words[1], "exec")
    elif words[0] == "rkdo":
        options = cli.parsed(words[1:])  # ends the process where an option or a command does not exist
        config = getattr(options, "config", None)
        if config and Path(config).parts[0] == "configs":
            configuration.load(ROOT / config, getattr(options, "overrides", ()))
    else:
        assert words[0] in OTHERS, line
    return words[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse_and_name_what_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [part for line in commands(page, *SHELL) for part in line.split("&&")]
    try:
        started = {check(part) for part in shown}
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if page == README:
        assert {"make", "rkdo", "accelerate"} <= started
    for command in re.findall(r"`rkdo ([a-z][a-z-]*)", page.read_text("utf-8")):
        with pytest.raises(SystemExit) as end:
            cli.parsed([command, "--help"])
        assert end.value.code == 0, f"{page.name}: rkdo {command}"
    for target in re.findall(r"`make ([a-z]+)", page.read_text("utf-8")):
        check(f"make {target}")


@pytest.mark.parametrize(
    "line",
    [
        "rkdo tarin configs/digits-rkdo.yaml",
        "rkdo train configs/digits-rkdo.yaml train.epohcs=2",
        "rkdo train configs/digits.yaml",
        "rkdo sweep configs/digits-rkdo.yaml --set field.dept=3",
        "rkdo report runs/a --output page.html",
        "accelerate launch -m rkdo_dist train configs/digits-rkdo.yaml train.epochs=many",
        "launch/multi-node.sh 2 0 node-a 8 configs/cifar10-rkdo.yaml",
        "make tests",
        "curl https://example.org",
    ],
)
def test_a_command_that_would_fail_is_found(line: str) -> None:
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check(line)


def test_links_and_files_of_the_readme_are_there() -> None:
    text = README.read_text("utf-8")
    for name in FILE.findall(text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["README.md", "docs/loss.md"])
def test_examples_of_the_loss_run(name: str) -> None:
    examples = blocks(ROOT / name, "python")
    assert examples
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, name, "exec"), namespace)


# --- as a shell runs them -----------------------------------------------------------------------------------------


def run_page(page: Path, folder: Path) -> int:
    """Run a page's commands and Python in its order; how many there were."""
    for name in ("configs", "launch", "examples", "benchmarks"):
        if not (folder / name).exists() and (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    ran = 0
    for text in blocks(page, "bash", "python"):
        lines = commands_of(text)
        for words in lines:
            answer = subprocess.run(
                words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900, check=False
            )
            assert answer.returncode == 0, f"{words[-1]}\n{answer.stdout}\n{answer.stderr}"
            ran += 1
    return ran


def commands_of(block: str) -> list[list[str]]:
    if re.match(r"(import|from) ", block):
        return [[sys.executable, "-c", block]]
    lines = block.replace("\\\n", " ").splitlines()
    return [["bash", "-c", line] for line in lines if line.strip() and not BY_HAND.match(line)]


@pytest.fixture(scope="module")
def after_the_readme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and runs that a reader of the README has."""
    folder = tmp_path_factory.mktemp("readme")
    assert run_page(README, folder) >= 5
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash") and p != README], ids=lambda p: p.name)
def test_every_command_runs(page: Path, after_the_readme: Path, tmp_path: Path) -> None:
    """Every page begins where the README ends, but for docs/start.md, which begins with nothing."""
    folder = tmp_path / "reader"
    if page.name == "start.md":
        folder.mkdir()
    else:
        shutil.copytree(after_the_readme, folder, symlinks=True)
    run_page(page, folder)
