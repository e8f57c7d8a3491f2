"""Named objectives: chosen in a configuration, trained, called what they are; added with a function and an entry."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.data.index import load_index
from rkdo_dist.field import presets, supervisors
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.field.presets import PRESETS, Preset
from rkdo_dist.losses import FieldLoss
from rkdo_dist.studies.palette import of_objective
from rkdo_dist.studies.report.groups import read_groups
from tests import fields
from tests.jobs import command, fingerprint, metrics, on_ranks
from tests.pictures import reindexed, shard_of
from tests.runs import made_up

ROOT = Path(__file__).resolve().parent.parent
SUPCON = ["field.objective=supcon", "train.checkpoint_every=6"]


def run_of(arguments: list[str]) -> Path:
    return Path(next(x for x in reversed(arguments) if x.startswith("run.dir=")).removeprefix("run.dir="))


def made(*overrides: str, progress: float = 0.0) -> Objective:
    config = configuration.change(Config(), overrides)
    parts.check(config)
    return parts.make_objective(config, progress)


def test_presets_are_what_they_are_called() -> None:
    assert presets.choices() == [
        *("rkdo", "icon", "infonce", "simclr", "clip", "supcon", "sne", "t-simclr", "clusters", "sce", "ressl", "co2"),
        "snapshot",
    ]
    assert len({of_objective(name) for name in PRESETS}) == len({p.label for p in PRESETS.values()}) == len(PRESETS)
    u, v = fields.embeddings(8, 4)
    labels = torch.arange(8) % 3
    for name, like in (
        ("rkdo", Objective.rkdo(3, 0.5, 0.5, 0.1)),
        ("icon", Objective.icon(0.2, 0.5)),
        ("infonce", Objective.infonce(0.5)),
        ("simclr", Objective.infonce(0.5, "joint")),
        ("clip", Objective.infonce(0.07, symmetric=True)),
        ("supcon", Objective.supervised(0.1, 0.0, "joint")),
    ):
        objective = made(f"field.objective={name}")
        assert objective.name == name
        assert float(dense(objective, u, v, labels)[0]) == float(dense(like, u, v, labels)[0])
        given = (u, v, labels if like.needs_labels else None)
        assert float(FieldLoss(name)(*given)) == float(FieldLoss(like)(*given))
    with pytest.raises(ValueError, match=r"objective 'sce' needs a teacher's keys"):
        FieldLoss("sce")
    with pytest.raises(ValueError, match=r"objective must be one of rkdo, .*, got 'simcrl'"):
        FieldLoss("simcrl")


def test_what_is_not_set_is_the_objectives_own_and_what_is_set_stays() -> None:
    assert made("field.objective=supcon", "field.temperature=0.3").temperature == 0.3
    assert made("field.objective=icon", "field.pairing=joint", "field.debias=0.4").debias == 0.4
    assert made("field.objective=simclr", "field.pairing=joint").pairing == "joint"
    hybrid = ("field.objective=rkdo", "field.switch_to=clip")
    assert [made(*hybrid, progress=x).temperature for x in (0.0, 1.0)] == [0.5, 0.07]
    assert made("field.recursion=persistent").name == "persistent"
    assert made("field.objective=infonce", "field.debias=0.4").debias == 0.4
    assert made("field.recursion=persistent", "field.debias=0.4").debias == 0  # of the first rows, not of every step
    assert [made(f"field.objective={x}").debias for x in ("rkdo", "icon")] == [0, 0.2]
    explicit = configuration.change(
        Config(), ["field.objective=simclr", "field.temperature=0.5", "field.pairing=joint"]
    )
    implicit = configuration.change(Config(), ["field.objective=simclr"])
    assert configuration.digest(explicit) == configuration.digest(implicit)
    assert configuration.flatten(implicit)["field.pairing"] == "joint"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["field.objective=simclr", "field.pairing=cross"],
            "field.objective=simclr needs field.pairing=joint, got cross",
        ),
        (
            ["field.objective=clip", "field.pairing=joint"],
            "field.objective=clip needs field.pairing=symmetric, got joint",
        ),
        (["field.switch_to=supcon", "field.pairing=cross"], "field.switch_to=supcon needs field.pairing=joint"),
        (["field.objective=persistent"], "unknown value 'persistent' for field.objective"),
        (["field.objective=supcom"], "did you mean 'supcon'"),
        (["field.objective=simclr", "field.recursion=persistent"], "field.objective=simclr has no recursion"),
    ],
)
def test_contradictions_are_one_line(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        configuration.change(Config(), overrides)
    assert "\n" not in str(caught.value)


def test_help_and_configuration_need_no_torch() -> None:
    code = "import sys, rkdo_dist.config as c; c.Config(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_report_calls_runs_what_they_are(tmp_path: Path) -> None:
    wanted = {
        "RKDO": ["field.objective=rkdo"],
        "RKDO, persistent": ["field.recursion=persistent"],
        "SupCon": ["field.objective=supcon"],
    }
    folders = []
    for number, overrides in enumerate(wanted.values()):
        config = configuration.change(Config(), [*overrides, f"run.dir={tmp_path / str(number)}"])
        made_up(config, [2.0, 1.5], lambda epoch: {"knn_accuracy": 0.5})
        folders.append(Path(config.run.dir))
    groups, _ = read_groups(folders)
    assert [group.label for group in groups] == list(wanted)
    assert [group.style for group in groups] == [of_objective(name) for name in ("rkdo", "persistent", "supcon")]


# --- labels -----------------------------------------------------------------------------------------------------------


def test_supcon_is_trained_from_a_configuration_with_the_same_bits_on_1_2_and_4_ranks(
    small: list[str], tmp_path: Path
) -> None:
    code, text = command([*small, *SUPCON, "evaluate.at_end=true"])
    assert code == 0, text
    one = run_of(small)
    records = metrics(one)
    assert {record["objective"] for record in records} == {"supcon"}
    for record in records:
        assert record["loss_at_ideal"] < record["loss"] < record["loss_at_uniform"] + 0.5
    own = json.loads((one / "evaluations" / "6.json").read_text())["yardsticks"]
    assert own["own_objective"] == "supcon"
    assert own["own_loss_at_ideal"] < own["own_loss"]
    for world in (2, 4):
        run = tmp_path / f"of-{world}"
        options = [*small, *SUPCON, f"run.dir={run}", *(["train.recompute=true"] if world == 2 else [])]
        for code, text in on_ranks(world, options):
            assert code == 0, text
        assert fingerprint(run, 6) == fingerprint(one, 6)
        assert metrics(run) == records
    ring = tmp_path / "ring"
    for code, text in on_ranks(2, [*small, *SUPCON, "run.reduction=ring", "train.max_steps=2", f"run.dir={ring}"]):
        assert code == 0, text
    for record, wanted in zip(metrics(ring), records, strict=False):
        for name in ("loss", "loss_at_uniform", "loss_at_ideal"):
            assert record[name] == pytest.approx(wanted[name], rel=1e-4)


def test_what_looks_at_a_configuration_takes_every_objective(small: list[str]) -> None:
    for name in ("supcon", "simclr"):
        for words in (["flops", small[1], "--repeats", "0"], ["doctor", *small[1:]]):
            code, text = command([*words, f"field.objective={name}"])
            assert code == 0, text
            assert name in text


@pytest.mark.parametrize("missing", ["some", "all"])
def test_supcon_without_labels_is_refused_before_the_first_step(
    small: list[str], digits: Path, tmp_path: Path, missing: str
) -> None:
    shutil.copytree(digits, tmp_path / "shards")
    index = load_index(tmp_path / "shards")
    for shard in index.split("train").shards if missing == "all" else index.split("train").shards[1:2]:
        with tarfile.open(fileobj=io.BytesIO((tmp_path / "shards" / shard.name).read_bytes())) as archive:
            members = [(m.name, archive.extractfile(m).read()) for m in archive]
        labels = [name for name, _ in members if name.endswith(".cls")]
        left_out = labels if missing == "all" else labels[3:4]
        content = shard_of([(name, data) for name, data in members if name not in left_out])
        index = reindexed(index, shard.name, content, shard.samples)
    samples = index.split("train").samples
    arguments = [*small, f"data.shards={tmp_path / 'shards'}"]
    code, text = command([*arguments, "field.objective=supcon"])
    assert code == 2
    count = samples if missing == "all" else 1
    assert f"supcon needs a label for every sample, but {count} of the {samples} samples" in text.replace("\n", " ")
    assert not (run_of(small) / "metrics.jsonl").exists()
    code, text = command([*arguments, "field.switch_to=supcon"])
    assert code == 2, text
    assert command([*arguments, "train.max_steps=1"])[0] == 0


# --- an objective of one's own ----------------------------------------------------------------------------------------


@pytest.fixture
def following(monkeypatch: pytest.MonkeyPatch) -> None:
    """The objective that CONTRIBUTING.md adds: p(0) is half on the positive, half on the next sample."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Add an objective")[2]
    names = {"torch": torch, "Preset": Preset, "LISTED": {}, "PRESETS": {}}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert list(names["PRESETS"]) == ["next"]
    for table in ("LISTED", "PRESETS"):
        for name, value in names[table].items():
            monkeypatch.setitem(getattr(supervisors if table == "LISTED" else presets, table), name, value)


