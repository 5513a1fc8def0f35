"""Finished adapters made by PEFT itself, for the tests of everything that is done to them."""

import json
import shutil

import pytest


def save_adapter(
    model_dir,
    folder,
    *,
    dtype="float32",
    seed=0,
    with_fingerprint=True,
    quantization=None,
    num_labels=None,
    **config,
):
    """Save a PaCA adapter with random deltas for the model in a folder; return the PEFT model."""
    import torch
    from peft import get_peft_model

    from pacatune import PacaConfig
    from pacatune.adapters.base import load_base
    from pacatune.adapters.fingerprint import write_fingerprint
    from pacatune.adapters.loading import answered_warnings

    settings = {
        "r": 4,
        "paca_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        **config,
    }
    base = load_base(
        str(model_dir),
        task_type=settings["task_type"],
        dtype=dtype,
        quantization=quantization,
        num_labels=num_labels,
    )
    generator = torch.Generator().manual_seed(seed)
    with answered_warnings():
        model = get_peft_model(base, PacaConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.data += noise.to(parameter.dtype)
        model.save_pretrained(folder)
    if with_fingerprint:
        write_fingerprint(folder, model)
    return model.eval()


def edit_json(path, **changes):
    """Change some values of a JSON file; return its path."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def edit_tensors(path, change):
    """Give a file's tensors to a function that changes the dictionary, and write them back."""
    from safetensors.torch import load_file, save_file

    path = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def scale(folder, factor, part="paca_delta"):
    edit_tensors(
        folder, lambda tensors: [one.mul_(factor) for name, one in tensors.items() if part in name]
    )


def logits_of(model):
    """What a model says of some tokens, or of noise if it is for images."""
    import torch

    if model.main_input_name == "pixel_values":
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        inputs = {"pixel_values": pixels}
    else:
        inputs = {"input_ids": torch.arange(24).view(2, 12)}
    with torch.no_grad():
        return model.eval()(**inputs).logits


def log_likelihood(model, tokenizer, context, continuation):
    """The log-likelihood of a text after another."""
    import torch

    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probs = model(ids).logits[0].log_softmax(-1)
    return sum(log_probs[k - 1, ids[0, k]].item() for k in range(start, ids.shape[1]))


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory, tiny_model_dir):
    """An adapter of the tiny Llama, with a fingerprint of it; not to be changed."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    save_adapter(tiny_model_dir, folder)
    return folder


@pytest.fixture
def adapter_copy(adapter_dir, tmp_path):
    """The same adapter, to be damaged."""
    return shutil.copytree(adapter_dir, tmp_path / "adapter")


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / tiny_model_dir.name)


@pytest.fixture(scope="session")
def lora_dir(tmp_path_factory, tiny_model_dir):
    """A LoRA adapter of the tiny Llama with random factors; not to be changed."""
    import torch
    from peft import LoraConfig, get_peft_model

    from pacatune.adapters.base import load_base
    from pacatune.adapters.loading import answered_warnings

    folder = tmp_path_factory.mktemp("adapters") / "lora"
    base = load_base(str(tiny_model_dir), task_type="CAUSAL_LM")
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])
    with answered_warnings(), torch.random.fork_rng():
        torch.manual_seed(0)
        config.init_lora_weights = False
        get_peft_model(base, config).save_pretrained(folder)
    return folder


def error_in_peft(base, adapter, lora, **options):
    """How far PEFT's LoRA is from the adapter that it was made of, of the outputs' size."""
    from peft import PeftModel

    from pacatune.adapters.base import load_base
    from pacatune.adapters.folder import open_adapter

    options |= {"task_type": open_adapter(adapter).config.task_type, "dtype": "float32"}
    first, second = (
        logits_of(PeftModel.from_pretrained(load_base(str(base), **options), folder))
        for folder in (adapter, lora)
    )
    return float((first - second).abs().max() / first.abs().max())
