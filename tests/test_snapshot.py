"""Snapshots as teachers: sparse rows against dense formulas, and whole runs against what a reader would compute."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rkdo_dist import checkpoint, parts
from rkdo_dist import config as configuration
from rkdo_dist.checkpoint import Checkpoint
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.data.index import load_index
from rkdo_dist.data.stream import evaluation_stream
from rkdo_dist.exchange.store import Shards
from rkdo_dist.field import neighbours, relation, snapshot
from tests.jobs import command, kill_and_resume, metrics, on_ranks, run_of

N, K, TAU = 30, 6, 0.1
# Epochs of two steps; the first snapshot at epoch 1, the next at epoch 3.
RUN = ["field.objective=snapshot", "field.relation_start_epoch=1", "field.snapshot_every=2", "field.neighbours=8"]
RUN += ["train.epochs=4", "train.batches_per_epoch=2", "train.checkpoint_every=1", "train.keep_checkpoints=9"]


def dense(rows: tuple[Tensor, Tensor]) -> Tensor:
    """(r, N) of columns and probabilities."""
    columns, p = rows
    return torch.zeros(len(p), N + 1, dtype=torch.float64).scatter_add_(1, columns.long(), p.double())[:, :N]


def snapshots(count: int, mutual: bool) -> list[tuple[Tensor, Tensor]]:
    """Rows w of snapshots that resemble each other; with mutual neighbours some are empty."""
    generator = torch.Generator().manual_seed(0)
    base, found = torch.randn(N, 4, generator=generator), []
    for _ in range(count):
        x = normalize(base + 0.4 * torch.randn(N, 4, generator=generator), dim=1)
        table = neighbours.nearest(x, K)[0]
        table = neighbours.mutual(table) if mutual else table
        table[3] = N  # a sample that finds none
        w = snapshot.attended(x, table, range(N), TAU)
        similarity = x.double() @ x.double().T
        listed = dense((table, (table < N).double())) > 0
        torch.testing.assert_close(dense((table, w)), relation.relation(similarity, TAU, listed), rtol=1e-9, atol=1e-12)
        found.append((table.long(), w))
    return found


@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize(("mean", "momentum"), [("arithmetic", 0.6), ("geometric", 0.5), ("arithmetic", 0.0)])
def test_sparse_memory_is_the_dense_one(mean: str, momentum: float, mutual: bool) -> None:
    first, *later = snapshots(3, mutual)
    empty = torch.full((N, K), N), torch.zeros(N, K, dtype=torch.float64)
    sparse = snapshot.remember(empty, first, momentum, mean, N, N)
    whole = dense(first)
    torch.testing.assert_close(dense(sparse), whole, rtol=0, atol=1e-12)  # the first visit: r = w
    for new in later:
        w = dense(new)
        before, now = (x.sum(1, keepdim=True) > 0 for x in (whole, w))
        if momentum == 0:
            met = w
        elif mean == "arithmetic":
            met = relation.remembered(whole, w, momentum, mean)
        else:
            both = (whole > 0) & (w > 0)
            met = torch.where(both.any(1, keepdim=True), relation.remembered(whole, w, momentum, mean), w)
        whole = torch.where(before & now, met, torch.where(now, w, whole))
        shared = torch.minimum(snapshot.at(*sparse, new[0], N), new[1]).sum(1)
        sparse = snapshot.remember(sparse, new, momentum, mean, N, N)
        torch.testing.assert_close(dense(sparse), whole, rtol=0, atol=1e-12)
        assert ((shared >= 0) & (shared <= 1 + 1e-12)).all()
    assert (whole[3] == 0).all()


@pytest.mark.parametrize("confidence", [None, "given"])
def test_p_shares_its_place_with_the_relation(confidence: str | None) -> None:
    w = snapshots(1, True)[0]
    kappa = None if confidence is None else torch.linspace(0, 1, N, dtype=torch.float64)
    rows, a = snapshot.supervising(w, range(N), 0.4, kappa, N)
    candidates = dense((w[0], (w[0] < N).double())) > 0
    sure = relation.sureness(dense(w), candidates) if kappa is None else kappa
    wanted = relation.supervisor(torch.arange(N), dense(w), 0.4 * sure)
    torch.testing.assert_close(rows.dense(), wanted, rtol=0, atol=1e-6)  # kept in float32
    torch.testing.assert_close(a, 1 - wanted.diagonal(), rtol=0, atol=1e-12)
    drawn = torch.stack([rows.draw(torch.rand(N, dtype=torch.float64)) for _ in range(4000)])
    own = (drawn == torch.arange(N)).double().mean(0)
    margin = 5 * (wanted.diagonal() * (1 - wanted.diagonal()) / 4000).sqrt()
    assert ((own - wanted.diagonal()).abs() <= margin + 1e-6).all()


# --- whole runs -------------------------------------------------------------------------------------------------------


def everything(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of every tensor file of a checkpoint."""
    folder = run / "checkpoints" / str(step)
    files = sorted(folder.rglob("*.safetensors"))
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def rows_of(found: Checkpoint, n: int) -> Tensor:
    """All rows of a checkpoint, dense (n, n)."""
    parts_ = [found.part(name) for name in sorted(found.parts) if name.startswith("rows.")]
    columns, p = (torch.cat([part[name] for part in parts_]) for name in ("columns", "probabilities"))
    assert len(parts_) == Shards(n, 1).tiles
    return torch.zeros(n, n + 1, dtype=torch.float64).scatter_add_(1, columns.long(), p.double())[:, :n]


