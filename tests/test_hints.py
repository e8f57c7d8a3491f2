"""Errors that suggest the command that would have worked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rkdo_dist import cli
from rkdo_dist.commands import runs
from tests.jobs import command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Path) -> Path:
    """A working directory with two configurations and two runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / "settings" / f"{name}.yaml").write_text(f"run: {{dir: runs/{name}}}\n")
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(reference / "config.yaml", tmp_path / "runs" / name)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian settings/cats.yaml train.epochs=2", "did you mean: rkdo train settings/cats.yaml train.epochs=2"),
        ("xyzzy", "there is no command 'xyzzy'; `rkdo --help` lists them"),
        ("report runs/cats --output x.html", "did you mean --out? (rkdo report --help)"),
        ("train settings/cat.yaml", "No such file or directory; did you mean settings/cats.yaml?"),
        ("train digits-rdko.yaml", "did you mean configs/digits-rkdo.yaml?"),
        ("train runs/cats", "`rkdo train runs/cats/config.yaml run.resume=auto` continues it"),
        ("train settings/cats.yaml train.epohcs=2", "did you mean 'train.epochs'"),
        ("train settings/cats.yaml epochs=2", "e.g. train.epochs=2"),
        ("evaluate settings/cats.yaml", "it is a configuration: its runs go to runs/cats"),
        ("evaluate runs/cat", "it has no config.yaml; did you mean runs/cats?"),
        ("report runs", "there are runs in it, such as runs/"),
        ("status settings/dogs.yaml", "its runs go to runs/dogs"),
        ("status runs/digs", "did you mean runs/dogs?"),
        ("export runs/dosg --format torchvision --out x.pth", "did you mean runs/dogs?"),
    ],
)
def test_a_mistake_is_answered_with_what_would_have_worked(folder: Path, words: str, said: str) -> None:
    code, text = command(words.split())
    assert code == 2
    assert "Traceback" not in text
    assert said in text


def test_a_path_like_nothing_suggests_nothing(folder: Path) -> None:
    for words in ("train qqqqqqqq.yaml", "status qqqqqqqq"):
        text = command(words.split())[1]
        assert "did you mean" not in text
    assert "did you mean" not in command(["status", "runs/dogs"])[1]  # it is there, and has not begun


def test_settings_may_come_before_the_configuration() -> None:
    options = cli.parsed(["train", "train.epochs=2", "run.seed=1", "a.yaml", "data.workers=0"])
    assert options.config == "a.yaml"
    assert sorted(options.overrides) == ["data.workers=0", "run.seed=1", "train.epochs=2"]


@pytest.mark.parametrize(
    ("module", "extra"), [("pyarrow", "parquet"), ("timm", "timm"), ("wandb", "tracking"), ("yaml", "train")]
)
def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, extra: str, tmp_path: Path
) -> None:
    def missing(options: object) -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(runs, "_status", missing)
    code, text = command(["status", str(tmp_path)])
    assert code == 2
    assert f"pip install 'rkdo_dist[{extra}]'" in text


def test_help_of_all_has_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text = command(["--help"])
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    example = text.split("example:\n")[1].splitlines()[0].split()
    assert cli.parsed(example[1:]).config == "configs/digits-rkdo.yaml"
