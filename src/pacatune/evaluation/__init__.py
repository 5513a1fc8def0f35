"""Score a model, with or without an adapter: MMLU, lm-eval's tasks, multiple choice, perplexity.

Parts are lazy: the command line reads their options without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pacatune.data.choices import ChoiceQuestion
    from pacatune.evaluation.choice import ChoiceResult, evaluate_choice, read_questions
    from pacatune.evaluation.harness import Score, TaskScores
    from pacatune.evaluation.mmlu import MmluResult, evaluate_mmlu
    from pacatune.evaluation.mmlu_data import MmluData, bundled_mmlu, read_mmlu, write_tasks
    from pacatune.evaluation.perplexity import TextScore, default_text, evaluate_perplexity
    from pacatune.evaluation.tasks import evaluate_tasks

__all__ = [
    "ChoiceQuestion",
    "ChoiceResult",
    "MmluData",
    "MmluResult",
    "Score",
    "TaskScores",
    "TextScore",
    "bundled_mmlu",
    "default_text",
    "evaluate_choice",
    "evaluate_mmlu",
    "evaluate_perplexity",
    "evaluate_tasks",
    "read_mmlu",
    "read_questions",
    "write_tasks",
]

# Each has some of these names; a module is only imported where none before it has the name.
_HOMES = ("mmlu_data", "harness", "choice", "mmlu", "perplexity", "tasks")


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (import_module(f"pacatune.evaluation.{home}") for home in _HOMES)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
