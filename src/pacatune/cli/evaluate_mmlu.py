"""`pacatune evaluate mmlu`: MMLU with examples in the prompt, by category."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.cli import evaluate_options as shared
from pacatune.cli.options import names, positive, quiet_libraries

if TYPE_CHECKING:
    from pacatune.adapters.loading import LoadedModel
    from pacatune.evaluation.mmlu import MmluResult
    from pacatune.evaluation.output import Report


def run(argv: list[str]) -> int:
    """Run `pacatune evaluate mmlu` with the words after it; return the exit status."""
    options = _parse(argv)
    quiet_libraries()

    from pacatune.evaluation.mmlu import ask_mmlu, prepare_mmlu
    from pacatune.evaluation.output import open_output

    open_output(Path(options.output))
    chosen = shared.values_of(options, "tasks_dir", "subjects", "num_fewshot")
    tasks = prepare_mmlu(**chosen)
    asked = shared.values_of(options, "limit", "chat")

    def score(loaded: "LoadedModel") -> "Iterator[Report]":
        result = ask_mmlu(
            loaded.model,
            loaded.tokenizer,
            tasks,
            **asked,
            batch_size=options.batch_size,
            progress=True,
        )
        report = make_report(result)
        if options.limit is not None:
            report.notes.append(
                f"Only the first {options.limit} questions of each subject were asked."
            )
        yield report

    return shared.evaluate("mmlu", argv, options, chosen | asked, score)


def make_report(result: "MmluResult") -> "Report":
    """Return the table of the paper's Table 1 with standard errors and numbers of questions."""
    from pacatune.evaluation.mmlu import CATEGORIES
    from pacatune.evaluation.mmlu_data import NUM_SUBJECTS
    from pacatune.evaluation.output import Report, percent, score_dict

    fewest, most = result.num_fewshot
    shots = f"{most}" if fewest == most else f"{fewest} to {most}"
    scores = {
        **{title: result.categories.get(title) for title in CATEGORIES},
        "Avg.": result.average,
    }
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
    return Report(
        title="MMLU",
        headings=["", *scores],
        rows=[
            ["accuracy", *(percent(score) for score in scores.values())],
            ["questions", *(str(score.num_questions if score else 0) for score in scores.values())],
        ],
        result={
            "categories": {name: score_dict(score) for name, score in result.categories.items()},
            "average": score_dict(result.average),
            "subjects": {name: score_dict(score) for name, score in result.subjects.items()},
            "num_fewshot": list(result.num_fewshot),
            "num_truncated": result.num_truncated,
        },
        notes=notes,
        questions=result.questions,
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = shared.model_parser(
        "mmlu", "Score a model on MMLU by lm-eval: four categories and their average."
    )
    add = parser.add_argument
    add(
        "--tasks-dir",
        metavar="DIR",
        help="folder that `pacatune evaluate mmlu-data` wrote (default: the data comes from the "
        "hub)",
    )
    add("--subjects", type=names, metavar="A,B,...", help="only these")
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples in each prompt (default: what the tasks say, 5 for MMLU)",
    )
    add("--limit", type=positive, metavar="N", help="questions per subject, the first ones")
    add("--chat", action="store_true", help="write prompts by the model's chat template")
    return parser.parse_args(argv)
