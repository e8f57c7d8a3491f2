"""Rows and bank sharded by owner: the same rows on any number of ranks, and equation 3 through the whole engine."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rkdo_dist import checkpoint
from rkdo_dist.exchange import group
from rkdo_dist.exchange.store import ALIGNED, RowStore, Shards
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.persistent import Rows
from rkdo_dist.training.averaged import averaged_field
from rkdo_dist.training.exact import exact_field
from rkdo_dist.training.persistent import PersistentField, make_rows, rows_bytes
from tests.fields import kl, softmax
from tests.ranks import run_ranks

LANES, MICRO = 4, 8
BATCH = LANES * MICRO


def test_every_sample_has_one_owner() -> None:
    for n in (1, 15, 16, 17, 257, 1797, 50_000, 1_280_000):
        for world in (1, 2, 3, 4, 64):
            shards = Shards(n, world)
            bounds = [shards.own(rank) for rank in range(world)]
            assert bounds[0][0] == 0
            assert bounds[-1][1] == n
            assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
            some = torch.from_numpy(np.unique(np.random.default_rng(n).integers(0, n, 200)))
            for sample, owner in zip(some.tolist(), shards.owners(some).tolist(), strict=True):
                assert bounds[owner][0] <= sample < bounds[owner][1]
            assert Shards(n, 1).tile == shards.tile  # tiles are a matter of n alone
            by_rank = [(rank, place) for rank in range(world) for place in range(len(shards.tiles_of(rank)))]
            assert by_rank == list(zip(*(x.tolist() for x in shards.places()), strict=True))


def test_ranks_share_tiles_where_only_rows_are_sharded() -> None:
    """The control: whole tiles leave most of 512 ranks without a row, and another with a quarter too many."""
    n = 1_280_000
    for world in (1, 2, 3, 39, 64, 512, 4096):
        shards = Shards(n, world, rows_alone=True)
        bounds = [shards.own(rank) for rank in range(world)]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == n
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
        assert max(stop - start for start, stop in bounds) <= 1.26 * n / world + ALIGNED
        starts = torch.tensor([start for start, _ in bounds])
        assert shards.owners(starts).tolist() == list(range(world))
        assert shards.owners(torch.tensor([stop - 1 for _, stop in bounds])).tolist() == list(range(world))
        touched = [tile for rank in range(world) for tile in shards.touched(rank)]
        assert sorted({*touched}) == list(range(shards.tiles))
    whole = [stop - start for start, stop in map(Shards(n, 512).own, range(512))]
    assert sum(size == 0 for size in whole) == 355
    assert max(stop - start for start, stop in map(Shards(n, 64).own, range(64))) > 1.2 * n / 64


def steps_of(n: int, count: int) -> list[Tensor]:
    """Global batches of distinct samples; those of neighbouring steps overlap now and then."""
    rng = np.random.default_rng(n)
    return [torch.from_numpy(rng.permutation(n)[:BATCH]) for _ in range(count)]


def views(step: int, d: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(  # type: ignore[return-value]
        torch.nn.functional.normalize(torch.randn(BATCH, d, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )


def lanes_of(rank: int, world: int, u: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    own = range(rank * LANES // world, (rank + 1) * LANES // world)
    return [(u[i * MICRO : (i + 1) * MICRO], v[i * MICRO : (i + 1) * MICRO]) for i in own]


def digest(store: RowStore) -> dict[int, str]:
    """A fingerprint of every 16 of this rank's samples, by the first."""
    found = {}
    for start in range(store.first, store.stop, ALIGNED):
        own = slice(start - store.first, min(start + ALIGNED, store.stop) - store.first)
        tensors = [store.rows.columns[own], store.rows.probabilities[own], store.rows.rest[own]]
        tensors += [] if store.bank is None else [store.bank[own], store.seen[own]]
        found[start] = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in tensors)).hexdigest()
    return found


