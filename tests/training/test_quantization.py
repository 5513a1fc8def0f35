"""Training on a base of few bits: QPaCA and QLoRA."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pacatune.adapters.folder import read_adapter
from pacatune.training import language as models
from pacatune.training import train
from pacatune.training.task import task_of
from tests.training.runs import QUIET, assert_close, read_json, refused


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
    if method == "paca":
        described = read_json(tmp_path / "out/adapter_config.json")["base_quantization"]
        assert described["type"] == quantization
        assert described.get("double", True)
    kind = {"bnb_4bit_quant_type": quantization or "nf4", "bnb_4bit_use_double_quant": True}
    options = {"load_in_8bit": True} if quantization == "int8" else {"load_in_4bit": True, **kind}
    loaded = PeftModel.from_pretrained(load(tiny_model_dir, **options), tmp_path / "out")
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
        config = make_config(model={"quantization": other}, **start)
        refused(r"'bitsandbytes nf4.*here it is .*set `model.quant", config)
    train(make_config("qpaca", **start), console=QUIET)
    one, two = (read_adapter(tmp_path / name) for name in ("out", "on"))
    assert one.config.base_quantization == two.config.base_quantization
    assert_close(one.folder, two.folder, atol=1e-6, rtol=0)


def test_resumes(make_config, assert_resumes):
    assert_resumes(5, make_config, "qpaca")


def test_a_base_that_is_saved_quantised(make_config, tiny_model_dir, tmp_path):
    load(tiny_model_dir, load_in_4bit=True).save_pretrained(tmp_path / "quantised")
    model = {"path": str(tmp_path / "quantised"), "quantization": "nf4"}
    with pytest.raises(ValueError, match=r"is saved quantised already; drop the option"):
        task_of(make_config(model=model)).plan()


def test_eight_bits_train_without_a_line_per_layer_and_pass(make_config, caplog):
    """bitsandbytes says in each of them that it casts bfloat16."""
    model = {"quantization": "int8", "dtype": "bfloat16"}
    train(make_config(model=model, training={"max_steps": 1}), console=QUIET)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_storage_is_set_for_sharding(make_config, monkeypatch):
    config = make_config(model={"quantization": "nf4"})
    for sharded, storage in (("false", torch.uint8), ("true", torch.bfloat16)):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
        options = models.quantization_options(config, torch.bfloat16)
        assert options["quantization_config"].bnb_4bit_quant_storage == storage
