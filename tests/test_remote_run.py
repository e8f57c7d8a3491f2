"""A whole run on shards behind http, with a token in the URL that nothing may show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.canaries import CANARIES, PASSWORD, guarded
from tests.jobs import command, fingerprint, metrics, run_of


@pytest.fixture
def address(digits: Path) -> Iterator[str]:
    with guarded(digits) as given:
        yield given


def test_the_same_run_from_http_and_no_token_left_behind(
    small: list[str], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))
    run = run_of(small)
    assert command(small)[0] == 0
    far = run.with_name("far")
    arguments = [*small, f"data.shards={address}", f"run.dir={far}"]
    code, text = command(arguments)
    assert code == 0, text
    assert fingerprint(far, 6) == fingerprint(run, 6)
    assert metrics(far) == metrics(run)
    for canary in CANARIES:
        assert canary not in text
        for path in [*far.rglob("*"), *(tmp_path / "cache").rglob("*")]:
            assert canary not in str(path)
            assert not path.is_file() or canary.encode() not in path.read_bytes(), path
    code, text = command(["evaluate", str(far), f"data.shards={address}"])
    assert code == 0, text
    assert not any(canary in text for canary in CANARIES)


def test_a_refusal_names_the_place_and_not_the_token(small: list[str], address: str) -> None:
    code, text = command([*small, f"data.shards={address.partition('?')[0]}?password=hunter2"])
    assert code == 2
    assert "127.0.0.1" in text
    assert "hunter2" not in text
    assert PASSWORD not in text
    assert "Traceback" not in text


def test_shards_cannot_be_a_command(small: list[str], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for place in (f"pipe:touch {canary}", f"file://{tmp_path}", "ftp://127.0.0.1/x"):
        code, text = command([*small, f"data.shards='{place}'"])
        assert code == 2, text
    assert not canary.exists()