def simulate(rank: int, world: int, options: dict[str, Any]) -> dict[str, Any]:
    """A few steps of the field alone, embeddings given; losses, gradients, diagnostics, and all rows at the end."""
    torch.set_num_threads(1)
    n, stored, columns = options["n"], options["stored"], options["columns"]
    dtype = torch.float64 if options.get("double") else torch.float32
    batches = options.get("batches") or steps_of(n, options["steps"])
    memory = PersistentField(
        RowStore(n, stored, 6 if columns == "bank" else None, dtype=dtype),
        columns,
        options.get("bank_temperature", 0.2),
        lambda step: batches[step] if step < len(batches) else None,
        torch.device("cpu"),
    )
    start = 0
    if "resume" in options:
        found = checkpoint.load_latest(options["resume"])
        assert found is not None
        memory.restore(found)
        start = found.step
    results: dict[str, Any] = {"losses": [], "parts": [], "gradients": []}
    for step in range(start, options.get("stop", len(batches))):
        u, v = (x.to(dtype) for x in views(step))
        lanes = lanes_of(rank, world, u, v)
        b = BATCH // world
        memory.begin(step, batches[step][rank * b : (rank + 1) * b])
        objective = Objective.persistent(options.get("coupling", 0.3), 0.4)
        if options.get("fast"):
            field = averaged_field(lanes, objective, "gather", rows=memory)
            means = {name: group.all_gather_rows(x).mean(0) for name, x in field.sums.items()}
        else:
            field = exact_field(lanes, objective, rank * len(lanes), memory)
            everyone = {name: group.all_gather_rows(x) for name, x in field.sums.items()}
            means = {name: group.tree_sum(x.clone()) / BATCH for name, x in everyone.items()}
        memory.commit()
        parts = {name: float(x) for name, x in means.items()}
        results["losses"].append(parts.pop("loss"))
        results["parts"].append(parts)
        results["gradients"].append(torch.cat([torch.cat(pair, 1) for pair in field.gradients]).numpy())
    memory.store.finish()
    results["digest"] = digest(memory.store)
    rows = memory.store.rows
    results["dense"] = dict(zip(range(memory.store.first, memory.store.stop), rows.dense().numpy(), strict=True))
    results["snapshot"] = memory.watched(9)
    results["sums"] = (rows.probabilities.double().sum(1) + rows.rest - 1).abs().tolist()
    if "save" in options:
        folder = Path(options["save"])
        building = folder / f".{options['stop']}.tmp"
        if rank == 0:
            building = checkpoint.begin(folder, options["stop"])
        _barrier(world)
        checkpoint.write_parts(building, memory.parts())
        _barrier(world)
        if rank == 0:
            checkpoint.commit(building, {"w": torch.zeros(1)})
        _barrier(world)
    return results


def _barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()


def equation_3(steps: int, coupling: float, tau: float) -> tuple[np.ndarray, list[float], list[float]]:
    """The oracle: p(t) = (1 - a) p(t-1) + a q(t-1) over the whole data set as the batch, in the order of samples.

    Returns:
        p after the last step, the losses mean_i KL(p(t) || q(t)), and those of a p that is one step ahead.
    """
    batches = [whole_batch(step) for step in range(steps)]
    p, losses, ahead = np.eye(BATCH), [], []
    for step, order in enumerate(batches):
        u, v = (x.numpy()[np.argsort(order.numpy())] for x in views(step))
        q = np.stack([softmax(v @ x / tau) for x in u])
        after = (1 - coupling) * p + coupling * q
        losses.append(float(np.mean([kl(a, b) for a, b in zip(p, q, strict=True)])))
        ahead.append(float(np.mean([kl(a, b) for a, b in zip(after, q, strict=True)])))
        p = after
    return p, losses, ahead


def whole_batch(step: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(step).permutation(BATCH))


@pytest.mark.parametrize(
    ("columns", "world", "fast"), [("batch", 1, False), ("bank", 1, True), ("batch", 2, True), ("bank", 2, False)]
)
def test_whole_data_as_the_batch_and_everything_stored_is_equation_3(columns: str, world: int, fast: bool) -> None:
    options = {
        "n": BATCH,
        "stored": BATCH,
        "columns": columns,
        "batches": [whole_batch(step) for step in range(50)],
        "double": True,
        "bank_temperature": 0.4,
        "fast": fast,
    }
    expected, losses, ahead = equation_3(50, 0.3, 0.4)
    answers = [simulate(0, 1, options)] if world == 1 else run_ranks(simulate, world, options)
    rows = {i: row for answer in answers for i, row in answer["dense"].items()}
    assert sorted(rows) == list(range(BATCH))
    for i, row in rows.items():
        assert np.abs(row / expected[i] - 1).max() < 1e-12, i
    for answer in answers:
        assert answer["losses"] == pytest.approx(losses, rel=1e-12)
        assert np.abs(np.array(answer["losses"]) / np.array(ahead) - 1).min() > 1e-3  # control: p one step ahead


@pytest.mark.parametrize("columns", ["batch", "bank"])
@pytest.mark.parametrize("stored", [5, 40])
def test_exact_gives_the_same_rows_bit_for_bit_on_any_number_of_ranks(columns: str, stored: int) -> None:
    options = {"n": 300, "stored": stored, "columns": columns, "steps": 12}
    one = simulate(0, 1, options)
    assert max(one["sums"]) < 1e-6
    assert one["parts"][-1]["row_drift"] > 0
    for world in (2, 4):
        answers = run_ranks(simulate, world, options)
        assert {k: v for answer in answers for k, v in answer["digest"].items()} == one["digest"]
        for answer in answers:
            assert answer["losses"] == one["losses"]
            assert answer["parts"] == one["parts"]
            assert answer["snapshot"] == one["snapshot"]
        assert np.array_equal(np.concatenate([a["gradients"][-1] for a in answers]), one["gradients"][-1])


