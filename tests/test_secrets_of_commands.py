"""Tokens of addresses in every command that there is: the list of commands and arguments is the parser's own."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rkdo_dist import addresses, cli
from rkdo_dist.training import tracking
from tests.canaries import Arguments, assert_silent, guarded
from tests.jobs import command
from tests.test_tracking import StandIn

COMMANDS = cli._commands_of(cli._parser())
# Commands that are walked to their end: here, in test_secrets.py, or without any place for an address of data.
HERE = {"train", "audit", "field", "export", "embed", "cluster", "map", "compare", "status", "measure", "flops"}
THERE = {"report", "evaluate", "doctor", "index", "init", "sweep", "reproduce", "scale"}
NOWHERE = {"settings", "completion", "prepare", "verify-theory"}
SMALL = ["encoder.backbone=cifar_resnet8", "encoder.stem=imagenet", "data.workers=0", "evaluate.at_end=false"]
FIELD = ["field.recursion=persistent", "field.stored=24", "train.epochs=1", "train.batches_per_epoch=2"]


@pytest.fixture
def url(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The digits behind a password and a token; caches and temporary files are where the test looks."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with guarded(digits) as address:
        yield address


def test_every_command_is_walked() -> None:
    assert set(COMMANDS) == HERE | THERE | NOWHERE, "a command without a test of what it writes down"


def places(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Arguments of a command that take a text."""
    return [action for action in parser._actions if action.nargs != 0]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_token_in_place_of_any_argument(
    name: str, small: list[str], url: str, digits: Path, tmp_path: Path, reference: Path
) -> None:
    """Refused, or taken for what it is, and said nowhere: one argument after the other is an address of nothing."""
    nothing = url.replace("/?", "/nowhere?")
    plain = {  # what may stand in place of the arguments that must be there, by their names in help
        "CONFIG": small[1],
        "DIR": "out",
        "DIR_OR_URL": str(digits),
        "FEATURES": "features.npz",
        "FILE": "out.npz",
        "KEY=VALUE": "run.seed=1",
        "RUN": str(reference),
        "SOURCE": str(digits),
        "C": "3",
    }
    needed = [place for place in places(COMMANDS[name]) if place.required and place.nargs not in ("*", "?")]
    for place in places(COMMANDS[name]):
        for address in (nothing, f"data.source={nothing}", f"[{nothing}"):
            words = [name]
            for other in needed:
                value = other.choices[0] if other.choices else plain[str(other.metavar)]
                words += [*other.option_strings[:1], address if other is place else value]
            if place not in needed:
                words += [*place.option_strings[:1], address]
            code, text = command(words)
            assert code in (0, 2), (words, text)
            assert_silent(text, *tmp_path.iterdir())


def test_from_training_to_pictures(small: list[str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers are told what was asked for too: W&B reads the arguments of the process by itself."""
    mlflow = StandIn([])
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard", "wandb", "mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    run, file = tmp_path / "run", tmp_path / "features.npz"
    config = [small[1], *SMALL, f"data.shards={url}"]
    clusters = ["--clusters", "3", "--steps", "5", "--no-kmeans", "--out", "clusters"]
    train = ["train", *config, *FIELD, f"run.dir={run}", "run.trackers=[tensorboard,wandb,mlflow]"]
    monkeypatch.setattr(sys, "argv", ["rkdo", *train])
    with Arguments() as arguments:
        for words in (
            train,
            ["measure", *config, "--steps", "1", "--out", "measured.json"],
            ["flops", *config, "--repeats", "0", "--image-size", "8"],
            ["embed", str(run), url, "--split", "test", "--out", str(file)],
            ["embed", str(run), url, "--split", "test", "--out", "features.safetensors"],
            ["cluster", str(file), *clusters, "--images", url],
            ["map", str(file), "--samples", "40", "--perplexity", "5", "--iterations", "260", "--out", "map"],
            ["export", str(run), "--format", "safetensors", "--out", "encoder.safetensors"],
            ["audit", str(run), f"data.shards={url}", "--samples", "20", "--visits", "2"],
        ):
            monkeypatch.setattr(sys, "argv", ["rkdo", *words])
            code, text = command(words)
            assert code == 0, text
            assert_silent(text)
        monkeypatch.setenv(addresses.VARIABLE, url)
        for words in (
            ["field", str(run), "--out", "field"],
            ["compare", str(run), "--figure", "loss.svg"],
            ["status", str(run)],
        ):
            code, text = command(words)
            assert code == 0, text
            assert_silent(text)
    assert_silent("\n".join(arguments.seen) + str(mlflow.called), *tmp_path.iterdir())


def test_mlflow_itself(small: list[str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a server that refuses what it is asked for, and in the run directory (which it remembers, so last)."""
    pytest.importorskip("mlflow")
    train = ["train", small[1], *SMALL, f"data.shards={url}", "train.max_steps=1", "run.trackers=[mlflow]"]
    monkeypatch.setattr(sys, "argv", ["rkdo", *train])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for place, ends in ((url, 2), ("", 0)):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        if place:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
        code, text = command([*train, f"run.dir={tmp_path / f'run-{ends}'}"])
        assert code == ends, text
        assert_silent(text, *tmp_path.iterdir())
