import random

import pytest
import torch

from tests.data.conftest import write_lines


@pytest.fixture(scope="module", autouse=True)
def _methods(with_moslora):
    pass


TWO_STEPS = {"max_steps": 2, "bf16": False, "use_cpu": True}
WORDS = {"fruit": ["apple", "pear", "plum"], "colour": ["red", "green", "blue"]}


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """Training and test chats whose answers can be learned."""
    folder = tmp_path_factory.mktemp("chats")
    for name, numbers in {"train": range(40), "test": range(40, 52)}.items():
        rows = [{"prompt": f"What is {i}?", "completion": f"It is {7 * i % 10}."} for i in numbers]
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def text_options(tiny_model_dir, chats):
    return {
        "model": {"path": str(tiny_model_dir), "dtype": "float32"},
        "data": {"path": str(chats / "train.jsonl"), "eval_path": str(chats / "test.jsonl")},
        "training": {"per_device_train_batch_size": 4, **TWO_STEPS},
    }


@pytest.fixture
def class_options(tmp_path):
    """An encoder, and training and test texts of two classes, told apart by a word."""
    words = ["this", "that", "is", *WORDS["fruit"], *WORDS["colour"]]
    model, draw = save_bert(tmp_path / "bert", words), random.Random(0)
    for name, number in (("train", 60), ("test", 20)):
        rows = []
        for _ in range(number):
            label = draw.choice(list(WORDS))
            words = [draw.choice(WORDS[label]), *draw.choices(["this", "that", "is"], k=3)]
            draw.shuffle(words)
            rows.append({"text": " ".join(words), "label": label})
        write_lines(tmp_path / f"{name}.jsonl", rows)
    return {
        "model": {"path": str(model)},
        "data": {"path": str(tmp_path / "train.jsonl"), "eval_path": str(tmp_path / "test.jsonl")},
        "training": TWO_STEPS,
    }


def save_bert(folder, words):
    """Write a tiny BERT without dropout, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    vocabulary = {word: number for number, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(vocabulary), "intermediate_size": 64, "max_position_embeddings": 32}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder
