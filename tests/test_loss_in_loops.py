"""The loss inside other people's loops: more columns than rows, uneven ranks, torch's wrappers, upstream's losses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rkdo_dist import IConLoss, InfoNCELoss, RKDOLoss, SupervisedLoss
from rkdo_dist.field import recursion
from tests.ranks import run_ranks

D = 5
OBJECTIVES = [RKDOLoss(), RKDOLoss(1, 0.3, 0.02), IConLoss(0.2), InfoNCELoss(0.3)]


def unit(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(x, dim=1).to(dtype).requires_grad_()


def rectangular(loss: Any, u: Tensor, v: Tensor, extra: Tensor) -> Tensor:
    """Row losses (B,) over the columns of v and more, dense: rows have their own column as the positive."""
    o, columns = loss.objective, torch.cat([v, extra])
    p = torch.eye(len(u), len(columns), dtype=u.dtype)
    p = (1 - o.debias) * p + o.debias / len(columns)
    similarity = recursion.similarities(u, columns)
    if o.recursion == "in_batch":
        field = recursion.unroll(similarity, p, list(o.temperatures), o.couplings, None, o.supervisor_grad)
    else:
        field = recursion.Field([p], [recursion.log_learned(similarity, o.temperatures[0], None)])
    pairs = zip(field.p, field.log_q, strict=True)
    return torch.stack([recursion.cross_entropy(p, q) - recursion.entropy(p) for p, q in pairs]).sum(0)


@pytest.mark.parametrize("loss", OBJECTIVES, ids=lambda loss: loss.objective.name)
def test_extra_columns_are_columns_without_rows(loss: Any) -> None:
    u, v, extra = unit(6, 0), unit(6, 1), unit(4, 2)
    expected = rectangular(loss, u, v, extra).mean()
    found = loss(u, v, extra_columns=extra)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(value, (u, v, extra)) for value in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    queue = loss(u, v, extra_columns=extra.detach())
    assert torch.equal(torch.autograd.grad(queue, u)[0], torch.autograd.grad(loss(u, v, extra_columns=extra), u)[0])
    assert torch.equal(loss(u, v, extra_columns=extra[:0]), loss(u, v))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])  # the least uint8 is a label itself
def test_extra_columns_have_no_label(dtype: torch.dtype) -> None:
    u, v, extra, labels = unit(4, 0), unit(4, 1), unit(3, 2), torch.tensor([0, 1, 1, 0], dtype=dtype)
    loss = SupervisedLoss(0.3, pairing="cross")
    p = torch.cat([(labels[:, None] == labels).double() / 2, torch.zeros(4, 3)], dim=1)
    log_q = torch.log_softmax(u @ torch.cat([v, extra]).T / 0.3, dim=1)
    expected = ((p * (p.clamp(min=1e-300).log() - log_q)).sum(1)).mean()
    torch.testing.assert_close(loss(u, v, labels, extra_columns=extra), expected, rtol=1e-12, atol=1e-13)


def test_rows_of_any_length() -> None:
    u, v, extra = (3 * unit(n, k).detach() + 0.1 for k, n in enumerate((6, 6, 2)))
    u.requires_grad_()
    loss = RKDOLoss(normalise=True)
    expected = RKDOLoss()(*(normalize(x, dim=1) for x in (u, v)), extra_columns=normalize(extra, dim=1))
    found = loss(u, v, extra_columns=extra)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, u), torch.autograd.grad(expected, u))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(u.bfloat16(), v.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="squared norm differs from 1"):
        loss(torch.zeros_like(u), v)


@pytest.mark.parametrize(
    ("loss", "extra", "words"),
    [
        (InfoNCELoss(pairing="joint"), unit(2, 0), "pairing='cross'"),
        (InfoNCELoss(symmetric=True), unit(2, 0), "symmetric=False"),
        (InfoNCELoss(exchange="ring"), unit(2, 0), "'gather' or 'local'"),
        (InfoNCELoss(), unit(2, 0)[:, :3], r"\(m, 5\), got \(2, 3\)"),
        (InfoNCELoss(), unit(2, 0, torch.float32), "float64 .*got torch.float32"),
        (InfoNCELoss(), 2 * unit(2, 0), "extra_columns must have rows of unit norm"),
    ],
)
def test_extra_columns_where_they_cannot_be(loss: Any, extra: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loss(unit(4, 1), unit(4, 2), extra_columns=extra)


# --- torch's wrappers -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """An encoder with a loss inside, as a training step might be wrapped."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, D)).double()
        self.loss = loss

    def embed(self, x: Tensor) -> Tensor:
        """(n, 7) to (n, D) of unit norm."""
        return normalize(self.layers(x), dim=1)

    def forward(self, x: Tensor, y: Tensor, extra: Tensor | None = None) -> Tensor:
        """The loss."""
        more = None if extra is None else self.embed(extra)
        return self.loss(self.embed(x), self.embed(y), extra_columns=more)

    def gradients(self) -> list[Tensor]:
        """Of all parameters, which are set free."""
        found = [p.grad for p in self.parameters() if p.grad is not None]
        self.zero_grad(set_to_none=True)
        return found


