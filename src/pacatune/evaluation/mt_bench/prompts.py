"""The four prompts of single-answer grading, which are data and not part of this package."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pacatune.data.read import read_rows
from pacatune.evaluation.mt_bench.questions import Question

__all__ = ["JudgePrompt", "Prompt", "read_prompts", "render"]

_RATING = "[[rating]]"
# (with reference, turn) -> FastChat's name of the prompt, and what it shows the judge.
_KINDS: dict[tuple[bool, int], tuple[str, frozenset[str]]] = {
    (False, 1): ("single-v1", frozenset({"question", "answer"})),
    (True, 1): ("single-math-v1", frozenset({"question", "answer", "ref_answer_1"})),
    (False, 2): (
        "single-v1-multi-turn",
        frozenset({"question_1", "answer_1", "question_2", "answer_2"}),
    ),
    (True, 2): (
        "single-math-v1-multi-turn",
        frozenset(
            {"question_1", "answer_1", "ref_answer_1", "question_2", "answer_2", "ref_answer_2"}
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class JudgePrompt:
    """One of the four prompts, with places for what is judged."""

    name: str
    system: str
    template: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a judge is sent."""

    name: str
    """Of the `JudgePrompt`."""
    system: str
    user: str


def read_prompts(path: Path) -> dict[str, JudgePrompt]:
    """Read judge prompts in FastChat's form, by name; others than the four are passed over.

    Args:
        path: A `judge_prompts.jsonl`.

    Raises:
        OSError: If there is no such file.
        ValueError: If one of the four is missing, or shows the judge too little or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--judge-prompts ({path}) is no file; check the path.")
    rows = {row.values.get("name"): row for row in read_rows(str(path))}
    prompts = {}
    for name, fields in _KINDS.values():
        if name not in rows:
            raise ValueError(f"{path} has no prompt named {name!r}; add FastChat's.")
        values, place = rows[name].values, rows[name].place
        texts = [values.get(key) for key in ("system_prompt", "prompt_template", "output_format")]
        system, template, output = texts
        if not (isinstance(system, str) and isinstance(template, str) and output == _RATING):
            raise ValueError(
                f"{place}: {name!r} needs the texts `system_prompt` and `prompt_template`, and "
                f"{_RATING!r} as `output_format`."
            )
        _check_fields(template, fields, f"{place}: `prompt_template` of {name!r}")
        prompts[name] = JudgePrompt(name=name, system=system, template=template)
    return prompts


def render(
    prompts: Mapping[str, JudgePrompt], question: Question, answers: Sequence[str], turn: int
) -> Prompt:
    """Write what a judge is sent about one turn.

    Args:
        prompts: Of `read_prompts`.
        question: With its reference if its category needs one.
        answers: To the turns so far.
        turn: 1 or 2; the prompt of the second shows both.
    """
    name, fields = _KINDS[question.needs_reference, turn]
    values = {"question": question.turns[0], "answer": answers[0]}
    for place in range(turn):
        values[f"question_{place + 1}"] = question.turns[place]
        values[f"answer_{place + 1}"] = answers[place]
        if question.needs_reference:
            assert question.reference is not None
            values[f"ref_answer_{place + 1}"] = question.reference[place]
    prompt = prompts[name]
    user = prompt.template.format_map({key: values[key] for key in fields})
    return Prompt(name=name, system=prompt.system, user=user)


def _check_fields(template: str, expected: frozenset[str], place: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{place}: {error}; write a brace that is text twice.") from error
    found = {name for _, name, _, _ in parts if name is not None}
    # A name like {answer.__class__} or a conversion would reach into Python.
    is_plain = all(not spec and conversion is None for _, _, spec, conversion in parts)
    if found != expected or not is_plain:
        raise ValueError(
            f"{place} has the places {', '.join(sorted(found))}; it must have exactly "
            f"{', '.join(sorted(expected))}."
        )
