"""Score a model, with or without an adapter: tasks of lm-eval, multiple choice, perplexity.

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
    from pacatune.evaluation.perplexity import TextScore, default_text, evaluate_perplexity
    from pacatune.evaluation.tasks import evaluate_tasks

__all__ = [
    "ChoiceQuestion",
    "ChoiceResult",
    "Score",
    "TaskScores",
    "TextScore",
    "default_text",
    "evaluate_choice",
    "evaluate_perplexity",
    "evaluate_tasks",
    "read_questions",
]

__getattr__, __dir__ = import_later(
    __name__, __all__, (".harness", ".choice", ".perplexity", ".tasks")
)
