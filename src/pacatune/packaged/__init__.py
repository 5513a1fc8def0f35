"""Real models and real data that come as Python packages, pinned by hash: no model hub needed."""

from pacatune.packaged.language_models import prepare_model
from pacatune.packaged.mt_bench import prepare_mt_bench
from pacatune.packaged.multiple_choice import prepare_multiple_choice
from pacatune.packaged.packages import default_cache
from pacatune.packaged.questions import prepare_questions

__all__ = [
    "default_cache",
    "prepare_model",
    "prepare_mt_bench",
    "prepare_multiple_choice",
    "prepare_questions",
]
