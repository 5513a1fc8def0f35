"""`pacatune evaluate lm-eval`: any task of lm-eval."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.cli import evaluate_options as shared
from pacatune.cli.options import names, positive, quiet_libraries

if TYPE_CHECKING:
    from pacatune.adapters.loading import LoadedModel
    from pacatune.evaluation.harness import TaskScores
    from pacatune.evaluation.output import Report


def run(argv: list[str]) -> int:
    """Run `pacatune evaluate lm-eval` with the words after it; return the exit status."""
    options = _parse(argv)
    quiet_libraries()

    from pacatune.evaluation.harness import run_tasks
    from pacatune.evaluation.output import open_output
    from pacatune.evaluation.tasks import prepare_tasks

    open_output(Path(options.output))
    tasks = prepare_tasks(options.tasks, options.tasks_dir)
    asked = shared.values_of(options, "num_fewshot", "limit", "chat", "seed")

    def score(loaded: "LoadedModel") -> "Iterator[Report]":
        scores = run_tasks(
            loaded.model,
            loaded.tokenizer,
            tasks,
            **asked,
            batch_size=options.batch_size,
            progress=True,
        )
        yield make_report(scores)

    settings = shared.values_of(options, "tasks", "tasks_dir") | asked
    return shared.evaluate("lm-eval", argv, options, settings, score)


def make_report(scores: "TaskScores") -> "Report":
    """Return a row per task and metric."""
    from pacatune.evaluation.output import Report, score_dict
    from pacatune.evaluation.tasks import rows_of

    notes = []
    if scores.num_truncated:
        notes.append(
            f"{scores.num_truncated} prompts are longer than the model's context and lost their "
            "start."
        )
    return Report(
        title="lm-eval",
        headings=["task", "metric", "value", "standard error", "questions", "examples"],
        rows=rows_of(scores),
        result={
            "tasks": {
                task: {metric: score_dict(score) for metric, score in metrics.items()}
                for task, metrics in scores.tasks.items()
            },
            "num_fewshot": scores.num_fewshot,
            "num_truncated": scores.num_truncated,
            "task_versions": scores.versions,
        },
        notes=notes,
        questions=scores.questions,
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = shared.model_parser("lm-eval", "Score a model on any tasks of lm-eval.")
    add = parser.add_argument
    add("--tasks", type=names, required=True, metavar="A,B,...", help="such as arc_easy")
    add("--tasks-dir", metavar="DIR", help="folder with task files of your own, taken instead")
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples in each prompt (default: what the tasks say)",
    )
    add("--limit", type=positive, metavar="N", help="questions per task, the first ones")
    add("--chat", action="store_true", help="write prompts by the model's chat template")
    add("--seed", type=int, default=0, help="seed of drawn examples (default: %(default)s)")
    return parser.parse_args(argv)
