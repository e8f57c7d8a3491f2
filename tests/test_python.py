"""Training from Python: the bits of the command line, with a model, data, metrics and callbacks of one's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rkdo_dist
from rkdo_dist.encoders import CifarResNet
from tests.jobs import TIMES, fingerprint, metrics, run_of
from tests.launching import environment, free_port
from tests.ranks import run_ranks


class Recorder(rkdo_dist.Callback):
    """Remembers what it is told; the wish to spoil it shows that facts are copies."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []

    def _note(self, event: str, facts: dict[str, Any]) -> None:
        self.told.append((event, {key: value for key, value in facts.items() if key not in TIMES}))
        facts.clear()
        torch.rand(3)  # the global generator decides nothing
        np.random.rand(3)

    def on_step(self, facts: dict[str, Any]) -> None:
        self._note("step", facts)

    def on_epoch(self, facts: dict[str, Any]) -> None:
        self._note("epoch", facts)

    def on_evaluation(self, facts: dict[str, Any]) -> None:
        self._note("evaluation", facts)

    def on_checkpoint(self, facts: dict[str, Any]) -> None:
        self._note("checkpoint", facts)


class Pixels(torch.utils.data.Dataset):
    """Images that tell their number."""

    def __init__(self, count: int, labels: bool = True) -> None:
        self.count, self.labels = count, labels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> Any:
        image = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return (image, k % 2) if self.labels else image


def mean_norm(features: Any, labels: Any) -> float:
    assert features.shape == (len(labels), 64)
    assert labels.min() >= 0
    return float(np.linalg.norm(features, axis=1).mean())


def _on_rank(rank: int, world: int, arguments: list[str], port: int) -> Any:
    """Two runs in one process: the first with callbacks and metrics, the second plain. They form their own groups."""
    if world > 1:
        torch.distributed.barrier()  # the other rank may still be connecting to this one
        torch.distributed.destroy_process_group()
        os.environ["MASTER_PORT"] = str(port)
    recorder = Recorder()
    settings = {key: value for key, _, value in (word.partition("=") for word in arguments[2:])}
    first = rkdo_dist.train(
        arguments[1],
        settings={**settings, "evaluate": {"at_end": True}},
        callbacks=[recorder],
        metrics={"mean_norm": mean_norm},
    )
    second = rkdo_dist.train(arguments[1], settings={**settings, "run.dir": f"{settings['run.dir']}-again"})
    assert not torch.distributed.is_initialized()
    return str(first.path), str(second.path), recorder.told


@pytest.mark.parametrize("world", [1, 2])
def test_the_bits_of_the_command_line_with_callbacks_and_metrics(small: list[str], reference: Path, world: int) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    answers = [_on_rank(0, 1, small, 0)] if world == 1 else run_ranks(_on_rank, world, small, free_port())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert all(answer == answers[0] for answer in answers)
    first, second, told = answers[0]
    for run in (Path(first), Path(second)):
        assert fingerprint(run, 6) == fingerprint(reference, 6)
        assert metrics(run) == metrics(reference)
    assert [event for event, _ in told] == [*["step", "step", "checkpoint"] * 3, "epoch", "evaluation"]
    assert [facts["loss"] for event, facts in told if event == "step"] == [r["loss"] for r in metrics(reference)]
    expected = json.loads((reference / "evaluations" / "6.json").read_text())
    found = json.loads((Path(first) / "evaluations" / "6.json").read_text())
    assert told[-1][1] == found
    assert found.pop("mean_norm") > 0
    assert found == expected
    facts = json.loads((Path(first) / "environment.json").read_text())
    assert (facts["callbacks"], facts["changed_by"]) == (["Recorder"], [])


def test_a_module_of_the_users(small: list[str], tmp_path: Path) -> None:
    """The same network by name and as a module with the weights that the name would have drawn."""
    settings = {"data.shards": small[2].partition("=")[2], "train.max_steps": 2}
    named = rkdo_dist.train(small[1], settings={**settings, "run.dir": str(tmp_path / "named")})
    torch.manual_seed(42)
    by_name = rkdo_dist.encoders.Encoder("cifar_resnet8", embedding_dim=16)  # type: ignore[attr-defined]
    module = CifarResNet(8)
    module.load_state_dict(by_name.backbone.state_dict())
    module.eval()  # no reason to be trained so
    run = rkdo_dist.train(small[1], encoder=module, settings={**settings, "run.dir": tmp_path / "module"})
    assert run.exit_code == 0
    assert run.status == "complete"
    assert [r["batch_digest"] for r in metrics(run.path)] == [r["batch_digest"] for r in metrics(named.path)]
    encoder = run.load_encoder()
    for name, tensor in module.state_dict().items():  # trained in place
        assert torch.equal(tensor, encoder.backbone.state_dict()[name])
        assert tensor.is_contiguous()
    assert not torch.equal(module[0].weight, by_name.backbone[0].weight)
    assert encoder.backbone is not module
    with pytest.raises(ValueError, match="a module that Python code gave, python:CifarResNet"):
        rkdo_dist.load_encoder(run.path)
    with pytest.raises(ValueError, match="was a module that Python code gave"):
        rkdo_dist.train(run.path / "config.yaml", settings={"run.resume": "auto", "train.max_steps": 3})
    longer = {"run.resume": "auto", "train.max_steps": 3}
    assert len(rkdo_dist.train(run.path / "config.yaml", encoder=CifarResNet(8), settings=longer).history.records) == 3


