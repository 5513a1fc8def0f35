"""The packaged models: the conversions themselves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from examples.packaged import NAMES, __main__, models
from tests.conftest import build_model

gguf = pytest.importorskip("gguf")


def test_without_a_name_it_lists_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["packaged"])
    assert __main__.main() == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and text in out for name, text in NAMES.items())


@pytest.mark.parametrize("quantization", ["F32", "Q4_1"])
def test_converted_folder_has_the_weights_of_the_gguf(tmp_path, tiny_tokenizer, quantization):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.grid.files import KINDS, write_gguf

    base = build_model(len(tiny_tokenizer), tie_word_embeddings=True)
    weights = {name: one for name, one in base.state_dict().items() if name != "lm_head.weight"}
    written = SimpleNamespace(config=base.config, state_dict=lambda: weights)
    path = write_gguf(tmp_path / "tiny.gguf", written, tiny_tokenizer, quantization)
    models.convert_gguf([path], tmp_path / "model")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, weight in weights.items():
        if weight.ndim == 2 and "embed" not in name:
            packed = gguf.quants.quantize(weight.numpy(), KINDS[quantization])
            weight = torch.from_numpy(gguf.quants.dequantize(packed, KINDS[quantization]))
        assert torch.equal(model.state_dict()[name], weight.bfloat16()), name

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(chat) == tiny_tokenizer.apply_chat_template(chat)


def tiny_dino():
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = Dinov2Config(**sizes, patch_size=4, image_size=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
        for parameter in model.parameters():  # no zeros or ones that could hide a mistake
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def write_onnx(model, path):
    """Write a model's weights as the package has them: products without names, transposed."""
    onnx = pytest.importorskip("onnx")
    from onnx.helper import make_graph, make_model, make_node
    from onnx.numpy_helper import from_array

    saved, nodes = {}, []
    for number, (name, weight) in enumerate(sorted(model.state_dict().items())):
        array = weight.numpy()
        layer, _, kind = name.rpartition(".")
        if name == "embeddings.position_embeddings":
            saved[models.CLASS_POSITION] = array[:, :1]
            saved[models.PATCH_POSITIONS] = array[:, 1:]
        elif name == "embeddings.mask_token":
            continue
        elif kind == "weight" and array.ndim == 2:
            saved[f"onnx::MatMul_{number}"] = array.T
            node = f"/backbone/{layer.replace('.', '/')}/MatMul".replace("layer/", "layer.")
            inputs = ["x", f"onnx::MatMul_{number}"]
            nodes.append(make_node("MatMul", inputs, ["y"], name=node))
        else:
            saved[f"backbone.{name}"] = array
    last = "decoder.final_conv.weight"
    saved[last] = np.ones((1, 4), np.float32)
    nodes.append(make_node("MatMul", ["x", last], ["y"], name="/head/MatMul"))
    tensors = [from_array(np.ascontiguousarray(a), name) for name, a in saved.items()]
    onnx.save(make_model(make_graph(nodes, "g", [], [], tensors)), path)
    return path


def test_dino_folder_computes_what_the_graph_held(tmp_path):
    model = tiny_dino()
    (tmp_path / "out").mkdir()
    models.convert_dino([write_onnx(model, tmp_path / "model.onnx")], tmp_path / "out")
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size["height"] == 224
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out", num_labels=2)
    loaded = loaded.eval().dinov2
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        ours, theirs = (m(pixel_values=pixels).last_hidden_state for m in (loaded, model))
    assert torch.equal(ours, theirs)


def test_efficientnet_folder_has_the_weights_of_the_file(tmp_path):
    """Random weights under the package's names, in its order."""
    timm = pytest.importorskip("timm")
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"_{name}": torch.rand(value.shape, generator=generator).to(value.dtype)
        for name, value in names.items()
    }
    torch.save(weights, tmp_path / "weights.pth")
    models.convert_efficientnet([tmp_path / "weights.pth"], tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).data_config["mean"] == (0.5, 0.5, 0.5)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.id2label[1] == "goldfish, Carassius auratus"
    model = model.timm_model
    for (name, loaded), given in zip(model.state_dict().items(), weights.values(), strict=True):
        assert torch.equal(loaded, given), name
