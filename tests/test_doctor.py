"""`rkdo doctor`: says what a launch would do, refuses what cannot work, and never leaves a rank waiting."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.encoders import Encoder
from rkdo_dist.ranks import agreement
from rkdo_dist.training import memory
from rkdo_dist.training.shape import shape_of
from tests.jobs import command, launch, on_ranks
from tests.ranks import run_ranks


def doctor(small: list[str]) -> list[str]:
    return ["doctor", *small[1:]]


def test_one_process_without_training(small: list[str], tmp_path: Path) -> None:
    code, text = command(doctor(small))
    assert code == 0, text
    for words in ("single", "float32", "exact", "8 shards verified", "cifar_resnet8", "activations", "6 steps"):
        assert words in text, words
    assert torch.__version__ in text
    flat = " ".join(text.split())
    rates = re.search(
        r"one worker reads ([0-9,]+) images/s here, the encoder takes ([0-9,]+) pairs/s .*workers=(\d+)", flat
    )
    assert rates is not None, text
    images, pairs, workers = (int(x.replace(",", "")) for x in rates.groups())
    assert pairs / images - 0.01 <= workers < pairs / images + 1.01
    assert "nothing stands in the way" in text
    assert not (tmp_path / "run").exists()


def test_two_ranks_agree_and_only_one_speaks(small: list[str]) -> None:
    (code, text), (other, silence) = on_ranks(2, [*doctor(small), "run.reduction=ring"])
    assert (code, other) == (0, 0), text + silence
    assert not silence.strip()
    assert "gloo" in text
    assert "2 on 1 machine" in text
    assert re.search(r"column gradients\s*│ send", text)
    assert re.search(r"parameter gradients\s*│ all_reduce", text)


def test_a_typo_gives_the_usual_error(small: list[str]) -> None:
    code, text = command([*doctor(small), "train.epoch=3"])
    assert code == 2
    assert "train.epochs" in text.replace("\n", " ")


def _index_with(tree: dict[str, Any], change: str) -> dict[str, Any]:
    """An index of the digits that says something else than the shards hold."""
    if change == "larger images":
        return {**tree, "image_size": [16, 16]}
    if change == "impossible images":
        return {**tree, "image_size": [1 << 40, 1 << 40]}
    if change == "two classes":
        return {**tree, "classes": ["even", "odd"]}
    return {**tree, "splits": {"train": tree["splits"]["train"]}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.split=trian"], "trian"),
        (["train.global_batch=4096"], "fewer than one global batch"),
        (["evaluate.test_split=nowhere"], "nowhere"),
        (["evaluate.train_split=nowhere", "evaluate.protocol=full"], "nowhere"),
        (["data.shards=''"], "data.source is not set"),
        (["encoder.backbone=resnet19"], "resnet18"),
        (["encoder.backbone=vit_b_16"], "backbone=vit_b_16 cannot take images of 8 x 8"),
        (["encoder.backbone=alexnet"], "backbone=alexnet cannot take images of 8 x 8"),
        (["encoder.backbone=cifar_resnet8x9999"], "lower encoder.backbone"),
        (["encoder.embedding_dim=1048576", "encoder.head_width=1048576"], "lower encoder.backbone"),
        (["field.recursion=persistent", "field.stored=100000"], "a row has no more entries than that"),
        (["field.supervisor=neighbours", "field.neighbours=5000"], "neighbours must lie in [1, 1437]"),
        (["run.trackers=[nobody]"], "run.trackers"),
        (["larger images"], "has 8 x 8 pixels, but INDEX says 16 x 16"),
        (["impossible images"], "has 8 x 8 pixels, but INDEX says"),
        (["two classes"], "the index has 2 classes"),
        (["no test split", "evaluate.probes=[linear]"], "evaluate.probes=['linear'] needs labels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_doctor_and_training_refuse_alike(
    small: list[str], digits: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    asked = [*small[1:], "evaluate.at_end=true", *(word for word in words if "=" in word)]
    for change in (word for word in words if "=" not in word):
        copy = tmp_path / "copy"
        shutil.copytree(digits, copy)
        tree = json.loads((copy / "index.json").read_text())
        (copy / "index.json").write_text(json.dumps(_index_with(tree, change)))
        asked.append(f"data.shards={copy}")
    answers = [command([what, *asked]) for what in ("doctor", "train")]
    errors = [[line for line in text.splitlines() if "error:" in line] for _, text in answers]
    assert [code for code, _ in answers] == [2, 2], answers
    assert errors[0] == errors[1]
    assert said.replace("INDEX", str(tmp_path / "copy")) in " ".join(errors[0])
    assert len(errors[0]) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "said"), [("field.neighbours=5000", "[1, 1437]"), ("train.global_batch=4096", "4096")]
)
def test_a_refusal_before_the_first_step_reaches_every_rank(small: list[str], word: str, said: str) -> None:
    """One that is found from the index, and one within the building of the run: no rank waits for another."""
    for what in ("doctor", "train"):
        for code, text in on_ranks(2, [what, *small[1:], "field.supervisor=neighbours", word], timeout=60):
            assert code == 2, text
            assert said in text.replace("\n", " ")


def test_three_ranks_cannot_share_the_lanes(small: list[str]) -> None:
    for code, text in on_ranks(3, doctor(small)):
        assert code == 2
        assert "3 ranks cannot share a step of 4 lanes" in text.replace("\n", " ")


def test_a_damaged_shard_is_named_on_every_rank(small: list[str], digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    shard = sorted(copy.glob("*train*.tar"))[3]
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    for code, text in on_ranks(2, [*doctor(small), f"data.shards={copy}"]):
        assert code == 2
        assert shard.name in text.replace("\n", "")


def _on_one_rank(rank: int, world: int, arguments: list[str], odd: int, change: str) -> tuple[int, str]:
    """`rkdo` where one rank was given something else."""
    if rank == odd:
        if change == "code":
            agreement.code_files = _edited(agreement.code_files)  # type: ignore[assignment]
        elif change == "version":
            agreement.__version__ = "0.0.9"  # type: ignore[attr-defined]
        else:
            arguments = [*arguments, change]
    return command(arguments)


def _edited(files: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
    return lambda: {**files(), "field/recursion.py": "0" * 64}


CHANGES: list[tuple[str, list[str]]] = [
    ("run.seed=43", ["run.seed", "42", "rank 1 has 43"]),
    ("field.temperature=0.25", ["field.temperature", "rank 1 has 0.25"]),
    ("train.checkpoint_every=5", ["train.checkpoint_every", "rank 1 has 5"]),
    ("run.reduction=fast", ["run.reduction", "rank 1 has fast"]),
    ("train.micro_batch=32", ["train.micro_batch", "rank 1 has 32"]),
    ("code", ["field/recursion.py", "rank 1 has 0000000000000000"]),
    ("version", ["version", "rank 1 has 0.0.9"]),
]


CASES = [("doctor", *case) for case in CHANGES] + [("train", *CHANGES[n]) for n in (4, 5)]


@pytest.mark.parametrize(("what", "change", "words"), CASES, ids=[f"{w}-{c}" for w, c, _ in CASES])
def test_a_rank_with_something_else_is_refused_by_name(
    small: list[str], tmp_path: Path, what: str, change: str, words: list[str]
) -> None:
    for code, text in run_ranks(_on_one_rank, 2, [what, *small[1:]], 1, change, timeout=60):
        assert code == 2, text
        for word in ["ranks disagree on", *words]:
            assert word in text.replace("\n", " "), text
    assert not (tmp_path / "run").exists()


def test_a_rank_with_another_index_is_refused_by_name(small: list[str], digits: Path, tmp_path: Path) -> None:
    """Another index of the same shards: as when a node's copy is old."""
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    index = json.loads((copy / "index.json").read_text())
    index["classes"][0] = "nought"
    (copy / "index.json").write_text(json.dumps(index))
    for code, text in run_ranks(_on_one_rank, 4, doctor(small), 2, f"data.shards={copy}", timeout=60):
        assert code == 2, text
        assert "ranks disagree on the shards' index" in text.replace("\n", " ")
        assert "rank 2 has" in text


