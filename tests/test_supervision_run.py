"""Whole runs with supervisors of every kind and both deliveries: ranks, workers, resume, files, mistakes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rkdo_dist.data.errors import DataError
from rkdo_dist.data.given import read_rows
from rkdo_dist.data.index import load_index
from rkdo_dist.data.shards import keys_of, labels_of
from rkdo_dist.data.stream import evaluation_stream
from rkdo_dist.field.neighbours import nearest
from tests.jobs import command, fingerprint, kill_and_resume, metrics, on_ranks, run_of
from tests.pictures import image_folder
from tests.test_persistent_run import everything

TWO = ["train.epochs=2", "train.batches_per_epoch=3"]
NEIGHBOURS = [
    "field.supervisor=neighbours",
    "field.neighbours=6",
    "field.mutual=true",
    "field.walk=2",
    "field.stored=9",
]


@pytest.fixture(scope="session")
def features(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixels of the training split with their keys, in another order, after rows of another split."""
    index = load_index(digits)
    pixels = [x.images.flatten(1).numpy() for _, x in evaluation_stream(index, "train", 256)]
    x = np.concatenate(pixels).astype(np.float32)[::-1]
    keys = np.array(keys_of(index, "train"))[::-1]
    path = tmp_path_factory.mktemp("features") / "pixels.npz"
    other = np.zeros((3, x.shape[1]), dtype=np.float32)
    np.savez(
        path,
        features=np.concatenate([other, x]),
        keys=np.concatenate([keys[:3], keys]),  # the same names in another split
        splits=np.array(["test"] * 3 + ["train"] * len(x)),
    )
    return path


def trained(arguments: list[str], *more: str) -> Path:
    code, text = command([*arguments, *more])
    assert code == 0, text
    return run_of([*arguments, *more])


def refused(arguments: list[str], *more: str) -> str:
    code, text = command([*arguments, *more])
    assert code == 2, text
    assert "Traceback" not in text
    assert not (run_of(arguments) / "metrics.jsonl").exists()
    return " ".join(text.split())


@pytest.mark.parametrize("delivery", ["restricted", "sampled"])
def test_one_run_on_1_2_and_4_processes(small: list[str], delivery: str) -> None:
    arguments = [*small, *TWO, *NEIGHBOURS, f"field.delivery={delivery}", "field.debias=0.1"]
    run = trained(arguments)
    whole, journal = everything(run, 6), metrics(run)
    for world, extra in ((2, ["data.workers=2"]), (4, ["train.recompute=true"])):
        other = [*arguments, *extra, f"run.dir={run}-{world}"]
        answers = on_ranks(world, other)
        assert [code for code, _ in answers] == [0] * world, answers
        assert everything(run_of(other), 6) == whole
        assert metrics(run_of(other)) == journal


@pytest.mark.parametrize("delivery", [pytest.param("restricted", marks=pytest.mark.nightly), "sampled"])
def test_killed_runs_continue_bit_for_bit_on_other_numbers_of_processes(small: list[str], delivery: str) -> None:
    arguments = [*small, *TWO, *NEIGHBOURS, f"field.delivery={delivery}", "train.checkpoint_every=1"]
    run = run_of(arguments)
    straight = trained(arguments, f"run.dir={run}-straight")
    kill_and_resume(arguments, [(2, 2), (1, 4)])  # inside both epochs
    trained(arguments, "run.resume=auto", "data.workers=1")
    assert everything(run, 6) == everything(straight, 6)
    assert metrics(run) == metrics(straight)


def test_persistent_rows_of_both_views_from_a_configuration(small: list[str]) -> None:
    """k != i: any number of processes, kill -9, p(0) of neighbours with a uniform share, moved every second epoch."""
    arguments = [*small, "train.epochs=4", "train.batches_per_epoch=2", "train.checkpoint_every=1"]
    arguments += ["field.recursion=persistent", "field.pairing=joint", "field.stored=24", "field.coupling_every=2"]
    arguments += ["field.supervisor=neighbours", "field.debias=0.1"]
    run = run_of(arguments)
    straight = trained(arguments, f"run.dir={run}-straight")
    drifts = [record["row_drift"] > 0 for record in metrics(straight)]
    assert drifts == [False, False, True, True] * 2
    kill_and_resume(arguments, [(4, 5)])
    trained(arguments, "run.resume=auto")
    assert everything(run, 8) == everything(straight, 8)
    assert metrics(run) == metrics(straight)


