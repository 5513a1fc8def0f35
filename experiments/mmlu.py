"""MMLU: its training questions in the words in which lm-eval asks them, and its scores by lm-eval.

    python -m experiments.mmlu mmlu.jsonl

`pacatune train --data.path mmlu.jsonl` then learns the answers: a space, a letter, end of text.
PaCA's authors trained without beginning and end tokens, with each example padded to 512 tokens
(`--data.special_tokens false --training.max_length 512 --training.pad_to_multiple_of 512`), and
evaluated with a beginning token. Their prompts are in a data file that we have not seen.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pacatune.data.read import load_hub
from pacatune.files.folder import whole_file
from pacatune.installation import require_extra

LETTERS = "ABCD"
# What lm-eval 0.4 says before a question whose subject it knows; training questions name none.
_ABOUT = "The following are multiple choice questions (with answers) about {}.\n\n"


def to_row(values: Mapping[str, Any]) -> dict[str, str]:
    """Return prompt and completion of a row of cais/mmlu, asked without examples."""
    listed = "".join(map("\n{}. {}".format, LETTERS, values["choices"]))
    subject = values["subject"].replace("_", " ")
    about = _ABOUT.format(subject) if subject else ""
    prompt = f"{about}{values['question'].strip()}{listed}\nAnswer:"
    return {"prompt": prompt, "completion": f" {LETTERS[values['answer']]}"}


def write_training_file(path: Path) -> None:
    """Write the 99,842 training questions as JSON Lines."""
    rows = load_hub("cais/mmlu", "all", "auxiliary_train", "data.path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, is_new=True) as unfinished, unfinished.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(to_row(row), ensure_ascii=False) + "\n" for row in rows)


def lm_eval_results(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | dict[str, Any]],
    *,
    tasks_dir: Path | None = None,
    batch_size: int = 8,
    **options: Any,
) -> dict[str, Any]:
    """Return what lm-eval says of a model in memory, whose adapter is in it.

    Args:
        model: A causal language model, or a PEFT model around one.
        tokenizer: Its tokenizer.
        tasks: Names of MMLU and its parts; or configurations of tasks.
        tasks_dir: Folder with task files, taken instead of MMLU's.
        batch_size: Prompts that are evaluated at once.
        options: Those of `lm_eval.simple_evaluate`, such as `num_fewshot` and `limit`.
    """
    require_extra("a score by lm-eval", "experiments", ("lm_eval",))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Logits of a 16-bit model are rounded already; rounded logarithms would make more ties.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    # MMLU's files alone: lm-eval reads all of its 14,000 in ten seconds.
    mmlu = Path(str(lm_eval.__file__)).parent / "tasks" / "mmlu" / "default"
    manager = TaskManager(include_path=tasks_dir or mmlu, include_defaults=False)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=lm, tasks=[*tasks], task_manager=manager, **options
    )
    return results


def main() -> int:
    """Read the command line, and write the file."""
    parser = argparse.ArgumentParser(prog="python -m experiments.mmlu", description=__doc__)
    parser.add_argument("output", type=Path, help="file to write")
    output: Path = parser.parse_args().output
    if output.exists():
        sys.exit(f"error: {output} is there already; choose another name, or delete it.")
    try:
        write_training_file(output)
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
