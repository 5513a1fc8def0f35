"""`torch.set_default_device`: what is made on the CPU, or beside a tensor, is there all the same.

On `meta` a tensor that went to the default device has no values, so that using it fails.
"""

import ast
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pacatune import PacaConfig, lean
from pacatune.adapters.export import export_lora
from pacatune.adapters.fingerprint import fingerprint
from pacatune.adapters.folder import read_adapter

SRC = Path(__file__).parents[2] / "src" / "pacatune"
MAKERS = {
    *("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"),
    *("tensor", "zeros", "asarray", "tril_indices"),
}
# Where PEFT makes its adapters, too; what follows goes where its values are wanted.
ON_THE_DEFAULT_DEVICE = {"tuner/layer.py", "training/rl.py"}


def makers(path):
    """Yield the calls of a file that make a tensor without saying where."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).removeprefix("torch.") in MAKERS
            and ast.unparse(node.func).startswith("torch.")
            and "device" not in [keyword.arg for keyword in node.keywords]
        ):
            yield f"{path.relative_to(SRC)}:{node.lineno}"


def test_every_tensor_that_is_made_says_where():
    files = [
        path
        for path in sorted(SRC.rglob("*.py"))
        if str(path.relative_to(SRC)) not in ON_THE_DEFAULT_DEVICE
    ]
    assert len(files) > 100
    assert [call for path in files for call in makers(path)] == []


@pytest.fixture(name="model")
def _model() -> PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return get_peft_model(base, PacaConfig(r=4, paca_alpha=4))


def train(model: torch.nn.Module, batch: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        with torch.device("cpu"):  # old torch keeps its own counts on the default device
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_model_is_trained_saved_and_merged(model, tmp_path):
    batch = torch.arange(16).view(1, 16)
    with torch.device("meta"):
        lean.enable(model, mode="require")
        losses = train(model, batch)
        assert losses[-1] < losses[0]
        model.save_pretrained(tmp_path / "adapter")
        base = model.get_base_model()
        modules = read_adapter(tmp_path / "adapter").modules
        columns = {name: update.indices for name, update in modules.items()}
        assert len(fingerprint(model, columns)["modules"]) == len(columns)
        export_lora(base, tmp_path / "adapter", tmp_path / "lora")
        wanted = model(input_ids=batch).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=batch).logits, wanted)
