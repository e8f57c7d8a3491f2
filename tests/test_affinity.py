"""Every affinity in bounded memory equals dense autograd: values and gradients, by every exchange, on 1, 2 and 4 ranks.

Embeddings are far from the origin and of any length, and different on every rank.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rkdo_dist.field import rows as rows_of_the_field
from rkdo_dist.field.affinity import AFFINITIES, Affinity, Clusters, Cosine, Gaussian, Student
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.field.rows import field_normaliser
from rkdo_dist.field.tiled import log_sum, value_and_gradient
from rkdo_dist.losses import FieldInputError, FieldLoss, InfoNCELoss, RKDOLoss, SupervisedLoss
from rkdo_dist.training.exact import exact_field
from tests.ranks import run_ranks

B, D = 16, 5
KINDS = [Cosine(), Gaussian(1.7), Student(2.0), Student(0.7), Clusters(), Clusters(0.3)]
SPREAD = [Gaussian(1.7), Student(2.0), Clusters(0.3)]  # on ranks
SHAPES = [("cross", False), ("cross", True), ("joint", False)]


def embeddings(affinity: Affinity, batch: int = B, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Both views and labels; the second sample is a copy of the first."""
    generator = torch.Generator().manual_seed(batch)
    u, noise = (torch.randn(batch, D, generator=generator, dtype=torch.float64) for _ in range(2))
    u, v = (u + 2, u + 0.4 * noise + 2)
    u[1], v[1] = u[0], v[0]
    if affinity.unit_norm:
        u, v = normalize(u, dim=1), normalize(v, dim=1)
    return u.to(dtype), v.to(dtype), torch.arange(batch) % 3


def objectives(affinity: Affinity) -> list[Objective]:
    """Every supervisor, pairing, normaliser and recursion within a step."""
    found = []
    for pairing, symmetric in SHAPES:
        shape = {"pairing": pairing, "symmetric": symmetric, "affinity": affinity}
        found += [Objective.icon(a, 0.8, **shape) for a in (0.0, 0.3)]
        found.append(Objective.supervised(1.3, 0.2, **shape))
        deep = Objective.rkdo(3, (0.5, 0.0, 0.2), 0.9, 0.3, **shape)
        found += [deep, dataclasses.replace(deep, supervisor_grad="stop")]
        found.append(dataclasses.replace(deep, supervisor="labels", debias=0.2))
        found += [dataclasses.replace(o, normaliser="field") for o in found if o.debias and o.recursion == "none"][-2:]
    return found


def oracle(objective: Objective, u: Tensor, v: Tensor, labels: Tensor) -> dict[str, Tensor]:
    u, v = (x.detach().double().requires_grad_() for x in (u, v))
    tau = torch.tensor(objective.temperature, dtype=torch.float64, requires_grad=True)
    loss, parts = dense(objective, u, v, labels, tau)
    du, dv, dtau = torch.autograd.grad(loss, (u, v, tau))
    return {"loss": loss.detach(), "u": du, "v": dv, "tau": dtau, **{name: x.detach() for name, x in parts.items()}}


def assert_agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: object) -> None:
    """Within a tolerance of the scale of the terms: a loss is a difference of cross-entropy and entropy."""
    scale = max(1.0, float(expected["cross_entropy"]))
    for name, value in found.items():
        error = float((torch.as_tensor(value).double() - expected[name]).norm())
        assert error <= tolerance * (float(expected[name].norm()) + scale), (what, name, error)


def in_two_calls(objective: Objective, u: Tensor, v: Tensor, labels: Tensor) -> dict[str, Tensor]:
    found = {"u": torch.zeros_like(u), "v": torch.zeros_like(v)}
    totals: dict[str, Tensor] = {}
    parts, normaliser = list(itertools.pairwise((0, 5, len(u)))), None
    if objective.normaliser == "field":
        sums = [log_sum(objective, u[start:stop], v[start:stop], u, v, start) for start, stop in parts]
        normaliser = field_normaliser(torch.stack(sums), len(u) * len(objective.slices))
    for start, stop in parts:
        own = u[start:stop], v[start:stop]
        result = value_and_gradient(objective, *own, u, v, start, labels, log_normaliser=normaliser)
        for name, rows, columns in (("u", result.rows_u, result.columns_u), ("v", result.rows_v, result.columns_v)):
            found[name][start:stop] += rows
            found[name] += 0 if columns is None else columns
        assert result.temperature is not None
        for name, value in {"loss": result.loss, "tau": result.temperature, **result.parts}.items():
            totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + value
    return {name: value / len(u) for name, value in (found | totals).items()}


