"""Files for people and forges around the package: they name what exists, and agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import rkdo_dist

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_ci_runs_targets_that_exist_on_every_python_that_the_package_names() -> None:
    lines = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"make ([a-z]+)", " ".join(lines)))
    assert {"test", "nightly", "docs", "oldest"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, flags=re.M)]
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.", c)}
    assert set(WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]) == named


def test_the_oldest_torch_of_make_is_the_one_that_the_package_asks_for() -> None:
    needed = next(line for line in PROJECT["dependencies"] if line.startswith("torch")).removeprefix("torch>=")
    tested = re.search(r"torch==([\d.]+)", (ROOT / "Makefile").read_text())
    assert tested is not None
    assert tested[1].startswith(needed + ".")


def test_the_image_is_the_one_that_kubernetes_asks_for_and_copies_what_exists() -> None:
    text = (ROOT / "Dockerfile").read_text()
    pods = (ROOT / "launch" / "kubernetes.yaml").read_text()
    images = set(re.findall(r"registry\.example\.com/\S+", text + pods))
    assert images == {f"registry.example.com/rkdo_dist:{rkdo_dist.__version__}"}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    for line in re.findall(r"^COPY (.+) \S+$", text, flags=re.M):
        for name in line.split():
            assert (ROOT / name).exists(), name
            assert name in allowed, f"{name} is left out by .dockerignore"
    extras = re.search(r"EXTRAS=(\S+)", text)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    assert re.search(r"workingDir: (\S+)", pods)[1] == re.search(r"^WORKDIR (\S+)", text, flags=re.M)[1]  # type: ignore[index]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_an_issue_template_asks_for_something(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    assert all(item["attributes"]["label"] for item in form["body"])
    assert any(item.get("validations", {}).get("required") for item in form["body"])
