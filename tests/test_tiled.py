"""The field in strips equals the dense oracle: values, parts, gradients, in any tiling, precision, block order."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rkdo_dist.field import rows as rows_of_the_field
from rkdo_dist.field.affinity import AFFINITIES
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.field.rows import FieldRows
from rkdo_dist.field.tiled import value_and_gradient
from tests import fields

OBJECTIVES = ["rkdo", "debiased rkdo", "rkdo of labels", "icon", "infonce", "supervised"]


@st.composite
def objectives(draw) -> Objective:
    kind, tau = draw(st.sampled_from(OBJECTIVES)), draw(st.one_of(st.floats(0.01, 10), st.sampled_from([0.01, 0.5])))
    pairing, symmetric = draw(st.sampled_from([("cross", False), ("cross", True), ("joint", False)]))
    if kind == "infonce":
        return Objective.infonce(tau, pairing, symmetric)
    share = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0]))
    if kind in ("icon", "supervised"):
        return getattr(Objective, kind)(temperature=tau, debias=draw(share), pairing=pairing, symmetric=symmetric)
    depth = draw(st.integers(1, 6))
    alpha = draw(st.one_of(share, st.lists(share, min_size=depth, max_size=depth)))
    gradient, clock = draw(st.sampled_from(["flow", "stop"])), draw(st.sampled_from(["depth", "training"]))
    debias = draw(share) if kind == "debiased rkdo" else 0.0
    made = Objective.rkdo(depth, alpha, tau, draw(st.floats(0, 0.9)), pairing, gradient, symmetric, clock, 0.5, debias)
    return dataclasses.replace(made, supervisor="labels") if kind == "rkdo of labels" else made


def oracle(objective: Objective, u: Tensor, v: Tensor, labels: Tensor) -> dict[str, Tensor]:
    u, v = (x.detach().clone().requires_grad_() for x in (u, v))
    tau = torch.tensor(objective.temperature, dtype=u.dtype, requires_grad=True)
    loss, parts = dense(objective, u, v, labels, tau)
    du, dv, dtau = torch.autograd.grad(loss, (u, v, tau))
    return {"loss": loss.detach(), "u": du, "v": dv, "temperature": dtau, **{k: p.detach() for k, p in parts.items()}}


def gathered(objective: Objective, u: Tensor, v: Tensor, labels: Tensor, cuts: list[int], parts: bool = True) -> dict:
    """Means over the batch, from `value_and_gradient` of consecutive rows."""
    found = {"loss": 0, "u": torch.zeros_like(u), "v": torch.zeros_like(v), "temperature": 0}
    edges = [0, *cuts, len(u)]
    for start, stop in itertools.pairwise(edges):
        result = value_and_gradient(objective, u[start:stop], v[start:stop], u, v, start, labels, parts)
        for name, rows, columns in (("u", result.rows_u, result.columns_u), ("v", result.rows_v, result.columns_v)):
            found[name][start:stop] += rows
            found[name] += 0 if columns is None else columns
        for name, value in {"loss": result.loss, "temperature": result.temperature, **result.parts}.items():
            found[name] = found.get(name, 0) + value
    return {name: value / len(u) for name, value in found.items()}


def scale_of(name: str, expected: dict[str, Tensor], objective: Objective) -> float:
    """How large the numbers are that a result is a difference of: a divergence is one of two entropies, and log q is
    one of two logits, which is felt from a temperature of 0.02 on."""
    steep = max(1.0, 1 / min(objective.temperatures))
    entropy = max(1.0, float(expected["cross_entropy"]), 0.02 * steep)
    return {"u": steep, "v": steep, "temperature": steep**2 * entropy}.get(name, entropy)


def assert_agree(found: dict, expected: dict[str, Tensor], objective: Objective, rtol: float, atol: float) -> None:
    for name, value in found.items():
        wanted = expected[name].double()
        error, allowed = float((value.double() - wanted).norm()), atol * scale_of(name, expected, objective)
        assert error <= rtol * float(wanted.norm()) + allowed, (name, error, float(wanted.norm()))


def with_tiles(strip: int, panel: int, rows: int):
    patch = pytest.MonkeyPatch()
    patch.setitem(rows_of_the_field.STRIP_BUFFER_ELEMENTS, "cpu", strip)
    patch.setitem(rows_of_the_field.PANEL_ELEMENTS, "cpu", panel)
    patch.setattr(rows_of_the_field, "PANEL_ROWS", rows)
    return patch


@settings(deadline=None, max_examples=80)
@given(
    objectives(), st.integers(2, 250), st.integers(1, 12), st.integers(0, 4), st.integers(0, 999),
    st.integers(1, 20000), st.integers(1, 4000), st.integers(1, 16), st.booleans(),
)  # fmt: skip
def test_equals_the_oracle_in_float64(objective, batch, d, copies, seed, strip, panel, rows, parts) -> None:
    u, v = fields.embeddings(batch, d, seed, copies=copies)
    labels = torch.randint(0, 4, (batch,), generator=torch.Generator().manual_seed(seed))
    patch = with_tiles(strip, panel, rows)
    try:
        found = gathered(objective, u, v, labels, [batch // 3 + 1] if batch > 2 else [], parts)
    finally:
        patch.undo()
    assert_agree(found, oracle(objective, u, v, labels), objective, 1e-12, 1e-14)


@pytest.mark.parametrize("objective", fields.objectives_of(0.5, 3, 0.5), ids=lambda o: f"{o.name}-{o.pairing}")
def test_equals_the_oracle_at_a_few_hundred(objective: Objective) -> None:
    u, v = fields.embeddings(300, 16, copies=3)
    labels = torch.arange(300) % 7
    found = gathered(objective, u, v, labels, [64, 128])
    assert_agree(found, oracle(objective, u, v, labels), objective, 1e-12, 1e-15)


@settings(deadline=None, max_examples=80)
@given(objectives(), st.integers(2, 250), st.integers(2, 12), st.integers(0, 4), st.integers(0, 999))
@example(Objective.rkdo(6, 1.0, 0.01, 0.9), 70, 12, 4, 0)
@example(Objective.rkdo(2, 1e-300), 5, 4, 0, 0)
def test_equals_the_oracle_in_float32(objective, batch, d, copies, seed) -> None:
    u, v = (x.float() for x in fields.embeddings(batch, d, seed, copies=copies))
    labels = torch.randint(0, 4, (batch,), generator=torch.Generator().manual_seed(seed))
    expected = oracle(objective, u.double(), v.double(), labels)
    # a similarity of float32 rows is off by 1e-7, a log-probability by that over tau
    noise = max(1.0, 0.02 / min(objective.temperatures)) * 1e-5
    assert_agree(gathered(objective, u, v, labels, []), expected, objective, noise, noise)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    u, v = (x.to(dtype) for x in fields.embeddings(50, 8))
    objective, labels = Objective.rkdo(), torch.zeros(50)
    result = value_and_gradient(objective, u, v, u, v, 0)
    assert result.rows_u.dtype == torch.float32
    found = gathered(objective, u.float(), v.float(), labels, [])
    expected = oracle(objective, u.double(), v.double(), labels)
    assert_agree(found, expected, objective, 1e-5, 1e-5)
    wide = value_and_gradient(objective, u.float(), v.float(), u.float(), v.float(), 0)
    assert torch.equal(result.rows_u, wide.rows_u)
    assert float(result.loss) == float(wide.loss)


@pytest.mark.parametrize("objective", fields.objectives_of(0.5, 3, 0.5), ids=lambda o: f"{o.name}-{o.pairing}")
@pytest.mark.parametrize("tau", [0.5, 0.003])
def test_blocks_of_columns_give_the_same_as_all_at_once(objective: Objective, tau: float) -> None:
    objective = objective.with_temperature(tau)
    u, v = fields.embeddings(24, 5)
    labels, b = torch.arange(24) % 5, 6
    own = torch.stack([{"u": u, "v": v}[name] for name in objective.column_views])
    for first in (0, 12):
        rows = {"u": u[first : first + b], "v": v[first : first + b]}
        expected = value_and_gradient(objective, rows["u"], rows["v"], u, v, first, labels)
        field = FieldRows(objective, rows, 24, first, b, labels)
        for walk in field.walks:
            for start in (6, 0, 18, 12):
                field.visit(walk, own[:, start : start + b].contiguous(), start)
        columns = torch.zeros_like(own)
        for start in (18, 12, 6, 0):
            gradient = torch.zeros_like(own[:, :b])
            field.differentiate(own[:, start : start + b].contiguous(), start, gradient)
            columns[:, start : start + b] += gradient
        found = {"loss": field.loss(), "temperature": field.temperature_gradient(), **field.parts()}
        for name, value in {"loss": expected.loss, "temperature": expected.temperature, **expected.parts}.items():
            torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11)
        wanted = {"u": expected.columns_u, "v": expected.columns_v}
        for view, gradient in zip(objective.column_views, columns, strict=True):
            torch.testing.assert_close(gradient, wanted[view], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(field.gradients["u"], expected.rows_u, rtol=1e-10, atol=1e-12)
        of_v = field.gradients.get("v", torch.zeros_like(rows["v"]))  # of views that are rows alone
        torch.testing.assert_close(of_v, expected.rows_v, rtol=1e-10, atol=1e-12)


def test_the_result_is_a_function_of_the_arguments_bit_for_bit() -> None:
    u, v = (x.float() for x in fields.embeddings(200, 16))
    first = value_and_gradient(Objective.rkdo(), u[64:128], v[64:128], u, v, 64)
    again = value_and_gradient(Objective.rkdo(), u[64:128].clone(), v[64:128].clone(), u.clone(), v.clone(), 64)
    assert torch.equal(first.rows_u, again.rows_u)
    assert first.columns_v is not None
    assert again.columns_v is not None
    assert torch.equal(first.columns_v, again.columns_v)
    assert float(first.loss) == float(again.loss)
    assert {k: float(x) for k, x in first.parts.items()} == {k: float(x) for k, x in again.parts.items()}


@pytest.mark.parametrize("objective", fields.objectives_of(0.5, 3, 0.5), ids=lambda o: f"{o.name}-{o.pairing}")
@pytest.mark.parametrize("affinity", ["cosine", "clusters"])
def test_lanes_together_have_the_bits_of_each_alone(objective: Objective, affinity: str, monkeypatch) -> None:
    """Three panels of two lanes, one panel of all, or two and a half panels for a lane: the same sums, lane by lane."""
    objective = dataclasses.replace(objective, affinity=AFFINITIES[affinity]())
    u, v = (x.float() for x in fields.embeddings(96, 8))
    labels, m, first = torch.arange(96) % 7, 12, 24
    views = {"u": u[first : first + 5 * m], "v": v[first : first + 5 * m]}
    block = torch.stack([{"u": u, "v": v}[name] for name in objective.column_views])
    pooled = objective.affinity.pool(block, len(block) * 96)

    def found(rows: slice, lanes: int) -> list[list[Tensor]]:
        homes: list[Tensor] = []
        own = {name: x[rows] for name, x in views.items()}
        field = FieldRows(objective, own, 96, first + rows.start, 96, labels, pooled=pooled, lanes=lanes)
        field.fused_by_lane(block, homes.append)
        sums = torch.stack([field.loss(), field.temperature_gradient(), *field.parts().values()])
        gradients = [gradient.split(m) for gradient in field.gradients.values()]
        return [list(of_lane) for of_lane in zip(homes, sums.unbind(1), *gradients, strict=True)]

    width = 96 * len(objective.slices[0].columns)
    for panel_rows in (2 * m * len(objective.slices), 10 * m, 5):
        monkeypatch.setattr(rows_of_the_field, "PANEL_ROWS", 1)
        monkeypatch.setitem(rows_of_the_field.PANEL_ELEMENTS, "cpu", panel_rows * width)
        together = found(slice(0, 5 * m), 5)
        for number in range(5):
            (alone,) = found(slice(number * m, (number + 1) * m), 1)
            assert all(torch.equal(a, b) for a, b in zip(together[number], alone, strict=True)), (number, panel_rows)


def test_where_a_tensor_lies_in_memory_changes_no_bit() -> None:
    u, v = (x.float() for x in fields.embeddings(200, 16))
    expected = value_and_gradient(Objective.rkdo(), u[64:128], v[64:128], u, v, 64)

    def moved(x: Tensor) -> Tensor:
        room = torch.empty(x.numel() + 3)[3:].view_as(x)
        return room.copy_(x)

    found = value_and_gradient(Objective.rkdo(), moved(u[64:128]), moved(v[64:128]), moved(u), moved(v), 64)
    assert torch.equal(found.rows_u, expected.rows_u)
    assert found.columns_v is not None
    assert expected.columns_v is not None
    assert torch.equal(found.columns_v, expected.columns_v)
    assert float(found.loss) == float(expected.loss)


class _LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("pairing", ["cross", "joint"])
@pytest.mark.parametrize("affinity", ["cosine", "gaussian", "student", "clusters"])
def test_no_tensor_grows_with_the_square_of_the_batch(pairing: str, affinity: str) -> None:
    largest = {}
    patch = with_tiles(1 << 16, 1 << 13, 8)
    for batch in (128, 512):
        u, v = (x.float() for x in fields.embeddings(batch, 8))
        with _LargestTensor() as mode:
            value_and_gradient(Objective.rkdo(pairing=pairing, affinity=affinity), u, v, u, v, 0)
        largest[batch] = mode.elements
    patch.undo()
    assert largest[512] <= 512**2 / 8
    assert largest[512] <= 4 * largest[128]  # as the embeddings do, and the least panel of 8 rows


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda u, v: value_and_gradient(Objective.rkdo(), u[:4], v[:4], u, v, 5), "do not lie within a batch of 8"),
        (lambda u, v: value_and_gradient(Objective.rkdo(), u[:4], v[:3], u, v, 0), "rows_v \\(3, 4\\)"),
        (lambda u, v: value_and_gradient(Objective.rkdo(), u[:4], v[:4], u, v[:7], 0), "columns_v \\(7, 4\\)"),
        (lambda u, v: value_and_gradient(Objective.rkdo(), u[:4, :3], v[:4, :3], u, v, 0), "rows_u d = 3"),
        (lambda u, v: value_and_gradient(Objective.rkdo(), u.float(), v.float(), u, v, 0), "torch.float32"),
        (lambda u, v: value_and_gradient(Objective.rkdo(), u[:0], v[:0], u, v, 0), "at least one row"),
        (lambda u, v: value_and_gradient(Objective.rkdo(), u[:1], v[:1], u[:1], v[:1], 0), "two samples"),
        (lambda u, v: value_and_gradient(Objective.supervised(), u, v, u, v, 0), "labels"),
    ],
)
def test_wrong_calls_are_refused(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(*fields.embeddings(8, 4))
