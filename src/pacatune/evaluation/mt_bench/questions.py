"""The questions: what is asked, at which temperature, and the answers to compare with."""

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pacatune.data.read import Row, read_rows

__all__ = [
    "NEEDS_REFERENCE",
    "NUM_TURNS",
    "TEMPERATURES",
    "Question",
    "QuestionId",
    "add_references",
    "answer_turns",
    "choose_questions",
    "read_questions",
    "read_references",
    "row_identity",
]

NUM_TURNS = 2
# FastChat's, of the answers; the order is that of the tables.
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
_ID_KEYS, _TURN_KEYS = ("question_id", "prompt_id"), ("turns", "prompt")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of two turns."""

    id: QuestionId
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None
    """A good answer to each turn."""

    @property
    def needs_reference(self) -> bool:
        """Whether the judge compares answers with a reference."""
        return self.category in NEEDS_REFERENCE

    @property
    def temperature(self) -> float:
        """Of the model that answers."""
        return TEMPERATURES[self.category]


def read_questions(path: str) -> list[Question]:
    """Read questions in FastChat's form, or as data sets on the hub have them.

    Args:
        path: File, or hub data set; `hub` is short for one.

    Raises:
        OSError: If there is no such file or data set.
        ValueError: If a row is no question of two turns in one of the eight categories, or an id
            comes twice.
    """
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
    """Return the questions of some categories, the first few of each.

    Args:
        questions: All.
        categories: Names; empty takes all.
        limit: How many of each category; None takes all.

    Raises:
        ValueError: If a category is unknown, or no question is left.
    """
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


def read_references(path: str) -> dict[QuestionId, tuple[str, ...]]:
    """Read answers to compare with: a `model_answer` file of FastChat, of a good model.

    Args:
        path: File.

    Raises:
        OSError: If there is no such file.
        ValueError: If a row has no answer to both turns.
    """
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
    questions: Iterable[Question], references: Mapping[QuestionId, tuple[str, ...]], source: str
) -> list[Question]:
    """Return the questions, those that need one with the reference that is given for them.

    Args:
        questions: References of their own are left out.
        references: By question id.
        source: Where they come from, for the message.

    Raises:
        ValueError: If a question that needs one has none.
    """
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


def answer_turns(values: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Return the turns of an answer in FastChat's form, of its first choice.

    Args:
        values: The row.
        place: Where it stands, for the message.

    Raises:
        ValueError: If it is in another form.
    """
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
    """Return the id of the question that a row is about.

    Args:
        values: The row.
        place: Where it stands, for the message.

    Raises:
        ValueError: If there is none.
    """
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
    return Question(
        id=row_identity(row.values, row.place), category=category, turns=turns, reference=reference
    )


def _check_category(name: str, place: str) -> None:
    if name in TEMPERATURES:
        return
    near = difflib.get_close_matches(name, TEMPERATURES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TEMPERATURES)}."
    raise ValueError(f"{place}: unknown category {name!r}; {hint}")


def _rows(path: str, option: str) -> Iterable[Row]:
    try:
        yield from read_rows(path)
    except OSError as error:
        raise FileNotFoundError(
            f"{option} ({path!r}) is neither a file nor a data set that the hub gives out "
            f"({type(error).__name__}); check the path or the network."
        ) from error


def _texts(value: Any) -> tuple[str, ...] | None:
    is_texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return tuple(value) if is_texts and value else None
