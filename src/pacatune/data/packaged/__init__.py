"""Real models and real data that come as Python packages, pinned by hash: no model hub needed."""

from pacatune.data.packaged.language_models import prepare_model
from pacatune.data.packaged.mt_bench import prepare_mt_bench
from pacatune.data.packaged.multiple_choice import prepare_multiple_choice
from pacatune.data.packaged.packages import default_cache
from pacatune.data.packaged.questions import prepare_questions

__all__ = [
    "default_cache",
    "prepare_model",
    "prepare_mt_bench",
    "prepare_multiple_choice",
    "prepare_questions",
]
