"""`rkdo reproduce`: the protocol's settings, the published numbers, tables and figures, requests."""

from __future__ import annotations

import csv
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rkdo_dist import config as configuration
from rkdo_dist.config import ConfigError
from rkdo_dist.data.index import load_index
from rkdo_dist.data.prepare import prepare
from rkdo_dist.evaluate import evaluation
from rkdo_dist.parts import make_objective
from rkdo_dist.studies import paper, paper_figures, paper_tables, published, runner
from rkdo_dist.studies.paper import Request, Results
from rkdo_dist.studies.plots import save
from rkdo_dist.studies.runner import Planned, complete
from rkdo_dist.studies.statistics import paired
from tests.jobs import command
from tests.runs import made_up

ROOT = Path(__file__).resolve().parent.parent
TINY = ("encoder.backbone=shufflenet_v2_x0_5", "train.batches_per_epoch=2", "data.workers=0")


def request(out: Path, **changes: Any) -> Request:
    whole = Request(published.DATASETS, "paper", published.SEEDS, published.EPOCHS, out)
    return replace(whole, **changes)


# --- the protocol -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", published.DATASETS)
@pytest.mark.parametrize("objective", paper.OBJECTIVES)
def test_the_protocol_is_the_released_notebooks(tmp_path: Path, dataset: str, objective: str) -> None:
    """Row by row: the table at the end of the design's field.md."""
    config = paper.paper_config(request(tmp_path), dataset, objective, 42, "shards")
    field, train = config.field, config.train
    assert (field.recursion, field.depth, field.coupling) == ("in_batch", 3, 0.5)
    assert (field.value("temperature"), field.cooling, field.clock) == (0.5, 0.1, "depth")
    assert (field.value("pairing"), field.supervisor_grad) == ("cross", "flow")
    assert make_objective(config, 0.0).debias == (0.2 if objective == "icon" else 0.0)
    assert (config.encoder.backbone, config.encoder.head, config.encoder.embedding_dim) == ("resnet18", "released", 64)
    assert (train.global_batch, train.lanes) == (32 if dataset == "stl10" else 64, 1)
    assert config.data.image_size == (64 if dataset == "stl10" else None)
    assert (train.batches_per_epoch, train.epochs, train.schedule, train.optimizer) == (11, 10, "constant", "adam")
    assert (train.learning_rate, train.weight_decay) == (1e-3, 1e-5)
    assert train.evaluate_at == (1, 2, 5, 10)
    assert config.evaluate.protocol == "paper"
    assert evaluation.PAPER_BATCHES * train.global_batch == (352 if dataset == "stl10" else 704)
    if dataset == "cifar10":
        shipped = configuration.load(ROOT / "configs" / "paper" / f"cifar10-{objective}.yaml")
        assert configuration.decisive(shipped) == configuration.decisive(config)


def test_the_full_protocol_is_whole_epochs_and_whole_splits(tmp_path: Path) -> None:
    config = paper.paper_config(request(tmp_path, protocol="full"), "cifar10", "rkdo", 1, "shards")
    assert config.train.batches_per_epoch is None
    assert config.evaluate.protocol == "full"
    assert "full" in config.run.dir


def test_a_longer_run_that_is_there_serves(tmp_path: Path) -> None:
    longer = paper.paper_config(request(tmp_path), "cifar10", "rkdo", 1, "shards")
    made_up(longer, [1.9] * 10, lambda epoch: {})
    short = paper.paper_config(request(tmp_path, epochs=(1, 2)), "cifar10", "rkdo", 1, "shards")
    assert short.train.epochs == 10
    assert complete(Planned(short, 22))


# --- the published numbers ----------------------------------------------------------------------------------------


