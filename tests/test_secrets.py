"""Tokens of addresses: in no file, name, process argument, figure, table or message of any command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rkdo_dist import addresses
from tests.canaries import Arguments, assert_silent, guarded
from tests.jobs import ROOT, command, metrics

TINY = ["encoder.backbone=cifar_resnet8", "encoder.stem=imagenet", "train.max_steps=1", "data.workers=0"]


@pytest.fixture
def url(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The digits behind a password and a token."""
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with guarded(digits) as address:
        yield address


def config_of(small: list[str]) -> str:
    return small[1]


def test_train_evaluate_doctor_report_and_index(
    small: list[str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    words = [config_of(small), *TINY, f"data.shards={url}", f"run.dir={run}"]
    for arguments in (["doctor", *words], ["train", *words], ["report", str(run)]):
        code, text = command(arguments)
        assert code == 0, text
        assert_silent(text, run, cache)
    place, shard = addresses.shown(url), url.replace("/?", "/train-00000.tar?")
    assert f"shards: {place}" in (run / "config.yaml").read_text()
    code, text = command(["evaluate", str(run)])
    assert code == 2  # without its secret parts the address leads nowhere
    monkeypatch.setenv(addresses.VARIABLE, f"http://elsewhere/?token=x {url} {shard}")
    for arguments in (
        ["evaluate", str(run)],
        ["train", str(run / "config.yaml"), "run.resume=auto"],
        ["index", addresses.shown(shard), "--out", str(tmp_path / "index")],
    ):
        code, text = command(arguments)
        assert code == 0, text
        assert_silent(text, run, cache, *tmp_path.glob("index"))
    monkeypatch.delenv(addresses.VARIABLE)
    code, text = command(["index", shard, "--out", str(tmp_path / "again")])
    assert code == 0, text
    assert_silent(text, tmp_path / "again", cache)


def test_starting_configurations(url: str, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    code, text = command(["init", str(out), "--data", url])
    assert code == 0, text
    assert any(addresses.shown(url) in path.read_text() for path in out.rglob("*.yaml"))
    assert_silent(text, out, tmp_path / "cache")


def test_a_sweep_over_addresses(small: list[str], url: str, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = ["sweep", config_of(small), "--vary", f"data.shards='{url}','{digits}'", "--out", str(out)]
    changes = [word for change in [*TINY, "evaluate.at_end=true", f"data.shards={url}"] for word in ("--set", change)]
    with Arguments() as arguments:
        code, text = command([*words, *changes, "--processes", "2"])
    logs = "\n".join(path.read_text() for path in out.rglob("*.log"))
    assert code == 0, text + logs
    assert any("rkdo_dist train" in seen for seen in arguments.seen)
    assert_silent(text + "\n".join(arguments.seen), out, tmp_path / "cache")
    assert "127.0.0.1" in (out / "table.md").read_text()
    one, other = (metrics(path.parent) for path in out.rglob("metrics.jsonl"))
    assert one == other  # the child had the whole address
    code, text = command([*words[:3], f"data.shards='{url}','{url}x'", "--out", str(tmp_path / "twice")])
    assert code == 2
    assert "a value is given twice" in text  # told apart by nothing that may be shown
    assert_silent(text)


def test_a_reproduction(url: str, tmp_path: Path) -> None:
    out = tmp_path / "reproduce"
    words = ["reproduce", "--datasets", "cifar10", "--data", f"cifar10={url}", "--epochs", "1", "--seeds", "1"]
    changes = [word for change in [*TINY[:2], TINY[3], "train.batches_per_epoch=1"] for word in ("--set", change)]
    with Arguments() as arguments:
        code, text = command([*words, *changes, "--out", str(out), "--processes", "2"])
    logs = "\n".join(path.read_text() for path in out.rglob("*.log"))
    assert code == 0, text + logs
    assert any("rkdo_dist train" in seen for seen in arguments.seen)
    assert_silent(text + "\n".join(arguments.seen), out, tmp_path / "cache")
    code, text = command([*words[:4], f"cifar10={url.replace('/?', '/nowhere?')}", "--out", str(tmp_path / "none")])
    assert code == 2
    assert "is left out" in text
    assert_silent(text)


def test_a_scaling_study(small: list[str], url: str, tmp_path: Path) -> None:
    out = tmp_path / "scale"
    words = ["scale", config_of(small), *TINY[:2], TINY[3], "--world-sizes", "1", "--steps", "1", "--out", str(out)]
    with Arguments() as arguments:
        code, text = command([*words, f"data.source=shards://{url}"])
    assert code == 0, text
    assert any("rkdo_dist measure" in seen for seen in arguments.seen)
    assert_silent(text + "\n".join(arguments.seen), out, tmp_path / "cache")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "CONFIG", "data.shards=[URL]"],
        ["train", "CONFIG", "data.shards=URL: x"],
        ["train", "CONFIG", "data.shards={a: 'URL'}"],
        ["train", "CONFIG", "URL"],
        ["train", "CONFIG", "data.split=URL", "data.shards=DIGITS", "run.dir=RUN"],
        ["train", "CONFIG", "field.objective=URL"],
        ["train", "CONFIG", "train.epochs=URL"],
        ["train", "CONFIG", "--shards=URL"],
        ["train", "URL"],
        ["train", "CONFIG", "data.shards=NOWHERE", "run.dir=RUN"],
        ["train", "CONFIG", "data.shards=ftp://user:p4ssw0rd-canary@h/x?t0ken-canary", "run.dir=RUN"],
        ["train", "CONFIG", "data.shards=http://user:p4ssw0rd-canary@[::1/x?t0ken-canary", "run.dir=RUN"],
        ["URL"],
        ["doctor", "CONFIG", "data.shards=[URL]"],
        ["evaluate", "URL"],
        ["report", "URL"],
        ["compare", "URL"],
        ["status", "URL"],
        ["index", "URL"],
        ["index", "DIGITS", "URL"],
        ["prepare", "URL", "--out", "RUN"],
        ["init", "RUN", "--data", "NOWHERE"],
        ["init", "RUN", "--data", "[URL]"],
        ["settings", "--URL"],
        ["flops", "CONFIG", "URL"],
        ["measure", "CONFIG", "data.shards=NOWHERE", "--out", "RUN"],
        ["sweep", "CONFIG", "--vary", "data.shards"],
        ["sweep", "CONFIG", "--vary", "data.shards=[URL", "--out", "RUN"],
        ["sweep", "CONFIG", "--vary", "data.shards=[URL,x]", "--out", "RUN"],
        ["sweep", "CONFIG", "--vary", "run.dir=URL", "--out", "RUN"],
        ["sweep", "CONFIG", "--variant", "data.shards=URL", "--out", "RUN"],
        ["sweep", "CONFIG", "--seeds", "URL", "--vary", "field.depth=1"],
        ["sweep", "CONFIG", "--vary", "field.depth=1", "--set", "field.depth=URL", "--out", "RUN"],
        ["reproduce", "--set", "data.shards=URL", "--out", "RUN"],
        ["reproduce", "--data", "cifar10=URL", "--datasets", "stl10", "--out", "RUN"],
        ["scale", "CONFIG", "data.shards=[URL]", "--out", "RUN"],
    ],
    ids=lambda words: " ".join(words),
)
def test_no_message_echoes_a_token(words: list[str], small: list[str], url: str, digits: Path, tmp_path: Path) -> None:
    nowhere = url.replace("/?", "/nowhere?")
    places = {
        "NOWHERE": nowhere,
        "CONFIG": config_of(small),
        "RUN": str(tmp_path / "out"),
        "DIGITS": str(digits),
        "URL": url,
    }
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    code, text = command(words)
    assert code not in (0, None), text
    assert text
    assert_silent(text, *tmp_path.glob("out"))


@pytest.mark.parametrize(
    ("text", "silent"),
    [
        ("http://user:P@host:80/a/b.tar?sig=T", "http://host:80/a/b.tar"),
        ("https://T@host/a", "https://host/a"),
        ("s3://bucket/a?T#T", "s3://bucket/a"),
        ("http://u:pa/ss@h/x", "http://h/x"),
        ("http://u:pa?ss@h/x?T", "http://h/x"),
        ("http://[::1]:8000/x?T", "http://[::1]:8000/x"),
        ("a ['http://u:P@h/x?T'] (list), http://i/y", "a ['http://h/x'] (list), http://i/y"),
        ("http:///user:P@h/x?T", "http:///h/x"),
        ("http:/user:P@h/x?T", "http:/h/x"),
        ("http://a/x?T,http://u:P@b/y?T", "http://a/x,http://b/y"),
        ("hf://datasets/name@revision/x", "hf://datasets/name@revision/x"),
        ("cannot read http://127.0.0.1:8000: gone", "cannot read http://127.0.0.1:8000: gone"),
        ("shards://http://u:P@h/x?T", "shards://http://h/x"),
        ("cannot read http://u@P:h/x, nor http://i/y", "cannot read http://, nor http://i/y"),
        ("http://u@v:P@h:80/x", "http://h:80/x"),
        ("'http://u:a P@s/x' is no address", "'http://s/x' is no address"),
        ("http://a u:P/a P@[::1]:80/x?T", "http://[::1]:80/x"),
        ("http://h:80/x is gone: ask a@b", "http://h:80/x is gone: ask a@b"),
        ("torchvision://CIFAR10?root=a&download=true", "torchvision://CIFAR10?root=a&download=true"),
        ("/a/b?c@d: no address", "/a/b?c@d: no address"),
    ],
)
def test_what_is_shown_of_an_address(text: str, silent: str) -> None:
    assert addresses.shown(text) == silent
    assert addresses.shown(silent) == silent


MISTYPED = [
    "HtTp:///{login}@h/x?{token}", "http:\\\\{login}@h\\x?{token}", "http//{login}@h/x?{token}", "s3;//h/x?{token}",
    "//{login}@h/x?{token}", "https:{login}@h/x?token={token}", "{login}@h/x?token={token}",
    "http\uff1a//{login}@h/?{token}", "imagefolder://{login}@h/x?token={token}",
    "http%3A%2F%2Fuser%3Ap4ssw0rd-canary%40h%2Fx%3F{token}", "http://h/x;token={token}", "http://user@{token}:h/x",
    "http://a {token}:{token} {token}@h/x", "http//{login} {token}@h/x", "/h/x?a=b&sig={token}",
]  # fmt: skip


@pytest.mark.parametrize("text", MISTYPED)
def test_a_mistyped_address_is_quoted_without_its_secrets(text: str, small: list[str], tmp_path: Path) -> None:
    address = text.format(login="user:p4ssw0rd-canary", token="t0ken-canary")
    for words in (
        ["train", config_of(small), f"data.source={address}", f"run.dir={tmp_path / 'run'}"],
        ["train", address],
        ["train", config_of(small), address],
        ["prepare", address, "--out", str(tmp_path / "out")],
        ["index", address],
        ["sweep", config_of(small), "--vary", address],
        ["report", address],
        [address],
    ):
        code, text = command(words)
        assert code == 2, (words, text)
        assert_silent(text)
    for plain in (
        "/a/b?c@d",
        "hf://datasets/a@b/x",
        "torchvision://CIFAR10?root=a",
        "e.g. http://127.0.0.1:80: gone",
        "a:b",
    ):
        assert addresses.said(plain) == plain


def test_a_long_message_is_looked_through_in_time_that_grows_with_its_length() -> None:
    for word in ("a:", "%41:", "a@b:", "?token", "http:/", ")"):  # minutes to hours, where a pattern tries all pairs
        assert addresses.said(word * 20_000 + "x").endswith("x")


def test_what_a_child_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(addresses.VARIABLE, raising=False)
    settings: list[Any] = [3, "plain", None, "http://h/open", "shards://http://u:P@h/x?T"]
    assert addresses.handed_on({"A": "1"}, settings[:4]) == {"A": "1"}
    told = addresses.handed_on({"A": "1", addresses.VARIABLE: "http://h/y?U"}, settings)
    assert told == {"A": "1", addresses.VARIABLE: "http://u:P@h/x?T http://h/y?U"}
    monkeypatch.setenv(addresses.VARIABLE, told[addresses.VARIABLE])
    assert addresses.whole("http://h/x") == "http://u:P@h/x?T"
    assert addresses.whole("http://h/y") == "http://h/y?U"
    assert addresses.whole("http://h/z") == "http://h/z"
    told = addresses.handed_on({}, ["http://u:a P@h/x"])
    monkeypatch.setenv(addresses.VARIABLE, told[addresses.VARIABLE])
    assert addresses.whole("http://h/x") == "http://u:a%20P@h/x"
    assert addresses.whole("http://h/x?other") == "http://h/x?other"  # what is given whole is left as it is
