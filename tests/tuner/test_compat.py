"""What an old PEFT lacks; `make compat` runs all other tests there."""

import pytest

from pacatune import MosLoraConfig
from pacatune.tuner import compat


def test_an_old_release_is_named(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "0.18.1")
    with pytest.raises(
        ValueError,
        match=r"^MosLoRA needs PEFT 0.19 or newer, and this is 0.18.1; pip install -U peft.$",
    ):
        MosLoraConfig()


def test_a_release_candidate_counts_as_its_release(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "0.19.0.dev0")
    compat.require("PEFT", "0.19", "MosLoRA")
