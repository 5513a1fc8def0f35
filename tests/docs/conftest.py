import json
import shutil

import pytest

from tests.data.conftest import chat, write_lines
from tests.docs import blocks
from tests.forks import server
from tests.image_models import save_vit, write_images


@pytest.fixture
def workplace(tmp_path, tiny_model_dir):
    """Folder of a reader: my-model, my-data.jsonl, my-image-model, my-images and launch files."""
    server()
    shutil.copytree(blocks.ROOT / "examples" / "launch", tmp_path, dirs_exist_ok=True)
    shutil.copytree(tiny_model_dir, tmp_path / "my-model")
    save_vit(tmp_path / "my-image-model")
    write_images(tmp_path / "my-images", 12)
    config = tmp_path / "my-model" / "config.json"
    longer = json.loads(config.read_text()) | {"max_position_embeddings": 2048}
    config.write_text(json.dumps(longer))
    chats = (chat(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(20))
    write_lines(tmp_path / "my-data.jsonl", [{"messages": turns} for turns in chats])
    return tmp_path


@pytest.fixture
def run_blocks(workplace, monkeypatch, measured_here, own_strategies):
    return lambda document: blocks.run_blocks(document, workplace, monkeypatch)
