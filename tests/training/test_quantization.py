"""Training on a base of few bits: QPaCA and QLoRA."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pacatune import pretrained
from pacatune.adapters.folder import read_adapter
from pacatune.training import ModelConfig, PacaSection, train
from pacatune.training import language as models
from pacatune.training.task import task_of
from tests.conftest import build_model

QUIET = Console(quiet=True)


def load(folder, **options):
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )


@pytest.mark.parametrize(
    ("method", "quantization"),
    [("paca", "nf4"), ("paca", "int8"), ("qlora", None), ("dora", "fp4"), ("moslora", "nf4")],
)
def test_runs(make_config, tiny_model_dir, tmp_path, method, quantization):
    config = make_config(method, model={"quantization": quantization}, data={"eval_fraction": 0.1})
    report = train(config, console=QUIET)
    assert report.quantization == (quantization or "nf4")
    assert report.eval_loss_after < report.eval_loss_before
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    if method == "paca":
        described = adapter["base_quantization"]
        assert described["type"] == quantization
        assert described.get("double", True)
    base = load(
        tiny_model_dir,
        **{"load_in_8bit": True}
        if quantization == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization or "nf4",
            "bnb_4bit_use_double_quant": True,
        },
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    trained = [p for name, p in loaded.named_parameters() if "paca_" in name or "lora_" in name]
    assert trained
    assert all(p.dtype == torch.float32 for p in trained)
    if (method, quantization) == ("paca", "nf4"):
        goes_on(make_config, tmp_path)


def goes_on(make_config, tmp_path):
    """A run that starts from the adapter needs the same base, and records it."""
    start = {"adapter": str(tmp_path / "out"), "training": {"output_dir": str(tmp_path / "on")}}
    start["training"] |= {"max_steps": 1, "eval_strategy": "no", "learning_rate": 1e-9}
    for other in (None, "fp4"):
        with pytest.raises(ValueError, match=r"'bitsandbytes nf4.*here it is .*set `model.quant"):
            train(make_config(model={"quantization": other}, **start), console=QUIET)
    train(make_config("qpaca", **start), console=QUIET)
    one, two = (read_adapter(tmp_path / name) for name in ("out", "on"))
    assert one.config.base_quantization == two.config.base_quantization
    for name, update in one.modules.items():
        torch.testing.assert_close(update.delta, two.modules[name].delta, atol=1e-6, rtol=0)


def test_columns_from_the_checkpoint(make_config, tiny_tokenizer, tmp_path):
    # bitsandbytes 0.50 dequantises rows of no whole block wrongly on CPUs with AVX-512: 64 wide.
    build_model(len(tiny_tokenizer), hidden_size=64).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    section = PacaSection(columns_from="original")
    model = {"path": str(tmp_path / "model"), "quantization": "nf4"}
    config = make_config(model=model, paca=section)
    train(config, console=QUIET)
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["columns_from"] == "original"


def test_resumes(make_config, tmp_path):
    """A run stopped half way ends where an uninterrupted one does."""
    whole = train(make_config(model={"quantization": "nf4"}), console=QUIET)
    for name in ("report.json", "checkpoint-8", "adapter_model.safetensors"):
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train(make_config(model={"quantization": "nf4"}), resume=True, console=QUIET)
    assert resumed.train_losses == whole.train_losses


def test_full_fine_tuning_is_refused(make_config):
    message = r"`model.quantization` \('nf4'\) with `method` \('full'\): quantised weights cannot"
    with pytest.raises(ValueError, match=message):
        train(make_config("full", model={"quantization": "nf4"}), console=QUIET)


def test_a_base_that_is_saved_quantised(make_config, tiny_model_dir, tmp_path):
    load(tiny_model_dir, load_in_4bit=True).save_pretrained(tmp_path / "quantised")
    path = {"path": str(tmp_path / "quantised")}
    with pytest.raises(ValueError, match=r"is saved quantised already; drop the option"):
        task_of(make_config(model={**path, "quantization": "nf4"})).plan()


def test_without_bitsandbytes(make_config, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes; pip install 'pacatune\[quant\]'"):
        train(make_config(model={"quantization": "nf4"}), console=QUIET)


def test_eight_bits_train_without_a_line_per_layer_and_pass(make_config, caplog):
    """bitsandbytes says in each of them that it casts bfloat16."""
    config = make_config(model={"quantization": "int8", "dtype": "bfloat16"})
    config.training.given["max_steps"] = 1
    train(config, console=QUIET)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_storage_is_set_for_sharding(make_config, monkeypatch):
    config = make_config(model={"quantization": "nf4"})
    options = models.quantization_options(config, torch.bfloat16)
    assert options["quantization_config"].bnb_4bit_quant_storage == torch.uint8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    options = models.quantization_options(config, torch.bfloat16)
    assert options["quantization_config"].bnb_4bit_quant_storage == torch.bfloat16


def test_qlora_chooses_nf4(make_config):
    assert make_config("qlora").model.quantization == "nf4"
    assert make_config("qlora", model={"quantization": "fp4"}).model.quantization == "fp4"
    assert ModelConfig(path="x").quantization is None
