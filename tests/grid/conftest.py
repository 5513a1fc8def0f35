"""A small model in a GGUF file of several formats, and a run on it."""

import contextlib
import hashlib
import io
import json

import pytest

from pacatune.cli import main
from tests.conftest import build_model

ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Yes."}]}
    for q in ("Is it?", "Was it?", "Will it be?", "Can it be?")
]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build(tokenizer, **config):
    return build_model(len(tokenizer), hidden_size=64, intermediate_size=96, **config)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("gguf")
    pytest.importorskip("gguf")
    from tests.grid.files import write_gguf

    others = {"ffn_down": "Q8_0", "attn_v": "Q5_1", "attn_output": "Q4_1", "ffn_up": "F16"}
    return write_gguf(folder / "base.gguf", build(tiny_tokenizer), tiny_tokenizer, "Q4_0", others)


def train_in(model_file, folder, *more):
    """Train a few steps in a file, on data that is held out too; return what `train` says."""
    folder.mkdir(exist_ok=True)
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--model.path", model_file, "--data.path", data, "--training.use_cpu", "true"]
    words += ["--training.output_dir", folder / "run", "--training.max_steps", "8", *more]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["train", *map(str, words)]) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def run_dir(model_file, tmp_path_factory):
    """What `train` makes of a few steps, at a rate whose changes are seen in 4 bits."""
    folder = tmp_path_factory.mktemp("run")
    words = ["--data.eval_fraction", "0", "--training.learning_rate", "0.002"]
    words += ["--paca.r", "4", "--paca.paca_alpha", "16"]
    assert "warning" not in train_in(model_file, folder, *words)
    return folder / "run"
