"""What is asked and judged by: questions, reference answers and the judge's prompts."""

import dataclasses
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacatune.data.read import Row, read_rows
from pacatune.evaluation.mt_bench.config import MtBenchConfig
from pacatune.names import did_you_mean

NUM_TURNS = 2
# FastChat's temperatures for answers; tables list the categories in this order.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
NEEDS_REFERENCE = frozenset({"math", "reasoning", "coding"})
HUB_QUESTIONS = "lighteval/mt-bench"

QuestionId = int | str
Turns = tuple[str, ...]
_ID_KEYS, _TURN_KEYS = ("question_id", "prompt_id"), ("turns", "prompt")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of two turns."""

    id: QuestionId
    category: str
    turns: Turns
    reference: Turns | None = None
    """A good answer to each turn."""

    @property
    def needs_reference(self) -> bool:
        """Whether the judge compares answers with a reference."""
        return self.category in NEEDS_REFERENCE

    @property
    def temperature(self) -> float:
        """Return the temperature at which the model answers."""
        return TEMPERATURES[self.category]


def read_questions(path: str) -> list[Question]:
    """Read questions in FastChat's form, or as data sets on the hub have them."""
    questions: dict[QuestionId, Question] = {}
    for row in _rows(HUB_QUESTIONS if path == "hub" else path, "--questions"):
        question = _question(row)
        if question.id in questions:
            raise ValueError(f"{row.place}: the id {question.id!r} comes twice; remove one row.")
        questions[question.id] = question
    return list(questions.values())


def choose_questions(
    questions: Sequence[Question], categories: Collection[str], limit: int | None
) -> list[Question]:
    """Return the questions of some categories, or of all, the first few of each."""
    for name in categories:
        _check_category(name, "--categories")
    chosen = []
    for category in TEMPERATURES:
        if not categories or category in categories:
            chosen += [one for one in questions if one.category == category][:limit]
    if not chosen:
        raise ValueError(
            f"--categories ({', '.join(categories)}) leaves no question; they have "
            f"{', '.join(sorted({one.category for one in questions}))}."
        )
    return chosen


def read_references(path: str) -> dict[QuestionId, Turns]:
    """Read answers of a good model, to compare with, from a `model_answer` file of FastChat."""
    references = {}
    for row in _rows(path, "--references"):
        turns = answer_turns(row.values, row.place)
        if len(turns) != NUM_TURNS or not all(turns):
            raise ValueError(
                f"{row.place}: {len(turns)} turns; a reference answers both turns of a question."
            )
        references[row_identity(row.values, row.place)] = turns
    return references


def add_references(
    questions: Iterable[Question], references: Mapping[QuestionId, Turns], source: str
) -> list[Question]:
    """Return the questions with these references; a question that needs one must have one."""
    result = [dataclasses.replace(one, reference=references.get(one.id)) for one in questions]
    missing = [one for one in result if one.needs_reference and one.reference is None]
    if missing:
        shown = ", ".join(f"{one.id} ({one.category})" for one in missing[:5])
        raise ValueError(
            f"{source}: no reference answer to {len(missing)} of the questions that are judged "
            f"against one: {shown}{', ...' * (len(missing) > 5)}; give them: --references FILE, "
            "or leave their categories out: --categories."
        )
    return result


def answer_turns(values: Mapping[str, Any], place: str) -> Turns:
    """Return the turns of an answer in FastChat's form, of its first choice."""
    choices = values.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    turns = _texts(first.get("turns")) if isinstance(first, dict) else None
    if turns is None:
        raise ValueError(
            f'{place}: no answer in the form of FastChat, {{"question_id": ..., "choices": '
            '[{"index": 0, "turns": ["...", "..."]}]}}.'
        )
    return turns


def row_identity(values: Mapping[str, Any], place: str) -> QuestionId:
    """Return the id of the question that a row is about."""
    found = next((values[key] for key in _ID_KEYS if key in values), None)
    if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
        raise ValueError(f"{place}: `question_id` ({found!r}) must be a number or a name.")
    return found


def _question(row: Row) -> Question:
    given = next((row.values[key] for key in _TURN_KEYS if key in row.values), None)
    turns = _texts(given)
    if turns is None or len(turns) != NUM_TURNS or not all(map(str.strip, turns)):
        raise ValueError(
            f"{row.place}: `turns` ({str(given)[:60]!r}) must be a list of {NUM_TURNS} texts, "
            "the two questions of a conversation."
        )
    category = str(row.values.get("category"))
    _check_category(category, row.place)
    reference = _texts(row.values.get("reference"))
    if reference is not None and (len(reference) != NUM_TURNS or not all(reference)):
        reference = None  # FastChat has one for one turn of some questions
    number = row_identity(row.values, row.place)
    return Question(id=number, category=category, turns=turns, reference=reference)


