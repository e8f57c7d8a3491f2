"""Sampled delivery: the planned sample and its partner, whoever reads them; damage; what an epoch waits for."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkdo_dist.data import samples
from rkdo_dist.data.index import DataError, ShardIndex, load_index
from rkdo_dist.data.order import partner_draws, rank_lanes
from rkdo_dist.data.partners import Partners, require_random_access
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.remote import Address
from rkdo_dist.data.source import open_source
from rkdo_dist.data.stream import Batch, lane_stream
from tests.pictures import image_folder
from tests.test_stream import by_hand, flat

PLAN: dict[str, Any] = {"seed": 3, "all_lanes": 4, "micro_batch": 5, "window": 16}
N = 125
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), train=N, test=3)


@pytest.fixture
def index(folder: Path, tmp_path: Path) -> ShardIndex:
    """125 training samples in 8 shards."""
    prepare("imagefolder", tmp_path / "s", folder, shard_size=17)
    return load_index(tmp_path / "s")


def drawn(epoch: int) -> np.ndarray:
    """Any sample of the split for any other."""
    return (partner_draws(3, epoch, np.arange(N)) * N).astype(np.int64)


def read(index: ShardIndex, epoch: int = 0, start_step: int = 0, epochs: int = 1, **options: Any) -> list[Batch]:
    partners = Partners(N, shared=options.get("workers", 0) > 0)
    stream = lane_stream(
        index, "train", **PLAN, epoch=epoch, start_step=start_step, epochs=epochs, partners=partners, **options
    )
    found: list[Batch] = []
    for k in range(epoch, epoch + epochs):
        partners.set(k, drawn(k))
        found += [next(stream) for _ in range(N // 20 - (start_step if k == epoch else 0))]
    assert next(stream, None) is None
    return found


def both(batches: list[Batch]) -> list[Any]:
    return [(b.epoch, b.step, [(flat(m), flat(m.second)) for m in b.lanes if m.second is not None]) for b in batches]


def test_partners_are_the_drawn_samples(index: ShardIndex) -> None:
    expected = by_hand(index, "train")
    plain = list(lane_stream(index, "train", **PLAN, epochs=2))
    for batch, ordinary in zip(read(index, epochs=2), plain, strict=True):
        for micro, alone in zip(batch.lanes, ordinary.lanes, strict=True):
            assert flat(micro) == flat(alone)  # the data order is as it was
            assert micro.second is not None
            wanted = drawn(batch.epoch)[micro.ids.numpy()]
            assert micro.second.ids.tolist() == wanted.tolist()
            assert micro.second.keys == [expected[j][0] for j in wanted]
            assert np.array_equal(micro.second.images.numpy(), np.stack([expected[j][1] for j in wanted]))


def test_any_workers_and_ranks_and_any_beginning_give_the_same_bits(index: ShardIndex) -> None:
    want = both(read(index, epochs=2))
    assert both(read(index, epochs=2, workers=3)) == want
    parts = [both(read(index, epochs=2, lanes=rank_lanes(4, rank, 2), workers=1)) for rank in range(2)]
    for step, whole in enumerate(want):
        assert whole[2] == [micro for part in parts for micro in part[step][2]]
    assert both(read(index, epoch=1, start_step=4)) == [item for item in want if item[:2] >= (1, 4)]


def test_a_stream_that_is_closed_at_a_border_ends_its_waiting_workers(index: ShardIndex) -> None:
    partners = Partners(N, shared=True)
    stream = lane_stream(index, "train", **PLAN, epochs=2, partners=partners, workers=2)
    partners.set(0, drawn(0))
    for _ in range(N // 20):
        next(stream)
    began = time.monotonic()
    stream.close()  # the workers wait for the partners of epoch 1, which nobody will draw
    assert time.monotonic() - began < 4  # a worker that does not end by itself is waited for for five seconds
    with pytest.raises(AssertionError, match="epoch 1 are not set"):
        Partners(N, shared=False).of(1)


def test_damaged_partners_follow_on_corrupt(tmp_path: Path) -> None:
    copy = image_folder(tmp_path / "copy", train=N, test=3)
    index = open_source(str(copy), workers=False)
    clean = read(index)
    firsts = {key for b in clean for m in b.lanes for key in m.keys}
    names = [m.second.keys for b in clean for m in b.lanes if m.second is not None]
    victim = next(key for keys in names for key in keys if key not in firsts)
    payload = bytearray((copy / victim).read_bytes())
    payload[-3] ^= 1  # one bit
    (copy / victim).write_bytes(payload)
    with pytest.raises(DataError, match="has changed") as error:
        read(index)
    assert victim in str(error.value)
    replaced = 0
    for batch, before in zip(read(index, on_corrupt="skip"), clean, strict=True):
        for micro, old in zip(batch.lanes, before.lanes, strict=True):
            assert micro.second is not None
            assert old.second is not None
            assert flat(micro) == flat(old)
            replaced += micro.second.skipped
            for i, key in enumerate(old.second.keys):
                assert micro.second.keys[i] == (micro.keys[i] if key == victim else key)
    assert replaced == sum(key == victim for keys in names for key in keys)


def test_few_shards_are_open_at_once(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    want = both(read(index))
    monkeypatch.setattr(samples, "OPEN_SHARDS", 2)
    opened: list[samples.OpenSamples] = []
    original = samples.open_shard
    monkeypatch.setattr(samples, "open_shard", lambda *a: opened.append(original(*a)) or opened[-1])
    most = 0
    partner = samples.Lookup.partner

    def counted(self: samples.Lookup, of: samples.Sample, id: int) -> samples.Sample:
        nonlocal most
        most = max(most, len(self._open))
        return partner(self, of, id)

    monkeypatch.setattr(samples.Lookup, "partner", counted)
    assert both(read(index)) == want
    assert most == 2
    assert all(x._descriptor == -1 for x in opened)  # type: ignore[attr-defined]  # and all are closed in the end


def test_shards_that_lie_elsewhere_are_refused(index: ShardIndex) -> None:
    require_random_access(index)
    elsewhere = replace(index, address=Address("https://example.org/digits/index.json"))
    with pytest.raises(DataError, match=r"field.delivery=sampled.*https://example.org/digits.*copy them"):
        require_random_access(elsewhere)
