"""Small GGUF files, as llama.cpp's converter writes them."""

import json

import gguf
import numpy as np
import torch
from gguf.quants import quantize

KINDS = gguf.GGMLQuantizationType


def permuted(weight, num_heads):
    """Rows of q and k as llama.cpp has them."""
    out, width = weight.shape
    return (
        weight.view(num_heads, 2, out // num_heads // 2, width).swapaxes(1, 2).reshape(out, width)
    )


def random_blocks(out_features, in_features, kind, generator):
    """A matrix of a format that the package cannot write: random codes, small scales."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (out_features, in_features // block, size)
    data = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    places = {"Q6_K": (208,), "TQ1_0": (52,), "IQ4_NL": (0,), "IQ4_XS": (0,), "NVFP4": ()}
    places = places.get(kind.name, (0, 2))
    for start in places:
        number = 2e-4 * torch.rand(*shape[:2], 1, generator=generator).half()
        data[..., start : start + 2] = number.view(torch.uint8).view(*shape[:2], 2)
    return data.flatten(1).numpy()


def write_gguf(path, model, tokenizer, kind="Q4_0", others=None, architecture="llama"):
    """Write a model; `others` are formats of tensors by a part of their names."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    _add_sizes(writer, config)
    _add_tokenizer(writer, config, tokenizer)
    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for parameter, weight in _apart(model.state_dict()):
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        matrix = weight.float()
        for part, number in heads.items():
            if f".{part}." in parameter and architecture == "llama":
                matrix = permuted(matrix, number)
        if architecture.startswith("gemma") and "norm" in parameter:
            matrix = matrix + 1
        found = [other for part, other in (others or {}).items() if part in name]
        is_plain = matrix.ndim == 1 or "token_embd" in name or name == "output.weight"
        chosen = "F32" if matrix.ndim == 1 else found[0] if found else "F32" if is_plain else kind
        values = np.ascontiguousarray(matrix.numpy())
        if chosen in ("TQ1_0", "IQ4_NL", "IQ4_XS", "NVFP4") or chosen.endswith("_K"):
            data = random_blocks(*matrix.shape, KINDS[chosen], generator)
        else:
            data = quantize(values, KINDS[chosen])
        writer.add_tensor(name, data, raw_dtype=KINDS[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _apart(tensors):
    """Experts' gate and up are one tensor in a model, and two in a file."""
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
        else:
            yield name + ".weight" * name.endswith("experts.down_proj"), tensor


def _add_sizes(writer, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    if head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if (window := getattr(config, "sliding_window", None)) is not None:
        writer.add_sliding_window(window)
    if experts := getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer, config, tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = {*tokenizer.all_special_ids, *range(6)}
    types = [
        gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL
        for number in range(len(tokens))
    ]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