@pytest.mark.parametrize("affinity", [*KINDS, Student(1e6)], ids=repr)
def test_strips_equal_the_dense_formula(affinity: Affinity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows_of_the_field.STRIP_BUFFER_ELEMENTS, "cpu", 700)
    monkeypatch.setattr(rows_of_the_field, "PANEL_ROWS", 6)
    monkeypatch.setitem(rows_of_the_field.PANEL_ELEMENTS, "cpu", 1)
    u, v, labels = embeddings(affinity)
    for objective in objectives(affinity):
        expected = oracle(objective, u, v, labels)
        # with 1e6 degrees of freedom the logit is a million times the logarithm of nearly 1
        exact = 1e-12 if affinity != Student(1e6) else 1e-10
        assert_agree(in_two_calls(objective, u, v, labels), expected, exact, objective)
        u32, v32 = u.float(), v.float()
        expected = oracle(objective, u32, v32, labels)
        assert_agree(in_two_calls(objective, u32, v32, labels), expected, 1e-5, objective)


def test_the_gradient_of_sigma_is_that_of_the_temperature() -> None:
    u, v, labels = embeddings(Gaussian())
    sigma = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    x = -torch.cdist(u, v).square() / (2 * sigma**2)
    torch.nn.functional.cross_entropy(x, torch.arange(B)).backward()
    found = in_two_calls(Objective.infonce(1.0, affinity=Gaussian(1.7)), u, v, labels)["tau"]
    torch.testing.assert_close(found * 2 / 1.7, sigma.grad, rtol=1e-12, atol=0)


def test_the_sizes_of_clusters_have_a_gradient() -> None:
    """A control: a gradient without it is another one."""
    u, v, _ = embeddings(Clusters())
    v.requires_grad_()
    objective = Objective.infonce(affinity=Clusters(0.2))
    (expected,) = torch.autograd.grad(dense(objective, u, v)[0], v)
    phi, columns = u.softmax(1), v.softmax(1)
    chance = 0.8 * phi @ (columns / columns.sum(0).detach()).T + 0.2 / B
    (without,) = torch.autograd.grad(-chance.log().log_softmax(1).diagonal().mean(), v)
    assert (without - expected).norm() > 0.1 * expected.norm()


def test_clusters_are_a_distribution_and_tails_tend_to_the_gaussian() -> None:
    u, v, _ = embeddings(Clusters())
    q = Clusters(0.3).logits(u, v, B).exp()
    torch.testing.assert_close(q.sum(1), torch.ones(B, dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(Student(1e9).logits(u, v, B), Gaussian(1.0).logits(u, v, B), rtol=1e-7, atol=1e-7)
    far = torch.tensor([[200.0, -200.0]]).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])  # sure of different clusters
    for share in (0.0, 0.5):
        result = value_and_gradient(Objective.infonce(affinity=Clusters(share)), far, far.flip(0), far, far.flip(0), 0)
        assert torch.isfinite(torch.stack([result.loss, result.rows_u.sum(), result.columns_v.sum()])).all()


# --- ranks ------------------------------------------------------------------------------------------------------------


def some(affinity: Affinity) -> list[Objective]:
    """Every pairing without recursion, and with one that also has labels and a share."""
    return [
        o for o in objectives(affinity) if o.debias == (0.3 if o.recursion == "none" else 0.2) and o.name != "supcon"
    ]


def weight_of(objective: Objective, rank: int) -> float:
    """Different on every rank, where the gradient of a rank's loss is that of its rows alone."""
    return rank + 1.0 if objective.normaliser == "row" else 1.0


