"""The core works where no optional package is installed, as after `pip install .` alone."""

import os
import subprocess
import sys
import textwrap

import pytest

# Whatever an extra brings and torch, transformers and PEFT do without.
EXTRA = (
    *("trl", "datasets", "jsonargparse", "rich", "matplotlib", "tensorboard", "gguf", "timm"),
    *("bitsandbytes", "torchvision", "PIL", "lm_eval", "onnx", "diffusers", "hypothesis"),
)


def run_alone(code, *arguments, status=0):
    """Run code in a process in which no import of an optional package succeeds."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({EXTRA!r}))\n"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == status, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    """Adapter that plain torch trained, written by PEFT."""
    folder = tmp_path_factory.mktemp("alone") / "adapter"
    code = """
        import sys
        import torch
        from peft import PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM

        from pacatune import PacaConfig

        base, folder = sys.argv[1:]
        load = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
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
        model.save_pretrained(folder)
        wanted = model.eval()(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(load(), folder).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted)
        tokens = merged.generate(ids, max_new_tokens=4, do_sample=False)
        assert tokens.shape[1] > ids.shape[1]
    """
    run_alone(code, tiny_model_dir, folder)
    return folder


COMMAND = "from pacatune.cli import main\nsys.exit(main(sys.argv[1:]))"


def test_inspects(adapter):
    out = run_alone(COMMAND, "inspect", adapter)
    assert "14 modules: down_proj x 2" in out
    assert "2 more modules; --all lists them" in out


def test_merges_and_generates(adapter, tiny_model_dir, tmp_path):
    merged = tmp_path / "merged"
    words = ("--model", tiny_model_dir, "--adapter", adapter)
    assert "verified" in run_alone(COMMAND, "merge", *words, "--output", merged)
    answers = [
        run_alone(COMMAND, "generate", *model, "--prompt", "Hello", "--max-new-tokens", 6)
        for model in (words, ("--model", merged))
    ]
    assert answers[0] == answers[1] != ""


def test_exports_to_lora(adapter, tiny_model_dir, tmp_path):
    words = ("--model", tiny_model_dir, "--adapter", adapter, "--to", "lora", "--verify")
    assert "outputs in plain PEFT differ" in run_alone(
        COMMAND, "export", *words, "--output", tmp_path / "lora"
    )


def test_helps():
    assert "fine-tune a model on your data" in run_alone(COMMAND, "--help")


def test_a_plot_says_what_it_needs(adapter):
    code = """
        from pathlib import Path
        from pacatune.adapters.inspect import inspect_adapter
        from pacatune.reports.columns import plot_columns
        try:
            plot_columns(inspect_adapter(sys.argv[1]), Path("columns.png"))
        except ValueError as error:
            print(error)
    """
    assert run_alone(code, adapter) == (
        "a plot needs packages that are not installed (matplotlib): pip install 'pacatune[train]'\n"
    )
