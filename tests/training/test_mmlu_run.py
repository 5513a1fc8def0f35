"""Fine-tuning on MMLU's questions, as the evaluation asks them and as PaCA's authors did."""

import io
import json

import pytest
from rich.console import Console

from pacatune.training import train
from pacatune.training.sft import TextTrainer
from tests.conftest import build_model


@pytest.fixture
def model_dir(tmp_path, tiny_tokenizer):
    build_model(len(tiny_tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    return str(tmp_path / "m")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"Is it {i}?", "choices": list("abcd"), "answer": i % 4} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "format": "mmlu", "eval_fraction": 0}


@pytest.fixture
def batches(monkeypatch):
    """The micro-batches that training sees."""
    seen, step = [], TextTrainer.training_step

    def watch(self, model, inputs, *args, **kwargs):
        seen.append({name: value.clone() for name, value in inputs.items()})
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TextTrainer, "training_step", watch)
    return seen


def run(make_config, model_dir, data, **training):
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no", **training}
    config = make_config(model={"path": model_dir}, data=data, training=options)
    train(config, console=Console(file=io.StringIO()))


def test_answer_and_stop_token_are_learned(
    make_config, model_dir, questions, batches, tiny_tokenizer
):
    run(make_config, model_dir, questions)
    (batch,) = batches
    assert batch["input_ids"].shape[1] < 64
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert ids[0] == tiny_tokenizer.bos_token_id
        learned = labels[labels != -100].tolist()
        assert learned[-1] == tiny_tokenizer.eos_token_id
        assert tiny_tokenizer.decode(learned[:-1]) in (" A", " B", " C", " D")


def test_as_the_authors_trained(make_config, model_dir, questions, batches, tiny_tokenizer):
    data = {**questions, "special_tokens": False}
    run(make_config, model_dir, data, max_length=512, pad_to_multiple_of=512)
    (batch,) = batches
    assert batch["input_ids"].shape == (4, 512)
    for ids, labels, mask in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        text = tiny_tokenizer.decode(ids[mask.bool()])
        assert text.startswith("Is it ")
        learned = tiny_tokenizer.decode(labels[labels != -100])
        assert text.endswith(f"\nAnswer:{learned}")
        assert learned in (" A", " B", " C", " D")