def test_the_transcription_agrees_with_itself() -> None:
    """The paper's own percentages follow from its means, to rounding; Tables 3 and 4 repeat Table 2."""
    for row in published.TABLE_1.values():
        assert 100 * (1 - row.rkdo[0] / row.icon[0]) == pytest.approx(row.percent, abs=0.01)
    for table in (published.TABLE_2, published.TABLE_4):
        for row in table.values():
            digits = 100 * 0.5e-4 * (1 / row.rkdo[0] + 1 / row.icon[0]) * row.rkdo[0] / row.icon[0]
            assert 100 * (row.rkdo[0] / row.icon[0] - 1) == pytest.approx(row.percent, abs=digits + 0.02)
    for dataset, early in published.TABLE_3.items():
        assert early.rkdo == published.TABLE_2[dataset, early.rkdo_epochs].rkdo
        assert early.icon == published.TABLE_2[dataset, early.icon_epochs].icon
        assert published.TABLE_4[dataset, "linear_accuracy"] == published.TABLE_2[dataset, 2]
    assert len(published.TABLE_1) == len(published.TABLE_2) == len(published.TABLE_4) == 12


def test_published_accuracies_are_shares_of_the_evaluation_subset() -> None:
    """Means over five seeds of multiples of 1/141 (1/71 for STL-10), printed to four digits."""
    for (dataset, _), row in published.TABLE_2.items():
        unit = 5 * (71 if dataset == "stl10" else 141)
        for mean, _ in (row.rkdo, row.icon):
            assert abs(round(mean * unit) / unit - mean) < 0.6e-4


def test_the_seeds_of_the_first_run_give_the_papers_table() -> None:
    """With the standard deviation of the population; and none of the author's two runs shows a difference."""
    smallest = []
    for (dataset, epochs), row in published.TABLE_2.items():
        for objective, side in zip(paper.OBJECTIVES, published.accuracies(dataset, epochs, 0), strict=True):
            mean, sd = getattr(row, objective)
            assert statistics.fmean(side) == pytest.approx(mean, abs=1.1e-4)
            assert statistics.pstdev(side) == pytest.approx(sd, abs=1.1e-4)
            assert statistics.stdev(side) > sd + 2e-4  # ours: it is not the sample's
        smallest += [paired(*published.accuracies(dataset, epochs, run)).t_p for run in (0, 1)]
    assert min(smallest) == pytest.approx(0.065, abs=1e-3)
    headline = [paired(*published.accuracies(*cell, 0)).t_p for cell in (("cifar100", 2), ("stl10", 2))]
    assert headline == pytest.approx([0.305, 0.099], abs=1e-3)
    rkdo, icon = published.accuracies("stl10", 2, 1)
    assert sum(rkdo) == pytest.approx(sum(icon))
    assert published.SECOND_LOSSES.keys() == published.CORRECT.keys() == published.TABLE_2.keys()


# --- tables and figures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """CIFAR-10 with five seeds near the published numbers; I-Con's NMI is higher by 0.1 on every seed."""
    asked = request(tmp_path_factory.mktemp("made") / "out", datasets=("cifar10", "stl10"))
    for number, seed in enumerate(asked.seeds):
        for objective in paper.OBJECTIVES:
            config = paper.paper_config(asked, "cifar10", objective, seed, "shards")
            made_up(config, _losses(objective, number), _scores(objective, number))
    return Results(asked)


def _losses(objective: str, number: int) -> list[float]:
    base, fall = (1.95, 0.035) if objective == "rkdo" else (2.68, 0.037)
    return [base - fall * epoch + 0.01 * (number - 2) for epoch in range(10)]


def _scores(objective: str, number: int) -> Any:
    shift = (number % 2) * 0.01 if objective == "rkdo" else 0.005
    nmi = 0.12 + 0.003 * number + (0.1 + 0.001 * number) * (objective == "icon")
    return lambda epoch: {"linear_accuracy": 0.25 + shift, "nmi": nmi, "ari": 0.05, "neighbourhood": 0.18}


def test_cells_hold_means_and_distances_from_the_paper(results: Results) -> None:
    cell = results.loss("cifar10", 1)
    assert cell.rkdo == pytest.approx([1.93, 1.94, 1.95, 1.96, 1.97])
    assert cell.away("rkdo") == pytest.approx((1.95 - 1.9384) / 0.0403)
    assert cell.percent(True) == pytest.approx(100 * (1 - 1.95 / 2.68))
    share = results.loss("cifar10", 1, attained=True)
    assert share.rkdo[2] == pytest.approx((2.1396 - 1.95) / (2.1396 - 0.7520))
    assert results.at_uniform("cifar10") == pytest.approx((2.1396, 2.8472))
    assert results.at_uniform("stl10") is None
    assert results.score("stl10", 1, "linear_accuracy").seeds == 0
    assert results.loss("cifar10", 11).seeds == 0