def test_data_sets_as_objects(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "encoder": {"backbone": "cifar_resnet8", "embedding_dim": 8},
        "train": {"global_batch": 8, "micro_batch": 4, "epochs": 1, "batches_per_epoch": 2},
        "data.workers": 0,
    }
    one = rkdo_dist.train({**settings, "run.dir": tmp_path / "one"}, data={"train": Pixels(24), "val": Pixels(12)})
    assert one.evaluations[2]["knn_accuracy"] is not None
    two = rkdo_dist.train(
        settings, data=Pixels(24, labels=False), objective="infonce", settings={"run.dir": str(tmp_path / "two")}
    )
    assert two.evaluations[2]["knn_accuracy"] is None
    assert two.history.config.field.objective == "infonce"
    assert one.history.records[0]["batch_digest"] == two.history.records[0]["batch_digest"]


# --- mistakes -----------------------------------------------------------------------------------------------------


class Raising:
    def on_step(self, facts: dict[str, Any]) -> None:
        if facts["step"] == 4 and os.environ.get("RANK", "0") == os.environ.get("RKDO_TEST_RAISES", "0"):
            raise OSError("the disk\nis full")


class Training:
    """Moves a weight, or leaves the encoder in evaluation mode."""

    def __init__(self, module: nn.Module, how: str, changes_results: bool = False) -> None:
        self.module, self.how, self.changes_results = module, how, changes_results

    def on_step(self, facts: dict[str, Any]) -> None:
        if facts["step"] == 2:
            if self.how == "weights":
                torch.nn.init.zeros_(next(self.module.parameters()))
            else:
                self.module.eval()


def _raises_on_one_rank(rank: int, world: int, arguments: list[str]) -> str:
    os.environ["RKDO_TEST_RAISES"] = "1"
    settings = dict(word.split("=") for word in arguments[2:])
    with pytest.raises(RuntimeError) as caught:
        rkdo_dist.train(arguments[1], settings=settings, callbacks=[Raising()])
    return str(caught.value)


@pytest.mark.parametrize("world", [1, 2])
def test_a_callback_that_raises_ends_the_run_on_all_ranks_after_the_checkpoint(
    small: list[str], reference: Path, world: int
) -> None:
    if world == 1:
        with pytest.raises(RuntimeError) as caught:
            rkdo_dist.train(small[1], settings=dict(word.split("=") for word in small[2:]), callbacks=[Raising()])
        texts = [str(caught.value)]
    else:
        texts = run_ranks(_raises_on_one_rank, world, small)
        assert "rank 1: callback Raising" in texts[0]
    assert len(set(texts)) == 1
    assert "callback Raising.on_step failed at step 4: OSError: the disk is full" in texts[0]
    run = run_of(small)
    assert fingerprint(run, 4) == fingerprint(reference, 4)  # checkpoint_every=2: it was due
    assert len(metrics(run)) == 4
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    settings = {**dict(word.split("=") for word in small[2:]), "run.resume": "auto"}
    rkdo_dist.train(small[1], settings=settings)
    assert fingerprint(run, 6) == fingerprint(reference, 6)


def test_a_callback_that_changes_the_encoder_must_say_so(small: list[str], tmp_path: Path) -> None:
    settings = {"data.shards": small[2].partition("=")[2], "train.max_steps": 3}
    for how in ("weights", "mode"):
        module = CifarResNet(8)
        settings["run.dir"] = str(tmp_path / how)
        with pytest.raises(RuntimeError, match=r"Training\.on_step changed the encoder at step 2 without saying so"):
            rkdo_dist.train(small[1], encoder=module, settings=settings, callbacks=[Training(module, how)])
    module = CifarResNet(8)
    said = Training(module, "weights", changes_results=True)
    settings |= {"run.dir": str(tmp_path / "said"), "train.checkpoint_every": 1}
    run = rkdo_dist.train(small[1], encoder=module, settings=settings, callbacks=[said])
    longer = {**settings, "train.max_steps": 4, "run.resume": "auto"}
    rkdo_dist.train(small[1], encoder=module, settings=longer)  # without it: the record stays
    assert json.loads((run.path / "environment.json").read_text())["changed_by"] == ["Training"]


