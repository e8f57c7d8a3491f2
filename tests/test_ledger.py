"""The ledger counts every collective, and its bytes are those of the textbook algorithms."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from rkdo_dist.exchange import columns, group
from rkdo_dist.losses import RKDOLoss
from rkdo_dist.measure import ledger
from tests.ranks import exact_all_reduce, run_ranks

PACKAGE = Path(__file__).resolve().parent.parent / "rkdo_dist"
COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_object", "all_gather_single", "all_gather_into_tensor", "barrier",
    "reduce_scatter_single", "reduce_scatter_tensor", "reduce_scatter", "all_to_all_single", "all_to_all", "broadcast",
    "broadcast_object_list", "gather", "scatter", "reduce", "batch_isend_irecv", "isend", "send", "recv", "irecv",
}  # fmt: skip


def sent(book: ledger.Ledger, world: int) -> dict[ledger.Entry, float]:
    """Bytes that a rank sends, by entry."""
    return {entry: ledger.sent_bytes(entry[1], payload, world) for entry, payload in book.payload.items()}


def collectives(rank: int, world: int) -> dict[str, Any]:
    """Each way to send, its ledger."""
    rows = torch.full((12, 5), float(rank))
    actions = {
        "all_gather_rows": lambda: group.all_gather_rows(rows),
        "exact_reduce_scatter": lambda: group.exact_reduce_scatter(rows.clone()),
        "exact_all_reduce": lambda: exact_all_reduce(rows.flatten()[:59]),
        "all_reduce_max": lambda: group.all_reduce_max(1.0),
        "gather_objects": lambda: group.gather_objects("x" * rank),
        "barrier": lambda: group.barrier(),
        "together": lambda: group.together(lambda: None, "nothing"),
        "gather columns": lambda: columns.GatheredColumns().gather(rows[None].expand(2, 12, 5).contiguous()),
        "send home": lambda: columns.GatheredColumns().send_home(torch.ones(2, 12 * world, 5)),
        "ring walk": lambda: list(columns.RingColumns().walk(rows[None])),
        "ring home": lambda: columns.RingColumns().walk_home(rows[None], lambda *_: None),
    }
    found = {}
    with ledger.counting() as book:
        for name, action in actions.items():
            action()
            new = book.take()
            found[name] = dict(new.payload), dict(new.calls), sent(new, world)
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bytes_of_every_kind_of_collective(world: int) -> None:
    n, w = 12 * 5 * 4, world
    small, cols, grads = ledger.SMALL, ledger.COLUMNS, ledger.COLUMN_GRADIENTS
    padded = (59 + -59 % w) * 4
    sent = {
        "all_gather_rows": {(small, "all_gather"): (w - 1) * n},
        "exact_reduce_scatter": {(small, "all_to_all"): (w - 1) * n / w},
        "exact_all_reduce": {
            (small, "all_to_all"): (w - 1) * padded / w,
            (small, "all_gather"): (w - 1) * padded / w,
        },
        "all_reduce_max": {(small, "all_reduce"): 2 * (w - 1) * 8 / w},
        "gather_objects": {(small, "objects"): 0},
        "barrier": {(small, "all_reduce"): 0},
        "together": {(small, "all_reduce"): 2 * (w - 1) * 8 / w},
        "gather columns": {(cols, "all_gather"): 2 * (w - 1) * n},
        "send home": {(grads, "reduce_scatter"): 2 * (w - 1) * n},
        "ring walk": {(cols, "send"): (w - 1) * n},
        "ring home": {(cols, "send"): (w - 1) * n, (grads, "send"): w * n},
    }
    for found in run_ranks(collectives, world) if world > 1 else [collectives(0, 1)]:
        for name, expected in sent.items():
            assert found[name][2] == ({} if world == 1 else expected), name


def test_a_ring_and_a_gather_send_alike_but_for_the_walks() -> None:
    """The ring's price for bounded memory: each further walk sends the columns again."""

    for found in run_ranks(_both_losses, 4):
        once = 3 * 6 * 8 * 4  # (W - 1) blocks of b d float32
        gathered, ring = found["gather"], found["ring"]
        assert gathered[(ledger.COLUMNS, "all_gather")] == once
        assert gathered[(ledger.COLUMN_GRADIENTS, "reduce_scatter")] == once
        assert ring[(ledger.COLUMNS, "send")] == 3 * once  # normalise, correct, and home
        assert ring[(ledger.COLUMN_GRADIENTS, "send")] == once * 4 // 3


def _both_losses(rank: int, world: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    u, v = (torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1) for _ in range(2))
    found = {}
    for exchange in ("gather", "ring"):
        with ledger.counting() as book:
            RKDOLoss(exchange=exchange)(u.requires_grad_(), v.requires_grad_()).backward()
        found[exchange] = sent(book, world)
    return found


def _counted_or_not(rank: int, world: int) -> tuple[dict[Any, int], dict[Any, int]]:
    functions = [getattr(owner, name) for owner, name, *_ in ledger._COLLECTIVES]
    with contextlib.suppress(KeyError), ledger.counting() as book:
        group.barrier()
        torch.distributed.all_reduce(torch.ones(3))  # not a collective of the package: DeepSpeed's, say
        raise KeyError
    assert functions == [getattr(owner, name) for owner, name, *_ in ledger._COLLECTIVES]
    inside = dict(book.calls)
    group.barrier()
    return inside, dict(book.calls)


def test_only_the_packages_collectives_are_counted_and_only_while_counting() -> None:
    for inside, afterwards in run_ranks(_counted_or_not, 2):
        assert inside == afterwards == {(ledger.SMALL, "all_reduce"): 1}


def test_every_collective_of_the_package_is_one_that_the_ledger_counts() -> None:
    """Called by its module, so that counting can put another function in its place."""
    names = {(owner.__name__.rpartition(".")[2], name) for owner, name, *_ in ledger._COLLECTIVES}
    missed = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "measure" or path.name == "watch.py":  # its beats are no part of a step
            continue
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            owner, _, last = ast.unparse(call.func).rpartition(".")
            where = {"ranks": "group", "dist": "distributed", "torch.distributed": "distributed"}.get(owner, owner)
            where = where or {"exchange/group.py": "group"}.get(path.relative_to(PACKAGE).as_posix(), "")
            if last in COLLECTIVES and (where, last) not in names and where in ("", "group", "distributed"):
                missed.append(f"{path.relative_to(PACKAGE)}:{call.lineno} {owner}.{last}")
    assert not missed, "add these to measure.ledger"
