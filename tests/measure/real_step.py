"""The training step that is estimated, for real: small models with weights on the CPU."""

import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from pacatune import PacaConfig
from pacatune.measure.counters import SavedBytes
from pacatune.measure.models import checkpoint_blocks
from pacatune.measure.setting import Setting
from pacatune.measure.tracker import StorageTracker
from pacatune.tuner.layer import PacaLayer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GEMMA = LLAMA | {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
QWEN = LLAMA | {"model_type": "qwen3", "head_dim": 16}


def write_config(folder, values, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(values | changes))
    return str(path)


def real_model(setting):
    """The model and adapter of a setting, with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(setting.model)
    model = AutoModelForCausalLM.from_config(
        config, dtype=setting.weight_dtype, attn_implementation="sdpa"
    )
    if setting.gradient_checkpointing:
        checkpoint_blocks(model)
    model.config.use_cache = False
    return with_adapter(model, setting)


def with_adapter(model, setting):
    options = {"r": setting.rank, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if setting.method == "paca":
        model = get_peft_model(model, PacaConfig(**options))
    elif setting.method != "full":
        options |= {"lora_dropout": setting.dropout, "use_dora": setting.method == "dora"}
        model = get_peft_model(model, LoraConfig(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(setting.trained_dtype)
    return model.train()


def loss_of(model, setting, ids):
    with torch.autocast("cpu", dtype=setting.compute_dtype):
        return model(input_ids=ids, labels=ids).loss


def start(model, setting):
    """Tokens of a micro-batch, what is trained, and its optimizer."""
    ids = torch.randint(128, (setting.batch_size, setting.seq_len))
    trained = [p for p in model.parameters() if p.requires_grad]
    return ids, trained, torch.optim.AdamW(trained, fused=True)


def really_saved(model, setting):
    """Bytes that autograd keeps in the second step, when columns are written already."""
    ids, _, optimizer = start(model, setting)
    loss_of(model, setting, ids).backward()
    optimizer.zero_grad()
    with SavedBytes(model) as saved:
        loss = loss_of(model, setting, ids)
    loss.backward()
    return saved.num_bytes


def real_peak(model, setting):
    """Tracker over the third step of a real model: its peak and what it keeps."""
    ids, trained, optimizer = start(model, setting)
    tracker = StorageTracker()
    with tracker:
        tracker.hold(model.parameters(), "weights")
        tracker.hold(model.buffers(), "weights")
        for _ in range(2):
            loss_of(model, setting, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        state = (value for values in optimizer.state.values() for value in values.values())
        tracker.hold(state, "optimizer")
        tracker.hold(_beside(model), "weights")
        tracker.watch_gradients(trained)
        tracker.reset_peak()
        for _ in range(setting.gradient_accumulation):
            tracker.phase = "forward"
            loss = loss_of(model, setting, ids)
            tracker.settle_activations(ids, loss)
            kept = tracker.owned_by_module("activations")
            tracker.phase = "backward"
            loss.backward()
        tracker.phase = "optimizer"
        optimizer.step()
    return tracker, kept


def _beside(model):
    """Original columns, and which they are."""
    layers = [module for module in model.modules() if isinstance(module, PacaLayer)]
    kept = [layer.residency.kept for layer in layers if layer.residency is not None]
    return [x for one in kept for x in (one.originals, one.columns)]


def tiny(folder, values=LLAMA, **options):
    """A setting of a small model whose config.json is in `folder`."""
    usual = {"batch_size": 2, "seq_len": 32, "lean": "off", "rank": 4}
    return Setting(model=write_config(folder, values), **usual | options)
