"""Score a model, with or without an adapter: MMLU, lm-eval's tasks, multiple choice, perplexity.

Parts are lazy: the command line reads their options without torch.
"""

from typing import TYPE_CHECKING

from pacatune.lazy import import_later

if TYPE_CHECKING:
    from pacatune.evaluation.choice import (
        ChoiceQuestion,
        ChoiceResult,
        evaluate_choice,
        read_questions,
    )
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

__getattr__, __dir__ = import_later(
    __name__, __all__, (".mmlu_data", ".harness", ".choice", ".mmlu", ".perplexity", ".tasks")
)