def test_rows_are_those_of_the_weights_at_the_border(small: list[str], digits: Path) -> None:
    """Against a dense k-nearest-neighbour search in the embeddings of the checkpoint that the epoch began with."""
    code, text = command([*small, *RUN, "field.relation_momentum=0.5"])
    assert code == 0, text
    run, index = run_of(small), load_index(digits)
    n = index.split("train").samples
    config = configuration.load(run / "config.yaml")
    saved = {step: checkpoint.load(run / "checkpoints" / str(step)) for step in (1, 2, 3, 6, 7)}
    views, images = parts.make_views(config, index), []
    labels = []
    for _, block in evaluation_stream(index, "train", 256):
        images.append(views.plain(block.images))
        labels.append(block.labels)

    def wanted(step: int) -> Tensor:
        encoder = parts.make_encoder(config).eval()
        encoder.load_state_dict(saved[step].model)
        with torch.no_grad():
            x = torch.cat([encoder(block) for block in images]).double()
        similarity = (x @ x.T).fill_diagonal_(-torch.inf)
        near = torch.zeros(n, n, dtype=torch.bool).scatter_(1, similarity.topk(8, dim=1).indices, True)
        return relation.relation(similarity, 0.05, near & near.T)

    identity = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(rows_of(saved[1], n), identity)
    torch.testing.assert_close(rows_of(saved[2], n), identity)
    w = wanted(2)
    p = relation.supervisor(torch.arange(n), w, torch.full((n,), 0.3, dtype=torch.float64))
    assert float((rows_of(saved[3], n) - p).abs().sum(1).gt(1e-3).sum()) <= 0.01 * n  # equal ones may change places
    older = relation.supervisor(torch.arange(n), wanted(1), torch.full((n,), 0.3, dtype=torch.float64))
    assert float((rows_of(saved[3], n) - older).abs().sum(1).gt(1e-3).sum()) > 0.5 * n  # control: other weights
    torch.testing.assert_close(rows_of(saved[6], n), rows_of(saved[3], n), rtol=0, atol=0)
    r = w / w.sum(1, keepdim=True).clamp(min=1e-9)
    new = wanted(6)
    known = torch.where((new.sum(1) > 0) & (r.sum(1) > 0), 0.5, (r.sum(1) > 0).double())[:, None]
    p = relation.supervisor(torch.arange(n), known * r + (1 - known) * new, torch.full((n,), 0.3, dtype=torch.float64))
    assert float((rows_of(saved[7], n) - p).abs().sum(1).gt(1e-3).sum()) <= 0.01 * n
    journal = metrics(run)
    assert ["relation_weight" in record for record in journal] == [False] * 2 + [True] * 6
    same = torch.cat(labels)[:, None] == torch.cat(labels)[None, :]
    related = w.sum(1) > 0
    assert journal[2]["relation_precision"] == pytest.approx(float((w * same).sum(1)[related].mean()), abs=1e-3)
    assert journal[2]["relation_weight"] == pytest.approx(0.3 * float(related.double().mean()), abs=1e-3)