def test_drawing_of_the_identity_is_no_change_and_of_others_is_one(small: list[str]) -> None:
    run = run_of(small)
    plain = trained(small, *TWO)
    drawn = trained(small, *TWO, "field.delivery=sampled", f"run.dir={run}-drawn")
    assert fingerprint(drawn, 6) == fingerprint(plain, 6)
    labels = trained(small, *TWO, "field.delivery=sampled", "field.supervisor=labels", f"run.dir={run}-labels")
    assert metrics(labels)[0]["loss"] != metrics(plain)[0]["loss"]


def test_rkdo_without_recursion_is_infonce(small: list[str]) -> None:
    run = run_of(small)
    none = trained(small, "field.recursion=none")
    infonce = trained(small, "field.objective=infonce", f"run.dir={run}-infonce")
    assert fingerprint(none, 6) == fingerprint(infonce, 6)


def test_labels_supervise_any_objective(small: list[str]) -> None:
    run = run_of(small)
    supcon = trained(small, "field.objective=supcon")
    own = ["field.objective=infonce", "field.supervisor=labels", "field.pairing=joint", "field.temperature=0.1"]
    assert fingerprint(trained(small, *own, f"run.dir={run}-own"), 6) == fingerprint(supcon, 6)
    rkdo = trained(small, "field.supervisor=labels", "field.debias=0.1", f"run.dir={run}-rkdo")
    assert metrics(rkdo)[0]["loss"] != metrics(supcon)[0]["loss"]
    assert metrics(rkdo)[0]["kl_3"] > 0


def test_given_features_are_matched_by_key(small: list[str], features: Path, digits: Path) -> None:
    """The rows in the checkpoint are even over a sample and those nearest to its own pixels."""
    run = trained(small, f"field.features={features}", "field.supervisor=neighbours", "field.neighbours=4")
    index = load_index(digits)
    x = torch.cat([b.images.flatten(1) for _, b in evaluation_stream(index, "train", 256)]).float()
    expected = torch.cat([torch.arange(len(x))[:, None].int(), nearest(x, 4)[0]], 1)
    found = stored_columns(run)
    assert torch.equal(found.sort(1).values, expected.sort(1).values)
    labels = torch.tensor(labels_of(index, "train"))
    assert (labels[found.long()] == labels[:, None]).float().mean() > 0.9  # digits near each other are the same