def test_an_objective_is_added_by_a_function_and_an_entry(following: None, small: list[str]) -> None:
    code, text = command([*small, "field.objective=next", "train.max_steps=3"])
    assert code == 0, text
    assert [record["objective"] for record in metrics(run_of(small))] == ["next"] * 3
    u, v = (x.requires_grad_() for x in fields.embeddings(10, 5))
    p = (torch.eye(10) + torch.eye(10).roll(1, 1)).double() / 2
    log_q = log_softmax(u @ v.T / 0.5, dim=1)
    expected = (torch.xlogy(p, p) - p * log_q).sum(1).mean()
    loss = FieldLoss("next")(u, v)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    truth = torch.autograd.grad(expected, (u, v))
    for mine, wanted in zip(torch.autograd.grad(loss, (u, v)), truth, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("pairing", ["cross", "symmetric", "joint"])
@pytest.mark.parametrize(
    ("recursion", "debias", "tau"), [("none", 0.3, 0.5), ("in_batch", 0.0, 0.2), ("none", 0.0, 0.002)]
)
def test_listed_columns_equal_the_oracle(
    following: None,
    monkeypatch: pytest.MonkeyPatch,
    recursion: str,
    debias: float,
    tau: float,
    pairing: str,
    exchange: str,
) -> None:
    monkeypatch.setitem(PRESETS, "deep", Preset("", "", "next_sample", recursion))
    objective = Objective.of("deep", temperature=tau, pairing=pairing, debias=debias)
    u, v = (x.requires_grad_() for x in fields.embeddings(10, 5))
    loss, found = FieldLoss(objective, exchange=exchange)(u, v, parts=True)
    expected, wanted = dense(objective, u, v)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    for name in objective.part_names:
        torch.testing.assert_close(found[name], wanted[name].detach(), rtol=1e-11, atol=1e-12)
    truth = torch.autograd.grad(expected, (u, v))
    for mine, gradient in zip(torch.autograd.grad(loss, (u, v)), truth, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-10, atol=1e-12 / tau)
