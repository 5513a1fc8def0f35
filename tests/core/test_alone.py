"""The core works where no optional package is installed, as after `pip install .` alone."""

import textwrap

import pytest

from tests.forks import run_cases

# Whatever an extra brings and torch, transformers and PEFT do without.
EXTRA = (
    *("trl", "datasets", "rich", "matplotlib", "tensorboard", "gguf", "timm"),
    *("bitsandbytes", "torchvision", "PIL", "lm_eval", "onnx", "diffusers", "hypothesis"),
)
# No import of an optional package succeeds.
FIRST = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRA!r}))
import pacatune, torch, transformers.modeling_utils, peft
"""
TRAIN = """
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pacatune import PacaConfig

load = lambda: AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32)
model = get_peft_model(load(), PacaConfig(r=4, paca_alpha=8, target_modules="all-linear"))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))
losses = []
for _ in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.1, losses
model.save_pretrained({adapter!r})
wanted = model.eval()(input_ids=ids).logits
loaded = PeftModel.from_pretrained(load(), {adapter!r}).eval()
torch.testing.assert_close(loaded(input_ids=ids).logits, wanted)
merged = loaded.merge_and_unload()
torch.testing.assert_close(merged(input_ids=ids).logits, wanted)
tokens = merged.generate(ids, max_new_tokens=4, do_sample=False)
assert tokens.shape[1] > ids.shape[1]
print("trained")
"""


def command(*words):
    return f"from pacatune.cli import main\nassert main({[*map(str, words)]!r}) == 0"


@pytest.fixture(scope="module")
def printed(tiny_model_dir, tmp_path_factory):
    """What each case printed; an adapter that plain torch trained is there after the first."""
    folder = tmp_path_factory.mktemp("alone")
    base, adapter, merged = str(tiny_model_dir), str(folder / "adapter"), folder / "merged"
    adapted = ("--model", base, "--adapter", adapter)
    prompt = ("--prompt", "Hello", "--max-new-tokens", 6)
    lora = ("--to", "lora", "--output", folder / "lora")
    cases = {
        "train": TRAIN.format(base=base, adapter=adapter),
        "inspect": command("inspect", adapter),
        "merge": command("merge", *adapted, "--output", merged),
        "generate": command("generate", *adapted, *prompt),
        "generate from the merged": command("generate", "--model", merged, *prompt),
        "export": command("export", *adapted, *lora),
        "help": "import contextlib\nwith contextlib.suppress(SystemExit):\n"
        + textwrap.indent(command("--help"), "    "),
    }
    return run_cases(FIRST, cases, new=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train", "trained"),
        ("inspect", "14 modules: down_proj x 2"),
        ("inspect", "2 more modules; --all lists them"),
        ("merge", "verified  read back, bit for bit"),
        ("export", "14 modules as LoRA, float32, exact"),
        ("help", "fine-tune a model on your data"),
    ],
)
def test_what_is_said(printed, name, said):
    assert said in printed[name]
    assert "Traceback" not in printed[name]


def test_merges_and_generates(printed):
    assert printed["generate"] == printed["generate from the merged"] != ""
    assert "Traceback" not in printed["generate"]
