"""Checkpoints: what is saved comes back bit by bit; damage is noticed; errors explain and leave the last one whole."""

from __future__ import annotations

import errno
import functools
import json
import os
import pickle
import random
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rkdo_dist import checkpoint
from rkdo_dist.checkpoint import CheckpointError, CheckpointWarning, manifest, writing


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        torch.manual_seed(i)
        optimizer.zero_grad()
        module(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()


def in_memory() -> tempfile.TemporaryDirectory[str]:
    """A directory in memory where there is one: nothing here depends on how long a disk takes to flush."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with in_memory() as folder:
        yield Path(folder)


@functools.cache
def content(seed: int) -> tuple[dict[str, Tensor], checkpoint.OptimizerState]:
    """Weights and optimizer after two steps of training."""
    module = network(seed)
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer, range(2))
    return module.state_dict(), checkpoint.optimizer_to_tensors(optimizer, module.named_parameters())


def write(directory: Path, step: int, keep: int = 2, seed: int = 0) -> None:
    """Save a checkpoint of which everything is a function of the step and the seed."""
    model, state = content(seed)
    parts = {"field.0": {"rows": torch.arange(step, step + 7)}}
    checkpoint.save(directory, step, model, state, {"at": step / 3, "of": None}, keep, parts)


def whole(found: checkpoint.Checkpoint | None, step: int, seed: int = 0) -> bool:
    """Whether a checkpoint holds what `write` wrote."""
    if found is None or found.step != step:
        return False
    model, state = content(seed)
    assert found.optimizer is not None
    return (
        same(found.model, model)
        and same(found.optimizer.tensors, state.tensors)
        and found.optimizer.groups == state.groups
        and found.extra == {"at": step / 3, "of": None}
        and same(found.part("field.0"), {"rows": torch.arange(step, step + 7)})
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def quietly(directory: Path) -> checkpoint.Checkpoint | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return checkpoint.load_latest(directory)


# --- there and back ---------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    assert quietly(root) is None
    write(root, 10)
    assert whole(quietly(root), 10)
    write(root, 200)
    assert whole(quietly(root), 200)
    assert whole(checkpoint.load(root / "10"), 10)
    assert (root / "latest").read_text() == "200\n"
    assert sorted(p.relative_to(root / "200").as_posix() for p in (root / "200").rglob("*.*")) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "parts/field.0.safetensors",
        "state.json",
    ]
    assert "3.exp_avg" not in checkpoint.load(root / "10").optimizer.tensors  # type: ignore[union-attr]
    assert "3.weight.exp_avg" in checkpoint.load(root / "10").optimizer.tensors  # type: ignore[union-attr]


def test_every_dtype_shape_and_layout_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    tensors = {
        "bf16": torch.randn(3, 2).bfloat16(),
        "f16": torch.randn(5).half(),
        "f64": torch.randn(5, dtype=torch.float64),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "transposed": torch.randn(4, 6).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "tied": shared,
        "tied.too": shared,
        "slice": shared[3:7],
        "parameter": nn.Parameter(torch.randn(2)),
    }
    checkpoint.save(tmp_path, 0, tensors)
    found = quietly(tmp_path)
    assert found is not None
    assert found.optimizer is None
    assert found.extra == {}
    for name, tensor in tensors.items():
        assert found.model[name].dtype == tensor.dtype
        assert torch.equal(found.model[name].nan_to_num(9), tensor.detach().nan_to_num(9)), name
    assert str(found.model["odd"][2].item()) == "-0.0"


def test_loaded_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found = quietly(tmp_path)
    (tmp_path / "1" / "model.safetensors").write_bytes(b"")
    assert whole(found, 1)


def test_parts_are_written_by_their_owners(tmp_path: Path) -> None:
    building = checkpoint.begin(tmp_path, 5)
    checkpoint.write_part(building, "rows.1", {"x": torch.ones(2)})
    checkpoint.write_part(building, "rows.0", {"x": torch.zeros(3)})
    assert checkpoint.load_latest(tmp_path) is None
    checkpoint.commit(building, {"w": torch.ones(1)})
    found = quietly(tmp_path)
    assert found is not None
    assert found.parts == ("rows.0", "rows.1")
    assert torch.equal(found.part("rows.0")["x"], torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"no part 'rows.2', only rows.0, rows.1"):
        found.part("rows.2")
    for name in ("../evil", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="part's name"):
            checkpoint.write_part(building, name, {})


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="negative"):
        checkpoint.save(tmp_path, -1, {})
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.save(tmp_path, 1, {}, keep=0)
    with pytest.raises(ValueError, match="w is a list"):
        checkpoint.save(tmp_path, 1, {"w": [1]})  # type: ignore[dict-item]


# --- the optimizer ----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-5, betas=(0.8, 0.99)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1 + 0.2, amsgrad=True),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.03)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "adafactor": torch.optim.Adafactor,
}


def grouped(module: nn.Module, backwards: bool = False) -> list[dict[str, Any]]:
    """Biases without weight decay, the usual second group; parameters in another order if asked."""
    named = list(module.named_parameters())[:: -1 if backwards else 1]
    return [
        {"params": [p for n, p in named if "weight" in n], "weight_decay": 0.1},
        {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_continues_bit_by_bit(kind: str, tmp_path: Path) -> None:
    module = network()
    optimizer = OPTIMIZERS[kind](grouped(module))
    train(module, optimizer, range(3))
    state = checkpoint.optimizer_to_tensors(optimizer, module.named_parameters())
    checkpoint.save(tmp_path, 3, module.state_dict(), state)

    restored = network(seed=9)
    continued = OPTIMIZERS[kind](grouped(restored, backwards=True))
    train(restored, continued, range(5, 6))  # state that has to go
    for group in continued.param_groups:
        group["lr"] = 77.0
    found = quietly(tmp_path)
    assert found is not None
    assert found.optimizer is not None
    restored.load_state_dict(found.model)
    checkpoint.tensors_to_optimizer(found.optimizer, continued, dict(restored.named_parameters()))
    again = checkpoint.optimizer_to_tensors(continued, restored.named_parameters())
    assert same(again.tensors, state.tensors)
    assert again.scalars == state.scalars
    for group, other in zip(optimizer.param_groups, continued.param_groups, strict=True):
        assert {k: (type(v), v) for k, v in group.items() if k != "params"} == {
            k: (type(v), v) for k, v in other.items() if k != "params"
        }
    train(module, optimizer, range(3, 6))
    train(restored, continued, range(3, 6))
    assert same(restored.state_dict(), module.state_dict())


def test_an_optimizer_that_does_not_fit_is_refused_unchanged() -> None:
    module = network()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer, range(1))
    state = checkpoint.optimizer_to_tensors(optimizer, module.named_parameters())
    fewer = torch.optim.Adam(list(module.parameters())[:-1])
    with pytest.raises(ValueError, match=r"parameters differ, the first is 3\.bias"):
        checkpoint.tensors_to_optimizer(state, fewer, module.named_parameters())
    with pytest.raises(ValueError, match="groups differ"):
        checkpoint.tensors_to_optimizer(state, torch.optim.Adam(grouped(module)), module.named_parameters())
    with pytest.raises(ValueError, match="6 of 6 parameters in group 0 have no name"):
        checkpoint.optimizer_to_tensors(optimizer, network().named_parameters())
    wide = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    untouched = torch.optim.Adam(wide.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=r"0\.weight\.exp_avg has shape \(8, 4\), its parameter \(9, 4\)"):
        checkpoint.tensors_to_optimizer(state, untouched, wide.named_parameters())
    assert not untouched.state
    assert untouched.param_groups[0]["lr"] == 0.5


# --- retention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    for i, step in enumerate((1, 5, 30, 200, 1000)):
        write(tmp_path, step, keep)
        expected = [1, 5, 30, 200, 1000][max(0, i + 1 - keep) : i + 1]
        assert sorted(int(p.name) for p in tmp_path.iterdir() if p.is_dir()) == expected
        assert whole(quietly(tmp_path), step)


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "2" / "manifest.json").unlink()
    write(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["1", "3", "latest"]


def test_strangers_are_left_alone_and_remains_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "007").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".5.tmp" / "parts").mkdir(parents=True)
    (tmp_path / ".latest.0123.tmp").write_text("5")
    write(tmp_path, 6)
    assert sorted(os.listdir(tmp_path)) == ["007", "6", "best", "latest", "notes.txt"]


def test_the_same_step_again(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    before = (tmp_path / "2" / "model.safetensors").stat()
    write(tmp_path, 2)
    assert (tmp_path / "2" / "model.safetensors").stat().st_ino == before.st_ino  # equal: kept
    write(tmp_path, 2, seed=77)
    assert whole(quietly(tmp_path), 2, seed=77)  # another: replaced
    (tmp_path / "2" / "state.json").write_bytes(b"{}")
    write(tmp_path, 2)
    assert whole(quietly(tmp_path), 2)  # damaged: replaced
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "latest"]


# --- damage -----------------------------------------------------------------------------------------------------


def damages(root: Path, older: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """100 ways to damage a checkpoint, over all of its files."""
    generator = random.Random(0)
    files = sorted(p for p in root.rglob("*") if p.is_file())

    def flip(path: Path, bit: int) -> Callable[[], Any]:
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        return lambda: path.write_bytes(content)

    for i in range(60):
        path = files[i % len(files)]
        bit = generator.randrange(8 * path.stat().st_size)
        yield f"bit {bit} of {path.name}", flip(path, bit)
    for i in range(25):
        path = files[i % len(files)]
        length = generator.randrange(path.stat().st_size)
        yield f"{path.name} cut to {length}", lambda p=path, n=length: os.truncate(p, n)
    for path in files:
        yield f"no {path.name}", path.unlink
        yield f"longer {path.name}", lambda p=path: p.write_bytes(p.read_bytes() + b"\0")
        other = older / path.relative_to(root)
        yield f"another's {path.name}", lambda p=path, o=other: shutil.copy(o, p)


def test_100_of_100_damaged_checkpoints_are_noticed(tmp_path: Path) -> None:
    """Another's manifest.json alone is damage too: lengths are equal, so only digests can tell."""
    template, root = tmp_path / "template", tmp_path / "checkpoints"
    write(template, 10, seed=1)
    write(template, 20)
    shutil.copytree(template, root)
    noticed = 0
    for what, damage in damages(root / "20", root / "10"):
        shutil.rmtree(root)
        shutil.copytree(template, root)
        damage()
        with pytest.warns(CheckpointWarning) as caught:
            found = checkpoint.load_latest(root)
        assert whole(found, 10, seed=1), what
        text = str(caught[0].message)
        assert str(root / "20") in text, what
        assert f"Using {root / '10'}" in text, what
        noticed += 1
    assert noticed == 100


@pytest.mark.parametrize(
    ("text", "step", "words"),
    [
        (b"10\n", 10, "there are newer: \\[20\\]"),
        (b"30\n", 20, "names step 30, which is not there"),
        (b"020\n", 20, "latest is damaged"),
        (b"2", 20, "latest is damaged"),
        (b"", 20, "latest is damaged"),
        (b"\xff" * 100, 20, "latest is damaged"),
        (None, 20, "latest cannot be read"),
    ],
    ids=range(7),
)
def test_a_wrong_pointer_is_said(text: bytes | None, step: int, words: str, tmp_path: Path) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    (tmp_path / "latest").unlink()
    if text is not None:
        (tmp_path / "latest").write_bytes(text)
    with pytest.warns(CheckpointWarning, match=words):
        found = checkpoint.load_latest(tmp_path)
    assert whole(found, step)


def test_when_none_is_whole_it_does_not_start_anew_silently(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    for step in (1, 2):
        os.truncate(tmp_path / str(step) / "model.safetensors", 9)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*/2 is damaged: model.*/1 is damaged"):
        checkpoint.load_latest(tmp_path)
    with pytest.raises(CheckpointError, match=r"incomplete: it has no manifest.json"):
        checkpoint.load(tmp_path / "3")


def forge(root: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint with a manifest that vouches for it."""
    (root / name).write_bytes(content)
    step = json.loads((root / "manifest.json").read_bytes())["step"]
    (root / "manifest.json").write_bytes(manifest.manifest_of(root, step))


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "latest"]


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_not_loaded_even_with_valid_checksums(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    root = tmp_path / "checkpoints"
    write(root, 1)
    payload = pickle.dumps(Canary(canary))
    if name in ("manifest.json", "latest"):
        (root / "1" / name if name != "latest" else root / name).write_bytes(payload)
    else:
        forge(root / "1", name, payload)
    if name == "latest":
        with pytest.warns(CheckpointWarning, match="damaged"):
            checkpoint.load_latest(root)
    else:
        with pytest.raises(CheckpointError, match=r"/1 (cannot be read|is damaged)"):
            checkpoint.load_latest(root)
    assert not canary.exists()
    pickle.loads(payload)  # the control: the canary does sing
    assert canary.exists()


def test_a_manifest_reaches_nothing_outside_its_directory(tmp_path: Path) -> None:
    root = tmp_path / "1"
    write(tmp_path, 1)
    honest = json.loads((root / "manifest.json").read_bytes())
    del honest["sha256"]
    for name in ("../secret", "/etc/passwd", "parts/../../secret", "parts/a/b", ".."):
        forged = {**honest, "files": {**honest["files"], name: {"bytes": 1, "sha256": "0" * 64}}}
        (root / "manifest.json").write_bytes(manifest._signed(forged))
        with pytest.raises(CheckpointError, match="not as it was written"):
            checkpoint.load(root)
    (root / "manifest.json").write_bytes(manifest._signed(honest))
    assert whole(checkpoint.load(root), 1)
    content = (root / "model.safetensors").read_bytes()
    (tmp_path / "elsewhere").write_bytes(content)
    (root / "model.safetensors").unlink()
    (root / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        checkpoint.load(root)


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "FORMAT", 2)
    monkeypatch.setattr(writing, "FORMAT", 2)
    write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2; this version reads 1"):
        checkpoint.load(tmp_path / "1")


# --- a full or forbidden disk -----------------------------------------------------------------------------------

CALLS = {"write": os, "fsync": os, "rename": os, "replace": os, "mkdir": os, "save_file": writing}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", CALLS)
def test_any_failing_call_is_explained_and_the_last_good_one_stays(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each occurrence of the call in a save fails in turn, until a save gets through."""
    write(tmp_path, 1, keep=1)
    real = getattr(CALLS[call], call)
    for nth in range(100):
        left = [nth]

        def failing(*arguments: Any, left: list[int] = left, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        monkeypatch.setattr(CALLS[call], call, failing)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)  # an old one that cannot be removed
                write(tmp_path, 2, keep=1)
        except CheckpointError as error:
            text = str(error)
            assert "step 2" in text
            assert str(tmp_path) in text
            assert os.strerror(number) in text
            assert {errno.ENOSPC: "free some space", errno.EACCES: "writable", errno.EIO: "check"}[number] in text
        finally:
            monkeypatch.undo()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            found = checkpoint.load_latest(tmp_path)
        assert whole(found, 1) or whole(found, 2)
        assert not [n for n in os.listdir(tmp_path) if n.startswith(".2")]
        if left[0] >= 0:
            break
    assert nth > 0
    assert whole(quietly(tmp_path), 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("mounting a small disk needs more rights")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=20)


def test_a_disk_that_is_really_full_or_read_only(small_disk: Path) -> None:
    write(small_disk, 1)
    with pytest.raises(CheckpointError, match="No space left on device; free some space"):
        checkpoint.save(small_disk, 2, {"w": torch.zeros(100_000)})
    assert whole(quietly(small_disk), 1)
    assert sorted(os.listdir(small_disk)) == ["1", "latest"]
    write(small_disk, 2)
    assert whole(quietly(small_disk), 2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=20)
    with pytest.raises(CheckpointError, match="Read-only file system; choose a directory"):
        write(small_disk, 3)
    assert whole(quietly(small_disk), 2)


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        write(tmp_path / "file", 1)
    assert save_file is writing.save_file
