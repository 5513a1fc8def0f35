"""Chats, files of rows, and what is prepared of them."""

import json

import pytest

from pacatune.data.config import DataConfig
from pacatune.data.encode import Encoder
from pacatune.data.prepare import prepare_data

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def chat(*contents):
    """Return turns of a user and an assistant."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def talk(question, answer):
    return {"messages": chat(question, answer)}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """Prepare rows, or with `path` or `datasets` what lies there."""

    def run(rows=(), max_length=200, num_processes=None, **options):
        if rows:
            options["path"] = write_lines(tmp_path / "data.jsonl", rows)
        config = DataConfig(**options)
        learn_all = config.loss == "all"
        encoder = Encoder(
            tokenizer=tokenizer, stop_ids={2}, max_length=max_length, learn_all=learn_all
        )
        return prepare_data(config, encoder, num_processes)

    return run
