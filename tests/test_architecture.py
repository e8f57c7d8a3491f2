"""The floors and homes of the house: imports run strictly downward, heavy dependencies live in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "rkdo_dist"

# Module prefix (longest match wins) -> floor. A module imports only lower floors, and its own folder.
FLOORS = {
    "printable": -1,
    "addresses": 0,
    "files": 0,
    "documents": 1,
    "lock": 2,
    "web": 2,
    "field": 0,
    "config": 1,
    "exchange": 2,
    "losses": 3,
    "data": 3,
    "encoders": 3,
    "completion": 0,
    "console": 0,
    "diagnostics": 1,
    "faults": 1,
    "batch_norm": 3,
    "lars": 0,
    "checkpoint": 3,
    "history": 3,
    "run_files": 3,
    "rundir": 4,
    "parts": 5,
    "ranks": 6,
    "evaluate": 7,
    "export": 8,
    "start": 8,
    "training": 8,
    "measure": 9,
    "interface": 9,
    "studies": 10,
    "frozen": 11,
    "commands": 12,
    "cli": 13,
    "__main__": 14,
    "__init__": 14,
}
# A room of floors 1 to 5 gets plain arguments: only what stands between a run and its user reads the configuration.
CONFIG_READERS = (
    "history",
    "rundir",
    "parts",
    "ranks",
    "evaluate.evaluation",
    "evaluate.probes",
    "export",
    "training",
    "measure",
    "interface",
    "studies",
    "frozen",
    "commands",
    "cli",
)
HOMES = {
    "accelerate": ("ranks.runtime", "ranks.relaunch", "training.tracking"),
    "deepspeed": ("training.zero", "ranks.runtime"),
    "webdataset": ("data",),
    "torchvision": ("data", "encoders"),
    "sklearn": ("evaluate.scores", "evaluate.linear", "evaluate.maps", "data.sources"),
    "rich": ("console", "evaluate.evaluation", "export.embed", "training", "measure", "commands", "studies", "frozen"),
    "matplotlib": ("studies.plots",),
    "scipy": ("studies.statistics", "evaluate.scores", "evaluate.linear"),
    "yaml": ("config.reading", "start"),
    "safetensors": ("checkpoint", "encoders.weights", "export", "frozen.features"),
    "timm": ("encoders.backbones",),
}


def modules() -> list[tuple[str, Path]]:
    return [(".".join(p.relative_to(PACKAGE).with_suffix("").parts), p) for p in sorted(PACKAGE.rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def inside(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_run_downward(module: str, path: Path) -> None:
    assert room(module) in FLOORS, f"{module} has no floor: give it a room in tests/test_architecture.py and the README"
    for name in imports(path):
        if not inside(name, "rkdo_dist") or name in ("rkdo_dist", "rkdo_dist.__version__"):
            continue
        target = name.removeprefix("rkdo_dist.")
        if room(target) == room(module):
            continue
        assert FLOORS.get(room(target), 99) < FLOORS[room(module)], f"{module} must not import {target}"
        if room(target) == "config":
            assert any(inside(module, reader) for reader in CONFIG_READERS), (
                f"{module} takes plain arguments, not a configuration"
            )


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_heavy_dependencies_stay_at_home(module: str, path: Path) -> None:
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        if homes is not None:
            assert any(inside(module, home) for home in homes), f"{name} belongs to {homes}, not {module}"


def test_files_can_be_read_in_one_sitting() -> None:
    paths = [*(path for _, path in modules()), *Path(__file__).parent.glob("*.py")]
    long = {path.name: lines for path in paths if (lines := path.read_text(encoding="utf-8").count("\n")) > 500}
    assert not long


def test_no_room_without_a_name() -> None:
    assert not [module for module, _ in modules() if module.split(".")[-1] in ("utils", "helpers", "misc", "common")]


def test_public_functions_and_classes_say_what_they_do() -> None:
    silent = []
    for module, path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                silent.append(f"{module}.{node.name}")
    assert not silent


def test_no_pickle_is_read_anywhere() -> None:
    for module, path in modules():
        text = path.read_text(encoding="utf-8")
        if module == "encoders.weights":  # a user's torch file: tensors alone
            safe = 'torch.load(path, map_location="cpu", weights_only=True)'
            assert text.count("torch.load(") == text.count(safe) == 1
            assert text.count("pickle.") == text.count("pickle.UnpicklingError")
            continue
        assert "pickle" not in imports(path), module
        assert "torch.load" not in text, module
        assert "yaml.load(" not in text or module == "config.reading", module