def samples(n: int, seed: int) -> Tensor:
    return torch.randn(n, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_compiled_step_has_one_break_and_the_same_numbers() -> None:
    net, x, y = Net(RKDOLoss()), samples(6, 0), samples(6, 1)
    expected = net(x, y)
    expected.backward()
    gradients = net.gradients()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    found = torch.compile(net, backend=backend)(x, y)
    found.backward()
    assert len(graphs) == 1  # the encoder; the loss runs as it is
    torch.testing.assert_close([found, *net.gradients()], [expected, *gradients], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("changing", ["parameter", "argument", "progress"])
def test_a_changing_temperature_never_compiles_a_step_again(changing: str, validate: bool) -> None:
    from torch._dynamo.utils import counters

    tau = nn.Parameter(torch.tensor(0.5, dtype=torch.float64)) if changing == "parameter" else None
    clock = "training" if changing == "progress" else "depth"
    loss, net = RKDOLoss(temperature=tau, cooling=0.4, clock=clock, validate=validate), Net(nn.Identity())
    x, y = samples(6, 0), samples(6, 1)

    def step(temperature: Tensor | None) -> Tensor:
        return 2 * loss(net.embed(x), net.embed(y), temperature=temperature)

    torch._dynamo.reset()
    compiled, values, graphs = torch.compile(step, backend="eager"), [], []
    for k in range(12):  # more than the compiler's limit of 8
        if changing == "progress":
            loss.set_progress(k / 12)
        given = torch.tensor(0.3 + 0.01 * k, dtype=torch.float64) if changing == "argument" else None
        values.append(compiled(given).item())
        assert values[-1] == step(given).item()
        if tau is not None:
            tau.data.add_(0.01)
        if k == 0:
            counters_before = counters["stats"]["unique_graphs"]
        graphs.append(counters["stats"]["unique_graphs"] - counters_before)
    assert len(set(values)) == 12
    assert graphs == [0] * 12


def test_a_whole_graph_is_refused_by_the_compiler() -> None:
    loss, u, v = InfoNCELoss(), unit(6, 0), unit(6, 1)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"FieldLoss\._forward"):
        torch.compile(lambda: loss(u, v), backend="eager", fullgraph=True)()


def test_gradient_checkpointing_changes_nothing() -> None:
    net, x, y = Net(RKDOLoss()), samples(6, 0), samples(6, 1)
    net(x, y).backward()
    gradients = net.gradients()
    for reentrant in (False, True):
        inputs = (x.clone().requires_grad_(reentrant), y)
        checkpoint(net, *inputs, use_reentrant=reentrant).backward()
        torch.testing.assert_close(net.gradients(), gradients, rtol=0, atol=0)


def test_copies_and_saved_states() -> None:
    temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss, u, v = InfoNCELoss(temperature), unit(4, 0), unit(4, 1)
    stored = io.BytesIO()
    torch.save(loss.state_dict(), stored)
    stored.seek(0)
    other = InfoNCELoss(nn.Parameter(torch.tensor(9.0, dtype=torch.float64)))
    other.load_state_dict(torch.load(stored, weights_only=True))
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), other):
        assert torch.equal(copied(u, v), loss(u, v))
        copied.temperature.data.fill_(1.0)
    assert loss.temperature.item() == pytest.approx(0.3)


# --- ranks ------------------------------------------------------------------------------------------------------

SHARES = [(3, 2), (5, 0), (4, 1)]  # rows and extra columns of every rank


def uneven(rank: int, world: int) -> list[list[np.ndarray]]:
    """Gradients of a wrapped step, by loss, plain and with a static graph."""
    torch.manual_seed(rank)
    (n, m), first = SHARES[rank], sum(b for b, _ in SHARES[:rank])
    x, y = (samples(12, k)[first : first + n] for k in (0, 1))
    extra = samples(3, 2)[sum(c for _, c in SHARES[:rank]) :][:m]
    found = []
    for loss in (RKDOLoss(), IConLoss()):
        for static in (False, True):
            net = DistributedDataParallel(Net(copy.deepcopy(loss)), static_graph=static)
            for _ in range(2):  # a static graph is used from the second step on
                net.zero_grad(set_to_none=True)
                value = net(x, y, extra)
                value.backward()
            found.append([value.detach().numpy(), *(g.numpy() for g in net.module.gradients())])
    return found


