"""The configurations for PEFT's comparison load as PEFT's run.py loads them, and train as many
parameters as their page says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pacatune import PacaConfig

ROOT = Path(__file__).parents[2] / "benchmarks" / "metamath"
EXPERIMENTS = sorted(path.parent for path in ROOT.glob("experiments/*/*/adapter_config.json"))
# LLaMA 3.2 3B but for its vocabulary; a layer stands for all 28.
NUM_LAYERS = 28
SIZES = {"hidden_size": 3072, "intermediate_size": 8192, "head_dim": 128, "vocab_size": 8}
HEADS = {"num_attention_heads": 24, "num_key_value_heads": 8}
LLAMA = LlamaConfig(num_hidden_layers=1, **SIZES, **HEADS)
# As many as LoRA of rank 32, as nearly as other targets allow.
STATED = {"rank12": 9_289_728, "rank17": 9_261_056, "rank53": 9_117_696}
STATED |= dict.fromkeys(("rank32", "rank80"), 9_175_040)


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: path.name)
def test_configuration(folder):
    values = json.loads((folder / "adapter_config.json").read_text())
    config = PeftConfig.from_pretrained(str(folder))
    assert type(config) is (PacaConfig if folder.parent.name == "pacatune" else LoraConfig)
    del values["peft_type"]
    for name, value in values.items():
        found = getattr(config, name)
        assert (set(value) if isinstance(found, set) else value) == found
    if values.get("normalize"):  # looks at weights, and changes no number of parameters
        config.normalize = "none"
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA)
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    number = NUM_LAYERS * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert number == STATED[folder.name.split("-")[3]]
    assert f" {number:,} |" in (ROOT / "README.md").read_text(encoding="utf-8")
    rate = json.loads((folder / "training_params.json").read_text())["optimizer_kwargs"]["lr"]
    assert folder.name.endswith(f"-lr{rate:.0e}".replace("e-0", "e-"))


def test_run_is_that_of_peft(tmp_path):
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "from peft import PeftConfig\n"
        "print(__name__, sys.argv[1:], type(PeftConfig.from_pretrained(sys.argv[2])).__module__)\n"
    )
    script = tmp_path / "run_with_pacatune.py"
    script.write_text((ROOT / script.name).read_text())
    folder = ROOT / "experiments/pacatune/llama-3.2-3B-rank80-lr3e-4"
    words = [sys.executable, str(script), "-v", str(folder)]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"__main__ ['-v', '{folder}'] pacatune.")
