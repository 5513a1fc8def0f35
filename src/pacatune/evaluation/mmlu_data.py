"""MMLU as a local folder of lm-eval tasks: from its files, or the few questions in lm-eval."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pacatune.data.choices import LETTERS, Question, to_question
from pacatune.data.read import SUFFIXES, read_rows
from pacatune.evaluation.harness import require_lm_eval
from pacatune.files.folder import staged_folder
from pacatune.names import guess
from pacatune.reports.provenance import package_version

NUM_FEWSHOT = 5
NUM_SUBJECTS = 57
NUM_TEST_QUESTIONS = 14_042
"""Number of questions in the test split as released."""

_NUM_BYTES = 10 * 2**20  # the whole of MMLU
_SPLIT = re.compile(r"(?:^|[-_])(dev|test|val|validation|train)(?:[-_.]|$)")
_ASKED, _SHOWN = "test", "dev"
_BUNDLED = re.compile(
    r"Q: (.*?)\s\(A\) (.*?)\s\(B\) (.*?)\s\(C\) (.*?)\s\(D\) (.*?)\nA: (.*)", re.DOTALL
)
_ANSWER = re.compile(r"answer is \(?([A-E])\)?")


@dataclass(frozen=True, kw_only=True)
class MmluData:
    """Questions by subject."""

    shown: dict[str, list[Question]]
    """Examples for prompts."""
    asked: dict[str, list[Question]] | None
    """None: those that are shown are asked as well, each with the others as its examples."""
    source: str
    notes: list[str] = field(default_factory=list)


def read_mmlu(folder: Path) -> MmluData:
    """Read the splits `dev` and `test` out of a folder with files of MMLU.

    The original `dev/SUBJECT_dev.csv` and `test/SUBJECT_test.csv`, and Parquet or JSON files of the
    hub's `cais/mmlu`: in folders by subject, or all subjects in `all`. Other splits are passed
    over.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is not a folder; give the one with MMLU's files.")
    files = [f for f in sorted(folder.rglob("*")) if f.suffix in SUFFIXES and f.is_file()]
    together = [file for file in files if file.parent.name == "all"]
    found: dict[str, dict[str, list[Question]]] = {_ASKED: {}, _SHOWN: {}}
    for file in together or files:
        if (split := _split_of(file)) in found:
            for question in _read_file(file):
                found[split].setdefault(question.subject, []).append(question)
    for split, by_subject in found.items():
        if not by_subject:
            raise ValueError(
                f"{str(folder)!r} has no questions of the split {split!r} ({len(files)} files with "
                f"{', '.join(SUFFIXES)}); names such as `anatomy_{split}.csv` or "
                f"`anatomy/{split}-00000-of-00001.parquet` are expected."
            )
    asked, shown = found[_ASKED], found[_SHOWN]
    if alone := sorted(asked.keys() ^ shown.keys()):
        raise ValueError(
            f"{str(folder)!r}: subject {alone[0]!r} ({len(alone)} such) is only in one of the "
            f"splits {_ASKED!r} and {_SHOWN!r}; both are needed."
        )
    return MmluData(shown=shown, asked=asked, source=str(folder.resolve()), notes=_count(asked))


def bundled_mmlu() -> MmluData:
    """Return the questions of MMLU's split `dev` that come with lm-eval: real, and few.

    They are in the prompts of its task `mmlu_flan_cot_fewshot`; the answers are those that its
    chains of thought arrive at. One with five choices and one that is there twice are left out.
    """
    path = lm_eval_folder() / "flan_cot_fewshot" / "_cot_prompts.json"
    shown: dict[str, list[Question]] = {}
    num_other = 0
    for subject, prompt in sorted(json.loads(path.read_text(encoding="utf-8")).items()):
        for text in re.split(r"\n\n(?=Q: )", prompt)[1:]:
            question = _parse_bundled(text, subject)
            if question is None or question in shown.get(subject, []):
                num_other += 1
            else:
                shown.setdefault(subject, []).append(question)
    num = sum(map(len, shown.values()))
    notes = [
        f"{num} questions of MMLU's split dev, which come with lm-eval ({num_other} left out, "
        "without four choices or there twice); each is asked with the others of its subject as "
        f"examples. Too few to compare models by: the whole of MMLU has {NUM_TEST_QUESTIONS:,}."
    ]
    return MmluData(
        shown=shown, asked=None, source=f"lm-eval {package_version('lm-eval')}", notes=notes
    )


