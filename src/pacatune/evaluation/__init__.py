"""Score a model, with or without an adapter: MMLU, lm-eval's tasks, multiple choice, perplexity."""

from pacatune.evaluation.harness import Score, TaskScores
from pacatune.evaluation.mmlu import MmluResult, evaluate_mmlu
from pacatune.evaluation.mmlu_data import MmluData, bundled_mmlu, read_mmlu, write_tasks

__all__ = [
    "MmluData",
    "MmluResult",
    "Score",
    "TaskScores",
    "bundled_mmlu",
    "evaluate_mmlu",
    "read_mmlu",
    "write_tasks",
]
