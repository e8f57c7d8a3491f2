"""Order: every promise of an epoch's plan, over random plans."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkdo_dist.data.order import (
    EpochPlan,
    GlobalBatches,
    evaluation_blocks,
    hash64,
    permutation,
    rank_lanes,
    substitutes,
    worker_lanes,
)

PLANS = settings(max_examples=400, deadline=None)
counts_strategy = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@st.composite
def plans(draw: st.DrawFn) -> EpochPlan:
    return EpochPlan(
        tuple(draw(counts_strategy)),
        seed=draw(st.integers(0, 2**63)),
        epoch=draw(st.integers(0, 10_000)),
        lanes=draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16])),
        micro_batch=draw(st.integers(1, 16)),
        window=draw(st.integers(1, 40)),
    )


def oracle(plan: EpochPlan) -> list[np.ndarray]:
    """Every lane by the definition: the whole ring sample by sample, then lanes, segments and windows."""
    if not plan.samples:
        return [np.empty(0, np.int64)] * plan.lanes
    pieces = list(zip(*(plan._pieces[:, k].tolist() for k in (0, 1)), strict=True))
    ring = []
    for k, (shard, begin) in enumerate(pieces):
        end = pieces[0][1] if k == len(pieces) - 1 else plan.counts[shard]
        ring += [(shard, position) for position in range(begin, end)]
    bases = np.cumsum((0, *plan.counts))
    length = plan.steps * plan.micro_batch
    lanes = []
    for lane in range(plan.lanes):
        cut, out = ring[lane * length : (lane + 1) * length], []
        start = 0
        while start < len(cut):
            stop = start
            while stop < len(cut) and cut[stop][0] == cut[start][0] and cut[stop][1] == cut[start][1] + stop - start:
                stop += 1
            windows = -(-(stop - start) // plan.window)
            edges = [start + (stop - start) * k // windows for k in range(windows + 1)]
            for a, b in itertools.pairwise(edges):
                key = hash64(3, plan.seed, plan.epoch, lane, lane * length + a)
                out += [bases[cut[a + i][0]] + cut[a + i][1] for i in permutation(b - a, key)]
            start = stop
        lanes.append(np.array(out, np.int64))
    return lanes


@PLANS
@given(plans())
def test_each_sample_at_most_once_and_a_small_tail(plan: EpochPlan) -> None:
    ids = [GlobalBatches(plan).ids(step) for step in range(plan.steps)]
    seen = np.concatenate(ids) if ids else np.empty(0, np.int64)
    assert all(len(batch) == plan.lanes * plan.micro_batch for batch in ids)
    assert len(np.unique(seen)) == len(seen)
    assert len(seen) == 0 or (seen.min() >= 0 and seen.max() < plan.samples)
    assert 0 <= plan.samples - len(seen) < plan.lanes * plan.micro_batch


@PLANS
@given(plans())
def test_seek_equals_the_sequence_read_from_its_start(plan: EpochPlan) -> None:
    expected = oracle(plan)
    m = plan.micro_batch
    for lane in range(plan.lanes):
        assert len(expected[lane]) == plan.steps * m
        for step in range(plan.steps):
            np.testing.assert_array_equal(plan.micro_batch_ids(step, lane), expected[lane][step * m : (step + 1) * m])


@PLANS
@given(plans(), st.data())
def test_global_batches_are_those_of_the_lanes(plan: EpochPlan, data: st.DataObject) -> None:
    """One after another, and in any order, though the windows of earlier steps are kept."""
    expected = oracle(plan)
    batches, m, order = GlobalBatches(plan), plan.micro_batch, range(plan.steps)
    for step in [*order, *data.draw(st.permutations(order))]:
        np.testing.assert_array_equal(
            batches.ids(step), np.concatenate([lane[step * m : (step + 1) * m] for lane in expected])
        )
    with pytest.raises(ValueError, match=f"step {plan.steps} is not inside"):
        batches.ids(plan.steps)


@PLANS
@given(plans(), st.data())
def test_windows_stay_inside_shards_and_open_them_about_once(plan: EpochPlan, data: st.DataObject) -> None:
    opens = 0
    for lane in range(plan.lanes):
        last = None
        for w in plan.windows(lane):
            assert 0 <= w.start < w.stop <= plan.counts[w.shard]
            assert w.stop - w.start <= plan.window
            opens += w.shard != last
            last = w.shard
    assert opens <= sum(c > 0 for c in plan.counts) + plan.lanes
    if plan.steps:
        start = data.draw(st.integers(0, plan.steps))
        rest = [w.positions() for w in plan.windows(0, start)]
        assert sum(map(len, rest)) == (plan.steps - start) * plan.micro_batch


@PLANS
@given(plans(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 4))
def test_ranks_and_workers_only_share_the_lanes(plan: EpochPlan, world: int, workers: int) -> None:
    if plan.lanes % world:
        with pytest.raises(ValueError, match="must divide"):
            rank_lanes(plan.lanes, 0, world)
        return
    owned = [rank_lanes(plan.lanes, rank, world) for rank in range(world)]
    assert [lane for lanes in owned for lane in lanes] == list(range(plan.lanes))
    n = max(1, workers)
    split = [lane for lanes in owned for w in range(n) for lane in worker_lanes(lanes, w, n)]
    assert split == list(range(plan.lanes))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(30, 60), min_size=1, max_size=8), st.integers(0, 2**40))
def test_every_epoch_and_seed_differs_and_so_does_its_tail(counts: list[int], seed: int) -> None:
    def batches(seed: int, epoch: int) -> bytes:
        plan = EpochPlan(tuple(counts), seed, epoch, lanes=1, micro_batch=7, window=16)
        return np.concatenate([GlobalBatches(plan).ids(s) for s in range(plan.steps)]).tobytes()

    assert len({batches(seed, epoch) for epoch in range(6)}) == 6
    assert batches(seed, 0) != batches(seed + 1, 0)
    assert batches(seed, 3) == batches(seed, 3)


def test_the_dropped_tail_wanders_also_with_one_shard() -> None:
    dropped = set()
    for epoch in range(60):
        plan = EpochPlan((101,), seed=0, epoch=epoch, lanes=1, micro_batch=10)
        used = np.concatenate([GlobalBatches(plan).ids(s) for s in range(plan.steps)])
        dropped |= set(range(101)) - set(used.tolist())
    assert len(dropped) > 30


def test_the_order_is_mixed() -> None:
    # Neighbours in the shard must not be neighbours in the batch; an unpermuted window would give a
    # correlation of 1.
    plan = EpochPlan((2000,) * 5, seed=1, epoch=0, lanes=4, micro_batch=50)
    lane = np.concatenate([plan.micro_batch_ids(s, 2) for s in range(20)]).astype(float)
    assert abs(np.corrcoef(lane[:-1], lane[1:])[0, 1]) < 0.2


def test_permutations_are_uniform_enough() -> None:
    # Each of the 24 permutations of four within six standard deviations of its share of 24,000 draws.
    found: dict[tuple[int, ...], int] = {}
    for key in range(24_000):
        order = tuple(permutation(4, hash64(9, key)).tolist())
        found[order] = found.get(order, 0) + 1
    assert len(found) == 24
    assert all(abs(n - 1000) < 6 * 31 for n in found.values())


def test_the_order_is_pinned_for_ever() -> None:
    # A run that is resumed after an upgrade must meet the same samples: these values may never change.
    plan = EpochPlan((300, 0, 250, 417), seed=42, epoch=7, lanes=4, micro_batch=8, window=64)
    ids = np.concatenate([GlobalBatches(plan).ids(s) for s in range(plan.steps)]).astype("<i8")
    assert hash64() == 0
    assert hash64(0) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 seeded with 0, a published test value
    assert (
        hashlib.sha256(ids.tobytes()).hexdigest() == "461e8f23f6fd426673d9aaae11e32383720bea1cb831dea97c28533843e839bc"
    )


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="lanes must be at least 1"):
        EpochPlan((10,), 0, 0, 0, 1)
    with pytest.raises(ValueError, match="cannot hold -1"):
        EpochPlan((10, -1), 0, 0, 1, 1)
    plan = EpochPlan((10,), 0, 0, 2, 2)
    with pytest.raises(ValueError, match="step 2 is not inside"):
        plan.micro_batch_ids(2, 0)
    with pytest.raises(ValueError, match="lane 2"):
        plan.micro_batch_ids(0, 2)


@PLANS
@given(
    counts_strategy,
    st.integers(1, 20),
    st.sampled_from([1, 2, 3, 4]),
    st.one_of(st.none(), st.integers(0, 200)),
)
def test_evaluation_covers_every_sample_once(counts: list[int], batch: int, world: int, limit: int | None) -> None:
    bases = np.cumsum([0, *counts])
    blocks: dict[int, np.ndarray] = {}
    for rank in range(world):
        for number, windows in evaluation_blocks(counts, batch, rank, world, limit):
            assert number % world == rank
            blocks[number] = np.concatenate([bases[w.shard] + w.positions() for w in windows])
    ids = np.concatenate([blocks[k] for k in sorted(blocks)]) if blocks else np.empty(0)
    assert sorted(blocks) == list(range(len(blocks)))
    np.testing.assert_array_equal(ids, np.arange(min(sum(counts), sum(counts) if limit is None else limit)))


def test_substitutes_name_every_other_shard_once() -> None:
    assert sorted(substitutes(5, 2, seed=1, epoch=0)) == [0, 1, 3, 4]
    assert list(substitutes(9, 2, 1, 0)) != list(substitutes(9, 3, 1, 0))
    assert list(substitutes(1, 0, 1, 0)) == []
