"""Whole runs: the same run on any ranks, stopped and continued; mistakes end it early, clearly and on every rank."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rkdo_dist.encoders import Encoder
from tests.jobs import command, fingerprint, metrics, on_ranks, run_of
from tests.ranks import run_ranks


def test_a_run_leaves_what_the_contract_says(reference: Path) -> None:
    run = reference
    assert [r["step"] for r in metrics(run)] == [1, 2, 3, 4, 5, 6]
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    for name in (
        "epoch",
        "loss",
        "loss_at_uniform",
        "kl_1",
        "kl_3",
        "learning_rate",
        "temperature",
        "pairs_per_second",
    ):
        assert isinstance(first[name], int | float), name
    assert len(first["batch_digest"]) == 64
    assert (run / "checkpoints" / "latest").read_text().strip() == "6"
    saved = load_file(run / "checkpoints" / "6" / "model.safetensors")
    assert saved.keys() == Encoder("cifar_resnet8", embedding_dim=16).state_dict().keys()
    scores = json.loads((run / "evaluations" / "6.json").read_text())
    for name in ("linear_accuracy", "nmi", "ari", "neighbourhood"):
        assert -0.5 <= scores[name] <= 1
    environment_file = json.loads((run / "environment.json").read_text())
    assert environment_file["world_size"] == 1
    assert environment_file["versions"]["torch"]
    assert "objective: rkdo" in (run / "config.yaml").read_text()


def test_the_same_run_on_two_and_four_ranks(small: list[str], reference: Path) -> None:
    for world in (2, 4):
        other = run_of(small).with_name(f"run{world}")
        arguments = [
            *small[:-1],
            f"run.dir={other}",
            "data.workers=1",
            "train.recompute=true",
            "evaluate.at_end=true",
        ]
        answers = on_ranks(world, arguments)
        assert [code for code, _ in answers] == [0] * world, answers
        assert fingerprint(other, 6) == fingerprint(reference, 6)
        assert metrics(other) == metrics(reference)
        assert (other / "evaluations" / "6.json").read_text() == (reference / "evaluations" / "6.json").read_text()


def test_stopped_and_continued_on_other_ranks(small: list[str], reference: Path) -> None:
    """Cut down to a checkpoint in the middle, with a journal that went on further: as after a kill."""
    run = shutil.copytree(reference, run_of(small))
    shutil.rmtree(run / "checkpoints" / "6")
    (run / "checkpoints" / "latest").write_text("4\n")
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 7, "half a li')
    answers = on_ranks(2, [*small, "run.resume=auto"])
    assert [code for code, _ in answers] == [0, 0], answers
    assert fingerprint(run, 6) == fingerprint(reference, 6)
    assert metrics(run) == metrics(reference)


def test_a_finished_run_is_left_alone(small: list[str], reference: Path) -> None:
    run = shutil.copytree(reference, run_of(small))
    before = (run / "metrics.jsonl").read_bytes(), fingerprint(run, 6)
    assert command([*small, "run.resume=auto"])[0] == 0
    assert before == ((run / "metrics.jsonl").read_bytes(), fingerprint(run, 6))


def test_a_run_can_grow_and_continue_elsewhere(small: list[str], reference: Path) -> None:
    run = run_of(small)
    command([*small[:-1], f"run.dir={run}", "train.max_steps=3"])
    elsewhere = run.with_name("elsewhere")
    code, text = command([*small[:-1], f"run.dir={elsewhere}", f"run.resume={run}"])
    assert code == 0, text
    assert fingerprint(elsewhere, 6) == fingerprint(reference, 6)
    assert metrics(elsewhere) == metrics(reference)


def test_resuming_with_other_settings_is_refused(small: list[str]) -> None:
    command([*small, "train.max_steps=2"])
    code, text = command([*small, "run.resume=auto", "field.temperature=0.7"])
    assert code == 2
    assert "field.temperature: 0.5 -> 0.7" in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["train.epohcs=3"], ["train.epohcs", "train.epochs"]),
        (["train.epochs=many"], ["train.epochs", "whole number"]),
        (["data.shards=nowhere"], ["nowhere", "rkdo prepare"]),
        (["train.micro_batch=32"], ["2 ranks", "train.micro_batch=16"]),
        (["train.global_batch=1600", "train.micro_batch=100"], ["1600", "fewer than one global batch"]),
        (["field.temperature=0"], ["field.temperature"]),
        (["field.coupling=1.5"], ["field.coupling", "[0, 1]"]),
        (["encoder.backbone=resnet81"], ["resnet81", "resnet18"]),
        (["train.batches_per_epoch=1000"], ["train.batches_per_epoch"]),
        (["data.split=trian"], ["trian", "train"]),
        (["run.dir=''", "run.resume=auto"], ["run.dir", "e.g. run.dir=runs/small"]),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_mistakes_end_the_run_before_the_first_step_on_every_rank(
    small: list[str], change: list[str], words: list[str]
) -> None:
    for code, text in on_ranks(2, [*small, *change], timeout=30):
        assert code == 2, text
        assert "Traceback" not in text
        for word in words:
            assert word in " ".join(text.split()), text
    assert not (run_of(small) / "metrics.jsonl").exists()


def _in(rank: int, world: int, folder: Path, arguments: list[str]) -> tuple[int, str]:
    os.chdir(folder)
    return command(arguments)


def test_a_run_without_a_directory_gets_one_of_its_name_and_date(small: list[str], tmp_path: Path) -> None:
    short = [*small[:-1], "train.max_steps=1"]
    (code, text), (other, _) = run_ranks(_in, 2, tmp_path, short)
    assert (code, other) == (0, 0), text
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"small-\d{8}-\d{6}", run.name)
    assert f"run: runs/{run.name}" in text.splitlines()
    assert f"dir: runs/{run.name}" in (run / "config.yaml").read_text()
    for code, text in run_ranks(_in, 2, tmp_path, [*short, "run.resume=auto"]):
        assert code == 2
        assert f"run.dir must say which run (the newest run of small is run.dir=runs/{run.name})" in text
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_directory_that_holds_something_else_is_not_touched(small: list[str]) -> None:
    run = run_of(small)
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    for code, text in on_ranks(2, small, timeout=30):
        assert code == 2
        assert "thesis.tex" in " ".join(text.split())
    assert [p.name for p in run.iterdir()] == ["thesis.tex"]


def test_a_directory_that_holds_another_run_is_not_touched(small: list[str]) -> None:
    run = run_of(small)
    command([*small, "train.max_steps=2"])
    before = fingerprint(run, 2), metrics(run)
    for code, text in on_ranks(2, [*small, "run.seed=1"], timeout=30):
        assert code == 2
        assert "another run" in " ".join(text.split())
    assert before == (fingerprint(run, 2), metrics(run))


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty directory", "not an image"])
def test_damaged_shards_end_the_run_on_every_rank(small: list[str], digits: Path, tmp_path: Path, damage: str) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(digits, shards)
    shard = shards / "train-00003.tar"
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        os.truncate(shard, 20_000)
    elif damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    elif damage == "empty directory":
        shutil.rmtree(shards)
        shards.mkdir()
    else:
        _put_text_into(shards)
    for code, text in on_ranks(2, [*small, f"data.shards={shards}"], timeout=60):
        assert code == 2, text
        assert "Traceback" not in text
        named = {"empty directory": "index.json", "not an image": "train-0000"}.get(damage, shard.name)
        assert named in "".join(text.split()), text


def _put_text_into(shards: Path) -> None:
    """Replace some images by text and make the index agree, so that only decoding can notice."""
    index = json.loads((shards / "index.json").read_text())
    for entry in index["splits"]["train"]:
        shard, out = shards / entry["name"], io.BytesIO()
        with tarfile.open(shard) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as new:
            for number, member in enumerate(old):
                content = old.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".png") and number % 10 < 2:
                    content = b"this is not an image"
                    member.size = len(content)
                new.addfile(member, io.BytesIO(content))
        shard.write_bytes(out.getvalue())
        entry |= {"bytes": len(out.getvalue()), "sha256": hashlib.sha256(out.getvalue()).hexdigest()}
    (shards / "index.json").write_text(json.dumps(index))


def test_evaluate_evaluates_a_run_again_and_refuses_what_is_none(small: list[str], tmp_path: Path) -> None:
    run = run_of(small)
    command([*small, "train.max_steps=2"])
    one, text = command(["evaluate", str(run)])
    assert one == 0, text
    first = (run / "evaluations" / "2.json").read_text()
    assert [code for code, _ in on_ranks(2, ["evaluate", str(run), "evaluate.train_split=train"])] == [0, 0]
    assert (run / "evaluations" / "2.json").read_text() == first
    assert command(["evaluate", str(run), "evaluate.protocol=full"])[0] == 0
    assert json.loads((run / "evaluations" / "2.json").read_text())["protocol"] == "full"
    for arguments, word in (
        ([str(tmp_path)], "config.yaml"),
        ([str(run), "field.depth=2"], "do not change the run"),
    ):
        code, text = command(["evaluate", *arguments])
        assert code == 2
        assert word in " ".join(text.split())


def test_compare_prints_a_table_and_saves_a_figure(reference: Path, tmp_path: Path) -> None:
    code, text = command(["compare", str(reference), "--figure", str(tmp_path / "loss.png")])
    assert code == 0
    assert "at uniform" in " ".join(text.split())
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert command(["compare", str(tmp_path)])[0] == 2


# --- real launchers and real signals ------------------------------------------------------------------------------


@pytest.mark.nightly
def test_thirty_steps_of_resnet18_are_one_run_on_one_two_and_four_ranks(small: list[str]) -> None:
    """Batch norm, Adam, float32; loader workers and recomputation differ too."""
    arguments = [*small[:-1], "encoder.backbone=resnet18", "train.batches_per_epoch=30", "train.checkpoint_every=1000"]
    arguments.append("evaluate.at_end=true")
    found = []
    for world, extra in (
        (1, ["data.workers=0"]),
        (2, ["data.workers=1", "train.recompute=true"]),
        (4, ["data.workers=2"]),
    ):
        run = run_of(small).with_name(f"world{world}")
        answers = on_ranks(world, [*arguments, *extra, f"run.dir={run}"], timeout=240)
        assert [code for code, _ in answers] == [0] * world, answers
        found.append((fingerprint(run, 30), metrics(run), (run / "evaluations" / "30.json").read_text()))
    assert found[0] == found[1] == found[2]


def test_fast_reduction_sees_the_same_batches(small: list[str], reference: Path) -> None:
    run, fast = reference, run_of(small)
    answers = on_ranks(2, [*small, "run.reduction=fast", f"run.dir={fast}"])
    assert [code for code, _ in answers] == [0, 0], answers
    exact, other = metrics(run), metrics(fast)
    assert [r["batch_digest"] for r in exact] == [r["batch_digest"] for r in other]
    assert other[0]["loss"] == pytest.approx(exact[0]["loss"], abs=1e-6)
    assert fingerprint(run, 6) != fingerprint(fast, 6)  # the control: another order of summation shows in the bits


@pytest.mark.nightly
def test_a_launcher_that_would_start_one_rank_starts_all(small: list[str]) -> None:
    """Without --multi_gpu Accelerate starts a single process on a CPU machine and says nothing."""
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    words = [accelerate, "launch", "--num_processes", "2", "-m", "rkdo_dist", *small]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads((run_of(small) / "environment.json").read_text())["world_size"] == 2
