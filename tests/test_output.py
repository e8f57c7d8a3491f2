"""Lines for people may have no reader, and the disk may be full: the run goes on, or says why it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import rkdo_dist
from rkdo_dist.diagnostics import lasting_output
from tests.conftest import FORTY, ROOT
from tests.disks import small_disk
from tests.jobs import command, fingerprint, metrics, run_of
from tests.launching import environment


def test_what_nobody_reads_is_dropped() -> None:
    reads, writes = os.pipe()
    before = sys.stderr
    with os.fdopen(writes, "w") as stream:
        sys.stderr = stream
        try:
            with lasting_output() as (_, error):
                print("first", file=sys.stderr, flush=True)
                os.close(reads)
                for _ in range(3):
                    print("second", file=sys.stderr, flush=True)
            assert "Broken pipe" in error.lost
        finally:
            sys.stderr = before


@pytest.mark.slow
@pytest.mark.parametrize("redirected", ["2>&1 | head -1", "> /dev/full 2>&1", "1>&- 2>&-"])
def test_a_run_goes_on_without_anybody_who_reads(small: list[str], reference: Path, redirected: str) -> None:
    words = " ".join(f"'{word}'" for word in [sys.executable, "-m", "rkdo_dist", *small])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} {redirected}"], env=environment(), cwd=ROOT, timeout=240
    )
    assert done.returncode == 0
    run = run_of(small)
    assert fingerprint(run, 6) == fingerprint(reference, 6)
    assert metrics(run) == metrics(reference)
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "complete"
    assert ("lines for people were lost" in status.get("remark", "")) == (redirected != "1>&- 2>&-")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "8m") as place:
        yield place


def test_a_full_disk_under_the_journal(small: list[str], disk: Path, straight: Path) -> None:
    class Filler(rkdo_dist.Callback):
        def on_checkpoint(self, facts: dict[str, Any]) -> None:
            with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)) == 4096:
                    pass

    words = [*small, *FORTY, "train.checkpoint_every=10", f"run.dir={disk / 'run'}"]
    settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words[2:])}
    with pytest.raises(OSError, match=r"a line of \d+ bytes did not fit, \d+ bytes are free") as error:
        rkdo_dist.train(words[1], settings=settings, callbacks=[Filler()])
    run = disk / "run"
    assert str(run) in str(error.value)
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "failed"
    assert "No space left on device" in status["message"]
    lines = (run / "metrics.jsonl").read_bytes()
    assert lines.endswith(b"\n")
    assert [json.loads(line)["step"] for line in lines.splitlines()] == list(range(1, lines.count(b"\n") + 1))
    (disk / "filler").unlink()
    code, text = command([*words, "run.resume=auto"])
    assert code == 0, text
    assert fingerprint(run, 40) == fingerprint(straight, 40)
    assert metrics(run) == metrics(straight)
