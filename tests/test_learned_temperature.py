"""A learned temperature: the optimizer's formula, the slope against autograd (a whole run: tests/test_recipes.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rkdo_dist import checkpoint, parts
from rkdo_dist import config as configuration
from rkdo_dist.config import ConfigError
from rkdo_dist.data.index import load_index
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.ranks import runtime
from rkdo_dist.training.facts import Facts
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.step import Step, StepSettings
from rkdo_dist.training.temperature import LearnedTemperature
from tests.jobs import command, metrics, run_of
from tests.ranks import run_ranks
from tests.test_step import LANES, OBJECTIVES, SmallEncoder, make_view, micro_batch, own

LEARN = "field.learn_temperature=true"


def made(*overrides: str) -> LearnedTemperature:
    return LearnedTemperature(configuration.change(configuration.Config(), [LEARN, *overrides]))


def test_it_moves_by_the_optimizer_of_the_run_without_decay_and_stops_at_the_least() -> None:
    sgd = made("field.temperature=0.2", "train.optimizer=sgd", "train.weight_decay=0.5")
    assert sgd.value == pytest.approx(0.2, rel=1e-15)
    logarithm, velocity, tau = math.log(0.2), 0.0, 0.2
    for slope, rate in ((0.3, 0.1), (-0.2, 0.1), (1.0, 0.05)):
        velocity = 0.9 * velocity + slope * tau  # d loss / d log tau
        logarithm -= rate * velocity
        tau = math.exp(logarithm)
        sgd.move(slope, rate)
        assert sgd.value == pytest.approx(tau, rel=1e-14)
    adam = made("field.temperature=0.2", "train.weight_decay=0.5")
    adam.move(-3.0, 0.1)
    assert adam.value == pytest.approx(0.2 * math.exp(0.1), rel=1e-6)  # the first step of Adam is one of the rate
    for _ in range(400):
        adam.move(3.0, 0.1)
    assert adam.value == pytest.approx(0.01, rel=1e-15)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lars"])
def test_it_goes_through_a_checkpoint(optimizer: str, tmp_path: Path) -> None:
    straight, first, again = (made(f"train.optimizer={optimizer}") for _ in range(3))
    slopes = [0.3, -0.1, 0.2, 0.4]
    for slope in slopes:
        straight.move(slope, 0.01)
    for slope in slopes[:2]:
        first.move(slope, 0.01)
    again.restore(checkpoint.load(checkpoint.save(tmp_path, 2, {}, parts=first.parts())))
    for slope in slopes[2:]:
        again.move(slope, 0.01)
    assert again.value == straight.value != first.value


def slope_of_a_step(rank: int, world: int, reduction: str) -> dict[str, Facts]:
    """The facts of the first step of two objectives."""
    rt, found = runtime.start(1, 60, reduction), {}  # type: ignore[arg-type]
    for name in ("rkdo", "joint"):
        torch.manual_seed(0)
        settings = StepSettings(3, reduction, False, True, "gather", learn_temperature=True)
        step = Step(SmallEncoder().eval(), make_view, rt, settings)
        lanes = [micro_batch(0, lane) for lane in own(rank, world)]
        found[name], _ = train_step(step, lanes, OBJECTIVES[name].with_temperature(0.3), 0, 0)
    return found


def oracle(objective: Objective, wrong: bool) -> float:
    """The slope by plain autograd through the dense loss in float64."""
    torch.manual_seed(0)
    encoder = SmallEncoder().eval()
    views = [[], []]  # type: ignore[var-annotated]
    for lane in range(LANES):
        batch = micro_batch(0, lane)
        for k in (0, 1):
            views[k].append(encoder(make_view(batch.images, batch.ids, 0, k)).detach().double())
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss, _ = dense(objective.with_temperature(0.6 if wrong else 0.3), torch.cat(views[0]), torch.cat(views[1]),
                    temperature=2 * tau if wrong else tau)  # fmt: skip
    return float(torch.autograd.grad(loss, tau)[0])


def test_the_slope_of_a_step_is_that_of_the_dense_loss_under_every_sum() -> None:
    one = slope_of_a_step(0, 1, "exact")
    two = {how: run_ranks(slope_of_a_step, 2, how) for how in ("exact", "fast", "ring")}
    for name, facts in one.items():
        right = oracle(OBJECTIVES[name], wrong=False)
        assert abs(right) > 0.01
        assert facts.temperature_slope == pytest.approx(right, rel=1e-5)
        assert all(rank[name].temperature_slope == facts.temperature_slope for rank in two["exact"])
        for how in ("fast", "ring"):
            assert [rank[name].temperature_slope for rank in two[how]] == pytest.approx([right] * 2, rel=1e-5)
        assert oracle(OBJECTIVES[name], wrong=True) != pytest.approx(right, rel=0.1)  # the control
        assert "temperature_slope" not in facts.parts


def test_a_run_learns_it_and_is_evaluated_with_it(small: list[str]) -> None:
    run = run_of(small)
    code, text = command([*small, LEARN, "field.temperature=0.3", "evaluate.at_end=true"])
    assert code == 0, text
    learned = [record["temperature"] for record in metrics(run)]
    assert learned[0] == pytest.approx(0.3 * 0.9, rel=1e-14)  # the last level's, by field.cooling
    assert 1e-4 < np.abs(np.diff(np.log(learned))).max() < 2e-3  # Adam at 1e-3
    assert (
        load_file(run / "checkpoints" / "6" / "parts" / "temperature.safetensors")["logarithm"].dtype == torch.float64
    )
    judged = json.loads((run / "evaluations" / "6.json").read_text())["yardsticks"]
    config = configuration.load(run / "config.yaml")
    used = parts.as_recorded(config, parts.make_objective(config, 1.0), metrics(run)[-1])
    assert used.temperatures[-1] == pytest.approx(learned[-1], rel=1e-14)
    assert command(["evaluate", str(run)])[0] == 0
    assert json.loads((run / "evaluations" / "6.json").read_text())["yardsticks"] == judged


def test_it_is_learned_from_rows_that_a_file_gives_too(small: list[str], digits: Path, tmp_path: Path) -> None:
    n = load_index(digits).split("train").samples
    here, p = np.arange(n), np.repeat([0.75, 0.25], n)
    np.savez(tmp_path / "rows.npz", row=np.tile(here, 2), column=np.concatenate([here, (here + 1) % n]), p=p)
    learned = {}
    for how in ("exact", "fast"):
        words = [*small, LEARN, f"field.supervisor={tmp_path / 'rows.npz'}", f"run.reduction={how}"]
        code, text = command([*words, f"run.dir={tmp_path / how}"])
        assert code == 0, text
        learned[how] = [record["temperature"] for record in metrics(tmp_path / how)]
    assert learned["fast"] == pytest.approx(learned["exact"], rel=1e-6)
    assert learned["exact"][-1] != pytest.approx(learned["exact"][0], rel=1e-4)


@pytest.mark.parametrize(("words", "told"), [
    ("field.recursion=persistent", r"not defined where rows recur .* \(field.recursion=persistent\)"),
    ("field.objective=ressl train.ema=0.9", r"not defined where rows recur .* \(field.recursion=restart\)"),
    ("field.objective=rkdo field.switch_to=clip", "have different ones: set field.temperature"),
    ("field.temperature=0.005", "keeps the temperature at 0.01 at least, got field.temperature=0.005"),
])  # fmt: skip
def test_where_it_is_not_defined_one_line_says_so(words: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        configuration.change(configuration.Config(), [LEARN, *words.split()])
    assert "\n" not in str(caught.value)
