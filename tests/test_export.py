"""Encoders out of a run: loaded in Python, exported for other libraries, and features of images as files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision import models

import rkdo_dist
from rkdo_dist.evaluate.evaluation import BLOCK
from tests.jobs import command, on_ranks
from tests.test_backbones import hub

SIZE = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A short run of a torchvision backbone, evaluated."""
    path = tmp_path_factory.mktemp("exported") / "run"
    trained(path, digits, "encoder.backbone=shufflenet_v2_x0_5", "evaluate.at_end=true")
    return path


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run of a backbone that no library has."""
    path = tmp_path_factory.mktemp("small") / "run"
    channels = ("views.mean=[0.4,0.5,0.6]", "views.std=[0.2,0.3,0.4]")
    trained(path, digits, "encoder.backbone=cifar_resnet8", "data.image_size=null", *channels)
    return path


def trained(path: Path, digits: Path, *changes: str) -> None:
    config = path.parent / f"{path.name}.yaml"
    config.write_text(
        "encoder: {embedding_dim: 8}\ntrain: {global_batch: 16, micro_batch: 8, max_steps: 2}\n"
        f"data: {{workers: 0, image_size: {SIZE}}}\nevaluate: {{protocol: paper, at_end: false}}\n"
    )
    code, text = command(["train", str(config), f"data.source={digits}", f"run.dir={path}", *changes])
    assert code == 0, text


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of pictures of several modes and sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    for k, mode in enumerate(("RGB", "L", "RGBA", "CMYK", "P", "RGB", "L")):
        pixels = draws.integers(0, 256, (20 + 9 * k, 61 - 5 * k, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(mode)
        image.save(folder / (f"{k}.jpg" if mode == "CMYK" else f"{k}.png"))
    return folder


def of(encoder: Any, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.stack([encoder.transform(Image.open(path)) for path in sorted(folder.iterdir())])
    with torch.no_grad():
        return encoder.features(images)


def refused(arguments: list[str], *words: str) -> None:
    code, text = command(arguments)
    assert code == 2, text
    assert "Traceback" not in text
    for word in words:
        assert word in " ".join(text.split()), text


# --- in Python --------------------------------------------------------------------------------------------------


def test_a_run_is_loaded_with_its_weights_and_transform(run: Path, pictures: Path) -> None:
    encoder = rkdo_dist.load_encoder(run)
    assert not encoder.training
    saved = load_file(run / "checkpoints" / "2" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in encoder.state_dict().items())
    features, embeddings = of(encoder, pictures)
    assert features.shape == (7, 1024)
    assert embeddings.shape == (7, 8)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))
    grey = Image.new("I;16", (50, 40), 0xFFFF)
    assert torch.equal(encoder.transform(grey), torch.ones(3, SIZE, SIZE))  # (1 - 0.5) / 0.5
    again = rkdo_dist.load_encoder(run / "checkpoints" / "2")
    assert torch.equal(of(again, pictures)[1], embeddings)


def test_the_size_of_images_is_known_without_the_data(small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^  source: .*$", "  source: gone", settings))
    assert rkdo_dist.load_encoder(run).transform.size == 8


def test_mean_and_std_of_each_channel_go_with_the_encoder(small_run: Path, pictures: Path, tmp_path: Path) -> None:
    encoder = rkdo_dist.load_encoder(small_run)
    encoder.save_pretrained(tmp_path / "saved")
    images = torch.full((1, 3, 8, 8), 51, dtype=torch.uint8)  # 0.2
    right = (0.2 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.4])
    for one in (encoder, rkdo_dist.load_encoder(tmp_path / "saved")):
        assert torch.allclose(one.transform.plain(images)[0, :, 0, 0], right, atol=1e-6)
    assert "mean [0.4, 0.5, 0.6], std [0.2, 0.3, 0.4]" in (tmp_path / "saved" / "README.md").read_text()


def test_loading_draws_nothing_from_the_callers_generator(run: Path) -> None:
    torch.manual_seed(1)
    rkdo_dist.load_encoder(run)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))


def test_saved_and_loaded_again(run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = rkdo_dist.load_encoder(run)
    encoder.save_pretrained(tmp_path / "saved")
    expected = of(encoder, pictures)
    files = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    hub(tmp_path / "hub", "someone", "net", files, monkeypatch)
    for found in (
        rkdo_dist.PretrainedEncoder.from_pretrained(tmp_path / "saved"),
        rkdo_dist.PretrainedEncoder.from_pretrained("someone/net"),
        rkdo_dist.load_encoder("hf://someone/net"),
        rkdo_dist.load_encoder(tmp_path / "saved" / "model.safetensors"),
    ):
        assert all(torch.equal(a, b) for a, b in zip(of(found, pictures), expected, strict=True))
    with pytest.raises(ValueError, match="cannot push to someone/net"):  # no network
        encoder.push_to_hub("someone/net")


def test_code_is_not_imported_because_a_file_names_it(tmp_path: Path, digits: Path) -> None:
    path = tmp_path / "run"
    trained(path, digits, "encoder.backbone=tests.nets:Pooled")
    with pytest.raises(ValueError, match=r"tests.nets:Pooled, which is imported only where you name it"):
        rkdo_dist.load_encoder(path)
    encoder = rkdo_dist.load_encoder(path, backbone="tests.nets:Pooled")
    assert encoder.feature_dim == 12
    out = str(tmp_path / "e.safetensors")
    refused(["export", str(path), "--format", "safetensors", "--out", out], "encoder.backbone=tests.nets:Pooled")
    code, text = command(
        ["export", str(path), "encoder.backbone=tests.nets:Pooled", "--format", "safetensors", "--out", out]
    )
    assert code == 0, text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "not a run, a checkpoint"),
        ({"config.json": b"{"}, r"config.json\) is damaged: it is not a JSON object"),
        ({"config.json": b'{"library": "other"}'}, "not saved by rkdo_dist"),
        ({"config.yaml": b"{}"}, "no checkpoint yet"),
        ({"config.json": b'{"library": "rkdo_dist", "encoder": {"backbone": "resnet81"}, "transform": {}}'}, "."),
    ],
)
def test_what_is_no_encoder_is_said(tmp_path: Path, content: dict[str, bytes] | None, words: str) -> None:
    for name, text in (content or {}).items():
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=words):
        rkdo_dist.load_encoder(tmp_path)


# --- for other libraries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_torchvision_takes_the_weights_as_they_are(run: Path, pictures: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"net.{ending}"
    code, text = command(["export", str(run), "--format", "torchvision", "--out", str(out)])
    assert code == 0, text
    state = load_file(out) if ending == "safetensors" else torch.load(out, weights_only=True)
    model = models.shufflenet_v2_x0_5(weights=None)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    model.fc = torch.nn.Identity()
    encoder = rkdo_dist.load_encoder(run)
    images = torch.stack([encoder.transform(Image.open(path)) for path in sorted(pictures.iterdir())])
    with torch.no_grad():
        assert torch.equal(model.eval()(images), encoder.features(images)[0])
    about = json.loads((tmp_path / f"net.{ending}.json").read_text())
    assert about["transform"]["size"] == SIZE
    card = (tmp_path / f"net.{ending}.md").read_text()
    scores = json.loads((run / "evaluations" / "2.json").read_text())
    assert f"linear_accuracy: {scores['linear_accuracy']:.4f}" in card
    assert '"objective": "rkdo"' in card


def test_resnets_go_to_timm_and_back(tmp_path: Path, digits: Path) -> None:
    timm = pytest.importorskip("timm")
    for number, name in enumerate(("resnet18", "timm/resnet18")):
        path = tmp_path / str(number)
        trained(path, digits, f"encoder.backbone={name}", "train.max_steps=1")
        encoder, images = rkdo_dist.load_encoder(path), torch.randn(2, 3, SIZE, SIZE)
        for kind, made in (("timm", timm.create_model), ("torchvision", models.get_model)):
            out = tmp_path / f"{number}-{kind}.safetensors"
            code, text = command(["export", str(path), "--format", kind, "--out", str(out)])
            assert code == 0, text
            model = made("resnet18")
            missing, unexpected = model.load_state_dict(load_file(out), strict=False)
            assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
            model.fc = torch.nn.Identity()
            with torch.no_grad():
                torch.testing.assert_close(model.eval()(images), encoder.features(images)[0], rtol=0, atol=1e-5)


def test_onnx_gives_the_same_for_any_number_of_images(small_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    out = tmp_path / "net.onnx"
    code, text = command(["export", str(small_run), "--format", "onnx", "--out", str(out)])
    assert code == 0, text
    from onnx.reference import ReferenceEvaluator

    encoder, graph = rkdo_dist.load_encoder(small_run), ReferenceEvaluator(str(out))
    for n in (1, 3):
        images = torch.randn(n, 3, 8, 8)
        with torch.no_grad():
            expected = encoder.features(images)
        found = graph.run(["features", "embeddings"], {"images": images.numpy()})
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b.numpy(), atol=1e-5)


def test_a_file_that_is_there_stays(run: Path, tmp_path: Path) -> None:
    for name in ("e.safetensors", "e.safetensors.md"):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / name).write_text("mine")
        arguments = ["export", str(run), "--format", "safetensors", "--out", str(tmp_path / "e.safetensors")]
        refused(arguments, name, "--force")
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine")]
        assert command([*arguments, "--force"])[0] == 0
    assert rkdo_dist.load_encoder(tmp_path / "e.safetensors").about["step"] == 2


def test_what_cannot_be_exported_is_said_and_nothing_written(run: Path, small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for source, kind, name, words in (
        (run, "torchvision", "e.onnx", ".pth or .pt or .safetensors"),
        (tmp_path, "torchvision", "e.pth", "not a run"),
        (small_run, "torchvision", "e.pth", "unknown backbone 'cifar_resnet8'"),
    ):
        refused(["export", str(source), "--format", kind, "--out", str(out / name)], words)
    assert not list(out.iterdir())


# --- features ---------------------------------------------------------------------------------------------------


def test_features_of_a_folder_with_keys(run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npz"
    code, text = command(["embed", str(run), str(pictures), "--out", str(out)])
    assert code == 0, text
    found = np.load(out)
    features, embeddings = of(rkdo_dist.load_encoder(run), pictures)
    order = [sorted(p.stem for p in pictures.iterdir()).index(Path(key).stem) for key in found["keys"].tolist()]
    assert sorted(order) == list(range(7))
    np.testing.assert_allclose(found["features"], features[order].numpy(), atol=1e-5)
    np.testing.assert_allclose(found["embeddings"], embeddings[order].numpy(), atol=1e-5)
    assert "labels" not in found
    refused(["embed", str(run), str(pictures), "--out", str(out)], "f.npz is there already", "--force")


def test_features_are_the_same_on_any_ranks(small_run: Path, digits: Path, tmp_path: Path) -> None:
    """Each sample once, in the order of the index: several blocks, the last one smaller."""
    code, text = command(["embed", str(small_run), str(digits), "--out", str(tmp_path / "1.npz")])
    assert code == 0, text
    answers = on_ranks(2, ["embed", str(small_run), str(digits), "--out", str(tmp_path / "2.npz")])
    assert [code for code, _ in answers] == [0, 0], answers
    one, two = np.load(tmp_path / "1.npz"), np.load(tmp_path / "2.npz")
    assert sorted(one) == sorted(two) == ["classes", "embeddings", "features", "keys", "labels", "splits"]
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert len(one["keys"]) == 1797 > 7 * BLOCK
    assert len({*zip(one["splits"].tolist(), one["keys"].tolist(), strict=True)}) == 1797
    assert set(one["labels"].tolist()) == set(range(10))


def test_files_that_are_no_pictures(small_run: Path, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(pictures, folder)
    (folder / "broken.png").write_bytes(b"not a picture")
    arguments = ["embed", str(small_run), str(folder), "--out", str(tmp_path / "f.npz")]
    refused(arguments, "broken.png")
    assert not (tmp_path / "f.npz").exists()
    code, text = command([*arguments, "--on-corrupt", "skip"])
    assert code == 0, text
    assert len(np.load(tmp_path / "f.npz")["keys"]) == 7


def test_other_files_and_one_split(run: Path, digits: Path, tmp_path: Path) -> None:
    common = ["embed", str(run), str(digits), "--split", "test", "--what", "embeddings", "--out"]
    assert command([*common, str(tmp_path / "e.npz")])[0] == 0
    expected = np.load(tmp_path / "e.npz")
    assert "features" not in expected
    assert command([*common, str(tmp_path / "e.safetensors")])[0] == 0
    assert np.array_equal(load_file(tmp_path / "e.safetensors")["embeddings"].numpy(), expected["embeddings"])
    with safe_open(tmp_path / "e.safetensors", "np") as file:
        assert json.loads(file.metadata()["keys"]) == expected["keys"].tolist()


def test_parquet(run: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    code, text = command(["embed", str(run), str(pictures), "--out", str(tmp_path / "f.parquet")])
    assert code == 0, text
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["key", "split", "features", "embeddings"]
    assert command(["embed", str(run), str(pictures), "--out", str(tmp_path / "f.npz")])[0] == 0
    expected = np.load(tmp_path / "f.npz")
    assert table["key"].to_pylist() == expected["keys"].tolist()
    assert np.array_equal(np.array(table["features"].to_pylist(), dtype=np.float32), expected["features"])


def test_mistakes_about_features_end_before_anything_is_computed(run: Path, pictures: Path, tmp_path: Path) -> None:
    start = ["embed", str(run), str(pictures), "--out"]
    refused([*start, str(tmp_path / "f.csv")], "must end in .npz, .parquet, .safetensors")
    refused([*start, str(tmp_path / "f.npz"), "--split", "tset"], "no split 'tset'")
    refused([*start, str(tmp_path / "f.npz"), "train.epochs=2"], "train.epochs cannot be set here")
    for code, text in on_ranks(2, ["embed", str(run), str(tmp_path / "none"), "--out", str(tmp_path / "f.npz")]):
        assert code == 2, text
    assert not list(tmp_path.iterdir())
