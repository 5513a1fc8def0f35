"""The training questions of MMLU as prompts and answers, in the words in which lm-eval asks them.

    python -m experiments.mmlu mmlu.jsonl

`pacatune train --data.path mmlu.jsonl` then learns the answers: a space, a letter, end of text.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.packaged import default_cache
from pacatune.data.read import load_hub
from pacatune.files.folder import whole_file

LETTERS = "ABCD"
# What lm-eval 0.4 says before a question whose subject it knows; training questions name none.
_ABOUT = "The following are multiple choice questions (with answers) about {}.\n\n"

TRAINING_FILE = default_cache() / "mmlu-train.jsonl"


def to_row(values: Mapping[str, Any]) -> dict[str, str]:
    """Return prompt and completion of a row of cais/mmlu, asked without examples."""
    listed = "".join(map("\n{}. {}".format, LETTERS, values["choices"]))
    subject = values["subject"].replace("_", " ")
    about = _ABOUT.format(subject) if subject else ""
    prompt = f"{about}{values['question'].strip()}{listed}\nAnswer:"
    return {"prompt": prompt, "completion": f" {LETTERS[values['answer']]}"}


def write_training_file(path: Path = TRAINING_FILE) -> None:
    """Write the 99,842 training questions as JSON Lines, where the file is not there yet."""
    if path.exists():
        return
    rows = load_hub("cais/mmlu", "all", "auxiliary_train", "data.path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, is_new=True) as unfinished, unfinished.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(to_row(row), ensure_ascii=False) + "\n" for row in rows)


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