def _on_ranks(rank: int, world: int) -> list[dict[str, np.ndarray]]:
    """By objective: gather and ring, with a weight of the rank's own; and the exact sum over lanes."""
    found = []
    for affinity in SPREAD:
        u_all, v_all, labels = embeddings(affinity)
        mine, m = slice(rank * B // world, (rank + 1) * B // world), 4
        for objective in some(affinity):
            one: dict[str, Tensor] = {}
            for exchange in ("gather", "ring"):
                u, v = (x[mine].clone().requires_grad_() for x in (u_all, v_all))
                tau = torch.tensor(objective.temperature, dtype=torch.float64, requires_grad=True)
                given = labels[mine] if objective.needs_labels else None
                loss = FieldLoss(objective, exchange=exchange, temperature=tau)(u, v, given)
                (loss * weight_of(objective, rank)).backward()
                found_here = {"loss": loss.detach(), "u": u.grad, "v": v.grad, "tau": tau.grad}
                one |= {f"{exchange}.{name}": x for name, x in found_here.items() if x is not None}
            u, v = (x[mine].float() for x in (u_all, v_all))
            lanes = list(zip(u.split(m), v.split(m), strict=True))
            exact = exact_field(lanes, objective, rank * len(lanes), labels=labels[mine])
            one["exact.u"], one["exact.v"] = (torch.cat([pair[k] for pair in exact.gradients]) for k in (0, 1))
            one["exact.loss"] = exact.sums["loss"]
            found.append({name: x.detach().numpy() for name, x in one.items()})
    return found


def test_every_exchange_gives_the_same_and_the_exact_one_the_same_bits() -> None:
    per_world = {
        world: run_ranks(_on_ranks, world, timeout=300) if world > 1 else [_on_ranks(0, 1)] for world in (1, 2, 4)
    }
    everything = [(affinity, objective) for affinity in SPREAD for objective in some(affinity)]
    for number, (affinity, objective) in enumerate(everything):
        u, v, labels = embeddings(affinity)
        for world, ranks in per_world.items():
            results = [rank[number] for rank in ranks]
            for name in ("exact.u", "exact.v", "exact.loss"):
                bits = np.concatenate([r[name] for r in results])
                assert np.array_equal(bits, per_world[1][0][number][name]), (objective, name, world)
            expected = _weighted(objective, u, v, labels, world)
            for exchange in ("gather", "ring"):
                found = {name: np.concatenate([r[f"{exchange}.{name}"] for r in results]) for name in ("u", "v")}
                found |= {name: np.array([r[f"{exchange}.{name}"] for r in results]) for name in ("loss", "tau")}
                for name, value in found.items():
                    wanted = expected[name].numpy()
                    if name == "tau":  # the mean over ranks
                        wanted = np.full(world, wanted.mean())
                    np.testing.assert_allclose(value, wanted, rtol=1e-11, atol=1e-12, err_msg=f"{objective} {name}")


def _weighted(objective: Objective, u: Tensor, v: Tensor, labels: Tensor, world: int) -> dict[str, Tensor]:
    """By rank r the loss of its rows, and the gradients of the sum of r + 1 times these."""
    u, v = (x.clone().requires_grad_() for x in (u, v))
    tau = torch.tensor(objective.temperature, dtype=torch.float64, requires_grad=True)
    losses = [dense(objective, u, v, labels, tau, rows)[0] for rows in torch.arange(B).chunk(world)]
    weighted = [loss * weight_of(objective, r) for r, loss in enumerate(losses)]
    du, dv = torch.autograd.grad(sum(weighted), (u, v), retain_graph=True)
    slopes = [torch.autograd.grad(loss, tau, retain_graph=True)[0] for loss in weighted]
    return {"loss": torch.stack(losses).detach(), "u": du, "v": dv, "tau": torch.stack(slopes)}


# --- in one's own loop ------------------------------------------------------------------------------------------------


def test_losses_take_an_affinity() -> None:
    u, v, labels = embeddings(Student())
    for loss in (
        InfoNCELoss(affinity="student"),
        RKDOLoss(affinity=Gaussian(2.0)),
        SupervisedLoss(affinity="clusters"),
    ):
        assert loss.objective.temperature == 1
        given = (u, v, labels if loss.objective.needs_labels else None)
        torch.testing.assert_close(loss(*given), dense(loss.objective, *given)[0], rtol=1e-12, atol=1e-13)
    assert InfoNCELoss().objective.temperature == 0.5
    with pytest.raises(FieldInputError, match="u must have rows of unit norm"):
        InfoNCELoss()(u, v)
    extra = u[:3] * 2
    loss = InfoNCELoss(affinity=Clusters(0.1))
    q = Clusters(0.1).logits(u, torch.cat([v, extra]), B + 3)
    torch.testing.assert_close(loss(u, v, extra_columns=extra), -q.log_softmax(1).diagonal().mean())


@pytest.mark.parametrize("affinity", list(AFFINITIES))
def test_numbers_that_are_not_finite_are_refused_for_every_affinity(affinity: str) -> None:
    u, v, _ = embeddings(AFFINITIES[affinity]())
    u[3, 2] = torch.nan
    with pytest.raises(FieldInputError, match="u has entries that are not finite"):
        InfoNCELoss(affinity=affinity)(u, v)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Gaussian(0.0), "sigma must be finite and > 0, got 0"),
        (lambda: Student(-1.0), "degrees_of_freedom must be finite and > 0, got -1"),
        (lambda: Student(float("nan")), "degrees_of_freedom must be finite and > 0, got nan"),
        (lambda: Clusters(1.5), r"share must lie in \[0, 1\], got 1.5"),
        (lambda: InfoNCELoss(affinity="cosinus"), "affinity must be one of cosine, gaussian, student, clusters"),
        (lambda: InfoNCELoss(affinity="clusters")(torch.ones(4, 1), torch.ones(4, 1)), "at least 2 clusters"),
    ],
)
def test_affinities_that_cannot_be_are_refused(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_the_ideal_has_a_closed_form_for_the_cosine_alone() -> None:
    same, two = torch.ones(B, D, dtype=torch.float64), torch.arange(B) % 2
    for objective in objectives(Student()):
        assert objective.at_ideal(B) is None
        positives = {"cross": 8, "joint": 15}[objective.pairing] if objective.needs_labels else 1
        assert float(dense(objective, same, same, two)[0]) == pytest.approx(
            objective.at_uniform(B, positives), rel=1e-9
        )
