"""`pacatune evaluate lm-eval`: any task of lm-eval."""

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pacatune.cli.evaluate import Score, values_of
from pacatune.cli.options import names, positive

if TYPE_CHECKING:
    from pacatune.evaluation.harness import TaskScores
    from pacatune.evaluation.output import Report

DESCRIPTION = "Score a model on any tasks of lm-eval."


def add_options(add: Callable[..., Any]) -> None:
    """Add the options of this evaluation alone."""
    add("--tasks", type=names, required=True, metavar="A,B,...", help="such as arc_easy")
    add("--tasks-dir", metavar="DIR", help="folder with task files of your own, taken instead")
    examples = "examples in each prompt (default: what the tasks say)"
    add("--num-fewshot", type=int, metavar="N", help=examples)
    add("--limit", type=positive, metavar="N", help="questions per task, the first ones")
    add("--chat", action="store_true", help="write prompts by the model's chat template")
    add("--seed", type=int, default=0, help="seed for drawing the examples (default: %(default)s)")


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Score]:
    """Return the settings, and what scores; see `evaluate`."""
    from pacatune.evaluation.harness import run_tasks
    from pacatune.evaluation.tasks import prepare_tasks

    tasks = prepare_tasks(options.tasks, options.tasks_dir)
    asked = values_of(options, "num_fewshot", "limit", "chat", "seed")

    def score(model: Any, tokenizer: Any, **speed: Any) -> "Iterator[Report]":
        yield make_report(run_tasks(model, tokenizer, tasks, **asked, **speed))

    return values_of(options, "tasks", "tasks_dir") | asked, score


def make_report(scores: "TaskScores") -> "Report":
    """Return a row per task and metric."""
    from pacatune.evaluation.output import Report, result_dict

    result = result_dict(scores)
    result["task_versions"] = result.pop("versions")
    notes = []
    if scores.num_truncated:
        notes.append(
            f"{scores.num_truncated} prompts are longer than the model's context and lost their "
            "start."
        )
    return Report(
        title="lm-eval",
        headings=["task", "metric", "value", "standard error", "questions", "examples"],
        rows=[
            [
                task,
                metric,
                f"{score.value:.4f}",
                "-" if score.stderr is None else f"{score.stderr:.4f}",
                str(score.num_questions),
                str(scores.num_fewshot.get(task, "-")),
            ]
            for task, metrics in scores.tasks.items()
            for metric, score in metrics.items()
        ],
        result=result,
        notes=notes,
        questions=scores.questions,
    )
