"""What is asked and judged by: questions, references, and the judge's prompts."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacatune.data.read import read_rows

NUM_TURNS = 2
# Category -> FastChat's temperature for answers.
TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("reasoning", "math", "coding", "extraction"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
NEEDS_REFERENCE = frozenset({"math", "reasoning", "coding"})
JUDGE_TEMPERATURE = 0.0
"""As in FastChat; left out where an endpoint says that its model takes none."""
# (with reference, turn) -> FastChat's name of the prompt, which is data and not part of this.
_PROMPT_NAMES = {
    (False, 1): "single-v1",
    (True, 1): "single-math-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 2): "single-math-v1-multi-turn",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of two turns."""

    id: int | str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None
    """A good answer to each turn."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a judge is sent about one turn of an answer."""

    question: Question
    number: int
    prompt_name: str
    system: str
    user: str
    key: str
    """Hash of judge, prompt and answer."""


def read_questions(path: str) -> list[Question]:
    """Read questions in FastChat's form, or as data sets on the hub have them."""
    questions: dict[int | str, Question] = {}
    for row in read_rows(path, option="questions"):
        number = row.values.get("question_id", row.values.get("prompt_id"))
        turns = _texts(row.values.get("turns", row.values.get("prompt")))
        category = str(row.values.get("category"))
        if number is None or number in questions or not turns or category not in TEMPERATURES:
            raise ValueError(
                f"{row.place}: {row.values!r:.160} needs a `question_id` of its own, as `turns` "
                f"{NUM_TURNS} texts, and a `category`: one of {', '.join(TEMPERATURES)}."
            )
        # FastChat has a reference to one turn of some questions: that is none.
        reference = _texts(row.values.get("reference"))
        questions[number] = Question(id=number, category=category, turns=turns, reference=reference)
    return list(questions.values())


def add_references(questions: Sequence[Question], path: str | None) -> list[Question]:
    """Return the questions with references of a `model_answer` file; None leaves their own.

    A question that is judged against a reference must have one.
    """
    found = list(questions)
    if path is not None:
        rows = [row.values for row in read_rows(path, option="references")]
        texts = {row.get("question_id"): _texts(row["choices"][0]["turns"]) for row in rows}
        found = [dataclasses.replace(one, reference=texts.get(one.id)) for one in questions]
    missing = [
        str(one.id) for one in found if one.category in NEEDS_REFERENCE and one.reference is None
    ]
    if missing:
        raise ValueError(
            f"{path or 'the file of questions'} has no reference to both turns of "
            f"{', '.join(missing)}, which are judged against one; give them: --references FILE."
        )
    return found


def read_prompts(path: Path) -> dict[str, dict[str, Any]]:
    """Read a `judge_prompts.jsonl` of FastChat, by name."""
    prompts = {str(row.values.get("name")): row.values for row in read_rows(str(path))}
    for name in _PROMPT_NAMES.values():
        if prompts.get(name, {}).get("output_format") != "[[rating]]":
            raise ValueError(f"{path} has no prompt {name!r} for a [[rating]]; add FastChat's.")
    return prompts


def render(
    prompts: dict[str, dict[str, Any]],
    question: Question,
    answers: Sequence[str],
    number: int,
    judge: str,
) -> Turn:
    """Write what a judge is sent about turn 1 or 2; the prompt of the second shows both."""
    has_reference = question.category in NEEDS_REFERENCE
    values = {"question": question.turns[0], "answer": answers[0]}
    for place in range(number):
        values[f"question_{place + 1}"] = question.turns[place]
        values[f"answer_{place + 1}"] = answers[place]
        if has_reference and question.reference:
            values[f"ref_answer_{place + 1}"] = question.reference[place]
    prompt = prompts[_PROMPT_NAMES[has_reference, number]]
    user = prompt["prompt_template"].format_map(values)
    asked = [judge, JUDGE_TEMPERATURE, prompt["system_prompt"], user]
    return Turn(
        question=question,
        number=number,
        prompt_name=prompt["name"],
        system=prompt["system_prompt"],
        user=user,
        key=hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    )


def _texts(value: Any) -> tuple[str, ...] | None:
    """Return a text for each turn; None where one is missing."""
    is_list = isinstance(value, list) and len(value) == NUM_TURNS
    return tuple(value) if is_list and all(str(one or "").strip() for one in value) else None
