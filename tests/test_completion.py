"""Shell completion, in a real bash; the scripts for zsh and fish hold the same words (no such shell is needed here)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from rkdo_dist import cli, config
from tests.jobs import command

KEYS = list(config.flatten(config.Config()))


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "rkdo.bash"
    code, text = command(["completion", "bash"])
    assert code == 0
    path.write_text(text)
    return path


def completed(script: Path, folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words, which are split as bash splits them: at = too."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"""
compopt() {{ :; }}
source {script}
COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}
_rkdo
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    answer = subprocess.run(["bash", "-eu", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert not answer.stderr
    return [line for line in answer.stdout.splitlines() if line]


def test_bash_completes_commands_options_settings_and_values(script: Path, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").touch()
    (tmp_path / "traces").mkdir()
    for words, expected in (
        (["tra"], ["train"]),
        (["st"], ["status"]),
        (["embed", "x", "--o"], ["--out", "--on-corrupt"]),
        (["export", "x", "--format", "t"], ["torchvision", "timm"]),
        (["completion", "b"], ["bash"]),
        (["train", "a.yaml", "field.cooling"], ["field.cooling="]),
        (["train", "a.yaml", "train.ep"], ["train.epochs="]),
        (["train", "a.yaml", "train.schedule", "="], ["constant", "cosine"]),
        (["train", "a.yaml", "train.schedule", "=", "cos"], ["cosine"]),
        (["train", "a.yaml", "data.allow_remote", "=", "t"], ["true"]),
        (["train", "a.yaml", "train.epochs", "=", "1"], []),  # any number
        (["status", "runs/a", "train.ep"], []),  # takes no settings
        (["train", ""], []),  # bash offers files
    ):
        assert completed(script, tmp_path, "rkdo", *words) == expected, words
    assert set(completed(script, tmp_path, "rkdo", "")) == {*cli._commands_of(cli._parser()), "--help", "--version"}
    found = completed(script, tmp_path, "rkdo", "train", "tra")
    assert found[:-2] == [f"{key}=" for key in KEYS if key.startswith("train.")]
    assert sorted(found[-2:]) == ["traces", "train.yaml"]
    sections = {key.partition(".")[0] for key in KEYS}
    offered = [word for s in sections for word in completed(script, tmp_path, "rkdo", "train", "a.yaml", f"{s}.")]
    assert sorted(word for word in offered if word != "train.yaml") == sorted(f"{key}=" for key in KEYS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_script_holds_every_command_option_and_setting(shell: str) -> None:
    code, text = command(["completion", shell])
    assert code == 0
    for name, parser in cli._commands_of(cli._parser()).items():
        assert name in text
        for action in parser._actions:
            for option in action.option_strings:
                assert not option.startswith("--") or (option if shell != "fish" else f"-l {option[2:]} ") in text
    for key in KEYS:
        assert key in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_an_unknown_shell_is_named() -> None:
    code, text = command(["completion", "tcsh"])
    assert code == 2
    assert "bash" in text
    assert "fish" in text
