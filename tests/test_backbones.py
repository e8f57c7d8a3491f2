"""Backbones that users bring: by library, by import path, as a module, with weights of their own, partly frozen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from rkdo_dist.encoders import Encoder
from tests.jobs import command, fingerprint, metrics, on_ranks
from tests.nets import Pooled, tiny_vit
from tests.ranks import run_ranks
from tests.strategies import launched

SMALL = "cifar_resnet8"
VIT = ["encoder.backbone=tests.nets:tiny_vit", "data.image_size=16"]


def made(**arguments: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(**arguments)


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- names ------------------------------------------------------------------------------------------------------


def test_torchvision_may_be_said() -> None:
    assert same(made(backbone="torchvision/shufflenet_v2_x0_5"), made(backbone="shufflenet_v2_x0_5"))


def test_timm_without_its_classifier() -> None:
    timm = pytest.importorskip("timm")
    encoder = made(backbone="timm/test_vit", embedding_dim=8).eval()
    torch.manual_seed(0)
    reference = timm.create_model("test_vit", num_classes=0).eval()
    images = torch.randn(2, 3, 160, 160)
    features, embeddings = encoder.features(images)
    assert torch.equal(features, reference(images))
    assert features.shape == (2, encoder.feature_dim)
    assert embeddings.shape == (2, 8)


def test_a_module_and_an_import_path_are_the_same_backbone() -> None:
    torch.manual_seed(0)
    given = Encoder(backbone=Pooled())
    assert same(given, made(backbone="tests.nets:Pooled"))
    assert given.feature_dim == 12  # from one forward pass, which leaves no trace
    assert given.training
    assert given.backbone.norm.num_batches_tracked == 0


def test_a_declared_width_is_believed_and_checked() -> None:
    class Wrong(Pooled):
        feature_dim = 13

    encoder = Encoder(backbone=Wrong())
    assert encoder.feature_dim == 13
    with pytest.raises(ValueError, match=r"\(n, 13\).*\(1, 12\)"):
        encoder.check_image_size(8)


def test_modules_beside_the_user_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text("from tests.nets import Pooled as Mine\n")
    monkeypatch.chdir(tmp_path)
    assert Encoder(backbone="my_networks:Mine").feature_dim == 12


def test_heads_of_any_width_and_depth() -> None:
    def shapes(**arguments: Any) -> list[Any]:
        layers = made(backbone=SMALL, **arguments).head
        return [(m.in_features, m.out_features) if isinstance(m, nn.Linear) else type(m).__name__ for m in layers]

    assert same(made(backbone=SMALL), made(backbone=SMALL, head_depth=2, head_width=64))  # the named heads' own
    assert shapes(head_depth=1) == [(64, 64)]
    assert shapes(head_depth=3, head_width=96, embedding_dim=8, head="paper") == [
        (64, 96), "BatchNorm1d", "ReLU", (96, 96), "BatchNorm1d", "ReLU", (96, 8)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backbone": "torchvision/resnet81"}, ["resnet81", "resnet18"]),
        ({"backbone": "keras/resnet18"}, ["keras/resnet18", "timm/NAME"]),
        ({"backbone": "no_such_package.models:make"}, ["no_such_package", "cannot import"]),
        ({"backbone": "tests.nets:tiny_vti"}, ["tiny_vti", "did you mean tiny_vit"]),
        ({"backbone": "tests.nets:broken"}, ["calling it failed", "no such thing"]),
        ({"backbone": "tests.nets:number"}, ["int", "torch.nn.Module"]),
        ({"backbone": "tests.nets:unpooled"}, ["(n, f)", "(1, 4, 222, 222)"]),
        ({"backbone": "tests.nets:Pooled", "stem": "cifar"}, ["ResNets only"]),
        ({"backbone": SMALL, "head_depth": 0}, ["head_depth", "0"]),
        ({"backbone": SMALL, "head_width": 0}, ["head_width", "0"]),
        ({"backbone": SMALL, "freeze": 9}, ["freeze=9", "5 parts"]),
        ({"backbone": "resnet18", "freeze": "layer22"}, ["layer22", "did you mean layer2"]),
        ({"backbone": SMALL, "weights": "nowhere.safetensors"}, ["nowhere.safetensors", "there are no weights"]),
        ({"backbone": SMALL, "weights": "DEFAULT"}, ["cifar_resnet8 has no pretrained weights"]),
        ({"backbone": SMALL, "weights": "hf://alone"}, ["hf://alone", "hf://OWNER/NAME"]),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        Encoder(**arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_timm_names_are_never_fetched_or_read_from_paths() -> None:
    pytest.importorskip("timm")
    for name, words in (
        ("resnet81", "did you mean resnet"),
        ("hf-hub:owner/name", "unknown"),
        ("test_vit.x", "test_vit"),
    ):
        with pytest.raises(ValueError, match=words):
            Encoder(backbone=f"timm/{name}")


def test_images_of_another_size_are_refused() -> None:
    encoder = Encoder(backbone=tiny_vit())
    encoder.check_image_size(16)
    with pytest.raises(ValueError, match=r"cannot take images of 12 x 12.*data.image_size"):
        encoder.check_image_size(12)


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other() -> dict[str, torch.Tensor]:
    """Weights of a shufflenet with its classifier, as torchvision would give them."""
    torch.manual_seed(7)
    return models.shufflenet_v2_x0_5(weights=None).state_dict()


SHUFFLE = "shufflenet_v2_x0_5"


def saved(state: dict[str, Any], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("form", ["plain.safetensors", "plain.pth", "nested.pt", "ddp.pt", "encoder.safetensors"])
def test_weights_from_files_of_every_form(form: str, other: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state: dict[str, Any] = other
    if form == "nested.pt":
        state = {"epoch": 3, "state_dict": other}
    elif form == "ddp.pt":
        state = {f"module.{k}": v for k, v in other.items()}
    elif form == "encoder.safetensors":  # a checkpoint of ours
        state = {f"backbone.{k}": v for k, v in other.items() if not k.startswith("fc.")} | {
            "head.0.weight": torch.ones(1)
        }
    encoder = made(backbone=SHUFFLE, weights=saved(state, tmp_path / form))
    own = encoder.backbone.state_dict()
    assert all(torch.equal(own[k], other[k]) for k in own)
    assert same(encoder.head, made(backbone=SHUFFLE).head)  # the head is drawn as without weights


def test_default_weights_are_the_librarys(
    other: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From torch's cache, as if they had been downloaded before."""
    url = models.get_model_weights(SHUFFLE)["DEFAULT"].url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(other, tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    own = made(backbone=SHUFFLE, weights="DEFAULT").backbone.state_dict()
    assert all(torch.equal(own[k], other[k]) for k in own)


def hub(home: Path, owner: str, name: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the Hub's cache, as an earlier download leaves it, and no network."""
    hub_constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    root = home / f"models--{owner}--{name}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    for file, content in files.items():
        target = root / "snapshots" / ("0" * 40) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def test_weights_from_the_hub(other: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = Path(saved(other, tmp_path / "w.safetensors")).read_bytes()
    hub(tmp_path / "hub", "someone", "net", {"model.safetensors": content, "more/w.safetensors": content}, monkeypatch)
    for address in ("hf://someone/net", "hf://someone/net@main", "hf://someone/net/more/w.safetensors"):
        own = made(backbone=SHUFFLE, weights=address).backbone.state_dict()
        assert all(torch.equal(own[k], other[k]) for k in own)
    with pytest.raises(ValueError, match=r"cannot get model.safetensors of hf://someone/other"):
        made(backbone=SHUFFLE, weights="hf://someone/other")


def test_keys_that_do_not_fit_are_named(other: dict[str, torch.Tensor], tmp_path: Path) -> None:
    renamed = {k.replace("conv1.", "conv_1."): v for k, v in other.items()}
    with pytest.raises(ValueError) as caught:
        made(backbone=SHUFFLE, weights=saved(renamed, tmp_path / "renamed.pt"))
    for word in ("missing (conv1.0.weight", "unexpected (conv_1.0.weight", "'conv_1.0.weight' where 'conv1.0.weight'"):
        assert word in str(caught.value)
    other = dict(other)
    other["conv1.0.weight"] = torch.zeros(24, 3, 7, 7)
    with pytest.raises(ValueError, match=r"1 of another shape \(conv1.0.weight: \(24, 3, 7, 7\) in the file"):
        made(backbone=SHUFFLE, weights=saved(other, tmp_path / "shaped.pt"))


class Dangerous:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"x": Dangerous(tmp_path / "executed")}, tmp_path / "bad.pt")
    for name, content, words in (
        ("bad.pt", None, "Python objects besides tensors"),
        ("cut.safetensors", b"\x10\0\0", "cannot be read as weights"),
        ("cut.pt", b"PK\3\4 half", "cannot be read as weights|Python objects"),
        ("list.pt", [1, 2], "no state dict"),
        ("weights.npz", b"", ".safetensors, or torch files"),
    ):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=words):
            made(backbone=SMALL, weights=str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


# --- frozen parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freeze", "trained_first"),
    [
        (0, "backbone.conv1.weight"),
        (3, "backbone.layer2.0.conv1.weight"),
        ("layer1.0", "backbone.layer1.1.conv1.weight"),
        ("backbone", "head.0.weight"),
    ],
)
def test_everything_before_is_frozen(freeze: int | str, trained_first: str) -> None:
    encoder = made(backbone="resnet18", freeze=freeze).train()
    names = [n for n, _ in encoder.named_parameters()]
    assert [n for n, p in encoder.named_parameters() if p.requires_grad] == names[names.index(trained_first) :]
    for name, module in encoder.named_modules():  # batch norm of a frozen part does not follow the batch
        own = [p.requires_grad for p in module.parameters()]
        if own and not any(own):
            assert not module.training, name
    images = torch.randn(2, 3, 32, 32)
    before = {n: b.clone() for n, b in encoder.named_buffers()}
    encoder(images)
    moved = {n.rpartition(".")[0] for n, b in encoder.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {n for n, m in encoder.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}


def test_a_vits_tokens_and_positions_freeze_with_its_first_blocks() -> None:
    encoder = made(backbone="tests.nets:tiny_vit", freeze="encoder.layers.encoder_layer_0")
    trained = [n for n, p in encoder.backbone.named_parameters() if p.requires_grad]
    assert all("encoder_layer_1" in n or n.startswith("encoder.ln") for n in trained)
    assert len(trained) == 14


# --- in runs ----------------------------------------------------------------------------------------------------


def with_run(small: list[str], name: str, *changes: str) -> list[str]:
    run = Path(small[-1].removeprefix("run.dir=")).with_name(name)
    return [*small[:-1], "train.batches_per_epoch=4", "train.checkpoint_every=4", *changes, f"run.dir={run}"]


def run_of(arguments: list[str]) -> Path:
    return Path(arguments[-1].removeprefix("run.dir="))


def same_on_ranks(small: list[str], *changes: str, worlds: tuple[int, ...] = (2, 4)) -> None:
    alone = with_run(small, "alone", *changes)
    code, text = command(alone)
    assert code == 0, text
    for world in worlds:
        other = with_run(small, f"world{world}", *changes)
        answers = on_ranks(world, other)
        assert [code for code, _ in answers] == [0] * world, answers
        assert fingerprint(run_of(other), 4) == fingerprint(run_of(alone), 4)
        assert metrics(run_of(other)) == metrics(run_of(alone))


def test_a_vit_trains_to_the_same_bits_on_any_ranks(small: list[str]) -> None:
    same_on_ranks(small, *VIT)


def test_timms_vit_trains_to_the_same_bits_on_any_ranks(small: list[str]) -> None:
    pytest.importorskip("timm")
    same_on_ranks(
        small,
        "encoder.backbone=timm/test_vit",
        "data.image_size=160",
        "train.global_batch=8",
        "train.micro_batch=2",
        worlds=(2,),
    )


def test_frozen_weights_stay_and_a_stopped_run_goes_on(small: list[str], tmp_path: Path) -> None:
    torch.manual_seed(5)
    start = Encoder(backbone=SMALL, embedding_dim=16).backbone.state_dict()
    changes = [
        f"encoder.weights={saved(start, tmp_path / 'w.safetensors')}",
        "encoder.freeze=3",
        f"encoder.backbone={SMALL}",
    ]
    straight = with_run(small, "straight", *changes)
    code, text = command(straight)
    assert code == 0, text
    model = load_file(run_of(straight) / "checkpoints" / "4" / "model.safetensors")
    kept = {k for k, v in start.items() if torch.equal(model[f"backbone.{k}"], v)}
    assert kept == {k for k in start if re.match(r"[0-3]\.", k)}
    halves = with_run(small, "halves", *changes)
    assert command([*halves, "train.max_steps=2"])[0] == 0
    code, text = command([*halves, "run.resume=auto"])
    assert code == 0, text
    assert fingerprint(run_of(halves), 4) == fingerprint(run_of(straight), 4)


def sharded(rank: int, world: int, strategy: str, arguments: list[str]) -> tuple[int, str]:
    """A run as a launcher of this strategy starts it."""
    with launched(strategy):
        return command(arguments)


def test_frozen_weights_under_zero_are_those_of_one_process(small: list[str]) -> None:
    """Saved by stage 2, continued by stage 3, which shards the frozen ones too."""
    changes = [f"encoder.backbone={SMALL}", "encoder.freeze=3"]
    alone, zero = with_run(small, "alone", *changes), with_run(small, "zero", *changes, "run.reduction=fast")
    assert command(alone)[0] == 0
    for strategy, arguments in (("zero-2", [*zero, "train.max_steps=2"]), ("zero-3", [*zero, "run.resume=auto"])):
        answers = run_ranks(sharded, 2, strategy, arguments)
        assert [code for code, _ in answers] == [0, 0], answers
    torch.manual_seed(42)
    start = Encoder(backbone=SMALL, embedding_dim=16).state_dict()
    found, expected = (load_file(run_of(a) / "checkpoints" / "4" / "model.safetensors") for a in (zero, alone))
    for name, tensor in expected.items():
        frozen = re.match(r"backbone\.[0-3]\.", name) is not None
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0 if frozen else 1e-4)
        assert torch.equal(found[name], start[name]) == frozen or not tensor.is_floating_point(), name