def write_tasks(data: MmluData, output: Path) -> None:
    """Write a folder that `pacatune evaluate mmlu --tasks-dir` and lm-eval's --include_path take.

    Prompts, categories and metric are those of the installed lm-eval's `mmlu`. The folder is new,
    and written as a whole or not at all.
    """
    configs = _default_configs()
    with staged_folder(output, _NUM_BYTES) as folder:
        (folder / "data").mkdir()
        subjects: dict[str, list[str]] = {}
        for subject, shown in data.shown.items():
            config = dict(configs[f"mmlu_{subject}"])
            subjects.setdefault(config.pop("tag"), []).append(f"mmlu_{subject}")
            files = {_SHOWN: _write_rows(folder, f"{subject}_{_SHOWN}", shown)}
            if data.asked is not None:
                files[_ASKED] = _write_rows(folder, f"{subject}_{_ASKED}", data.asked[subject])
            config |= {
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": files},
                "test_split": _SHOWN if data.asked is None else _ASKED,
                "num_fewshot": min(NUM_FEWSHOT, len(shown) - (data.asked is None)),
            }
            _write_yaml(folder / f"mmlu_{subject}.yaml", config)
        _write_groups(folder, configs, subjects)
        source = {"lm_eval": package_version("lm-eval"), "source": data.source, "notes": data.notes}
        (folder / "source.json").write_text(json.dumps(source, indent=1) + "\n")


def _write_groups(
    folder: Path, configs: dict[str, dict[str, Any]], subjects: dict[str, list[str]]
) -> None:
    # By name: lm-eval would take the tag of a category without subjects for a task.
    groups = {tag.removesuffix("_tasks"): names for tag, names in subjects.items()}
    whole = [name for name in configs["mmlu"]["task"] if name in groups]
    for name, members in {**groups, "mmlu": whole}.items():
        _write_yaml(folder / f"_{name}.yaml", configs[name] | {"task": members})


def _split_of(file: Path) -> str | None:
    match = _SPLIT.search(file.stem) or _SPLIT.search(file.parent.name)
    return None if match is None else match[1]


def _read_file(file: Path) -> Iterator[Question]:
    stem = _SPLIT.sub("", file.stem) if _SPLIT.match(file.stem) is None else ""
    named = stem or file.parent.name
    for row in read_rows(str(file)):
        question = to_question(row, subject=named)
        if question.subject not in _subjects():
            hint = guess(question.subject, _subjects()) or "name the file after its subject."
            raise ValueError(
                f"{row.place}: {question.subject!r} is not a subject of MMLU; {hint.strip()}"
            )
        yield question


def _count(asked: dict[str, list[Question]]) -> list[str]:
    """Return what an evaluation of these questions should say about their number."""
    notes = []
    num = sum(map(len, asked.values()))
    if num != NUM_TEST_QUESTIONS:
        notes.append(f"{num:,} questions; the released test split has {NUM_TEST_QUESTIONS:,}.")
    if len(asked) != NUM_SUBJECTS:
        notes.append(f"{len(asked)} of {NUM_SUBJECTS} subjects.")
    return notes


def _parse_bundled(text: str, subject: str) -> Question | None:
    match = _BUNDLED.fullmatch(text)
    if match is None:
        return None
    question, *choices, reasoning = match.groups()
    answers = set(_ANSWER.findall(reasoning))
    if "(E)" in choices[-1] or len(answers) != 1 or not answers <= set(LETTERS):
        return None
    return Question(question, choices, LETTERS.index(answers.pop()), subject)


@cache
def _default_configs() -> dict[str, dict[str, Any]]:
    """Return the configuration of each of lm-eval's MMLU tasks and groups."""
    folder = lm_eval_folder() / "default"
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=str(folder), include_defaults=False).task_index
    return {name: entry.cfg for name, entry in index.items() if entry.cfg is not None}


def _subjects() -> list[str]:
    names = _default_configs()
    return [name.removeprefix("mmlu_") for name in names if "tag" in names[name]]


def lm_eval_folder() -> Path:
    """Return the folder of the installed lm-eval's MMLU tasks."""
    require_lm_eval()
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks" / "mmlu"


def _write_rows(folder: Path, name: str, questions: list[Question]) -> str:
    lines = (json.dumps(asdict(q), ensure_ascii=False) + "\n" for q in questions)
    (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return f"data/{name}.jsonl"


def _write_yaml(path: Path, config: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
