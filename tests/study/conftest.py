import io
import random
from typing import ClassVar

import pytest
import torch
from rich.console import Console

from pacatune.study import plan, run_study
from pacatune.study.tasks import StudyTask
from tests.data.conftest import write_lines


@pytest.fixture(autouse=True)
def _blank_pictures(blank_pictures):
    """Those of a study are drawn in test_runner.py, once each."""


def run(config, folder, **options):
    """Run a study; return its result and what it printed."""
    console = Console(file=io.StringIO(), width=300)
    return run_study(config, folder, console=console, **options), console.file


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """Training and test chats whose answers can be learned, and some of both."""
    folder = tmp_path_factory.mktemp("chats")
    parts = {"train": range(40), "test": range(40, 52), "both": range(30, 52)}
    for name, numbers in parts.items():
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


TWO_STEPS = {"max_steps": 2, "bf16": False, "use_cpu": True}
WORDS = {"fruit": ["apple", "pear", "plum"], "colour": ["red", "green", "blue"]}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Training and test texts of two classes, told apart by a word."""
    folder = tmp_path_factory.mktemp("labelled")
    draw = random.Random(0)
    for name, number in (("train", 60), ("test", 20)):
        rows = []
        for _ in range(number):
            label = draw.choice(list(WORDS))
            words = [draw.choice(WORDS[label]), *draw.choices(["this", "that", "is"], k=3)]
            draw.shuffle(words)
            rows.append({"text": " ".join(words), "label": label})
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory):
    words = ["this", "that", "is", *WORDS["fruit"], *WORDS["colour"]]
    return save_bert(tmp_path_factory.mktemp("bert"), words)


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


@pytest.fixture
def class_options(bert_dir, labelled):
    return {
        "model": {"path": str(bert_dir)},
        "data": {"path": str(labelled / "train.jsonl"), "eval_path": str(labelled / "test.jsonl")},
        "training": TWO_STEPS,
    }


class Scripted(StudyTask):
    """Has real configurations of `pacatune train`, and results by a formula.

    Validation is best at a rate of 1e-3, test at 4e-3. `fail` raises at will.
    """

    runs: ClassVar = []
    fail = None

    def count(self, config):
        section = config.paca if config.method == "paca" else config.lora
        return section.r * (100 if config.method == "paca" else 230)

    def look(self, config):
        return "scripted", None

    def run(self, config):
        rate, seed = config.training.learning_rate, config.training.seed
        if Scripted.fail is not None:
            Scripted.fail(config)
        Scripted.runs.append((config.method, rate, seed))
        base = seed * 0.01 + (0.5 if config.method == "lora" else 0)
        return {
            "validation loss": base + abs(rate - 1e-3),
            "test loss": base + 1 + abs(rate - 4e-3),
            "trained parameters": self.count(config),
            "train loss": 1.0,
            "steps": 2,
            "step": 10.0 + seed,
            "kept for backward": 2.5 * 2**20,
            "general loss before": 3.0,
            "general loss after": 3.0 + rate,
        }


@pytest.fixture
def scripted(monkeypatch, text_options):
    """Let studies run the scripted task; yields its class and the options that it takes."""
    Scripted.runs, Scripted.fail = [], None
    monkeypatch.setattr(plan, "StudyTask", Scripted)
    return Scripted, text_options
