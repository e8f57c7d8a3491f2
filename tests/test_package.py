"""The package as it is installed: the losses need torch and numpy alone, the wheel works outside the repository."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.jobs import ROOT, command
from tests.launching import environment

BARE = """
import builtins, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
LOSS = """
import torch
from rkdo_dist import IConLoss, InfoNCELoss, RKDOLoss, SupervisedLoss
torch.manual_seed(0)
u, v = (torch.nn.functional.normalize(torch.randn(6, 4), dim=1).requires_grad_() for _ in range(2))
for loss in (RKDOLoss(), IConLoss(), InfoNCELoss()):
    loss(u, v).backward()
SupervisedLoss()(u, v, torch.tensor([0, 0, 1, 1, 2, 2])).backward()
print(RKDOLoss()(u, v).item())
"""


def needed(*names: str) -> set[str]:
    """These distributions and all that they need to be imported, by their names."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        todo += [re.split(r"[^\w.-]", r)[0] for r in requirements if "extra ==" not in r]
    return found


@pytest.fixture(scope="module")
def bare() -> str:
    """Code that makes a process see nothing but what torch and numpy need."""
    kept = needed("torch", "numpy")
    owners = metadata.packages_distributions()
    others = {m for m, names in owners.items() if not kept & {re.sub(r"[-_.]+", "-", n).lower() for n in names}}
    assert {"torchvision", "accelerate", "yaml", "rich", "PIL", "safetensors", "scipy"} <= others
    return BARE.format(blocked=sorted(others - {"rkdo_dist"}))


def run(code: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    variables = {**environment(), "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=variables, timeout=240, check=False
    )


def test_the_losses_need_torch_and_numpy_alone(bare: str, tmp_path: Path) -> None:
    alone, whole = run(bare + LOSS, ROOT, tmp_path), run(LOSS, ROOT, tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout == whole.stdout


def test_commands_name_the_extra_that_is_missing(bare: str, tmp_path: Path) -> None:
    code = "\nimport sys\nfrom rkdo_dist.cli import main\nmain({words!r})"
    answer = run(bare + code.format(words=["--version"]), ROOT, tmp_path)
    assert (answer.returncode, answer.stdout) == (0, f"rkdo {metadata.version('rkdo_dist')}\n"), answer.stderr
    answer = run(bare + code.format(words=["train", str(ROOT / "configs" / "digits-rkdo.yaml")]), ROOT, tmp_path)
    assert answer.returncode == 2
    assert (
        answer.stderr
        == "rkdo: error: this command needs yaml, which is not installed: pip install 'rkdo_dist[train]'\n"
    )


def test_the_wheel_holds_what_it_needs(bare: str, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=240)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        archive.extractall(tmp_path / "wheel")
    plain = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", about, flags=re.M)
    assert sorted(plain) == ["numpy", "torch"]
    assert {"rkdo_dist/py.typed", "rkdo_dist/configs/digits-rkdo.yaml"} <= names
    assert not [n for n in names if n.startswith("tests/")]
    assert run(bare + LOSS, tmp_path / "wheel", tmp_path).returncode == 0
    code = "from rkdo_dist import config; print(config.digest(config.load('configs/digits-rkdo.yaml')))"
    inside, here = (run(code, path, cwd) for path, cwd in ((tmp_path / "wheel", tmp_path), (ROOT, ROOT)))
    assert inside.returncode == 0, inside.stderr
    assert inside.stdout == here.stdout


# --- rkdo init ----------------------------------------------------------------------------------------------------


def test_init_writes_a_run_for_a_folder_of_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    draws = np.random.default_rng(1)
    for k in range(40):
        Image.fromarray(draws.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    (folder / "notes.png").write_bytes(b"not a picture")
    code, text = command(["init", str(tmp_path / "mine"), "--data", str(folder)])
    assert code == 0, text
    assert "40 images" in (tmp_path / "mine" / "rkdo.yaml").read_text()
    for name in ("rkdo", "infonce"):
        changes = ["train.max_steps=1", "encoder.backbone=cifar_resnet8", "encoder.stem=imagenet"]
        changes += [f"run.dir={tmp_path / name}", "data.workers=0", "evaluate.at_end=false"]
        code, text = command(["train", str(tmp_path / "mine" / f"{name}.yaml"), *changes])
        assert code == 0, text
    script = tmp_path / "mine" / "train.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert script.stat().st_mode & 0o100


def test_init_chooses_bf16_for_gpus_that_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for has in (True, False):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, has=has: has)
        assert command(["init", str(tmp_path / str(has))])[0] == 0
        assert f"{{PRECISION:-{'bf16' if has else 'no'}}}" in (tmp_path / str(has) / "train.sh").read_text()


def test_init_without_data_takes_the_digits_and_keeps_what_is_there(tmp_path: Path) -> None:
    assert command(["init", str(tmp_path)])[0] == 0
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert "rkdo prepare digits" in before["train.sh"]
    (tmp_path / "rkdo.yaml").write_text("mine")
    code, text = command(["init", str(tmp_path)])
    assert code == 2
    assert "rkdo.yaml is there already" in " ".join(text.split())
    assert (tmp_path / "rkdo.yaml").read_text() == "mine"
    assert command(["init", str(tmp_path), "--force"])[0] == 0
    assert before == {p.name: p.read_text() for p in tmp_path.iterdir()}
    code, text = command(["init", str(tmp_path / "new"), "--data", str(tmp_path / "nowhere")])
    assert code == 2
    assert not (tmp_path / "new").exists()
