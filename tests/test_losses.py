"""The front door in one process: what a user of `pip install rkdo_dist` meets."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import normalize

from rkdo_dist import FieldInputError, IConLoss, InfoNCELoss, RKDOLoss, SupervisedLoss
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.losses import FieldLoss
from tests import fields

EXCHANGES = ["gather", "ring", "local"]


def pair(batch: int = 12, d: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    u, v = (x.to(dtype).requires_grad_() for x in fields.embeddings(batch, d, copies=1))
    return u, v


def named() -> list[tuple[FieldLoss, Objective]]:
    return [
        (RKDOLoss(), Objective.rkdo()),
        (RKDOLoss(2, (0.1, 0.9), 0.2, 0.3, "joint", "stop"), Objective.rkdo(2, (0.1, 0.9), 0.2, 0.3, "joint", "stop")),
        (RKDOLoss(symmetric=True), Objective.rkdo(symmetric=True)),
        (IConLoss(), Objective.icon()),
        (IConLoss(0.3, 0.1, "joint"), Objective.icon(0.3, 0.1, "joint")),
        (InfoNCELoss(0.07, symmetric=True), Objective.infonce(0.07, symmetric=True)),
        (SupervisedLoss(0.2, 0.1), Objective.supervised(0.2, 0.1)),
    ]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_losses_equal_the_oracle(exchange: str) -> None:
    for loss_fn, objective in named():
        labels = torch.arange(12) % 4 if objective.needs_labels else None
        loss_fn.exchange = exchange
        u, v = pair()
        loss, parts = loss_fn(u, v, labels, parts=True)
        expected, wanted = dense(objective, u, v, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
        for mine, truth in zip(torch.autograd.grad(loss, (u, v)), torch.autograd.grad(expected, (u, v)), strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-14)
        assert list(parts) == list(objective.part_names)
        for name, value in parts.items():
            assert not value.requires_grad
            torch.testing.assert_close(value, wanted[name].detach(), rtol=1e-11, atol=1e-13)
        with torch.no_grad():
            torch.testing.assert_close(loss_fn(u, v, labels), expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("objective", fields.objectives_of(0.4, 3, 0.6), ids=lambda o: f"{o.name}-{o.pairing}")
def test_gradcheck(objective: Objective, exchange: str) -> None:
    if objective.supervisor_grad == "stop":
        return  # not the derivative of any function of u; it is compared with the oracle instead
    loss_fn = FieldLoss(objective, exchange=exchange, validate=False)
    labels = torch.arange(5) % 2 if objective.needs_labels else None
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def compute(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
        return loss_fn(normalize(x, dim=1), normalize(y, dim=1), labels, temperature=temperature)

    assert torch.autograd.gradcheck(compute, (*pair(5, 3), tau))


def test_a_learnable_temperature_is_a_parameter_and_learns() -> None:
    loss_fn = RKDOLoss(temperature=nn.Parameter(torch.tensor(0.5)))
    assert [name for name, _ in loss_fn.named_parameters()] == ["temperature"]
    u, v = pair(dtype=torch.float32)
    optimizer, before = torch.optim.SGD(loss_fn.parameters(), lr=0.01), float(loss_fn(u, v).detach())
    loss_fn(u, v).backward()
    optimizer.step()
    assert float(loss_fn.temperature.detach()) != 0.5
    assert float(loss_fn(u, v).detach()) < before
    assert not list(RKDOLoss().parameters())


def test_a_second_backward_and_a_scaled_loss() -> None:
    for exchange in EXCHANGES:
        u, v = pair()
        loss = RKDOLoss(exchange=exchange)(u, v)
        first = torch.autograd.grad(loss, (u, v), retain_graph=True)
        again = torch.autograd.grad(3 * loss, (u, v))
        for a, b in zip(first, again, strict=True):
            torch.testing.assert_close(3 * a, b, rtol=1e-12, atol=0)


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph"),
    reason="this torch does not say whether a graph is kept: gradients are copied",
)
def test_a_backward_pass_hands_on_the_gradients_that_are_kept() -> None:
    (u, v), (w, x) = pair(), pair()
    kept, handed = RKDOLoss()(u, v), RKDOLoss()(w, x)
    home = handed.grad_fn.home.data_ptr()  # type: ignore[union-attr, attr-defined]
    kept.backward(retain_graph=True)
    handed.backward()
    assert kept.grad_fn.home is not None  # type: ignore[union-attr, attr-defined]
    assert handed.grad_fn.home is None  # type: ignore[union-attr, attr-defined]
    pointers = [x.grad.data_ptr() for x in (v, x) if x.grad is not None]
    assert [pointer == home for pointer in pointers] == [False, True]
    for one, other in ((u, w), (v, x)):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        handed.backward()


def test_gradient_reaches_one_view_alone() -> None:
    for loss_fn in (RKDOLoss(), RKDOLoss(exchange="ring"), IConLoss()):
        u, v = pair()
        both = torch.autograd.grad(loss_fn(u, v), (u, v))
        torch.testing.assert_close(torch.autograd.grad(loss_fn(u.detach(), v), v)[0], both[1])
        torch.testing.assert_close(torch.autograd.grad(loss_fn(u, v.detach()), u)[0], both[0])


def test_strided_inputs_are_as_good_as_contiguous_ones() -> None:
    u, v = pair()
    both = torch.stack([u, v], dim=2).detach().requires_grad_()
    expected = torch.autograd.grad(RKDOLoss()(u, v), (u, v))
    for exchange in EXCHANGES:
        (found,) = torch.autograd.grad(RKDOLoss(exchange=exchange)(both[..., 0], both[..., 1]), both)
        torch.testing.assert_close(found, torch.stack(expected, dim=2), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_embeddings_and_autocast_are_computed_in_float32(dtype: torch.dtype) -> None:
    u, v = pair(40, 8, dtype)
    expected = dense(Objective.rkdo(), u.double(), v.double())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RKDOLoss()(u, v)
        wide = RKDOLoss()(u.detach().float(), v.detach().float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert float(wide) == float(loss.detach())
    (found,) = torch.autograd.grad(loss, u)
    (truth,) = torch.autograd.grad(expected, u)
    assert found.dtype == dtype
    torch.testing.assert_close(found, truth, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_training_clock() -> None:
    loss_fn = RKDOLoss(cooling=0.4, clock="training")
    u, v = pair()
    values = []
    for progress in (0.0, 0.5, 1.0):
        loss_fn.set_progress(progress)
        objective = Objective.rkdo(cooling=0.4, clock="training", progress=progress)
        torch.testing.assert_close(loss_fn(u, v), dense(objective, u, v)[0], rtol=1e-12, atol=0)
        values.append(float(loss_fn(u, v).detach()))
    assert len(set(values)) == 3


def test_changing_an_embedding_in_place_before_backward_is_noticed() -> None:
    u, v = pair()
    x = u * 1
    loss = RKDOLoss(exchange="ring")(x, v)
    x.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _dual(loss: FieldLoss, u: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return loss(forward_ad.make_dual(u, v), v)


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda loss, u, v: torch.autograd.grad(loss(u, v), u, create_graph=True), "no second derivative"),
        (lambda loss, u, v: torch.autograd.functional.hvp(lambda x: loss(x, v), u, u), "no second derivative"),
        (_dual, "no forward-mode derivative"),
        (lambda loss, u, v: torch.func.grad(lambda x: loss(x, v))(u), "no torch.func transforms"),
        (lambda loss, u, v: torch.func.jvp(lambda x: loss(x, v), (u,), (v,)), "no torch.func transforms"),
        (lambda loss, u, v: torch.vmap(loss)(torch.stack([u, v]), torch.stack([v, u])), "no torch.func transforms"),
    ],
)
@pytest.mark.parametrize("validate", [True, False])
def test_derivatives_that_are_not_there_are_refused_and_the_dense_formula_has_them(ask, text: str, validate) -> None:
    u, v = pair()
    with pytest.raises(RuntimeError, match=f"the field loss has {text}.*field.objectives.dense has"):
        ask(RKDOLoss(validate=validate), u, v)
    ask(lambda x, y: dense(Objective.rkdo(), x, y)[0], u, v)
    assert torch.isfinite(torch.func.functional_call(RKDOLoss(validate=validate), {}, (u, v)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda u, v: RKDOLoss()(u, v[:3]), "u and v must have the same shape"),
        (lambda u, v: RKDOLoss()(u, v.float()), "u and v must have the same dtype"),
        (lambda u, v: RKDOLoss()(u, v.to("meta")), "u and v must have the same device"),
        (lambda u, v: RKDOLoss()(u[0], v[0]), "u must be a tensor of embeddings"),
        (lambda u, v: RKDOLoss()(None, v), "u must be a tensor of embeddings"),
        (lambda u, v: RKDOLoss()(u.long(), v.long()), "u must be float64"),
        (lambda u, v: RKDOLoss()(u[:0], v[:0]), "u is empty"),
        (lambda u, v: RKDOLoss()(u[:, :0], v[:, :0]), "u is empty"),
        (lambda u, v: RKDOLoss()(u[:1], v[:1]), "one sample"),
        (lambda u, v: RKDOLoss(pairing="joint")(u[:1], v[:1]), "one sample"),
        (lambda u, v: RKDOLoss()(u, v * 1.1), "v must have rows of unit norm"),
        (lambda u, v: RKDOLoss()(u / u[0, 0] * torch.inf, v), "u has entries that are not finite"),
        (lambda u, v: RKDOLoss()(u, torch.full_like(v, torch.nan)), "v has entries that are not finite"),
        (lambda u, v: RKDOLoss()(u, v, temperature=torch.tensor(0.0)), "temperature must be finite and > 0"),
        (lambda u, v: RKDOLoss()(u, v, temperature=torch.tensor(torch.nan)), "temperature must be finite and > 0"),
        (lambda u, v: RKDOLoss()(u, v, temperature=0.3), "temperature must be a floating-point scalar tensor, got fl"),
        (lambda u, v: RKDOLoss()(u, v, temperature=torch.ones(2)), "temperature must be a number or"),
        (lambda u, v: RKDOLoss()(u.to("meta"), v.to("meta")), "are on the device meta and hold no numbers"),
        (lambda u, v: RKDOLoss(normalise=True)(None, v), "u must be a tensor of embeddings"),
        (lambda u, v: RKDOLoss()(u, v, torch.arange(12)), "labels are given, but objective rkdo takes none"),
        (lambda u, v: InfoNCELoss()(u, v, torch.arange(12)), "labels are given, but objective infonce takes none"),
        (lambda u, v: SupervisedLoss()(u, v), "labels are missing"),
        (lambda u, v: SupervisedLoss()(u, v, [0] * 12), "labels must be"),
        (lambda u, v: SupervisedLoss()(u, v, torch.arange(12) > 3), "labels must be"),
        (lambda u, v: SupervisedLoss()(u, v, torch.arange(3)), "labels must be"),
        (lambda u, v: SupervisedLoss()(u, v, torch.rand(12)), "labels must be"),
    ],
)
def test_bad_input_is_named_with_its_rank(call, text: str) -> None:
    with pytest.raises(FieldInputError, match=f"(rank 0: |u and v: ).*{text}"):
        call(*(x.detach() for x in pair()))


def test_without_validation_form_is_checked_and_values_are_not() -> None:
    u, v = (x.detach() for x in pair())
    loss_fn = InfoNCELoss(validate=False)
    for call, text in (
        (lambda: loss_fn(u, v[:3]), "u and v must have the same shape"),
        (lambda: loss_fn(u, v.float()), "u and v must have the same dtype"),
        (lambda: loss_fn(u[:1], v[:1]), "one sample"),
        (lambda: loss_fn(u, v, torch.arange(12)), "labels are given"),
        (lambda: loss_fn(u, v, temperature=0.3), "temperature must be"),
        (lambda: InfoNCELoss(symmetric=True, validate=False)(u, v, extra_columns=u), "symmetric=False"),
    ):
        with pytest.raises(FieldInputError, match=text):
            call()
    wide = torch.nn.functional.cross_entropy(2 * u @ v.T / 0.5, torch.arange(12))  # rows of any length: dot products
    torch.testing.assert_close(loss_fn(2 * u, v), wide, rtol=1e-12, atol=0)
    assert torch.isnan(loss_fn(u * torch.nan, v))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RKDOLoss(temperature=0.0), "temperature"),
        (lambda: RKDOLoss(temperature=torch.tensor(-0.5)), "temperature"),
        (lambda: RKDOLoss(temperature=torch.ones(2)), "temperature"),
        (
            lambda: FieldLoss("rkdo", temperature=torch.ones(2)),
            "temperature must be a number or a floating-point scalar",
        ),
        (lambda: RKDOLoss(temperature=torch.tensor(1.0, requires_grad=True).exp()), "give it to each call"),
        (lambda: RKDOLoss(coupling=1.5), "coupling"),
        (lambda: RKDOLoss(depth=0), "depth"),
        (lambda: RKDOLoss(exchange="post"), "exchange"),
        (lambda: IConLoss(debias=-0.1), "debias"),
        (lambda: InfoNCELoss(temperature=-1), "temperature"),
        (lambda: RKDOLoss(temperature=1e-45), "temperature must be at least 1e-30"),
        (lambda: InfoNCELoss()(*pair(), temperature=torch.tensor(1e-45)), "temperature must be at least 1e-30"),
        (lambda: RKDOLoss(temperature="low"), "temperature must be a number, got 'low'"),
        (lambda: RKDOLoss(cooling=None), "cooling must be a number, got None"),
        (lambda: RKDOLoss(coupling="half"), "coupling must be a number, got 'half'"),
        (lambda: RKDOLoss(coupling=[0.5, True, 0.5]), "coupling must be a number, got True"),
        (lambda: FieldLoss(None), "objective must be an Objective or the name of one, got None"),
        (lambda: RKDOLoss(group=[0, 1]), r"group must be a process group, or None .*, got \[0, 1\]"),
        (lambda: RKDOLoss()(*pair(), supervisor="rows"), "has a supervisor of its own"),
        (lambda: RKDOLoss()(pair()[0].detach().to_sparse(), pair()[1]), "u must be dense, got the layout sparse_coo"),
    ],
)
def test_bad_settings_are_named(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_rows_normalised_in_their_own_precision_pass_the_check() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for d in (2, 64, 1024):
            x = torch.randn(64, d, generator=torch.Generator().manual_seed(d)).to(dtype)
            u, v = normalize(x, dim=1), normalize(x + 1, dim=1)
            assert torch.isfinite(RKDOLoss()(u, v))
            assert torch.isfinite(RKDOLoss()(u.float(), v.float()))


IMPORTS = """
import sys
import torch
before = set(sys.modules)
from rkdo_dist import RKDOLoss, IConLoss, InfoNCELoss, SupervisedLoss
u = torch.nn.functional.normalize(torch.randn(8, 4), dim=1).requires_grad_()
RKDOLoss()(u, u).backward()
heavy = {"accelerate", "deepspeed", "webdataset", "sklearn", "torchvision", "matplotlib", "rich", "scipy", "triton"}
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
assert not loaded & heavy, loaded & heavy
assert "torch._dynamo" not in sys.modules
print(len(loaded))
"""


def test_importing_and_using_a_loss_imports_only_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, rkdo_dist; assert rkdo_dist.__version__; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
