import shutil

import pytest

from tests.conftest import build_model
from tests.data.conftest import chat, write_lines
from tests.docs import blocks
from tests.forks import server
from tests.image_models import save_vit


@pytest.fixture
def workplace(tmp_path, tiny_tokenizer):
    """Folder of a reader: my-model, my-data.jsonl, my-image-model, my-images and launch files."""
    server()
    shutil.copytree(blocks.ROOT / "examples" / "launch", tmp_path, dirs_exist_ok=True)
    model = build_model(len(tiny_tokenizer), hidden_size=64, max_position_embeddings=2048)
    for saved in (model, tiny_tokenizer):
        saved.save_pretrained(tmp_path / "my-model")
    save_vit(tmp_path / "my-image-model")
    chats = (chat(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(20))
    write_lines(tmp_path / "my-data.jsonl", [{"messages": turns} for turns in chats])
    return tmp_path


@pytest.fixture
def run_blocks(workplace, monkeypatch, own_strategies):
    return lambda document: blocks.run_blocks(document, workplace, monkeypatch)
