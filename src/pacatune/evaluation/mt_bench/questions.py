"""The questions: what is asked, at which temperature, and the answers to compare with."""

import dataclasses
import string
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacatune.data.packaged import default_cache, prepare_mt_bench
from pacatune.data.packaged.mt_bench import FILES, PROMPTS, QUESTIONS, REFERENCES
from pacatune.data.read import Row, read_rows
from pacatune.evaluation.mt_bench.config import MtBenchConfig
from pacatune.names import did_you_mean

__all__ = [
    "NEEDS_REFERENCE",
    "NUM_TURNS",
    "TEMPERATURES",
    "Data",
    "JudgePrompt",
    "Prompt",
    "Question",
    "QuestionId",
    "add_references",
    "answer_turns",
    "choose_questions",
    "load_data",
    "read_prompts",
    "read_questions",
    "read_references",
    "render",
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
        """Return the temperature at which the model answers."""
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
    raise ValueError(f"{place}: unknown category {name!r}; {did_you_mean(name, TEMPERATURES)}")


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


# The four prompts of single-answer grading, which are data and not part of this package.


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
    """Name of the `JudgePrompt`."""
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
        prompts: What `read_prompts` returns.
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


# Questions, references and judge prompts: from files, from the hub, or out of their package.


@dataclass(frozen=True, kw_only=True)
class Data:
    """What one evaluation asks and judges by."""

    questions: list[Question]
    prompts: dict[str, JudgePrompt]
    """Empty if nothing is judged."""
    sources: dict[str, str]
    """Where questions, references and prompts come from."""


def load_data(config: MtBenchConfig, say: Callable[[str], None]) -> Data:
    """Read all data of an evaluation, so that nothing is missing later.

    Args:
        config: Names the files; the package is fetched only for what they leave out.
        say: Called with one line before a download.

    Raises:
        OSError: If a file is missing, or the package cannot be downloaded.
        ValueError: If something in them is damaged, or a question lacks its reference.
    """
    package = _Package(config, say)
    path = config.questions or str(package.path(QUESTIONS))
    everything = read_questions(path)
    questions = choose_questions(everything, config.categories, config.limit)
    sources = {"questions": config.questions or package.name}
    if config.no_judge:
        return Data(questions=questions, prompts={}, sources=sources)
    references, source = _references(config, everything, questions, package)
    prompts = read_prompts(config.judge_prompts or package.path(PROMPTS))
    return Data(
        questions=add_references(questions, references, source),
        prompts=prompts,
        sources={
            **sources,
            "references": source,
            "judge_prompts": str(config.judge_prompts or package.name),
        },
    )


class _Package:
    """The package's files, fetched when the first is asked for."""

    def __init__(self, config: MtBenchConfig, say: Callable[[str], None]) -> None:
        self.name = FILES.requirement
        self._cache, self._say = config.cache or default_cache(), say

    def path(self, name: str) -> Path:
        return prepare_mt_bench(self._cache, self._say) / name


def _references(
    config: MtBenchConfig,
    everything: Sequence[Question],
    chosen: Sequence[Question],
    package: _Package,
) -> tuple[dict[QuestionId, tuple[str, ...]], str]:
    """Return reference answers and where they come from.

    All come from one place where that is possible, since they decide over scores; and from the same
    place for some of the questions as for all.
    """
    if config.references is not None:
        return read_references(config.references), config.references
    if not any(one.needs_reference for one in chosen):
        return {}, "not needed"
    needing = [one for one in everything if one.needs_reference]
    own = {one.id: one.reference for one in needing if one.reference is not None}
    if config.questions is not None and len(own) == len(needing):
        return own, config.questions
    packaged = read_references(str(package.path(REFERENCES)))
    # A question of one's own may have the number of one of theirs.
    theirs = {one.id: one.turns for one in read_questions(str(package.path(QUESTIONS)))}
    fitting = {one.id: packaged[one.id] for one in needing if theirs.get(one.id) == one.turns}
    if len(fitting) == len(needing):
        return fitting, package.name
    return own | fitting, f"{config.questions} and {package.name}"
