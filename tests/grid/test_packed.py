"""Training in the blocks of a file: the numbers of a dequantised model, bit for bit."""

import gc
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pacatune import PacaConfig, lean
from pacatune.adapters.base import load_base
from pacatune.cli import main
from pacatune.grid.decoding import decode
from pacatune.grid.layers import PackedLayer
from pacatune.grid.loading import NotPackableError
from pacatune.measure.counters import SavedBytes
from pacatune.pretrained import load_packed, load_weights
from tests.grid.conftest import build, digest, train_in
from tests.grid.test_formats import BLOCKS, reference, rows_of

FORMATS = [name for name in BLOCKS if name != "NVFP4"]  # which transformers does not dequantise


@pytest.fixture(scope="module")
def file_of(tmp_path_factory, tiny_tokenizer):
    """Return what makes the file of a small Llama in a format, embedding and head included."""
    from tests.grid.files import write_gguf

    files = {}

    def make(kind, tied=False):
        if (kind, tied) not in files:
            path = tmp_path_factory.mktemp("packed") / "base.gguf"
            sizes = {"hidden_size": 256, "intermediate_size": 256, "tie_word_embeddings": tied}
            model = build_model_of(tiny_tokenizer, **sizes)
            others = {"token_embd": kind, "output.weight": kind}
            files[kind, tied] = write_gguf(path, model, tiny_tokenizer, kind, others)
        return files[kind, tied]

    return make


def build_model_of(tokenizer, **sizes):
    from tests.conftest import build_model

    return build_model(len(tokenizer), **sizes)


def both(path, dtype=torch.bfloat16, kind=AutoModelForCausalLM):
    """The model dequantised, and in its blocks."""
    plain = load_weights(kind, str(path), dtype=dtype)
    return plain, load_packed(kind, str(path), dtype=dtype)


def train(base, config, level, steps, dtype=torch.bfloat16):
    """Return the losses of some steps of two micro-batches, and what was trained."""
    torch.manual_seed(0)
    model = get_peft_model(base, config).train()
    if level:
        lean.enable(model, level=level)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for step in range(steps):
        for micro in range(2):
            generator = torch.Generator().manual_seed(2 * step + micro)
            ids = torch.randint(base.config.vocab_size, (2, 12), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), trained


def assert_equal_training(plain, packed, level=0, steps=20, config=None, dtype=torch.bfloat16):
    config = config or PacaConfig(r=16, paca_alpha=16, task_type="CAUSAL_LM")
    expected, columns = train(plain, config, level, steps, dtype)
    losses, own = train(packed, config, level, steps, dtype)
    assert torch.equal(losses, expected)
    assert all(p.count_nonzero() for p in columns)
    assert all(torch.equal(a, b) for a, b in zip(own, columns, strict=True))
    assert len(own) == len(columns) > 0


@pytest.mark.parametrize("grid", BLOCKS.values(), ids=BLOCKS)
def test_blocks_are_decoded_to_the_values_of_the_package(grid):
    rows = rows_of(grid)
    assert torch.equal(decode(grid, rows), reference(grid, rows))


@pytest.mark.parametrize("kind", FORMATS)
def test_training_in_blocks_is_training_dequantised(kind, file_of):
    plain, packed = both(file_of(kind))
    layers = [layer for layer in packed.modules() if isinstance(layer, PackedLayer)]
    assert len(layers) == 2 * 7 + 2
    assert {layer.grid.name for layer in layers} == {kind}
    for name, weight in plain.named_parameters():
        module, _, own = name.rpartition(".")
        assert torch.equal(getattr(packed.get_submodule(module), own), weight), name
    assert_equal_training(plain, packed)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_lean_layers_compute_the_same(level, tied, file_of):
    plain, packed = both(file_of("Q4_1", tied))
    assert len({id(p) for p in packed.parameters() if p.dtype == torch.uint8}) == 16 - tied
    assert_equal_training(plain, packed, level, steps=3)


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Name in the file, and what differs; transformers takes 128 for the size of Qwen3's heads.
ARCHITECTURES = {
    "MistralConfig": ("llama", {"sliding_window": None}),
    "Qwen2Config": ("qwen2", {}),
    "Qwen3Config": ("qwen3", {"head_dim": 128}),
    "Gemma2Config": ("gemma2", {"head_dim": 32}),
    "Gemma3TextConfig": ("gemma3", {"head_dim": 32}),
    "Phi3Config": ("phi3", {}),
}