def test_the_averaged_way_agrees_in_float64() -> None:
    options = {"n": 300, "stored": 12, "columns": "bank", "steps": 12, "double": True}
    one = simulate(0, 1, options)
    for answer in run_ranks(simulate, 2, {**options, "fast": True}):
        assert answer["losses"] == pytest.approx(one["losses"], rel=1e-10)
        for name, value in one["parts"][-1].items():
            assert answer["parts"][-1][name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_coupling_zero_leaves_every_row_alone_and_refreshes_the_bank() -> None:
    options = {"n": 64, "stored": 6, "columns": "bank", "steps": 5, "coupling": 0.0}
    for answer in run_ranks(simulate, 2, options):
        assert all(row[i] == 1 and row.sum() == 1 for i, row in answer["dense"].items())
        assert answer["parts"][-1]["row_positive"] == 1
        assert answer["parts"][-1]["row_drift"] == 0


@pytest.mark.parametrize("columns", ["batch", "bank"])
def test_resharding_2_to_4_to_1_to_2_changes_no_bit(columns: str, tmp_path: Path) -> None:
    options = {"n": 300, "stored": 7, "columns": columns, "steps": 8}
    whole = simulate(0, 1, options)
    folders = [tmp_path / str(k) for k in range(3)]
    assert Shards(300, 4, rows_alone=True).own(1) != Shards(300, 4).own(1)  # on four ranks, tiles are shared
    run_ranks(simulate, 2, {**options, "stop": 2, "save": str(folders[0])})
    run_ranks(simulate, 4, {**options, "stop": 4, "resume": str(folders[0]), "save": str(folders[1])})
    simulate(0, 1, {**options, "stop": 6, "resume": str(folders[1]), "save": str(folders[2])})
    answers = run_ranks(simulate, 2, {**options, "resume": str(folders[2])})
    assert {k: v for answer in answers for k, v in answer["digest"].items()} == whole["digest"]
    assert answers[0]["losses"] == whole["losses"][6:]


def test_more_ranks_than_tiles() -> None:
    options = {"n": BATCH, "stored": 4, "columns": "bank", "steps": 4}
    assert Shards(BATCH, 4).tiles == 2
    one = simulate(0, 1, options)
    answers = run_ranks(simulate, 4, options)
    assert {k: v for answer in answers for k, v in answer["digest"].items()} == one["digest"]


def _move(rank: int, world: int) -> list[tuple[int, float]]:
    """Rows marked by sample and step travel home and come back; fetches overlap with writes."""
    n, store = 100, RowStore(100, 3)
    batches = [torch.arange(0, 40), torch.arange(40, 80), torch.arange(79, 39, -1), torch.arange(20, 60)]
    b, wrong, ahead = 40 // world, 0, store.fetch(batches[0])
    last = {i: (i, 1.0) for i in range(n)}
    for step, batch in enumerate(batches):
        mine = batch[rank * b : (rank + 1) * b]
        rows = ahead.wait()
        for k, i in enumerate(mine.tolist()):
            wrong += (int(rows.columns[k, 0]), float(rows.probabilities[k, 0])) != last[i]
        marked = Rows(rows.columns.clone(), rows.probabilities.clone(), rows.rest.clone(), n)
        marked.columns[:, 0] = (mine + step + 1) % n
        marked.probabilities[:, 0] = (mine % 7).float() / 8
        store.write(batch, marked)
        last |= {i: ((i + step + 1) % n, (i % 7) / 8) for i in batch.tolist()}
        if step + 1 < len(batches):
            ahead = store.fetch(batches[step + 1])
    store.finish()
    assert wrong == 0
    return [(int(c[0]), float(p[0])) for c, p in zip(store.rows.columns, store.rows.probabilities, strict=True)]


@pytest.mark.parametrize("world", [2, 4])
def test_rows_reach_their_owners_also_when_batches_overlap(world: int) -> None:
    moved = [row for part in run_ranks(_move, world) for row in part]
    assert moved == _move(0, 1)


def test_rows_that_do_not_fit_are_refused() -> None:
    few, many = RowStore(64, 4), RowStore(64, 5)
    with pytest.raises(ValueError, match=r"columns of rows 0.*field.stored"):
        many.load(0, few.tensors(0))
    with pytest.raises(ValueError, match=r"bank .* is missing"):
        RowStore(64, 4, 8).load(0, few.tensors(0))
    assert bool((many.rows.columns[:, 0] == torch.arange(64)).all())


def test_memory_is_as_specified(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 6 <= rows_bytes(1_280_000, 256, None, 2) * 2 / (1_280_000 * 256) < 8.1
    monkeypatch.setattr("rkdo_dist.training.persistent.available_bytes", lambda device: 1 << 20)
    with pytest.raises(ValueError, match=r"need 0\.\d\d GiB .* 0\.00 GiB are free: lower field\.stored.*columns=batch"):
        make_rows(10_000, 256, 64, torch.device("cpu"))
    make_rows(100, 4, 8, torch.device("cpu"))
