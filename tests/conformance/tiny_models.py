"""Random tiny models under the hub ids that PEFT's tests load, laid out as a hub cache."""

from __future__ import annotations

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

    models = {
        "peft-internal-testing/tiny-random-OPTForCausalLM": opt(),
        "peft-internal-testing/opt-125m": opt(layers=12, hidden=64, ffn=64),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel": gpt2,
        "peft-internal-testing/tiny-random-gpt2": gpt2,
        "hf-internal-testing/tiny-random-gpt2": gpt2,
        "peft-internal-testing/tiny-random-GPTJForCausalLM": gpt(
            t.GPTJConfig, t.GPTJForCausalLM, rotary_dim=4
        ),
        "hf-internal-testing/tiny-random-BloomForCausalLM": bloom,
        "hf-internal-testing/tiny-random-gpt_neo": gpt_neo,
        "hf-internal-testing/tiny-random-GPTBigCodeForCausalLM": gpt(
            t.GPTBigCodeConfig, t.GPTBigCodeForCausalLM
        ),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": llamaish(
            t.LlamaConfig, t.LlamaForCausalLM, num_key_value_heads=4
        ),
        "hf-internal-testing/tiny-random-MistralForCausalLM": llamaish(
            t.MistralConfig, t.MistralForCausalLM
        ),
        "peft-internal-testing/tiny-dummy-qwen2": llamaish(t.Qwen2Config, t.Qwen2ForCausalLM),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": llamaish(
            t.Gemma3TextConfig, t.Gemma3ForCausalLM, sliding_window=32
        ),
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": t5,
        "peft-internal-testing/tiny-random-BartForConditionalGeneration": bart,
        "peft-internal-testing/tiny-random-BertModel": bertish(t.BertConfig, t.BertModel),
        "peft-internal-testing/tiny-random-RobertaModel": bertish(t.RobertaConfig, t.RobertaModel),
        "peft-internal-testing/tiny-random-DebertaModel": bertish(
            t.DebertaConfig, t.DebertaModel, **relative
        ),
        "peft-internal-testing/tiny-random-DebertaV2Model": bertish(
            t.DebertaV2Config, t.DebertaV2Model, **relative
        ),
        "peft-internal-testing/tiny-random-BertForSequenceClassification": bertish(
            t.BertConfig, t.BertForSequenceClassification
        ),
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification": bertish(
            t.RobertaConfig, t.RobertaForSequenceClassification
        ),
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": llamaish(
            t.LlamaConfig, t.LlamaForSequenceClassification
        ),
        "peft-internal-testing/tiny-random-ResNetForImageClassification": resnet,
    }
    if hasattr(t, "Llama4ForCausalLM"):
        models["trl-internal-testing/tiny-Llama4ForCausalLM"] = llamaish(
            t.Llama4TextConfig,
            t.Llama4ForCausalLM,
            intermediate_size_mlp=32,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            attention_chunk_size=64,
            no_rope_layers=[1, 1],
        )
    if hasattr(t, "GptOssForCausalLM"):
        models["trl-internal-testing/tiny-GptOssForCausalLM"] = llamaish(
            t.GptOssConfig, t.GptOssForCausalLM, num_local_experts=4, num_experts_per_tok=2
        )
    if hasattr(t, "Qwen3MoeForCausalLM"):
        models["trl-internal-testing/tiny-Qwen3MoeForCausalLM"] = llamaish(
            t.Qwen3MoeConfig,
            t.Qwen3MoeForCausalLM,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            decoder_sparse_step=1,
        )
    return models


def _tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<eos>": 1, "<pad>": 2, **{f"w{i}": i + 3 for i in range(100)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=64,
    )


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
            (snapshot / "preprocessor_config.json").write_text(
                json.dumps(
                    {
                        "image_processor_type": "ConvNextImageProcessor",
                        "do_resize": True,
                        "size": {"shortest_edge": 64},
                        "crop_pct": 0.875,
                        "do_normalize": True,
                        "image_mean": [0.5] * 3,
                        "image_std": [0.5] * 3,
                    }
                )
            )
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