def model_of(name, tokenizer, **more):
    torch.manual_seed(0)
    config = getattr(transformers, name)(vocab_size=len(tokenizer), **SIZES | more)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, tmp_path, tiny_tokenizer):
    from tests.grid.files import write_gguf

    architecture, more = ARCHITECTURES[name]
    model = model_of(name, tiny_tokenizer, **more)
    others, path = {"token_embd": "Q8_0", "output.weight": "Q4_1"}, tmp_path / "base.gguf"
    write_gguf(path, model, tiny_tokenizer, "Q4_0", others, architecture)
    plain, packed = both(path)
    assert type(plain) is type(packed)
    matrices = [p for p in packed.parameters() if p.ndim > 1]
    assert {p.dtype for p in matrices} == {torch.uint8}
    assert_equal_training(plain, packed, steps=3)


def test_experts_are_refused(tmp_path, tiny_tokenizer):
    from tests.grid.files import write_gguf

    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 768,
    }  # of all, for transformers
    model = model_of("Qwen3MoeConfig", tiny_tokenizer, head_dim=128, **experts)
    path, others = tmp_path / "base.gguf", {"ffn_gate_inp": "F32"}
    write_gguf(path, model, tiny_tokenizer, "Q8_0", others, "qwen3moe")
    with pytest.raises(
        NotPackableError, match=r"experts.gate_up_proj' of .* matrices \(no experts\)"
    ):
        load_packed(AutoModelForCausalLM, str(path), dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"\(no experts\).*; the model is loaded in 16 bits"):
        model = load_base(str(path), task_type="CAUSAL_LM", dtype="bfloat16", packed=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_float32_with_autocast_and_without(file_of):
    plain, packed = both(file_of("Q6_K"), torch.float32)
    assert_equal_training(plain, packed, steps=3, dtype=torch.float32)
    plain, packed = both(file_of("Q6_K"), torch.float32)
    assert_equal_training(plain, packed, steps=3)


def test_other_methods_train_on_blocks_too(file_of):
    names = ["q_proj", "down_proj"]
    for config in (
        PacaConfig(r=4, channels=16, paca_alpha=4, task_type="CAUSAL_LM"),
        LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"),
    ):
        plain, packed = both(file_of("Q4_K"))
        assert_equal_training(plain, packed, steps=3, config=config)


def test_one_decoded_weight_lives_at_a_time(file_of, monkeypatch):
    _, packed = both(file_of("Q4_0"))
    alive, most = weakref.WeakSet(), []
    real = PackedLayer.decoded

    def counted(self, rows=None):
        tensor = real(self, rows)
        if rows is None:
            alive.add(tensor)
            most.append(len(alive))
        return tensor

    monkeypatch.setattr(PackedLayer, "decoded", counted)
    model = get_peft_model(packed, PacaConfig(r=4, task_type="CAUSAL_LM")).train()
    lean.enable(model, level=2)
    ids = torch.randint(packed.config.vocab_size, (2, 12))
    most.clear()
    with SavedBytes(model) as saved:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gc.collect()
    assert not alive
    # Seven layers in two blocks: forward, backward (not of the three that the embedding feeds), and
    # what level 2 computes again; and the head.
    assert len(most) == 2 * 7 + 2 * 7 - 3 + 2 * 2 + 1
    assert max(most) == 1
    plain = load_weights(AutoModelForCausalLM, packed.name_or_path, dtype=torch.bfloat16)
    model = get_peft_model(plain, PacaConfig(r=4, task_type="CAUSAL_LM")).train()
    lean.enable(model, level=2)
    with SavedBytes(model) as as_plain:
        loss = model(input_ids=ids, labels=ids).loss  # what it keeps goes with it
    del loss
    # Columns that are written in place let the MLP's product be computed again; here they are kept.
    of_down_proj = 2 * ids.numel() * 4 * torch.bfloat16.itemsize
    assert saved.num_bytes == as_plain.num_bytes + of_down_proj


def test_evaluation_and_generation_are_the_same(file_of):
    models = both(file_of("Q5_1"))
    adapted = []
    for model in models:
        torch.manual_seed(0)
        adapted.append(get_peft_model(model, PacaConfig(r=4, init_weights=False)).eval())
    ids = torch.randint(models[0].config.vocab_size, (2, 9))
    with torch.no_grad():
        expected, logits = (model(ids).logits for model in adapted)
    assert torch.equal(logits, expected)
    expected, tokens = (
        model.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for model in adapted
    )
    assert torch.equal(tokens, expected)


def test_what_would_write_a_weight_in_blocks_is_refused(file_of):
    _, packed = both(file_of("Q4_0"))
    model = get_peft_model(packed, PacaConfig(r=4, init_weights=False))
    with pytest.raises(ValueError, match=r"stays in the blocks of its file; `pacatune merge`"):
        model.merge_adapter()
    _, packed = both(file_of("Q4_0"))
    with pytest.raises(TypeError, match=r"'model.embed_tokens' \(PackedEmbedding\) is not supp"):
        get_peft_model(packed, PacaConfig(r=4, target_modules=["embed_tokens"]))


def test_a_run_in_blocks_makes_the_same_files(file_of, tmp_path, capsys):
    path = file_of("Q4_0")
    words = ["--training.learning_rate", "0.002", "--paca.r", "4", "--paca.paca_alpha", "16"]
    words += ["--training.gradient_accumulation_steps", "2", "--data.eval_fraction", "0.25"]
    digests = []
    for packed in ("true", "false"):
        folder = tmp_path / packed
        said = train_in(path, folder, *words, "--model.packed", packed)
        assert ("they stay in Q4_0, " in said) == (packed == "true")
        run_dir, output = folder / "run", folder / "tuned.gguf"
        options = ["--model", str(path), "--adapter", str(run_dir), "--output", str(output)]
        assert main(["merge", *options, "--held_out"]) == 0
        said = capsys.readouterr().out
        held_out = next(line for line in said.splitlines() if line.startswith("held out"))
        weights = run_dir / "adapter_model.safetensors"
        digests.append((digest(weights), digest(output), held_out))
    assert digests[0] == digests[1]
    assert digest(path) != digests[0][1]


def refused(capsys, path, folder, *more):
    with pytest.raises(AssertionError):
        train_in(path, folder, "--model.packed", "true", *more)
    return capsys.readouterr().err


def test_what_cannot_stay_in_blocks_is_refused_in_a_line(file_of, tmp_path, capsys, tiny_tokenizer):
    from tests.grid.files import write_gguf

    sizes = {"hidden_size": 256, "intermediate_size": 256}
    model, other = build_model_of(tiny_tokenizer, **sizes), tmp_path / "other.gguf"
    write_gguf(other, model, tiny_tokenizer, "Q4_0", {"ffn_up": "TQ1_0"})
    said = refused(capsys, other, tmp_path / "run")
    assert "`model.packed` (true)" in said
    assert "ffn_up.weight' as TQ1_0" in said
    build(tiny_tokenizer).save_pretrained(tmp_path / "plain")
    tiny_tokenizer.save_pretrained(tmp_path / "plain")
    assert "is no GGUF file" in refused(capsys, tmp_path / "plain", tmp_path / "run")
    path = file_of("Q4_0")
    more = ["--paca.modules_to_save", '["lm_head"]']
    assert "`modules_to_save` trains whole weights" in refused(
        capsys, path, tmp_path / "run", *more
    )
    assert "is not paca or lora" in refused(capsys, path, tmp_path / "run", "--method", "full")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-40_000])
    assert "pacatune: error" in refused(capsys, cut, tmp_path / "run")
    assert not (tmp_path / "run" / "run" / "adapter_model.safetensors").exists()


def test_a_file_of_other_sizes_than_it_says_is_refused(file_of, tmp_path):
    path = tmp_path / "wrong.gguf"
    data = file_of("Q4_0").read_bytes()
    key = b"llama.feed_forward_length"
    at = data.index(key) + len(key) + 4
    assert int.from_bytes(data[at : at + 4], "little") == 256
    path.write_bytes(data[:at] + (512).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ValueError, match=r"ffn_.* where the model has \(.*another model"):
        load_packed(AutoModelForCausalLM, str(path), dtype=torch.bfloat16)
