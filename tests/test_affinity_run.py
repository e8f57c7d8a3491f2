"""Affinities from a configuration: what is trained is the same bits on 1, 2 and 4 ranks, and every door knows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rkdo_dist import config as configuration
from rkdo_dist import load_encoder, parts
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.field.affinity import Clusters, Gaussian, Student
from rkdo_dist.studies.report.words import NO_IDEAL
from tests.jobs import command, fingerprint, metrics, on_ranks, run_of

SHORT = ["train.max_steps=3", "train.checkpoint_every=3"]


@pytest.mark.parametrize("objective", ["t-simclr", "clusters"])
def test_one_two_and_four_ranks_train_the_same_bits(objective: str, small: list[str], tmp_path: Path) -> None:
    options = [*small, *SHORT, f"field.objective={objective}"]
    code, text = command([*options, "evaluate.at_end=true"])
    assert code == 0, text
    one = run_of(small)
    records = metrics(one)
    assert {(r["objective"], r["temperature"], r["loss_at_ideal"]) for r in records} == {(objective, 1.0, None)}
    for world in (2, 4):
        run = tmp_path / f"of-{world}"
        recompute = ["train.recompute=true"] if world == 2 else []
        for code, text in on_ranks(world, [*options, f"run.dir={run}", *recompute]):
            assert code == 0, text
        assert fingerprint(run, 3) == fingerprint(one, 3)
        assert metrics(run) == records
    ring = tmp_path / "ring"
    for code, text in on_ranks(2, [*options, "run.reduction=ring", "train.max_steps=1", f"run.dir={ring}"]):
        assert code == 0, text
    for name in ("loss", "loss_at_uniform", "positive_mass"):
        assert metrics(ring)[0][name] == pytest.approx(records[0][name], rel=1e-4)

    own = json.loads((one / "evaluations" / "3.json").read_text())["yardsticks"]
    assert own["own_loss_at_ideal"] is own["own_loss_attained"] is None
    assert own["own_loss"] < own["own_loss_at_uniform"] * 1.5
    assert -8 <= own["uniformity"] <= 0 <= own["alignment"] <= 4  # of embeddings brought to unit norm
    encoder = load_encoder(one)
    images = torch.rand(3, 3, 8, 8)
    features, embeddings = encoder.features(images)
    torch.testing.assert_close(embeddings, encoder.head(features))
    code, text = command(["report", str(one), "--out", str(tmp_path / "report.html")])
    assert code == 0, text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert NO_IDEAL in page


def test_the_gaussian_and_persistent_rows_train(small: list[str], tmp_path: Path) -> None:
    for number, words in enumerate(
        (
            ["field.objective=sne"],
            ["field.objective=icon", "field.affinity=gaussian", "field.sigma=3", "run.reduction=fast"],
            ["field.affinity=student", "field.recursion=persistent"],
            ["field.affinity=clusters", "field.recursion=persistent", "field.learned_share=0.1"],
            ["field.affinity=student", "field.degrees_of_freedom=1", "encoder.embedding_dim=2"],  # t-SimCNE's map
            ["field.objective=t-simclr", "field.normaliser=field"],
            ["field.objective=icon", "field.affinity=student", "field.normaliser=field", "run.reduction=fast"],
            ["field.objective=sne", "field.supervisor=neighbours", "field.neighbours=5"],
        )
    ):
        run = tmp_path / str(number)
        code, text = command([*small, "train.max_steps=2", *words, f"run.dir={run}", "field.stored=16"])
        assert code == 0, text
        assert len(metrics(run)) == 2
        assert all(record["loss_at_ideal"] is None for record in metrics(run))


def changed(*overrides: str) -> Config:
    config = configuration.change(Config(), overrides)
    parts.check(config)
    return config


def test_settings_become_affinities() -> None:
    for words, affinity, temperature in (
        (["field.objective=sne", "field.sigma=2"], Gaussian(2.0), 1.0),
        (["field.objective=t-simclr"], Student(2.0), 1.0),
        (["field.affinity=student", "field.degrees_of_freedom=0.5"], Student(0.5), 1.0),
        (["field.objective=clusters"], Clusters(0.2), 1.0),
        (["field.objective=clusters", "field.debias=0.6"], Clusters(0.6), 1.0),
        (["field.objective=clusters", "field.debias=0.6", "field.learned_share=0"], Clusters(0.0), 1.0),
        (["field.objective=infonce", "field.affinity=clusters", "field.temperature=2"], Clusters(0.0), 2.0),
    ):
        config = changed(*words)
        objective = parts.make_objective(config, 0.0)
        assert (objective.affinity, objective.temperature) == (affinity, temperature)
        assert configuration.flatten(config)["field.temperature"] == temperature
        assert configuration.flatten(config)["field.affinity"] == affinity.name
        assert not parts.unit_norm(config)
    assert parts.unit_norm(Config())
    explicit = changed("field.objective=t-simclr", "field.affinity=student", "field.temperature=1")
    assert configuration.digest(explicit) == configuration.digest(changed("field.objective=t-simclr"))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["field.affinity=cosinus"], "field.affinity"),
        (["field.affinity=gaussian", "field.sigma=0"], "field.sigma must be at least 0.0001 and at most 10000, got 0"),
        (["field.degrees_of_freedom=-1"], "field.degrees_of_freedom must be at least 0.01 and at most 1e\\+06, got -1"),
        (["field.learned_share=2"], "field.learned_share must be at least 0 and at most 1, got 2"),
        (["field.objective=clusters", "encoder.embedding_dim=1"], "encoder.embedding_dim=1 is the number of clusters"),
        (["field.switch_to=t-simclr"], "have different affinities .cosine, student.*: set field.affinity"),
        (
            ["field.recursion=persistent", "field.affinity=student", "field.columns=bank"],
            "field.columns=bank is searched by cosines, got field.affinity=student",
        ),
        (["field.normaliser=field"], "field.normaliser=field goes with objectives without recursion"),
        (["field.objective=ressl", "field.affinity=student"], "field.affinity must be cosine for recursion='restart'"),
    ],
)
def test_contradictions_are_one_line(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        changed("train.ema=0.9", *overrides)
    assert "\n" not in str(caught.value)
