"""Random tiny models under the hub ids that PEFT's tests load, laid out as a hub cache."""

from __future__ import annotations

import itertools
import json
from pathlib import Path


def _tiny_models():
    """Map hub ids to functions that build the model; sizes are ours, small and divisible."""
    import torch
    import transformers as t

    v = 128

    def seeded(build):
        def run():
            torch.manual_seed(0)
            model = build()
            # Default initialisations (std 0.02) leave a tiny model's logits nearly constant and
            # some tests compare outputs with an absolute tolerance: spread the weights, keep
            # norms and biases alone.
            with torch.no_grad():
                for p in model.parameters():
                    if p.ndim >= 2:
                        fan_in = p.shape[-1]
                        p.normal_(0, fan_in**-0.5)
            return model.eval()

        return run

    def of(model_cls, config_cls, **options):
        return seeded(lambda: model_cls(config_cls(vocab_size=v, **options)))

    def opt(layers=5, hidden=16, ffn=4):
        sizes = {"hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": ffn}
        sizes |= {"num_attention_heads": 4, "max_position_embeddings": 100}
        more = {"num_hidden_layers": layers, "dropout": 0.0, "attention_dropout": 0.0}
        return of(t.OPTForCausalLM, t.OPTConfig, **sizes, **more)

    ends = {"bos_token_id": v - 1, "eos_token_id": v - 1}

    def gpt(config_cls, model_cls, **more):
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 100}
        return of(model_cls, config_cls, **sizes, **ends, **more)

    gpt2 = gpt(t.GPT2Config, t.GPT2LMHeadModel)
    # Of PEFT 0.18's tests, beside the others.
    bloom = of(t.BloomForCausalLM, t.BloomConfig, hidden_size=32, n_layer=3, n_head=4)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 100}
    types = {"attention_types": [[["global", "local"], 1]]}
    gpt_neo = of(t.GPTNeoForCausalLM, t.GPTNeoConfig, **sizes, **types, **ends)

    def llamaish(config_cls, model_cls, **more):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 4}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        common = {**sizes, "max_position_embeddings": 100, "pad_token_id": 0}
        return of(model_cls, config_cls, **{**common, **more})

    def bertish(config_cls, model_cls, **more):
        sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3}
        sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64}
        return of(model_cls, config_cls, **sizes, **more)

    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 3, "num_decoder_layers": 3}
    more = {
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }  # gradients of two passes are compared
    t5 = of(t.T5ForConditionalGeneration, t.T5Config, num_heads=4, **sizes, **more)
    sides = ("encoder", "decoder")
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 8}
    sizes = {f"{side}_{name}": size for side in sides for name, size in sizes.items()}
    sizes |= {"d_model": 16, "max_position_embeddings": 50}
    bart = of(t.BartForConditionalGeneration, t.BartConfig, **sizes)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
    resnet_config = t.ResNetConfig(**sizes, hidden_act="relu", num_labels=3)
    resnet = seeded(lambda: t.ResNetForImageClassification(resnet_config))

    peft, hf = "peft-internal-testing/tiny-random-", "hf-internal-testing/tiny-random-"
    trl = "trl-internal-testing/tiny-"
    models = {
        f"{peft}OPTForCausalLM": opt(),
        "peft-internal-testing/opt-125m": opt(layers=12, hidden=64, ffn=64),
        **dict.fromkeys((f"{peft}GPT2LMHeadModel", f"{peft}gpt2", f"{hf}gpt2"), gpt2),
        f"{peft}GPTJForCausalLM": gpt(t.GPTJConfig, t.GPTJForCausalLM, rotary_dim=4),
        f"{hf}BloomForCausalLM": bloom,
        f"{hf}gpt_neo": gpt_neo,
        f"{hf}GPTBigCodeForCausalLM": gpt(t.GPTBigCodeConfig, t.GPTBigCodeForCausalLM),
        f"{trl}random-LlamaForCausalLM": llamaish(
            t.LlamaConfig, t.LlamaForCausalLM, num_key_value_heads=4
        ),
        f"{hf}MistralForCausalLM": llamaish(t.MistralConfig, t.MistralForCausalLM),
        "peft-internal-testing/tiny-dummy-qwen2": llamaish(t.Qwen2Config, t.Qwen2ForCausalLM),
        f"{hf}Gemma3ForCausalLM": llamaish(
            t.Gemma3TextConfig, t.Gemma3ForCausalLM, sliding_window=32
        ),
        f"{peft}T5ForConditionalGeneration-calibrated": t5,
        f"{peft}BartForConditionalGeneration": bart,
        f"{peft}DebertaModel": bertish(t.DebertaConfig, t.DebertaModel, **relative),
        f"{peft}DebertaV2Model": bertish(t.DebertaV2Config, t.DebertaV2Model, **relative),
        f"{trl}LlamaForSequenceClassification-3.2": llamaish(
            t.LlamaConfig, t.LlamaForSequenceClassification
        ),
        f"{peft}ResNetForImageClassification": resnet,
    }
    kinds = ("Model", "ForSequenceClassification")
    for family, kind in itertools.product(("Bert", "Roberta"), kinds):
        model_cls = getattr(t, f"{family}{kind}")
        models[f"{peft}{family}{kind}"] = bertish(getattr(t, f"{family}Config"), model_cls)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    if hasattr(t, "Llama4ForCausalLM"):
        layers = {"interleave_moe_layer_step": 1, "no_rope_layers": [1, 1]}
        sizes = {"intermediate_size_mlp": 32, "attention_chunk_size": 64}
        models[f"{trl}Llama4ForCausalLM"] = llamaish(
            t.Llama4TextConfig,
            t.Llama4ForCausalLM,
            **{**experts, "num_experts_per_tok": 1, **layers, **sizes},
        )
    if hasattr(t, "GptOssForCausalLM"):
        models[f"{trl}GptOssForCausalLM"] = llamaish(t.GptOssConfig, t.GptOssForCausalLM, **experts)
    if hasattr(t, "Qwen3MoeForCausalLM"):
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        models[f"{trl}Qwen3MoeForCausalLM"] = llamaish(
            t.Qwen3MoeConfig, t.Qwen3MoeForCausalLM, **sizes, decoder_sparse_step=1
        )
    return models


