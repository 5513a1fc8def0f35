"""`pacatune evaluate choice`: multiple choice."""

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pacatune.cli.evaluate import Score, values_of
from pacatune.cli.options import positive

if TYPE_CHECKING:
    from pacatune.evaluation import ChoiceResult
    from pacatune.evaluation.output import Report

DESCRIPTION = "Score a model on multiple-choice questions by the likelihood of each choice."


def add_options(add: Callable[..., Any]) -> None:
    """Add the options of this evaluation alone."""
    data = ".jsonl files with question, choices, answer"
    add("--data", nargs="+", required=True, metavar="FILE", help=data)
    add("--limit", type=positive, metavar="N", help="questions per data set, the first ones")
    add("--chat", action="store_true", help="ask by the model's chat template")


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Score]:
    """Return the settings, and what scores; see `evaluate`."""
    from pacatune.evaluation.choice import evaluate_choice, read_questions
    from pacatune.evaluation.harness import require_lm_eval

    require_lm_eval()
    data = {path: read_questions(path) for path in dict.fromkeys(options.data)}
    asked = values_of(options, "limit", "chat")

    def score(model: Any, tokenizer: Any, **speed: Any) -> "Iterator[Report]":
        results = {}
        for name, questions in data.items():
            results[name] = evaluate_choice(model, tokenizer, questions, **asked, **speed)
            yield _report(results)

    return values_of(options, "data") | asked, score


def _report(results: "dict[str, ChoiceResult]") -> "Report":
    """Return a row per data set."""
    from pacatune.evaluation.output import Report, percent, result_dict

    notes = ["Accuracy in % ± standard error; `per character`: by log-likelihood per character."]
    for name, result in results.items():
        if result.num_truncated:
            notes.append(
                f"{name}: {result.num_truncated} questions are longer than the model's context and "
                "lost their start."
            )
    return Report(
        title="multiple choice",
        headings=["data", "accuracy", "per character", "chance", "questions"],
        rows=[
            [
                name,
                percent(result.accuracy),
                percent(result.accuracy_normalised),
                f"{100 * result.chance:.1f}",
                str(result.accuracy.num_questions),
            ]
            for name, result in results.items()
        ],
        result={name: result_dict(result) for name, result in results.items()},
        notes=notes,
        questions=[
            {"data": name, **each} for name, result in results.items() for each in result.questions
        ],
    )
