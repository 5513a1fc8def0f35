"""Tokenizer, weights and batches of language models; bases of few bits: QPaCA and QLoRA."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pacatune.adapters.base import find_tokenizer
from pacatune.adapters.folder import read_adapter
from pacatune.training import preview, train
from pacatune.training.language import Task, load_tokenizer, quantization_options
from tests.adapters.fixtures import edit_json, model_copy
from tests.data.conftest import talk
from tests.training.runs import QUIET, assert_close, read_json, refused, write_rows

__all__ = ["model_copy"]


def load(folder, **options):
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )


@pytest.mark.parametrize(
    ("method", "quantization"),
    [("paca", "nf4"), ("paca", "int8"), ("qlora", None), ("dora", "fp4")],
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


def test_a_base_that_is_saved_quantised(make_config, tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "quantised")
    load(folder, load_in_4bit=True).save_pretrained(folder)
    model = {"path": str(folder), "quantization": "nf4"}
    with pytest.raises(ValueError, match=r"is saved quantised already; drop the option"):
        _ = Task(make_config(model=model)).plan


def test_eight_bits_train_without_a_line_per_layer_and_pass(make_config, caplog):
    """bitsandbytes says in each of them that it casts bfloat16."""
    model = {"quantization": "int8", "dtype": "bfloat16"}
    train(make_config(model=model, training={"max_steps": 1}), console=QUIET)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_storage_is_set_for_sharding(make_config, monkeypatch):
    config = make_config(model={"quantization": "nf4"})
    for sharded, storage in (("false", torch.uint8), ("true", torch.bfloat16)):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
        options = quantization_options(config, torch.bfloat16)
        assert options["quantization_config"].bnb_4bit_quant_storage == storage


def test_stop_ids_are_those_of_generation_and_of_the_run(make_config, model_copy):
    config = make_config(model={"path": str(model_copy)})
    edit_json(model_copy / "generation_config.json", eos_token_id=[2, 5])
    assert Task(config).stop_ids == {2, 5}
    (model_copy / "generation_config.json").unlink()
    assert Task(config).stop_ids == {2}
    task = Task(make_config(training={"eos_token": "<|user|>"}))
    assert task.tokenizer.eos_token == "<|user|>"
    assert task.stop_ids == {2, task.tokenizer.eos_token_id}


MODES = "{{ bos_token }}{{ mode }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"


@pytest.mark.usefixtures("rewards_module")
@pytest.mark.parametrize("task", ["sft", "dpo", "kto", "reward", "grpo", "rloo"])
def test_variables_of_the_template(make_task_config, model_copy, tmp_path, console, task):
    """The run's reach the data, previews and the saved tokenizer; a row's own win."""
    (model_copy / "chat_template.jinja").write_text(MODES)
    question, answer, other = (talk(text, text)["messages"] for text in ("q", "a", "b"))
    row = {"prompt": question[:1], "chosen": answer[1:], "rejected": other[1:]}
    row = {"sft": talk("q", "a"), "grpo": {"prompt": question[:1]}}.get(task, row)
    row = {"prompt": question[:1]} if task == "rloo" else row
    rows = [{**row, "chat_template_kwargs": {"mode": "slow"}}, row] * 5
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    data = {"path": path, "chat_template_kwargs": {"mode": "fast"}, "eval_fraction": 0}
    config = make_task_config(
        task, data=data, model={"path": str(model_copy)}, training={"eval_strategy": "no"}
    )
    preview(config, 20, console=console)
    said = console.file.getvalue()
    assert said.count("<s>slow") == said.count("<s>fast") > 0
    trained = Task(config)
    batch = trained.collate(trained.train, [*range(len(trained.train))])
    texts = trained.tokenizer.batch_decode(batch["input_ids"])
    assert sum("slow" in text for text in texts) == sum("fast" in text for text in texts) > 0
    if task == "sft":
        train(config, console=QUIET)
        saved = find_tokenizer(str(model_copy), tmp_path / "out")
        assert saved.apply_chat_template(question, tokenize=False).startswith("<s>fast")


def test_variables_that_the_template_does_not_read(make_config, model_copy):
    data = {"chat_template_kwargs": {"enable_thinkin": False}}
    with pytest.raises(ValueError, match=r"`data.chat_template_kwargs` \('enable_thinkin'\) is no"):
        load_tokenizer(make_config(data=data))
    (model_copy / "chat_template.jinja").unlink()
    config = make_config(data=data, model={"path": str(model_copy)})
    with pytest.raises(ValueError, match=r"`data.chat_template_kwargs` .* is for a chat template"):
        load_tokenizer(config)


def test_nothing_of_a_model_is_executed(make_config, model_copy, tmp_path):
    """Neither its code nor pickled weights."""
    model = {"path": str(model_copy)}
    torch.save({}, model_copy / "pytorch_model.bin")
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read .*no file named model.safetensors"):
        Task(make_config(model=model)).load_model()
    (model_copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit_json(model_copy / "config.json", model_type="evil", auto_map=code)
    with pytest.raises(ValueError, match="comes with code of its own, which is never executed"):
        _ = Task(make_config(model=model)).plan
    assert not (tmp_path / "ran").exists()


def test_a_batch_is_what_the_trainer_makes_of_it(make_config, tiny_tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "place": 1}]
    rows += [{"input_ids": [8], "labels": [8], "place": 2}]
    task = Task(make_config())
    task.tokenizer = tiny_tokenizer
    batch = task.collate(rows, [1, 0])
    padding = tiny_tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[8, padding, padding], [5, 6, 7]]
    assert batch["labels"].tolist() == [[8, -100, -100], [-100, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    task.tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=2)
    assert task.collate(rows, [1, 0])["input_ids"].tolist()[0] == [8, 2, 2]
