"""`pacatune evaluate WHAT`: the table of evaluations."""

import importlib

from pacatune.names import did_you_mean

# Each is the module `pacatune.cli.evaluate_NAME` (`-` as `_`) with `run(argv: list[str]) -> int`.
SUBCOMMANDS = {
    "mmlu": "MMLU with five examples in the prompt, by category as in the paper",
    "mmlu-data": "write MMLU's questions as a local folder of tasks, for use offline",
    "lm-eval": "any other task of lm-eval",
    "mt-bench": "80 questions of two turns, answers graded by another model",
    "choice": "multiple choice: social_iqa, goal_inference, fever, or your own questions",
    "perplexity": "perplexity and bits per byte of text",
}


def run(argv: list[str]) -> int:
    """Run the evaluation that the first word names with the words after it; return its status.

    Raises:
        ValueError: If there is no such evaluation.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    name = argv[0]
    if name not in SUBCOMMANDS:
        kind = "option" if name.startswith("-") else "evaluation"
        hint = did_you_mean(name, SUBCOMMANDS)
        raise ValueError(f"unknown {kind} {name!r}; {hint} See `pacatune evaluate --help`.")
    module = importlib.import_module(f"pacatune.cli.evaluate_{name.replace('-', '_')}")
    status: int = module.run(argv[1:])
    return status


def _usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items())
    return (
        "usage: pacatune evaluate WHAT [OPTIONS]\n\n"
        "Score a model, with or without an adapter.\n\n"
        f"what:\n{table}\n\n"
        "`pacatune evaluate WHAT --help` lists the options of one."
    )