def test_ranks_of_different_sizes_are_one_global_batch_under_ddp() -> None:
    per_rank = run_ranks(uneven, 3)
    x, y, extra = samples(12, 0), samples(12, 1), samples(3, 2)
    expected = []
    for loss in (RKDOLoss(), IConLoss()):
        net = Net(loss)
        value = rectangular(loss, net.embed(x), net.embed(y), net.embed(extra)).mean()
        value.backward()
        expected += 2 * [[value.detach().numpy(), *(g.numpy() for g in net.gradients())]]
    for k, (mean, *gradients) in enumerate(expected):
        values = [answers[k][0] for answers in per_rank]
        np.testing.assert_allclose(np.mean(values), mean, rtol=1e-12)
        for answers in per_rank:
            for found, wanted in zip(answers[k][1:], gradients, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-13)


def learned(rank: int, world: int) -> list[Any]:
    """A learned temperature outside DDP and one inside, after ten steps each; what temperatures apart are told; what
    copies with a group of their own do."""
    u, v = unit(4 + rank, rank).detach(), unit(4 + rank, 9 + rank).detach()
    found: list[Any] = []
    for exchange, wrapped in (("gather", False), ("gather", True), ("ring", False), ("local", False)):
        mine = slice(4) if exchange == "ring" else slice(None)
        loss = InfoNCELoss(nn.Parameter(torch.tensor(0.5, dtype=torch.float64)), exchange=exchange)
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
        step = DistributedDataParallel(loss) if wrapped else loss
        for _ in range(10):
            optimizer.zero_grad()
            step(u[mine], v[mine]).backward()
            optimizer.step()
        found.append(loss.temperature.item())
    for apart in (
        {"temperature": torch.tensor(0.5 + rank / 100)},
        {"temperature": torch.tensor(0.5, requires_grad=rank == 1)},
    ):
        with pytest.raises(ValueError) as caught:
            InfoNCELoss()(u, v, **apart)
        found.append(str(caught.value))
    loss = InfoNCELoss(group=dist.new_group(list(range(world))))
    assert torch.equal(copy.deepcopy(loss)(u, v), InfoNCELoss()(u, v))
    with pytest.raises(TypeError, match="process group of its own cannot be pickled"):
        pickle.dumps(loss)
    return found


def test_a_learned_temperature_stays_one_on_all_ranks() -> None:
    first, second = run_ranks(learned, 2)
    assert first[:3] == second[:3]
    assert first[0] == pytest.approx(first[1], rel=1e-12)  # DDP changes nothing
    assert abs(first[0] - 0.5) > 1e-3
    assert first[3] != second[3]  # local columns exchange nothing: the control that drifts apart
    assert first[4:] == second[4:]
    assert "temperature must be equal on all ranks, got rank 0: 0.5, rank 1: 0.51; begin with one value" in first[4]
    assert "equal use of a learned temperature on all ranks, got rank 0: False, rank 1: True" in first[5]


def ring(rank: int, world: int) -> str:
    u, v = unit(2 + rank, rank).detach(), unit(2 + rank, 9).detach()
    with pytest.raises(ValueError, match="row counts") as caught:
        InfoNCELoss(exchange="ring")(u, v)
    return str(caught.value)


def test_a_ring_says_that_it_needs_equal_rows() -> None:
    assert len(set(run_ranks(ring, 2))) == 1


# --- upstream's own losses --------------------------------------------------------------------------------------


def close(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_open_clip() -> None:
    upstream = pytest.importorskip("open_clip")
    from examples.open_clip import ClipLoss

    u, v = unit(8, 0, torch.float32), unit(8, 1, torch.float32)
    scale = torch.tensor(2.0).requires_grad_()
    close(ClipLoss()(u, v, scale.exp()), upstream.ClipLoss()(u, v, scale.exp()), u, v, scale)
    assert list(ClipLoss()(u, v, scale.exp(), output_dict=True)) == ["contrastive_loss"]


def test_lightly() -> None:
    upstream = pytest.importorskip("lightly.loss")
    from examples.lightly import NTXentLoss

    u, v = ((2 * unit(8, k, torch.float32)).detach().requires_grad_() for k in (0, 1))
    close(NTXentLoss(0.3)(u, v), upstream.NTXentLoss(0.3)(u, v), u, v)


def test_sentence_transformers() -> None:
    """With and without hard negatives; against the formula too, which needs no library."""
    from examples.sentence_transformers import RankingLoss

    embeddings = [(2 * unit(6, k, torch.float32)).detach().requires_grad_() for k in range(4)]
    for count in (2, 4):
        u, *others = embeddings[:count]
        scores = 20 * normalize(u, dim=1) @ normalize(torch.cat(others), dim=1).T
        found = RankingLoss(None).of_embeddings([u, *others])
        close(found, cross_entropy(scores, torch.arange(6)), u, *others)
    upstream = pytest.importorskip("sentence_transformers.losses")
    loss = upstream.MultipleNegativesRankingLoss(nn.Identity())
    close(RankingLoss(None).of_embeddings(embeddings), loss.compute_loss_from_embeddings(embeddings, None), *embeddings)