def stored_columns(run: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    files = sorted((run / "checkpoints").rglob("rows.*.safetensors"))
    newest = max(int(f.parts[-3]) for f in files)
    return torch.cat([load_file(f)["columns"] for f in files if int(f.parts[-3]) == newest])


def rows_file(path: Path, row: list, column: list, p: list) -> Path:
    np.savez(path, row=np.array(row), column=np.array(column), p=np.array(p))
    return path


def test_rows_of_a_file_by_key_and_by_position(small: list[str], digits: Path, tmp_path: Path) -> None:
    """Each sample supervised by itself and the next one; named by key, and by position in another order."""
    index, run = load_index(digits), run_of(small)
    keys = keys_of(index, "train")
    n = len(keys)
    here, there = list(range(n)), [(i + 1) % n for i in range(n)]
    positions = rows_file(tmp_path / "positions.npz", here + here, here + there, [0.75] * n + [0.25] * n)
    named = [[keys[i] for i in x] for x in (here[::-1] + here, there[::-1] + here)]
    by_key = rows_file(tmp_path / "keys.npz", *named, [0.25] * n + [0.75] * n)
    first = trained(small, f"field.supervisor={positions}", "field.objective=rkdo")
    assert torch.equal(stored_columns(first), torch.tensor([here, there]).T.int())
    second = trained(small, f"field.supervisor={by_key}", "field.objective=rkdo", f"run.dir={run}-keys")
    assert fingerprint(first, 6) == fingerprint(second, 6)
    assert metrics(first)[0]["row_mass"] < 1


def test_rows_of_a_parquet_file(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"row": ["a", "b", "a"], "column": ["a", "b", "b"], "p": [0.75, 1.0, 0.25]}
    parquet.write_table(sys.modules["pyarrow"].table(table), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet", 2, lambda: ["a", "b"])
    assert rows.dense().tolist() == [[0.75, 0.25], [0, 1]]
    (tmp_path / "text.parquet").write_text("no table")
    for name, reason in (("text", "magic|minimum|footer"), ("none", "no such file")):
        with pytest.raises(DataError, match=rf"{name}.parquet cannot be read as a .parquet file: .*({reason})"):
            read_rows(tmp_path / f"{name}.parquet", 2, list)


@pytest.mark.parametrize(("change", "words"), [
    (lambda r, c, p: (r, c, [0.5, *p[1:]]), ["rows must sum to 1", "sample 0", "0.5"]),
    (lambda r, c, p: (r, c, [np.nan, *p[1:]]), ["p must be above 0 and finite", "row 0"]),
    (lambda r, c, p: (r[1:], c[1:], p[1:]), ["no row for 1 of the", "position 0"]),
    (lambda r, c, p: (r, [10**6, *c[1:]], p), ["column 1000000 is not one of the"]),
    (lambda r, c, p: ([f"x{i}" for i in r], c, p), ["row 'x0' is not the key"]),
    (lambda r, c, p: ([0, *r], [0, *c], [0.5, 0.5, *p[1:]]), ["row 0 has column 0 twice"]),
    (lambda r, c, p: (r, c[1:], p), ["must be equally long"]),
    (lambda r, c, p: (r, [x + 0.5 for x in c], p), ["column must be keys or positions"]),
])  # fmt: skip
def test_mistakes_in_rows(small: list[str], digits: Path, tmp_path: Path, change, words: list[str]) -> None:
    n = load_index(digits).split("train").samples
    path = rows_file(tmp_path / "rows.npz", *change(list(range(n)), list(range(n)), [1.0] * n))
    text = refused(small, f"field.supervisor={path}")
    assert all(word in text for word in ["rows.npz", *words]), text


def test_mistakes_in_files_and_settings(small: list[str], features: Path, tmp_path: Path) -> None:
    knn = ["field.supervisor=neighbours"]
    with np.load(features) as file:
        arrays = dict(file)
    lost, broken, short = (tmp_path / f"{name}.npz" for name in ("lost", "broken", "short"))
    np.savez(lost, **{**arrays, "keys": np.char.add("other/", arrays["keys"])})
    arrays["features"][40, 3] = np.nan
    np.savez(broken, **arrays)
    np.savez(short, features=arrays["features"][:9])
    (tmp_path / "text.npz").write_text("no archive")
    for more, words in (
        ([*knn, "field.neighbours=100000"], ["field.neighbours=100000", "must lie in [1, "]),
        ([*knn, "field.walk=0"], ["field.walk", "at least 1"]),
        ([*knn, f"field.features={lost}"], ["lost.npz has no features for", "rkdo embed"]),
        ([*knn, f"field.features={broken}"], ["broken.npz: features must be finite"]),
        ([*knn, f"field.features={short}"], ["short.npz has 9 rows and no keys"]),
        ([*knn, f"field.features={tmp_path}/none.npz"], ["none.npz cannot be read", "no such file"]),
        ([*knn, f"field.features={tmp_path}/text.npz"], ["text.npz cannot be read"]),
        ([f"field.supervisor={tmp_path}/none.npz"], ["none.npz cannot be read", "no such file"]),
        ([f"field.supervisor={features}"], ["pixels.npz has no row"]),
        (["field.supervisor=neighbors"], ["field.supervisor must be identity, labels, neighbours", "'neighbors'"]),
        (["field.walk=2"], ["field.walk=2", "field.supervisor=neighbours"]),
        ([*knn, "data.on_corrupt=skip"], ["data.on_corrupt=abort", "field.delivery=sampled"]),
        (["field.delivery=sampled", "field.recursion=persistent"], ["field.delivery=sampled", "move at every step"]),
        (["field.supervisor=labels", "field.recursion=persistent"], ["field.supervisor=labels", "as its class"]),
        (["field.coupling_every=2"], ["field.coupling_every=2", "field.recursion=persistent"]),
    ):
        text = refused(small, *more)
        assert all(word in text for word in words), text


def test_labels_are_asked_for_where_they_are_drawn(small: list[str], tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", train=40, test=3)
    small = [word for word in small if not word.startswith("data.shards")]
    source = [f"data.source=imagefolder://{folder}?labels=none", "data.image_size=32", "train.batches_per_epoch=1"]
    text = refused(small, *source, "field.supervisor=labels", "field.delivery=sampled")
    assert "field.supervisor=labels needs a label for every sample, but 40 of the 40" in text
    trained(small, *source, "field.supervisor=neighbours", "field.delivery=sampled")
