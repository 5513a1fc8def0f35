"""The real model and the real data of `pacatune demo`, from hash-pinned packages."""

from pacatune.demo.cache import default_cache
from pacatune.demo.model import prepare_model
from pacatune.demo.questions import prepare_questions

__all__ = ["default_cache", "prepare_model", "prepare_questions"]
