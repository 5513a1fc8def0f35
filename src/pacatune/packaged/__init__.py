"""Real models and real data that come as Python packages, pinned by hash: no model hub needed."""

from pacatune.packaged.cache import default_cache
from pacatune.packaged.mt_bench import prepare_mt_bench
from pacatune.packaged.multiple_choice import prepare_multiple_choice
from pacatune.packaged.questions import prepare_questions
from pacatune.packaged.smollm2 import prepare_model

__all__ = [
    "default_cache",
    "prepare_model",
    "prepare_mt_bench",
    "prepare_multiple_choice",
    "prepare_questions",
]