def test_the_four_tables(results: Results, tmp_path: Path) -> None:
    first, second, third, fourth = paper_tables.all_tables(results)
    for sheet in (first, second, third, fourth):
        assert "protocol paper" in sheet.title
        assert {row["protocol"] for row in sheet.data} == {"paper"}
        sheet.save(tmp_path)
        with (tmp_path / f"{sheet.name}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(sheet.data) == len(sheet.rows)
        assert (tmp_path / f"{sheet.name}.md").read_text().count("\n| ") == len(sheet.rows) + 2
    assert [len(sheet.rows) for sheet in (first, second, third, fourth)] == [8, 8, 2, 8]
    assert "24.9 % on CIFAR-10" in first.caption
    ours = "1.9500 ± 0.0158 (0.0141)"
    assert first.rows[0][2:6] == [ours, "1.9384 ± 0.0403", "1.9418 ± 0.0388", "+0.29 sd"]
    linear = {row["epochs"]: row for row in second.data if row["dataset"] == "CIFAR-10"}
    assert linear["2"]["rkdo_second_run"] == pytest.approx(0.2794, abs=6e-5)
    assert linear["2"]["published_p"] == pytest.approx(0.596, abs=1e-3)
    verdicts = {row["score"]: row["verdict"] for row in fourth.data if row["dataset"] == "CIFAR-10"}
    assert verdicts["NMI"].startswith("I-Con higher by 0.1020")
    assert verdicts["Linear Eval"] == verdicts["ARI"] == "no evidence of a difference"
    assert {row["verdict"] for row in fourth.data if row["dataset"] == "STL-10"} == {"not run"}
    adjusted = next(row["holm_p"] for row in fourth.data if row["score"] == "NMI")
    assert adjusted == pytest.approx(4 * paper_tables_p(fourth, "NMI"))  # four cells were tested
    assert third.data[0]["rkdo_epochs"] == 1
    assert third.data[0]["icon_epochs"] == 5


def paper_tables_p(sheet: Any, score: str) -> float:
    return next(row["t_p"] for row in sheet.data if row["score"] == score and row["dataset"] == "CIFAR-10")


def test_agreement_counts_cells_within_two_published_deviations(results: Results) -> None:
    (sentence,) = paper_tables.agreement(results)
    cells = [results.loss("cifar10", e) for e in published.EPOCHS]
    close = sum(abs(cell.away(o)) <= 2 for cell in cells for o in paper.OBJECTIVES)
    assert f"{close} of 8 cells" in sentence
    assert 0 < close < 8


def test_scores_of_another_protocol_do_not_count(results: Results) -> None:
    other = Results(results.request)
    for run in other.runs.values():
        run.evaluations[11]["protocol"] = "full"
    assert other.score("cifar10", 1, "nmi").seeds == 0
    assert other.score("cifar10", 2, "nmi").seeds == 5


def test_figures_are_drawn_and_the_same_again(results: Results, tmp_path: Path) -> None:
    paths = paper_figures.all_figures(results, tmp_path)
    assert [p.name for p in paths] == [f"figure{n}.{kind}" for n in range(1, 6) for kind in ("png", "svg")]
    for path in paths:
        assert path.stat().st_size > 5000
    again = save(paper_figures._improvement(results), tmp_path / "again", "figure1")
    assert again[1].read_bytes() == paths[1].read_bytes()


# --- requests -----------------------------------------------------------------------------------------------------


def test_locations(tmp_path: Path) -> None:
    both = ("cifar10", "stl10")
    assert paper.locations([], both) == {"cifar10": "data/cifar10", "stl10": "data/stl10"}
    assert paper.locations(["shards", "stl10=s3://x/stl"], both) == {"cifar10": "shards/cifar10", "stl10": "s3://x/stl"}
    (tmp_path / "index.json").write_text("{}")
    assert paper.locations([str(tmp_path)], ("cifar10",)) == {"cifar10": str(tmp_path)}
    with pytest.raises(ConfigError, match="cifar100 is not among"):
        paper.locations(["cifar100=x"], both)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--datasets", "cifar11"], "cifar11"),
        (["--seeds", "1,1"], "--seeds"),
        (["--epochs", "0,2"], "--epochs"),
        (["--set", "run.seed=3"], "run.seed"),
        (["--set", "field.dept=3"], "field.depth"),
    ],
)
def test_mistakes_end_before_anything_runs(tmp_path: Path, digits: Path, arguments: list[str], word: str) -> None:
    out = tmp_path / "out"
    base = ["reproduce", "--data", f"cifar10={digits}", "--out", str(out)]
    code, text = command([*base, *([] if "--datasets" in arguments else ["--datasets", "cifar10"]), *arguments])
    assert code == 2
    assert word in text
    assert not out.exists()


