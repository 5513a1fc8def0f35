"""Tests with real training tools, each in an environment of its own: `make test-integrations`."""

import importlib.util
import os

import pytest

TOOLS = {"axolotl": "axolotl", "llamafactory": "llamafactory", "modelexpress": "modelexpress_rl"}
TOOLS |= {"ms_swift": "swift", "verl": "verl"}
"""Beginning of a test file's name -> the package that it needs; `make test` has none of them."""

missing = [name for name, package in TOOLS.items() if importlib.util.find_spec(package) is None]
collect_ignore_glob = [f"test_{name}*.py" for name in missing]
if len(missing) < len(TOOLS):
    # None of them may report what it does, or ask a hub.
    os.environ.update(AXOLOTL_DO_NOT_TRACK="1", WANDB_MODE="disabled", HF_HUB_OFFLINE="1")

ROWS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Where is Paris?", "Paris is the capital of France, as it says in the question."),
    ("Please write a short answer.", "A short answer."),
    ("Where is the answer from?", "The answer is from the question."),
]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    from tests.data.conftest import chat, write_lines  # verl has a package `tests`, too

    write_lines(path, [{"messages": chat(*row)} for row in ROWS])
    return path
