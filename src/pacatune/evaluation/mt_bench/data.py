"""Questions, references and judge prompts: from files, from the hub, or out of their package."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pacatune.evaluation.mt_bench.config import MtBenchConfig
from pacatune.evaluation.mt_bench.prompts import JudgePrompt, read_prompts
from pacatune.evaluation.mt_bench.questions import (
    Question,
    QuestionId,
    add_references,
    choose_questions,
    read_questions,
    read_references,
)
from pacatune.packaged.cache import default_cache
from pacatune.packaged.mt_bench import FILES, PROMPTS, QUESTIONS, REFERENCES, prepare_mt_bench

__all__ = ["Data", "load_data"]


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
        self.name = FILES[QUESTIONS].requirement
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
