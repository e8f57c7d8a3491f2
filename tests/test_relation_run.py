"""Whole runs with a recursion with restart: the presets, any number of ranks, killed and continued, mistakes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from rkdo_dist import checkpoint, parts
from rkdo_dist import config as configuration
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.measure.flops import StepFlops, step_flops
from rkdo_dist.training.relation import Queue
from tests.jobs import command, kill_and_resume, metrics, on_ranks, run_of

EMA = ["train.ema=0.9"]
BATCH = ["field.recursion=restart", "field.relation_weight=0.3"]
SCE = ["field.objective=sce", "field.queue=64"]
# Every kind of teacher, view, columns and loss between them.
RUNS = {
    "sce": SCE,
    "ressl": ["field.objective=ressl", "field.queue=96", "views.teacher=plain", *EMA],
    "bank": ["field.objective=sce", "field.columns=bank", "train.epochs=2", "train.batches_per_epoch=2", *EMA],
    "co2": ["field.objective=co2", "field.queue=32", "field.teacher=student", "train.views=apart"],
    "own keys": [*BATCH, "field.confidence=entropy"],
    "mutual": [*BATCH, *EMA, "field.teacher=ema", "views.teacher=weak", "field.neighbours=3", "field.mutual=true"],
}


def everything(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of every tensor file of a checkpoint, the average and the queue included."""
    folder = run / "checkpoints" / str(step)
    files = sorted(folder.rglob("*.safetensors"))
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("kind", RUNS)
def test_one_run_on_any_number_of_processes(small: list[str], kind: str) -> None:
    """On 1, 2 and 4 in full for one kind; of the others what differs."""
    arguments = [*small, *RUNS[kind], "train.max_steps=3"]
    code, text = command(arguments)
    assert code == 0, text
    run = run_of(arguments)
    whole, journal = everything(run, 3), metrics(run)
    assert ("parts/queue.safetensors" in whole) == (kind in ("sce", "ressl", "co2"))
    assert ("parts/bank.000000.safetensors" in whole) == (kind == "bank")
    for record in journal:
        assert 0 < record["loss"] < record["loss_at_uniform"] + 4
        assert record["loss_at_ideal"] is None  # what is reached by similarities depends on the relation
        assert 0 < record["relation_weight"] <= 1
        assert 0 <= record["relation_precision"] <= 1
        assert record["relation_entropy"] >= 0
    for world, extra in ((2, []), (4, ["train.recompute=true"])):
        if world == {"sce": 2, "ressl": 2, "mutual": 4, "bank": 4}.get(kind) or kind == "sce":
            other = [*arguments, *extra, f"run.dir={run}-{world}"]
            answers = on_ranks(world, other)
            assert [code for code, _ in answers] == [0] * world, answers
            assert everything(run_of(other), 3) == whole
            assert metrics(run_of(other)) == journal
    if kind in ("ressl", "mutual"):
        return
    fast = [*arguments, "run.reduction=fast", f"run.dir={run}-fast"]
    answers = on_ranks(2, fast)
    assert [code for code, _ in answers] == [0, 0], answers
    for mine, theirs in zip(metrics(run_of(fast)), journal, strict=True):
        for name in ("loss", "loss_at_uniform", "relation_entropy", "relation_precision"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_the_queue_holds_the_keys_of_the_last_steps(small: list[str]) -> None:
    """64 keys of batches of 32: those of steps 5 and 6, of other samples, and they move with the average."""
    arguments = [*small, *SCE, "train.checkpoint_every=1", "train.keep_checkpoints=9"]
    code, text = command(arguments)
    assert code == 0, text
    saved = {step: checkpoint.load(run_of(arguments) / "checkpoints" / str(step)).part("queue") for step in range(1, 7)}
    assert [saved[step]["position"].tolist() for step in range(1, 5)] == [[32, 32], [0, 64], [32, 64], [0, 64]]
    last, before = saved[6], saved[5]
    assert (last["keys"][:32] == before["keys"][:32]).all()
    assert (last["keys"][32:] != before["keys"][32:]).any()
    assert len(set(last["samples"].tolist())) == 64
    assert last["keys"].norm(dim=1).sub(1).abs().max() < 1e-5
    entropies = [record["relation_entropy"] for record in metrics(run_of(arguments))]
    assert max(entropies[1:]) > entropies[0]  # more keys to be related to


def test_a_step_that_is_skipped_leaves_no_key() -> None:
    queue, ids = Queue(4, 1, torch.device("cpu")), torch.arange(2)
    for value, moved in ((1.0, True), (2.0, False), (3.0, True), (4.0, False), (5.0, True)):
        filled = queue.put(torch.full((2, 1), value), ids, ids)
        assert filled == (2 if value == 1 else 4)
        if moved:
            queue.advance(2)
    assert queue.keys[:, 0].tolist() == [5, 5, 3, 3]
    assert (queue.place, queue.filled) == (2, 4)


def test_killed_runs_continue_bit_for_bit_on_other_numbers_of_processes(small: list[str]) -> None:
    arguments = [*small, *SCE, "train.checkpoint_every=1"]
    run = run_of(arguments)
    straight = [*arguments, f"run.dir={run}-straight"]
    assert command(straight)[0] == 0
    kill_and_resume(arguments, [(2, 1), (1, 4)])
    answers = on_ranks(4, [*arguments, "run.resume=auto"])
    assert [code for code, _ in answers] == [0] * 4, answers
    assert everything(run, 6) == everything(run_of(straight), 6)
    assert metrics(run) == metrics(run_of(straight))


def test_a_bank_continues_on_another_number_of_processes(small: list[str]) -> None:
    arguments = [*small, *RUNS["bank"]]
    straight = [*arguments, f"run.dir={run_of(small)}-straight"]
    assert command(straight)[0] == 0
    assert command([*arguments, "train.max_steps=3", "train.checkpoint_every=3"])[0] == 0
    answers = on_ranks(2, [*arguments, "train.checkpoint_every=3", "run.resume=auto"])
    assert [code for code, _ in answers] == [0, 0], answers
    assert everything(run_of(small), 4) == everything(run_of(straight), 4)
    assert metrics(run_of(small)) == metrics(run_of(straight))
    seen = sum(
        int(checkpoint.load(run_of(small) / "checkpoints" / "4").part(f"bank.{tile:06d}")["seen"].sum())
        for tile in range(15)
    )
    assert 64 <= seen <= 128  # two epochs of two batches


def test_weight_0_is_infonce_bit_for_bit_and_so_is_the_time_before_the_start(small: list[str]) -> None:
    run = run_of(small)
    one = [*small, "train.epochs=2", "train.batches_per_epoch=3", "field.temperature=0.1"]
    assert command([*one, "field.objective=infonce"])[0] == 0
    zero = [*one, "field.recursion=restart", "field.relation_weight=0", f"run.dir={run}-zero"]
    assert command(zero)[0] == 0
    assert everything(run_of(zero), 6) == everything(run, 6)
    late = [*one, *BATCH, "field.relation_start_epoch=1", "train.checkpoint_every=3", f"run.dir={run}-late"]
    assert command(late)[0] == 0
    weights = [record.get("relation_weight", 0) for record in metrics(run_of(late))]
    assert weights == [0, 0, 0] + [pytest.approx(0.3)] * 3
    theirs = metrics(run)
    for mine, wanted in zip(metrics(run_of(late))[:4], theirs, strict=False):
        assert mine["positive_mass"] == pytest.approx(wanted["positive_mass"], rel=1e-5)
    assert metrics(run_of(late))[2]["loss"] == theirs[2]["loss"]


def test_the_share_of_a_relation_follows_its_schedule() -> None:
    given = ["field.recursion=restart", "field.relation_weight=0.4", "field.relation_end=0.2", "train.epochs=4"]
    given += ["field.relation_start_epoch=2"]
    for schedule, wanted in (
        ("constant", [0, 0, 0.4, 0.4, 0.4]),
        ("linear", [0, 0, 0.4, 0.3, 0.2]),
        ("cosine", [0, 0, 0.4, 0.3, 0.2]),
        ("step", [0, 0, 0.4, 0.2, 0.2]),
    ):
        config = configuration.change(Config(), [*given, f"field.relation_schedule={schedule}"])
        found = [parts.relation_at(config, "restart", epoch / 4) for epoch in range(5)]
        assert [relation.weight for relation in found if relation is not None] == pytest.approx(wanted)
        assert configuration.follows_length(config) == (schedule != "constant")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("field.recursion=restart field.objective=icon", "field.recursion=restart is a form of field.objective=rkdo"),
        ("field.recursion=restart field.teacher=ema views.teacher=weak", "field.teacher=ema needs the average of the"),
        ("field.recursion=restart field.teacher=ema train.ema=0.9", "needs its view: set views.teacher"),
        ("field.objective=sce train.ema=0.9 train.global_batch=96 train.micro_batch=8", "field.queue=4096 must be a"),
        ("field.objective=sce train.ema=0.9 field.queue=128", "multiple of train.global_batch=256"),
        ("field.recursion=restart field.relation_weight=1", "field.relation_weight=1 leaves nothing for the other"),
        ("field.recursion=restart field.relation_weight=1.2", "field.relation_weight must be at least 0 and at most 1"),
        ("field.recursion=restart field.teacher_temperature=0", "field.teacher_temperature must be at least 0.0001"),
        ("field.recursion=restart field.mutual=true", "field.mutual=true needs field.neighbours above 0"),
        ("field.recursion=restart field.columns=bank field.neighbours=5", "field.columns=bank takes all samples"),
        ("field.recursion=restart field.pairing=joint", "needs field.pairing=cross, got joint"),
        ("field.recursion=restart run.reduction=ring", "needs run.reduction=exact or fast, got ring"),
        ("field.recursion=restart field.relation_start_epoch=11", "must lie in [0, train.epochs=10], got 11"),
        ("field.teacher=ema train.ema=0.9", "field.teacher=ema is for a recursion with restart"),
        ("field.columns=queue", "field.columns=queue is for a recursion with restart"),
        ("views.teacher=weak", "views.teacher=weak is for a recursion with restart"),
        ("field.objective=sce field.switch_to=ressl train.ema=0.9", "have different relations"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(words: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.change(Config(), words.split())
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_the_queue_is_refused(small: list[str]) -> None:
    assert command([*small, *SCE, "train.max_steps=2"])[0] == 0
    code, text = command([*small, *SCE, "train.max_steps=4", "run.resume=auto", "field.queue=96"])
    assert code == 2
    assert "field.queue" in text
    run = run_of(small)
    (run / "checkpoints" / "2" / "parts" / "queue.safetensors").unlink()
    code, text = command([*small, *SCE, "train.max_steps=4", "run.resume=auto"])
    assert code == 2, text
    assert "queue" in text


# --- what looks at a run ----------------------------------------------------------------------------------------------


def test_a_report_shows_what_the_relation_was(small: list[str]) -> None:
    code, text = command([*small, *SCE])
    assert code == 0, text
    run = run_of(small)
    code, text = command(["report", str(run), "--out", f"{run}.html"])
    assert code == 0, text
    page = Path(f"{run}.html").read_text()
    mean = sum(record["relation_precision"] for record in metrics(run)) / 6
    assert f"{mean:.4f}" in page.partition("share of the relation on the own class")[2][:200]
    code, text = command(["doctor", *small[1:], *SCE])
    assert code == 0, text
    assert "sce" in text


def test_operations_of_a_step_are_those_of_its_views(small: list[str]) -> None:
    def of(*words: str) -> StepFlops:
        return step_flops(configuration.load(Path(small[1]), list(words)), 8)

    plain, sce, batch = of("field.objective=infonce"), of(*SCE), of(*RUNS["mutual"])
    assert sce.encoder_forward == plain.encoder_forward  # one view of the student, one of the teacher
    assert sce.encoder_step == pytest.approx(plain.encoder_step / 2 + plain.encoder_forward / 2)
    assert batch.encoder_step == pytest.approx(plain.encoder_step + plain.encoder_forward / 2)
    assert of(*RUNS["own keys"]).encoder_step == plain.encoder_step
    assert sce.loss_step == 3 * 2 * 32 * 64 * 16  # rows, keys, and the gradient of rows against 64 keys
    assert batch.loss_step == 4 * 2 * 32 * 32 * 16
    code, text = command(["flops", small[1], *SCE, "--repeats", "3"])
    assert code == 2
    assert "count with --repeats 0" in " ".join(text.split())