def _check_category(name: str, place: str) -> None:
    if name not in TEMPERATURES:
        raise ValueError(f"{place}: unknown category {name!r}; {did_you_mean(name, TEMPERATURES)}")


def _rows(path: str, option: str) -> Iterable[Row]:
    try:
        yield from read_rows(path)
    except OSError as error:
        raise FileNotFoundError(
            f"{option} ({path!r}) is neither a file nor a data set that the hub gives out "
            f"({type(error).__name__}); check the path or the network."
        ) from error


def _texts(value: Any) -> Turns | None:
    is_texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return tuple(value) if is_texts and value else None


# The four prompts of single-answer grading, which are data and not part of this package.


_RATING = "[[rating]]"
_ONE = frozenset({"question", "answer"})
_TWO = frozenset({"question_1", "answer_1", "question_2", "answer_2"})
# (with reference, turn) -> FastChat's name of the prompt, and what it shows the judge.
_KINDS: dict[tuple[bool, int], tuple[str, frozenset[str]]] = {
    (False, 1): ("single-v1", _ONE),
    (True, 1): ("single-math-v1", _ONE | {"ref_answer_1"}),
    (False, 2): ("single-v1-multi-turn", _TWO),
    (True, 2): ("single-math-v1-multi-turn", _TWO | {"ref_answer_1", "ref_answer_2"}),
}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a judge is sent."""

    name: str
    system: str
    user: str
    """With places for what is judged until `render` fills them."""


def read_prompts(path: Path) -> dict[str, Prompt]:
    """Read a `judge_prompts.jsonl` of FastChat, by name; others than the four are passed over."""
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--judge-prompts ({path}) is no file; check the path.")
    rows = {row.values.get("name"): row for row in read_rows(str(path))}
    prompts = {}
    for name, fields in _KINDS.values():
        if name not in rows:
            raise ValueError(f"{path} has no prompt named {name!r}; add FastChat's.")
        values, place = rows[name].values, rows[name].place
        system, template = values.get("system_prompt"), values.get("prompt_template")
        is_graded = values.get("output_format") == _RATING
        if not (isinstance(system, str) and isinstance(template, str) and is_graded):
            raise ValueError(
                f"{place}: {name!r} needs the texts `system_prompt` and `prompt_template`, and "
                f"{_RATING!r} as `output_format`."
            )
        _check_fields(template, fields, f"{place}: `prompt_template` of {name!r}")
        prompts[name] = Prompt(name=name, system=system, user=template)
    return prompts


def render(
    prompts: Mapping[str, Prompt], question: Question, answers: Sequence[str], turn: int
) -> Prompt:
    """Write what a judge is sent about turn 1 or 2; the prompt of the second shows both."""
    name, fields = _KINDS[question.needs_reference, turn]
    values = {"question": question.turns[0], "answer": answers[0]}
    for place in range(turn):
        values[f"question_{place + 1}"] = question.turns[place]
        values[f"answer_{place + 1}"] = answers[place]
        if question.needs_reference:
            assert question.reference is not None
            values[f"ref_answer_{place + 1}"] = question.reference[place]
    user = prompts[name].user.format_map({key: values[key] for key in fields})
    return dataclasses.replace(prompts[name], user=user)


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


@dataclass(frozen=True, kw_only=True)
class Data:
    """What one evaluation asks and judges by."""

    questions: list[Question]
    prompts: dict[str, Prompt]
    """Empty if nothing is judged."""
    sources: dict[str, str]
    """Where questions, references and prompts come from."""


def load_data(config: MtBenchConfig) -> Data:
    """Read all data of an evaluation, so that nothing is missing later."""
    assert config.questions is not None, "the configuration has checked it"
    everything = read_questions(config.questions)
    questions = choose_questions(everything, config.categories, config.limit)
    if config.judge_prompts is None or config.no_judge:
        return Data(questions=questions, prompts={}, sources={"questions": config.questions})
    source = config.references or config.questions
    if config.references is not None:
        references = read_references(config.references)
    else:
        references = {one.id: one.reference for one in questions if one.reference is not None}
    return Data(
        questions=add_references(questions, references, source),
        prompts=read_prompts(config.judge_prompts),
        sources={
            "questions": config.questions,
            "references": source,
            "judge_prompts": str(config.judge_prompts),
        },
    )
