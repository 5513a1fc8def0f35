"""The configurations for PEFT's comparison load as PEFT's run.py loads them, and train as many
parameters as their page says."""

import json
import re
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
LLAMA = LlamaConfig(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=1,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=8,
)


def stated():
    """Pattern of an experiment's folder -> number of parameters in the table of the page."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and cells[-1].replace(",", "").isdigit():
            first, *others = re.findall(r"`([^`]+)`", cells[0])
            names = [first, *(first.replace("-groups4-*", other) for other in others)]
            found |= {name: int(cells[-1].replace(",", "")) for name in names}
    return found


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: path.name)
def test_configuration(folder):
    values = json.loads((folder / "adapter_config.json").read_text())
    config = PeftConfig.from_pretrained(str(folder))
    assert type(config) is (PacaConfig if folder.parent.name == "pacatune" else LoraConfig)
    for name, value in values.items():
        found = getattr(config, name)
        if name != "peft_type":
            assert (sorted(found) if isinstance(found, set) else found) == (
                sorted(value) if isinstance(value, list) else value
            )
    if values.get("normalize"):  # looks at weights, and changes no number of parameters
        config.normalize = "none"
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA)
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    number = NUM_LAYERS * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    wanted = {
        number
        for pattern, number in stated().items()
        if re.fullmatch(pattern.replace("*", "lr.*"), f"{folder.parent.name}/{folder.name}")
    }
    assert {number} == wanted
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
    result = subprocess.run(
        [sys.executable, str(script), "-v", str(folder)], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(f"__main__ ['-v', '{folder}'] pacatune.")