def test_mistakes_end_the_run_before_its_first_step_on_every_rank(small: list[str]) -> None:
    for change, word in (
        (["encoder.backbone=tests.nets:tiny_vit", "data.image_size=8"], "cannot take images of 8 x 8"),
        (["encoder.backbone=tests.nets:tiny_vti"], "did you mean tiny_vit"),
        (["encoder.weights=nowhere.pt"], "nowhere.pt"),
        (["encoder.freeze=nothing"], "no such part"),
        (["encoder.backbone=tests.nets:of_rank"], "the encoder's weights (digest)"),
    ):
        for code, text in on_ranks(2, [*small, *change], timeout=60):
            assert code == 2, text
            assert word in " ".join(text.split()), text
    assert not (run_of(small) / "metrics.jsonl").exists()


def test_code_that_a_run_names_is_imported_only_where_the_user_names_it(small: list[str]) -> None:
    code, text = command([*with_run(small, "own", "encoder.backbone=tests.nets:Pooled")])
    assert code == 0, text
    run = run_of(small).with_name("own")
    code, text = command(["evaluate", str(run)])
    assert code == 2
    assert "add encoder.backbone=tests.nets:Pooled" in " ".join(text.split())
    code, text = command(["evaluate", str(run), "encoder.backbone=tests.nets:Pooled"])
    assert code == 0, text
    assert json.loads((run / "evaluations" / "4.json").read_text())["step"] == 4
