"""The packaged models: the conversions themselves."""

import json

import numpy as np
import pytest
import torch

from examples.packaged import models
from pacatune.training.image.model import ImageBase

gguf = pytest.importorskip("gguf")

CONFIG = {"hidden": 32, "ff": 64, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 300}


def write_gguf(path, tokenizer, quantization):
    """Write a tiny Llama GGUF with random weights; return the weights that it stands for."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": CONFIG["layers"], "embedding_length": CONFIG["hidden"]}
    sizes |= {"head_count": CONFIG["heads"], "head_count_kv": CONFIG["kv_heads"]}
    sizes |= {"feed_forward_length": CONFIG["ff"], "vocab_size": len(tokenizer)}
    more = {"context_length": 256, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4}
    for name, value in (sizes | more).items():
        getattr(writer, f"add_{name}")(value)
    _write_tokenizer(writer, tokenizer)
    kept = {}

    def add(name, *shape):
        values = rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            packed = gguf.quants.quantize(values, quantization)
            values = gguf.quants.dequantize(packed, quantization)
            writer.add_tensor(name, packed, raw_dtype=quantization)
        kept[name] = values

    hidden, ff = CONFIG["hidden"], CONFIG["ff"]
    kv = hidden * CONFIG["kv_heads"] // CONFIG["heads"]
    add("token_embd.weight", len(tokenizer), hidden)
    add("output_norm.weight", hidden)
    for i in range(CONFIG["layers"]):
        norms = dict.fromkeys(("attn_norm", "ffn_norm"), (hidden,))
        attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden)}
        attention = {f"attn_{name}": shape for name, shape in attention.items()}
        mlp = {"ffn_gate": (ff, hidden), "ffn_up": (ff, hidden), "ffn_down": (hidden, ff)}
        output = {"attn_output": (hidden, hidden)}
        for name, shape in (norms | attention | output | mlp).items():
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def _write_tokenizer(writer, tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    kinds = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


@pytest.mark.parametrize("quantization", ["F32", "Q4_1"])
def test_converted_folder_has_the_weights_of_the_gguf(tmp_path, tiny_tokenizer, quantization):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "tiny.gguf"
    kept = write_gguf(path, tiny_tokenizer, gguf.GGMLQuantizationType[quantization])
    models.convert_gguf([path], tmp_path / "model")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = model.state_dict()
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        assert torch.equal(state[ours], torch.from_numpy(kept[theirs]).bfloat16()), ours
    # GGUF keeps the rows of q and k in pairs for its rotary embedding; here they are in halves.
    q = torch.from_numpy(kept["blk.0.attn_q.weight"]).bfloat16()
    heads = CONFIG["heads"]
    unpaired = q.view(heads, -1, 2, q.shape[1]).transpose(1, 2).reshape_as(q)
    assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], unpaired)

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
    base = ImageBase(str(tmp_path / "out"), None, ["cat", "dog"], 12)
    assert base.size == 12
    loaded = base.load(torch.float32).eval().dinov2
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
    base = ImageBase(str(tmp_path), None, None, None)
    assert base.config.id2label[1] == "goldfish, Carassius auratus"
    assert tuple(base.processor.image_mean) == (0.5, 0.5, 0.5)
    model = base.load(torch.float32).timm_model
    for (name, loaded), given in zip(model.state_dict().items(), weights.values(), strict=True):
        assert torch.equal(loaded, given), name