def test_missing_data_says_what_to_prepare(tmp_path: Path) -> None:
    code, text = command(["reproduce", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert code == 2
    for name in published.DATASETS:
        assert f"rkdo prepare {name} --out {tmp_path / name}" in " ".join(text.split())


def test_jpeg_is_noted(tmp_path: Path) -> None:
    from tests.pictures import picture

    ten = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for split in ("train", "test"):
        for name in ten:
            folder = tmp_path / "folder" / split / name
            folder.mkdir(parents=True)
            (folder / "1.jpg").write_bytes(picture(1, kind="JPEG"))
    prepare("imagefolder", tmp_path / "shards", tmp_path / "folder")
    index = load_index(tmp_path / "shards")
    assert "CIFAR-10: images stored as JPEG" in paper.data_note("cifar10", index), "known by its classes"
    assert paper.data_note("stl10", index).startswith("CIFAR-10: not a data set of the paper"), "not in this place"


def test_a_study_on_other_data_calls_them_what_they_are(tmp_path: Path, digits: Path) -> None:
    """Digits where the command expects CIFAR-10: no table, figure or sentence names it, or its published numbers."""
    asked = request(tmp_path, datasets=("cifar10",), epochs=(1, 2))
    for number, seed in enumerate(asked.seeds):
        for objective in paper.OBJECTIVES:
            config = paper.paper_config(asked, "cifar10", objective, seed, str(digits))
            made_up(config, _losses(objective, number)[:2], _scores(objective, number))
    results = Results(asked)
    sheets = paper_tables.all_tables(results)
    shown = [sheet.title + sheet.caption + sheet.markdown() + sheet.csv() for sheet in sheets]
    shown += [*paper_tables.agreement(results), paper.data_note("cifar10", load_index(digits))]
    for name in ("_improvement", "_improvement_by_epoch", "_early_against_late", "_early_learning", "_losses"):
        figure = getattr(paper_figures, name)(results)
        shown += [text.get_text() for text in figure.findobj(lambda one: hasattr(one, "get_text"))]
        assert "digits (5 seeds)" in shown
    text = "\n".join(shown)
    assert "CIFAR" not in text.upper()
    assert "1.9384" not in text, "the paper's number for CIFAR-10"
    assert "24.9 % on digits" in sheets[0].caption


def test_a_run_gets_its_own_accelerator_and_of_a_launcher_the_precision_alone() -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1", "ACCELERATE_USE_DEEPSPEED": "true", "HOME": "/h"}
    assert runner.environment(launched, 3, 0) == {"HOME": "/h"}
    bf16 = {runner.PRECISION: "bf16"}
    assert runner.environment(launched | bf16, 3, 0) == {"HOME": "/h"} | bf16
    assert runner.environment({}, 5, 4)["CUDA_VISIBLE_DEVICES"] == "1"
    assert runner.environment({"CUDA_VISIBLE_DEVICES": "2,7"}, 1, 2)["CUDA_VISIBLE_DEVICES"] == "7"