@pytest.mark.nightly
def test_under_a_real_launcher(small: list[str]) -> None:
    answer = launch(2, [*doctor(small), "run.reduction=fast"])
    assert answer.returncode == 0, answer.stderr
    assert "ddp" in answer.stdout
    assert answer.stdout.count("nothing stands in the way") == 1


def test_the_activations_of_a_lane_are_what_autograd_keeps() -> None:
    """Two small forwards tell what a large one keeps, batch norm's fixed part included."""
    for backbone in ("resnet18", "shufflenet_v2_x0_5"):
        encoder = Encoder(backbone, "paper", 16, "imagenet")
        before = {k: v.clone() for k, v in encoder.state_dict().items()}
        predicted = memory.lane_bytes(encoder, encoder, 32, torch.device("cpu"))(12)
        assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
        measured = memory.kept_bytes(encoder, torch.rand(24, 3, 32, 32), encoder)
        assert predicted == measured


def test_the_activations_of_large_images_are_foreseen_from_small_ones(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encoder = Encoder("resnet18", "paper", 16, "imagenet")

    def forward(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.shape[-1])
        return encoder(images)

    predicted = memory.lane_bytes(forward, encoder, 192, torch.device("cpu"))(2)
    assert set(seen) == {64, 128}
    assert predicted == memory.kept_bytes(encoder, torch.rand(4, 3, 192, 192), encoder)
    pixels = nn.Linear(3 * 160**2, 2)  # takes one size alone, and is measured there
    predicted = memory.lane_bytes(lambda images: pixels(images.flatten(1)), pixels, 160, torch.device("cpu"))(3)
    assert predicted == 6 * 3 * 160**2 * 4
    # A small machine: on a large one the first samples, which are read before, would be very large images.
    monkeypatch.setattr(memory, "all_bytes", lambda device: 1 << 30)
    for what in ("doctor", "train"):
        code, text = command([what, *small[1:], "data.image_size=512"])
        assert code == 2
        assert "the activations of a step take about" in " ".join(text.split())
        assert "lower data.image_size or train.micro_batch, or set train.recompute=true" in " ".join(text.split())
    assert not (tmp_path / "run").exists()


def test_kept_bytes_counts_a_storage_once_and_no_parameter() -> None:
    """Linear keeps its input; ReLU its output, which the next Linear keeps too."""
    network = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    images = torch.rand(7, 10)
    assert memory.kept_bytes(network, images, network) == 7 * 10 * 4 + 7 * 20 * 4


def test_memory_of_a_step_by_strategy(small: list[str]) -> None:
    config = configuration.load(small[1], small[2:])
    encoder = parts.make_encoder(config)
    launched = {"strategy": "ddp", "precision": "no", "reduction": "fast"}
    shape = shape_of(config, encoder, parts.make_objective(config, 0.0), 2, launched)
    whole = 4 * sum(p.numel() for p in encoder.parameters())
    needs: dict[str, dict[str, Any]] = {}
    for strategy in ("ddp", "zero-1", "zero-2", "zero-3"):
        from dataclasses import replace

        needs[strategy] = memory.step_memory(replace(shape, strategy=strategy), "adam", 1000, 192)
    assert needs["ddp"]["optimizer"] == 2 * whole
    assert needs["zero-1"]["optimizer"] == whole
    assert needs["zero-2"]["gradients"] == whole // 2
    assert needs["zero-3"]["parameters"] == whole // 2
    assert needs["ddp"]["activations"] == 2000  # two lanes a rank
