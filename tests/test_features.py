"""Frozen features: each sample once, in order, the same bits on any ranks; what is wrong ends all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rkdo_dist.evaluate.features import FrozenFeatures, gather_features
from rkdo_dist.exchange.group import RankError
from tests.ranks import run_ranks

SAMPLES, BLOCK, FIRST = 45, 8, 100  # six blocks, the last of five samples


def block(number: int, ids: list[int] | None = None) -> tuple[int, SimpleNamespace]:
    """Block `number` of a split whose image, and label, are functions of the sample's id."""
    start = number * BLOCK
    ids = list(range(start, min(start + BLOCK, SAMPLES))) if ids is None else ids
    images = torch.stack([torch.full((3, 16, 16), i / 10) * torch.linspace(-1, 1, 16) for i in ids])
    facts = torch.tensor(ids, dtype=torch.int64)
    return number, SimpleNamespace(ids=facts + FIRST, images=images, labels=facts % 7 - 1)


def blocks_of(rank: int, world: int) -> Iterator[tuple[int, SimpleNamespace]]:
    yield from (block(number) for number in range(rank, -(-SAMPLES // BLOCK), world))


class Network(nn.Module):
    """A small encoder in evaluation mode: features (m, 33) and embeddings (m, 9)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = nn.Conv2d(3, 33, 5), nn.BatchNorm2d(33), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.backbone = nn.Sequential(*layers)
        self.head = nn.Linear(33, 9)
        self.eval()

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        backbone = self.backbone(images).flatten(1)
        return backbone, nn.functional.normalize(self.head(backbone), dim=1)


def as_arrays(features: FrozenFeatures | None) -> dict[str, np.ndarray] | None:
    return None if features is None else vars(features)


def gather_rank(rank: int, world: int) -> dict[str, np.ndarray] | None:
    return as_arrays(gather_features(blocks_of(rank, world), Network().features, SAMPLES, FIRST))


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """Computed without any gathering, on one thread as the ranks have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        parts = [Network().features(b.images) for _, b in blocks_of(0, 1)]
    torch.set_num_threads(threads)
    return {
        "ids": np.arange(FIRST, FIRST + SAMPLES),
        "labels": np.arange(SAMPLES) % 7 - 1,
        "backbone": torch.cat([p[0] for p in parts]).numpy(),
        "embeddings": torch.cat([p[1] for p in parts]).numpy(),
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_ranks_give_the_same_bits_each_sample_once(world: int, reference: dict[str, np.ndarray]) -> None:
    """On 4 ranks two have one block less, so some rounds have ranks with nothing to send."""
    answers = run_ranks(gather_rank, world)
    assert answers[1:] == [None] * (world - 1)
    for name, expected in reference.items():
        assert answers[0][name].dtype == expected.dtype
        assert np.array_equal(answers[0][name], expected), name


def gather_on_few(rank: int, world: int) -> dict[str, np.ndarray] | None:
    """Rank 1 has everything, the others nothing: they do not even know the widths."""
    blocks = blocks_of(0, 1) if rank == 1 else []
    return as_arrays(gather_features(blocks, Network().features, SAMPLES, FIRST))


def test_a_rank_may_have_no_block_at_all(reference: dict[str, np.ndarray]) -> None:
    answer = run_ranks(gather_on_few, 3)[0]
    assert all(np.array_equal(answer[name], expected) for name, expected in reference.items())


def plain(images: Tensor) -> tuple[Tensor, Tensor]:
    rows = images.flatten(1)[:, :5].double()  # arrives as float32 all the same
    return rows, rows[:, :2]


def test_without_a_process_group_blocks_may_come_in_any_order() -> None:
    shuffled = [block(i) for i in (4, 0, 5, 2, 1, 3)]
    features = gather_features(shuffled, plain, SAMPLES, FIRST)
    assert features is not None
    assert np.array_equal(features.ids, np.arange(FIRST, FIRST + SAMPLES))
    assert features.backbone.dtype == np.float32
    straight = torch.cat([plain(b.images)[0] for _, b in blocks_of(0, 1)]).float().numpy()
    assert np.array_equal(features.backbone, straight)
    assert np.array_equal(features.embeddings, straight[:, :2])


def test_no_gradient_is_kept() -> None:
    seen = []

    def embed(images: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(torch.is_grad_enabled())
        return plain(images)

    gather_features(blocks_of(0, 1), embed, SAMPLES, FIRST)
    assert seen == [False] * 6


WRONG = {
    "twice across blocks": ([*range(6), 2], None, "sample 116 came twice"),
    "twice in a block": ([*range(5)], [40, 41, 41, 43, 44], "sample 141 came twice"),
    "missing": ([0, 1, 3, 4, 5], None, "8 of 45 samples to evaluate are missing, the first is 116"),
    "too many": ([*range(6)], [45], "sample 145 is not among those to evaluate, 100 to 144"),
    "none": ([], None, "45 of 45 samples to evaluate are missing"),
}


def wrong_blocks(name: str) -> list[tuple[int, SimpleNamespace]]:
    numbers, extra, _ = WRONG[name]
    return [block(n) for n in numbers] + ([block(9, extra)] if extra else [])


@pytest.mark.parametrize("name", WRONG)
def test_duplicates_gaps_and_strays_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=WRONG[name][2]):
        gather_features(wrong_blocks(name), plain, SAMPLES, FIRST)


def gather_wrong(rank: int, world: int) -> list[str]:
    """What each rank is told, one failing gathering after another: none leaves the group out of step."""

    def broken(images: Tensor) -> tuple[Tensor, Tensor]:
        if rank == 1:
            raise OSError("disk on fire")
        return plain(images)

    tries = [(wrong_blocks(name)[rank::world], plain) for name in WRONG] + [(blocks_of(rank, world), broken)]
    said = []
    for blocks, embed in tries:
        try:
            gather_features(blocks, embed, SAMPLES, FIRST)
            said.append("no error")
        except RankError as error:
            said.append(str(error))
    return said


def test_an_error_on_one_rank_ends_all() -> None:
    expected = [text for _, _, text in WRONG.values()] + ["rank 1: disk on fire"]
    for said in run_ranks(gather_wrong, 2):
        assert len(said) == len(expected)
        assert [text in s for text, s in zip(expected, said, strict=True)] == [True] * len(expected), said


def test_an_embedding_of_the_wrong_length_is_named() -> None:
    with pytest.raises(ValueError, match="block 0 has 8 samples but 7 embeddings"):
        gather_features(blocks_of(0, 1), lambda x: (plain(x)[0], plain(x)[1][1:]), SAMPLES, FIRST)