def _tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<eos>": 1, "<pad>": 2, **{f"w{i}": i + 3 for i in range(100)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def write_tiny_models(root):
    """Write the models as huggingface_hub's cache keeps downloads; return the HF_HOME to use."""
    home = Path(root).resolve()
    hub = home / "hub"
    revision = "0" * 40
    for repo, build in _tiny_models().items():
        folder = hub / ("models--" + repo.replace("/", "--"))
        snapshot = folder / "snapshots" / revision
        if (snapshot / "model.safetensors").exists():
            continue
        try:
            model = build()
        except Exception as error:  # a transformers without that architecture, say
            print(f"cannot build {repo}: {type(error).__name__}: {error}")
            continue
        snapshot.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(snapshot)
        if "ResNet" in repo:
            half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}
            resize = {"do_resize": True, "size": {"shortest_edge": 64}, "crop_pct": 0.875}
            values = {"image_processor_type": "ConvNextImageProcessor", **resize, **half}
            (snapshot / "preprocessor_config.json").write_text(json.dumps(values))
        else:
            _tiny_tokenizer().save_pretrained(snapshot)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(revision)
    # Where PEFT 0.18's tests look for the same models.
    ours = "models--peft-internal-testing--"
    for folder in list(hub.glob(f"{ours}*")):
        for owner in ("hf-internal-testing", "ybelkada"):
            alias = hub / f"models--{owner}--{folder.name.removeprefix(ours)}"
            if not alias.exists():
                alias.symlink_to(folder.name, target_is_directory=True)
    # An adapter repository that test_config.py reads a config from, at a revision called "test".
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8}
    lora["target_modules"] = ["q_proj", "v_proj"]
    folder = hub / "models--peft-internal-testing--tiny-opt-lora-revision"
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "adapter_config.json").write_text(json.dumps(lora))
    (folder / "refs").mkdir(exist_ok=True)
    for ref in ("main", "test"):
        (folder / "refs" / ref).write_text(revision)
    return home
