"""`pacatune evaluate mmlu`: MMLU with examples in the prompt, by category."""

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pacatune.cli.evaluate import Score, values_of
from pacatune.cli.options import names, positive

if TYPE_CHECKING:
    from pacatune.evaluation.mmlu import MmluResult
    from pacatune.evaluation.output import Report

DESCRIPTION = "Score a model on MMLU by lm-eval: four categories and their average."


def add_options(add: Callable[..., Any]) -> None:
    """Add the options of this evaluation alone."""
    folder = "folder that `pacatune evaluate mmlu-data` wrote (default: the data is the hub's)"
    add("--tasks-dir", metavar="DIR", help=folder)
    add("--subjects", type=names, metavar="A,B,...", help="only these")
    examples = "examples in each prompt (default: what the tasks say, 5 for MMLU)"
    add("--num-fewshot", type=int, metavar="N", help=examples)
    add("--limit", type=positive, metavar="N", help="questions per subject, the first ones")
    add("--chat", action="store_true", help="write prompts by the model's chat template")


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Score]:
    """Return the settings, and what scores; see `evaluate`."""
    from pacatune.evaluation.harness import run_tasks
    from pacatune.evaluation.mmlu import mmlu_result, prepare_mmlu

    chosen = values_of(options, "tasks_dir", "subjects", "num_fewshot")
    tasks = prepare_mmlu(**chosen)
    asked = values_of(options, "limit", "chat")

    def score(model: Any, tokenizer: Any, **speed: Any) -> "Iterator[Report]":
        result = mmlu_result(run_tasks(model, tokenizer, tasks, **asked, **speed))
        yield _report(result, options.limit)

    return chosen | asked, score


def _report(result: "MmluResult", limit: int | None) -> "Report":
    """Return the table of the paper's Table 1 with standard errors and numbers of questions."""
    from pacatune.evaluation.mmlu import CATEGORIES
    from pacatune.evaluation.mmlu_data import NUM_SUBJECTS
    from pacatune.evaluation.output import Report, percent, result_dict

    fewest, most = result.num_fewshot
    shots = f"{most}" if fewest == most else f"{fewest} to {most}"
    scores = {title: result.categories.get(title) for title in CATEGORIES}
    scores["Avg."] = result.average
    notes = [
        f"Accuracy in % ± standard error, {shots} examples in each prompt; average by question."
    ]
    if len(result.subjects) < NUM_SUBJECTS:
        notes.append(f"{len(result.subjects)} of {NUM_SUBJECTS} subjects.")
    if result.num_truncated:
        notes.append(
            f"{result.num_truncated} prompts are longer than the model's context and lost their "
            "first examples."
        )
    if limit is not None:
        notes.append(f"Only the first {limit} questions of each subject were asked.")
    return Report(
        title="MMLU",
        headings=["", *scores],
        rows=[
            ["accuracy", *(percent(score) for score in scores.values())],
            ["questions", *(str(score.num_questions if score else 0) for score in scores.values())],
        ],
        result=result_dict(result),
        notes=notes,
        questions=result.questions,
    )
