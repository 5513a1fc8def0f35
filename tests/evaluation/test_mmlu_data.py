import csv
import json
import shutil
from dataclasses import asdict

import pytest

from pacatune.data.choices import LETTERS, Question
from pacatune.evaluation import MmluData, bundled_mmlu, read_mmlu, write_tasks
from pacatune.evaluation import mmlu_data as mmlu_data_module


def questions(subject, num):
    return [
        Question(
            f"Which, number {i}?",
            [f"{i}", f"{i + 1}", f'a, "b" {i}', "none\nof them"],
            i % 4,
            subject,
        )
        for i in range(num)
    ]


DATA = {
    "dev": {name: questions(name, 5) for name in ("anatomy", "marketing")},
    "test": {name: questions(name, 7)[5:] for name in ("anatomy", "marketing")},
}


def write_csv(folder):
    """The layout of the original archive."""
    for split, by_subject in DATA.items():
        (folder / split).mkdir(parents=True)
        for subject, rows in by_subject.items():
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                for row in rows:
                    writer.writerow([row.question, *row.choices, LETTERS[row.answer]])
    (folder / "auxiliary_train").mkdir()
    (folder / "auxiliary_train" / "arc_easy.csv").write_text("q,a,b,c,d,A\n")


def write_parquet(folder):
    """The layout of the hub's cais/mmlu, with all subjects together and by subject."""
    from datasets import Dataset

    for split, by_subject in DATA.items():
        together = [asdict(row) for rows in by_subject.values() for row in rows]
        for name, rows in {"all": together, "anatomy": together[:2]}.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")


def write_jsonl(folder):
    for split, by_subject in DATA.items():
        for subject, rows in by_subject.items():
            path = folder / subject / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [asdict(row) for row in rows]
            for line in lines:
                del line["subject"]  # known from the folder
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("write", [write_csv, write_parquet, write_jsonl])
def test_layouts_give_the_same_questions(tmp_path, write):
    write(tmp_path)
    data = read_mmlu(tmp_path)
    assert data.shown == DATA["dev"]
    assert data.asked == DATA["test"]
    assert data.notes == [
        "4 questions; the released test split has 14,042.",
        "2 of 57 subjects.",
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: text.rindex(",")], "row 2: .*'answer': None} needs"),
        (lambda text: text[: text.rindex("none")], "row 2: unexpected end of data"),
        (lambda text: text[: text.rindex("6?") + 3], "row 2: .* needs .* four texts as choices"),
        (lambda text: text.replace(",C\n", ",E\n"), "row 2: .*'answer': 'E'} needs"),
        (lambda text: text.replace(",C\n", ",C,D\n"), "row 2: .*more fields than columns"),
    ],
)
def test_damaged_rows_are_named(tmp_path, damage, message):
    write_csv(tmp_path)
    path = tmp_path / "test" / "anatomy_test.csv"
    text = path.read_bytes().decode().replace("\r\n", "\n")
    path.write_text(damage(text))
    with pytest.raises(ValueError, match=f"anatomy_test.csv, {message}"):
        read_mmlu(tmp_path)


def test_folder_without_questions(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder; give the one with MMLU's files"):
        read_mmlu(tmp_path / "no")
    with pytest.raises(ValueError, match=r"has no questions of the split 'test' \(0 files with"):
        read_mmlu(tmp_path)


def test_subject_in_one_split_only(tmp_path):
    write_csv(tmp_path)
    (tmp_path / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(ValueError, match=r"subject 'anatomy' \(1 such\) is only in one of"):
        read_mmlu(tmp_path)


def test_unknown_subject_suggests_the_nearest(tmp_path):
    write_csv(tmp_path)
    (tmp_path / "dev" / "anatomy_dev.csv").rename(tmp_path / "dev" / "anatomi_dev.csv")
    with pytest.raises(ValueError, match="'anatomi' is not a subject of MMLU; did you mean"):
        read_mmlu(tmp_path)
    shutil.move(tmp_path / "dev" / "anatomi_dev.csv", tmp_path / "dev" / "_dev.csv")
    with pytest.raises(ValueError, match="'dev' is not a subject of MMLU; name the file after its"):
        read_mmlu(tmp_path)


def test_bundled_questions_are_those_of_lm_evals_prompts(bundled):
    folder = mmlu_data_module.lm_eval_folder() / "flan_cot_fewshot"
    prompts = json.loads((folder / "_cot_prompts.json").read_text())
    asked = [one for each in bundled.shown.values() for one in each]
    assert len(asked) == 280
    assert len(bundled.shown) == 57
    assert bundled.notes[0].startswith("280 questions of MMLU's split dev, which come with")
    for one in asked:
        listed = " ".join(f"({LETTERS[i]}) {one.choices[i]}" for i in range(4))
        text = " ".join(prompts[one.subject].split())
        assert " ".join(f"Q: {one.question} {listed} A: Let's think".split()) in text
        assert f"answer is ({LETTERS[one.answer]})" in text
    assert one.question == one.question.strip()


def test_folder_is_written_whole_or_not_at_all(bundled, tasks_dir, tmp_path):
    assert len(list(tasks_dir.glob("mmlu_*.yaml"))) == 57
    assert json.loads((tasks_dir / "source.json").read_text())["source"].startswith("lm-eval 0.")
    with pytest.raises(FileExistsError, match="is not empty; choose another"):
        write_tasks(bundled, tasks_dir)
    odd = MmluData(shown={"alchemy": questions("alchemy", 5)}, asked=None, source="here")
    with pytest.raises(KeyError, match="mmlu_alchemy"):
        write_tasks(odd, tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr("pacatune.installation.find_spec", lambda name: None)
    mmlu_data_module._default_configs.cache_clear()
    with pytest.raises(ValueError, match=r"not installed \(lm_eval\): .*'pacatune\[eval\]'"):
        bundled_mmlu()