class Misspelt:
    def on_steps(self, facts: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"callbacks": [Misspelt()]}, "Misspelt has on_steps, which nothing calls; did you mean on_step?"),
        ({"callbacks": Misspelt()}, "callbacks must be a list, got Misspelt"),
        ({"metrics": [mean_norm]}, "metrics must be a mapping by name, got list"),
        ({"data": {}}, "has no split 'train'"),
        ({"callbacks": [5]}, "int has none of on_step"),
        ({"callbacks": [Recorder]}, r"give an object, Recorder\(\)"),
        ({"metrics": {"nmi": mean_norm}}, "nmi is a score of every evaluation"),
        ({"metrics": {"a.b": mean_norm}}, "without a dot"),
        ({"metrics": {"mine": 3}}, "mine is int, not a function"),
        ({"encoder": 5}, "encoder must be a torch.nn.Module or the name"),
        ({"encoder": nn.Identity()}, "must map images"),
        ({"objective": nn.Identity()}, "objective must be the name of an objective"),
        ({"objective": "infonse"}, "did you mean 'infonce'"),
        ({"data": [1, 2, 3]}, "item .* is int"),
        ({"data": 5}, "not a data set with a length"),
        ({"data": "nowhere"}, "there is no nowhere"),
        ({"settings": {"train": {"epohcs": 3}}}, r"train\.epochs"),
        ({"settings": {"epochs": 3}}, r"e\.g\. train\.epochs=3"),
        ({"settings": {"run.resume": "auto", "run.dir": ""}}, "run.dir must say which run"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(f"{k}-{x}"[:30] for k, x in v.items()),
)
def test_mistakes_are_one_line_before_the_first_step(small: list[str], given: dict[str, Any], said: str) -> None:
    settings = {**dict(word.split("=") for word in small[2:]), **given.pop("settings", {})}
    with pytest.raises(ValueError, match=said) as caught:
        rkdo_dist.train(small[1], settings=settings, **given)
    assert "\n" not in str(caught.value)
    assert not run_of(small).exists()


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (lambda features, labels: "good", r"metric mine must return a finite number, got 'good' \(str\)"),
        (lambda features, labels: None, "got 'None'"),
        (lambda features, labels: features.nonsense, "metric mine failed: AttributeError"),
    ],
)
def test_a_metric_that_gives_no_number_leaves_the_run_whole(small: list[str], metric: Any, said: str) -> None:
    settings = {**dict(word.split("=") for word in small[2:]), "train.max_steps": 1, "evaluate.at_end": True}
    with pytest.raises(ValueError, match=said):
        rkdo_dist.train(small[1], settings=settings, metrics={"mine": metric})
    run = rkdo_dist.Run(run_of(small))
    assert (run.status, run.evaluations) == ("failed", {})
    assert fingerprint(run.path, 1)
    settings["run.resume"] = "auto"
    assert 1 in rkdo_dist.train(small[1], settings=settings, metrics={"mine": lambda f, y: np.float32(1)}).evaluations


class Interrupting:
    def on_step(self, facts: dict[str, Any]) -> None:
        if facts["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_interrupts(small: list[str], reference: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    settings = dict(word.split("=") for word in small[2:])
    with pytest.raises(KeyboardInterrupt):
        rkdo_dist.train(small[1], settings=settings, callbacks=[Interrupting()])
    assert signal.getsignal(signal.SIGINT) is before
    assert rkdo_dist.Run(run_of(small)).status == "interrupted"
    run = rkdo_dist.train(small[1], settings={**settings, "run.resume": "auto"})
    assert fingerprint(run.path, 6) == fingerprint(reference, 6)


SCRIPT = """
import sys, rkdo_dist
{guard}
    for number in range(2):
        settings = {{"data.shards": sys.argv[2], "data.workers": 1, "train.max_steps": 2}}
        print(rkdo_dist.train(sys.argv[1], settings={{**settings, "run.dir": f"{{sys.argv[3]}}-{{number}}"}}))
"""


@pytest.mark.nightly
def test_a_script_under_torchrun_trains_twice(small: list[str], reference: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard='if __name__ == "__main__":'))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    words += [small[1], small[2].partition("=")[2], str(tmp_path / "run")]
    answer = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=240, check=False)
    assert answer.returncode == 0, answer.stderr
    for number in range(2):
        assert fingerprint(tmp_path / f"run-{number}", 2) == fingerprint(reference, 2)


@pytest.mark.nightly
def test_a_script_without_a_guard_is_told(small: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard="if True:"))
    words = [sys.executable, str(script), small[1], small[2].partition("=")[2], str(tmp_path / "run")]
    answer = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=240, check=False)
    assert answer.returncode == 1
    assert 'put the call under `if __name__ == "__main__":`' in answer.stderr
    assert not (tmp_path / "run-1").exists()
