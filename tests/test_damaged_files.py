"""Every file that a run, a data set or a study holds, damaged in every place: one line with its name, or read as it is.

No KeyError, TypeError or text of the JSON library reaches a user, also not from what works on with what was read.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rkdo_dist import checkpoint
from rkdo_dist.checkpoint import manifest
from rkdo_dist.data import prepare as preparation
from rkdo_dist.data.index import load_index
from rkdo_dist.export import pretrained
from rkdo_dist.frozen import clustering
from rkdo_dist.lock import DirectoryLock
from rkdo_dist.measure import scaling
from rkdo_dist.rundir import RunDirectory, RunError
from rkdo_dist.studies import audit, scaling_tables
from rkdo_dist.studies.report.groups import overview, read_groups
from tests.jobs import command

CONTENT = {"empty": b"", "a list": b"[]\n", "an empty object": b"{}\n", "null": b"null\n", "not UTF-8": b"\xff\xfe{}\n",
           "deep": b"[" * 99_999, "zeros": bytes(64), "a number": b"1e999\n"}  # fmt: skip
VALUES: list[Any] = [None, "x", -1, [], {"a": None}, math.nan, 10**400]


def damaged(document: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """A document with each of its values replaced or removed, down to a depth; of lists the first value."""
    if depth == 0 or not isinstance(document, dict | list):
        return
    places = list(document) if isinstance(document, dict) else list(range(min(1, len(document))))
    for place in places:
        for value in VALUES:
            changed = document.copy()
            changed[place] = value
            yield f"{place}={value!r:.20}", changed
        less = document.copy()
        del less[place]
        yield f"no {place}", less
        for what, inner in damaged(document[place], depth - 1):
            changed = document.copy()
            changed[place] = inner
            yield f"{place}.{what}", changed


def cases(content: bytes, depth: int = 3) -> Iterator[tuple[str, bytes]]:
    """A file's content damaged in many ways."""
    yield from CONTENT.items()
    yield "half", content[: len(content) // 2]
    document = json.loads(content)
    yield "a later format", json.dumps({**document, "format": 99}).encode()
    for what, changed in damaged(document, depth):
        yield what, json.dumps(changed).encode()


def refused(read: Callable[[], Any], file: Path, what: str, also: str = "\n") -> bool:
    """Whether it is refused; then by an error for users that is one line with the file's name, or its directory and
    the words `also`."""
    try:
        read()
    except (ValueError, OSError) as error:
        text = str(error)
        assert str(file) in text or (str(file.parent) in text and (file.name in text or also in text)), (what, text)
        assert "\n" not in text, (what, text)
        for word in ("Error", "Expecting", "line 1 column"):
            assert word not in text, (what, text)
        return True
    return False


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> Path:
    shutil.copytree(reference, tmp_path / "run")
    return tmp_path / "run"


def everything(run: Path) -> None:
    """What `rkdo status` and `rkdo compare` read and make of it."""
    directory = RunDirectory(run)
    directory.status()
    groups, _ = read_groups([run])
    overview(groups)


@pytest.mark.parametrize("name", ["status.json", "environment.json", "evaluations/6.json", "metrics.jsonl"])
def test_files_of_a_run(run: Path, name: str) -> None:
    file = run / name
    content = file.read_bytes()
    first, _, rest = content.partition(b"\n") if name.endswith(".jsonl") else (content, b"", b"")
    noticed = 0
    everything(run)
    for what, changed in cases(first, depth=2):
        file.write_bytes(changed.rstrip(b"\n") + b"\n" + rest if rest else changed)
        found = refused(lambda: everything(run), file, what)
        noticed += found
        assert found or what not in (*CONTENT, "half") or (what == "an empty object" and name == "environment.json")
        if what == "a later format":
            with pytest.raises(RunError, match="is of format 99, of a later version"):
                everything(run)
    assert noticed > 20


def test_a_state_of_a_checkpoint_that_is_signed_again(run: Path) -> None:
    root = run / "checkpoints" / "6"
    file = root / "state.json"
    config, noticed = RunDirectory(run).config(), 0
    for what, changed in cases(file.read_bytes(), depth=2):
        file.write_bytes(changed)
        (root / "manifest.json").write_bytes(manifest.manifest_of(root, 6))
        noticed += refused(
            lambda: RunDirectory(run).refuse_foreign(checkpoint.load(root), config), file, what, "other settings"
        )
    assert noticed > 40


def test_a_manifest_that_is_signed_again(run: Path) -> None:
    root = run / "checkpoints" / "6"
    file = root / "manifest.json"
    for what, changed in cases(file.read_bytes(), depth=2):
        try:
            document = json.loads(changed)
            document.pop("sha256", None)
            changed = manifest._signed(document)
        except (ValueError, AttributeError, TypeError, RecursionError):
            pass
        file.write_bytes(changed)
        if what.startswith("sha256") or what in ("no sha256", "files.no optimizer.safetensors"):
            continue  # it has been signed again, and a checkpoint need not have an optimizer
        assert refused(lambda: checkpoint.load(root), file, what), what


def test_an_index(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "index.json"
    noticed = 0
    for what, changed in cases((digits / "index.json").read_bytes()):
        file.write_bytes(changed)
        noticed += refused(lambda: load_index(tmp_path).split("train").samples, file, what, "no split 'train'")
    assert noticed > 60


def test_the_journal_of_a_preparation(tmp_path: Path) -> None:
    out = tmp_path / "out"
    preparation.prepare("digits", out)
    shards = json.loads((out / "index.json").read_text())["splits"]["train"]
    wanted = {
        name: json.loads((out / "index.json").read_text())[name]
        for name in ("source", "identity", "seed", "shard_size")
    }
    content = json.dumps({**wanted, "shards": [{**shard, "size": [8, 8]} for shard in shards]}).encode()
    (out / "index.json").unlink()
    file, noticed = out / ".prepare.json", 0
    for what, changed in cases(content):
        file.write_bytes(changed)
        noticed += refused(lambda: preparation._journal(out, wanted), file, what, "unfinished preparation of another")
    assert noticed > 40


ROWS = {
    "step": 6,
    "samples": 9,
    "rows": [{"sample": 1, "positive": 0.5, "rest": 0.0, "entropy": 0.1, "nearest": [[1, 0.5]]}],
}
ROW = {"group": "view", "view": "plain", "temperature": 0.1, "precision": 0.5, "error": 0.1, "rows": 1.0}
AUDIT = {"step": 6, "split": "train", "samples": 9, "of": 10, "seed": 1, "temperature": 0.1, "base": 0.1,
         "student": 0.2, "best": ROW, "rows": [ROW], "batch": 4, "kept": 0.3,
         "unlabelled": {"mutual": {"5": 0.5}, "overlap": {"plain": 0.5}}}  # fmt: skip
SHAPE = {"world": 1, "lanes": 4, "micro_batch": 8, "dimension": 16, "parameters": 99, "channels": 9, "column_views": 1,
         "report": 8, "walks": 2, "forwards": 1, "strategy": "single", "reduction": "exact", "exchange": "gather",
         "recompute": False, "labels": False, "persistent": False, "relational": False}  # fmt: skip
POINT = {"way": "exact", "world": 1, "machines": 1, "device": "CPU", "device_kind": "cpu", "cores": 2, "threads": 1,
         "shape": SHAPE, "seconds": 0.5, "wire": [["column", "all_reduce", 8, 1]], "phases": {"data": 0.1},
         "peak_bytes": [99], "losses": [1.0], "batch_digests": ["a"]}  # fmt: skip
CLUSTERS = {"accuracy": 0.5, "nmi": 0.5, "ari": 0.5, "loss": 0.1, "kmeans": dict.fromkeys(["accuracy", "nmi", "ari"]),
            "balance": {"smallest": 1, "largest": 2}, "request": {"control": "none"}, "losses": [0.1], "samples": 9,
            "labelled": 9, "clusters": 2}  # fmt: skip
ABOUT = {"library": "rkdo_dist", "encoder": {"backbone": "cifar_resnet8"}, "step": 6, "settings": {"field": {}},
         "transform": {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}, "evaluation": None}  # fmt: skip


def _audited(folder: Path) -> None:
    found = audit.find(folder)
    assert found is not None
    audit.table(found)
    audit.sentences(found)


def _scaled(folder: Path) -> None:
    study = scaling.study(scaling.read(folder))
    scaling_tables.tables(study)
    scaling_tables.notes(study)


OTHERS: dict[str, tuple[str, dict[str, Any], Callable[[Path], Any]]] = {
    "rows of a field": ("rows/6.json", ROWS, lambda folder: RunDirectory(folder).rows()),
    "an audit": ("audit.json", AUDIT, _audited),
    "measurements": ("1.json", {"points": [POINT]}, _scaled),
    "a scaling study": ("results.json", {"mode": "strong", "points": [POINT]}, _scaled),
    "clusters": ("clusters.json", CLUSTERS, lambda folder: clustering.table(clustering._read(folder))),
    "an encoder": (
        "config.json", ABOUT,
        lambda folder: pretrained._parsed((folder / "config.json").read_text(errors="replace"), str(folder)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", OTHERS)
def test_files_of_studies(which: str, tmp_path: Path) -> None:
    name, document, read = OTHERS[which]
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(document))
    read(tmp_path)
    noticed = 0
    for what, changed in cases(json.dumps(document).encode(), depth=4):
        file.write_bytes(changed)
        noticed += refused(lambda: read(tmp_path), file, what)
    assert noticed > 20


@pytest.mark.parametrize("content", [b"\xff" * 5000, b"\x1b[31mred\n\nnext", b""])
def test_the_note_in_a_lock_is_never_believed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(content)
    DirectoryLock(tmp_path).release()
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_pipe_in_place_of_a_file(run: Path, small: list[str], tmp_path: Path) -> None:
    """It would be waited for without an end."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for file in ("status.json", "config.yaml", "environment.json", "evaluations/6.json", "metrics.jsonl", ".lock"):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        (copy / file).unlink(missing_ok=True)
        os.mkfifo(copy / file)
        for words in (["status", str(copy)], ["compare", str(copy)], [*small, f"run.dir={copy}", "run.resume=auto"]):
            code, text = command(words)
            assert "Traceback" not in text
            assert code in (0, 2), text
        shutil.rmtree(copy)
    for words in (["index", str(pipe)], ["train", str(pipe)], [*small, f"data.shards={pipe}"],
                  ["scale", "--from", str(pipe)],
                  ["cluster", str(pipe), "--clusters", "2", "--out", "x"], ["map", str(pipe), "--out", "x"],
                  ["embed", str(run), str(pipe), "--out", str(tmp_path / "x.npz")],
                  ["embed", str(pipe), "x", "--out", str(tmp_path / "x.npz")],
                  [*small, f"encoder.weights={pipe}"], [*small, f"run.resume={pipe}"],
                  [*small, f"field.supervisor={pipe}"]):  # fmt: skip
        code, text = command(words)
        assert code == 2, (words, text)
        assert str(pipe) in text.replace("\n", ""), text
