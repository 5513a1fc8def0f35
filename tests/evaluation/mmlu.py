"""MMLU's questions that come with lm-eval, as data and task files of lm-eval's own format."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

LETTERS = "ABCD"
# Questions of the split dev, in the prompts of `mmlu_flan_cot_fewshot`; the answers are those that
# its chains of thought arrive at.
QUESTION = re.compile(
    r"Q: (.*?)\s\(A\) (.*?)\s\(B\) (.*?)\s\(C\) (.*?)\s\(D\) (.*?)\nA: (.*)", re.DOTALL
)
ANSWER = re.compile(r"answer is \(?([A-E])\)?")
TASKS = Path(find_spec("lm_eval").origin).parent / "tasks" / "mmlu"


def bundled_questions():
    """280 questions by subject, of which 53 have five."""
    prompts = json.loads((TASKS / "flan_cot_fewshot" / "_cot_prompts.json").read_text())
    found = {}
    for subject, prompt in sorted(prompts.items()):
        for text in re.split(r"\n\n(?=Q: )", prompt)[1:]:
            question, *choices, reasons = QUESTION.fullmatch(text).groups()
            answers = set(ANSWER.findall(reasons))
            if "(E)" in choices[-1] or len(answers) != 1 or not answers <= set(LETTERS):
                continue
            answer = LETTERS.index(answers.pop())
            row = {"question": question, "choices": choices, "answer": answer, "subject": subject}
            if row not in found.setdefault(subject, []):
                found[subject].append(row)
    return found


def write_mmlu(folder, questions=None):
    """Write a data set like cais/mmlu, whose splits are the same, and lm-eval's tasks for it."""
    shutil.copytree(TASKS / "default", folder)
    template = folder / "_default_template_yaml"
    template.write_text(template.read_text().replace("cais/mmlu", "questions"))
    (folder / "questions").mkdir()
    configs = []
    for subject, rows in (questions or bundled_questions()).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "questions" / f"{subject}.jsonl").write_text(lines)
        files = [{"split": name, "path": f"{subject}.jsonl"} for name in ("dev", "test")]
        configs.append({"config_name": subject, "data_files": files})
    head = json.dumps({"configs": configs})
    (folder / "questions" / "README.md").write_text(f"---\n{head}\n---\n")
    return folder
