"""Problems of reasoning-gym with one exact answer each, as prompts and completions.

The package (Apache-2.0) generates them; its own words around a problem, and its hints on the format
of an answer, would be most of the tokens and are left out.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pacatune.data.config import REASONING_GYM, PromptDataConfig
from pacatune.data.packaged.packages import prepare_rows
from pacatune.data.prompts import reasoning_gym_data
from pacatune.installation import require_extra
from pacatune.names import choose

NUM_TRAIN, NUM_TEST = 3000, 300


@dataclass(frozen=True, kw_only=True)
class Problems:
    """One kind of problem."""

    generator: str
    """reasoning-gym's name."""
    options: dict[str, Any]
    """Options of the generator."""
    prompt: str
    """What a model sees, a template of an item's `metadata`, whose lists are joined by commas. The
    answer follows after a space."""

    def rows(self, made: Any) -> Iterator[dict[str, str]]:
        """Yield a prompt and its completion for each item of a data set of reasoning-gym."""
        for i in range(len(made)):
            item = made[i]
            values = {
                key: ", ".join(value) if isinstance(value, list) else value
                for key, value in item["metadata"].items()
            }
            yield {"prompt": self.prompt.format(**values), "completion": f" {item['answer']}"}


PROBLEMS = {
    "reverse-words": Problems(
        generator="word_sequence_reversal",
        options={"min_words": 3, "max_words": 6},
        prompt="Reverse: {words}\nReversed:",
    ),
}
"""Name -> problems."""


def prepare_reasoning(
    cache: Path, name: str, *, seed: int = 0, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST
) -> tuple[Path, Path]:
    """Return train.jsonl and test.jsonl of a kind of problem, written the first time.

    Each line is `{"prompt": ..., "completion": " ..."}`. No prompt is in both files, or twice.

    Args:
        cache: Folder that gets a folder with the files.
        name: One of `PROBLEMS`.
        seed: Decides which problems.
        num_train: Number of problems to train on.
        num_test: Number of problems that are held out.

    Raises:
        ValueError: If the name is unknown, or there are not so many different problems.
        ImportError: If reasoning-gym is not installed.
    """
    name = choose(name, PROBLEMS, option="name")
    problems = PROBLEMS[name]
    # More than are wanted, since some come twice.
    data = PromptDataConfig(
        path=f"{REASONING_GYM}{problems.generator}",
        seed=seed,
        size=4 * (num_train + num_test),
        options=dict(problems.options),
    )

    def make() -> list[list[dict[str, str]]]:
        found: dict[str, dict[str, str]] = {}
        for row in problems.rows(reasoning_gym_data(data)):
            found.setdefault(row["prompt"], row)
            if len(found) == num_train + num_test:
                rows = list(found.values())
                return [rows[num_test:], rows[:num_test]]
        raise ValueError(
            f"{name!r} has {len(found)} different problems, fewer than `num_train` ({num_train}) "
            f"and `num_test` ({num_test}) together; lower them."
        )

    require_extra(f"`{name}`", "rl", ("reasoning_gym",))
    made_from = [asdict(data), problems.prompt, num_train, num_test, version("reasoning-gym")]
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:8]
    folder = cache / f"reasoning-{name}-{digest}"
    return prepare_rows(folder, ("train.jsonl", "test.jsonl"), 2**22, make)