def test_before_the_first_snapshot_it_is_simclr_bit_for_bit(small: list[str]) -> None:
    code, text = command([*small, *RUN])
    assert code == 0, text
    run = run_of(small)
    words = ["field.objective=simclr", "field.temperature=0.2", *RUN[4:], f"run.dir={run}-simclr"]
    assert command([*small, *words])[0] == 0
    model = "model.safetensors"
    assert everything(run, 2)[model] == everything(run_of(words), 2)[model]
    assert everything(run, 3)[model] != everything(run_of(words), 3)[model]


@pytest.mark.parametrize("confidence", ["agreement", "entropy"])
def test_one_run_on_any_number_of_processes_also_if_it_is_killed(small: list[str], confidence: str) -> None:
    """Killed and continued inside an interval and at its border, on other numbers of processes."""
    words = [*small, *RUN, f"field.confidence={confidence}", "field.relation_momentum=0.5"]
    words += ["field.relation_mean=geometric"] if confidence == "agreement" else ["field.stored=12"]
    run = run_of(words)
    straight = [*words, f"run.dir={run}-straight"]
    assert command(straight)[0] == 0
    if confidence == "entropy":
        assert [code for code, _ in on_ranks(2, [*words, "data.workers=1"])] == [0, 0]
    else:
        kill_and_resume(words, [(2, 3), (1, 6)])
        answers = on_ranks(4, [*words, "run.resume=auto"])
        assert [code for code, _ in answers] == [0] * 4, answers
    assert everything(run, 8) == everything(run_of(straight), 8)
    assert metrics(run) == metrics(run_of(straight))
    weights = {record["relation_weight"] for record in metrics(run)[2:]}
    assert len(weights) == 2  # one of each snapshot
    assert max(weights) <= 0.3 + 1e-9


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("field.objective=snapshot field.delivery=restricted", "needs field.delivery=sampled, got restricted"),
        ("field.objective=snapshot views.teacher=weak", "needs views.teacher=plain, got weak"),
        ("field.objective=snapshot field.columns=queue", "needs field.columns=batch, got queue"),
        ("field.objective=snapshot field.neighbours=0", "needs field.neighbours above 0"),
        ("field.objective=snapshot field.relation_weight=1", "field.relation_weight=1 leaves nothing"),
        ("field.objective=snapshot field.relation_momentum=1", "field.relation_momentum=1 never takes on a new row"),
        ("field.objective=snapshot field.snapshot_every=0", "field.snapshot_every must be at least 1"),
        ("field.objective=snapshot field.supervisor=labels", "needs field.supervisor=identity, got labels"),
        (
            "field.recursion=restart field.relation_momentum=0.5",
            "field.relation_momentum=0.5 is for field.teacher=snapshot",
        ),
        (
            "field.recursion=restart field.confidence=agreement",
            "field.confidence=agreement compares a row with",
        ),
        ("field.objective=snapshot field.switch_to=simclr", "are delivered differently: set field.delivery=sampled"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(words: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.change(Config(), words.split())
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolved_settings_are_read_again() -> None:
    """A checkpoint holds what null stands for."""
    for objective in ("snapshot", "sce", "rkdo"):
        config = configuration.change(Config(), [f"field.objective={objective}", "train.ema=0.9"])
        again = configuration.from_tree(configuration.decisive_tree(config))
        assert configuration.digest(again) == configuration.digest(config)


def test_more_neighbours_than_samples_are_refused_before_the_first_step(small: list[str]) -> None:
    code, text = command([*small, *RUN, "field.neighbours=99999"])
    assert code == 2
    assert "field.neighbours=99999" in text
    assert not run_of(small).exists()
