"""Wrong words are one line that says what to do, before what takes seconds is imported."""

import json
import re
import subprocess
import sys

import pytest

from pacatune.adapters import loading
from pacatune.cli import main
from pacatune.training.language import Task

RUN = "train --model.path tiny --data.path d.jsonl"
BOTH = "--adapter adapter --output out"
TYPO = "--training.learning_rte"

# Words of a run -> part of what is said.
WRONG_RUNS = {
    "train": "`model.path` is ''; give a hub id",
    "train --model tiny --data d.jsonl": ") is a section of options; did you mean --",
    "train --model.path tiny --data.path no.jsonl": "no.jsonl does not exist; check `data.path`",
    "train --model.path tiny --data.datasets=[{path:\\u0020no.csv}]": "check `data.datasets`",
    f"{RUN} --training.learning_rate fast": "`training.learning_rate` ('fast') must be a number or "
    "null; see `pacatune train --help`.",
    f"{RUN} --training.bf16 yess": "`training.bf16` ('yess') must be true, false or null; see",
    f"{RUN} --model.quantization nf5": "('nf5') must be nf4, fp4, int8 or null; see",
    f"{RUN} --paca.layers_to_transform x": "('x') must be a list, a whole number or null; see",
    "train --config rate.yaml": "`training.learning_rate` ('fast') must be a number or null; see",
    f"{RUN} --lr 1": "unknown option --lr; did you mean '--training.learning_rate'?",
    f"{RUN} --epochs 1": "--epochs; did you mean '--training.num_train_epochs'?",
    f"{RUN} --batch_size 1": "; did you mean '--training.per_device_train_batch_size'?",
    f"{RUN} --paca.rank_pattern.q_proj x": "paca.rank_pattern",
    f"{RUN} --method lora_": "did you mean 'lora'?",
    f"{RUN} --preview 0": "preview",
    f"{RUN} --reward a:f": "unknown option --reward; ",
    f"{RUN} --task dop": "`--task` ('dop') must be one of sft, dpo, ",
    f"{RUN} {TYPO} 1": f"unknown option {TYPO}; did you mean '--training.learning_rate'?",
    "train --config task.yaml": "`task of task.yaml` (\"['a']\") must be one of sft",
    "train --config flag.yaml": "flag.yaml: 'resume' belongs on the command line, as --resume.",
    f"{RUN} --training.output_dir /proc/none/a": "nothing can be written in /proc (No such file",
    f"{RUN} --adapter nope": "adapter folder 'nope' does not exist; check `adapter`",
    f"{RUN} --adapter images": "'images' has no adapter_config.json",
    "train --model.path bare --data.path d.jsonl": "`model.path` (bare) holds no weights in saf",
}

# Words of other commands -> part of what is said without PEFT, TRL or a model class.
EARLY = {
    "trian": "unknown command 'trian'; did you mean 'train'?",
    "merge --adapter adapter --output images": "output folder 'images' is not empty; choose",
    "merge --adapter a": "the following arguments are required: output",
    f"merge {BOTH} --device cuda:99": "`device` ('cuda:99') is not on this machine",
    f"export {BOTH} --to onnx": "`to` ('onnx') must be one of lora",
    "generate --prompt a": "give --model, --adapter or both; see `pacatune generate --help`.",
    "generate --prompt a --max_new_tokens few": "`max_new_tokens` ('few') must be a whole number;",
    "generate --prompt=-a --compare": "--compare needs --adapter",
    "generate --model tiny": "the following arguments are required: prompt; see `pacatune",
    "generate --promt=a": "unknown option --promt; did you mean '--prompt'?",
    "patch revrt": "unknown command of patch 'revrt'; did you mean 'revert'?",
    "patch recover --model ./no": "folder 'no' does not exist",
    "inspect": "the following arguments are required: adapter; see `pacatune inspect --help`.",
    "inspect a -- -b": "unrecognized arguments: -b; see",
    "estimate llama3-8b --gpu h100 --memory 1GiB": "give only one of --gpu, --memory",
    "estimate llama3-8b --max rank": "--max needs --gpu or --memory",
    # An option that there is not comes before those that are missing.
    **{
        f"{command} --outptu x": "unknown option --outptu; did you mean '--output'?"
        for command in ("merge", "patch make")
    },
}

# What is found before a model is loaded.
LATER = {
    "merge --adapter paca --output out --model nowhere": "`model` ('nowhere') is neither a file or",
    "estimate llama3.2-1b --method shira": "`method` ('shira') looks at values when its",
}

SCRIPT = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pacatune.cli import main

said = {}
for words in json.load(sys.stdin):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = main([json.loads(f'"{word}"') for word in words.split()])
    imported = set(sys.argv[1:]) & set(sys.modules)
    said[words] = status, out.getvalue(), [*imported], err.getvalue()
json.dump(said, sys.stdout)
"""


@pytest.fixture
def folder(tiny_model_dir, adapter_dir, tmp_path, monkeypatch):
    """The current folder, with what is right in the words, and what is wrong; it stays as it is."""
    files = {
        "adapter/adapter_config.json": '{"peft_type": "PACA"}',
        "d.jsonl": '{"prompt": "1?", "completion": " 1"}\n',
        "task.yaml": "task: [a]\n",
        "rate.yaml": "training: {learning_rate: fast}\n",
        "flag.yaml": "resume: true\n",
        "bare/config.json": "{}",
        "images/a.png": "",
    }
    for name in ("adapter", "bare", "images"):
        (tmp_path / name).mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "tiny").symlink_to(tiny_model_dir)
    (tmp_path / "paca").symlink_to(adapter_dir)
    monkeypatch.chdir(tmp_path)
    before = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    yield
    assert [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


def words_of(text):
    return [json.loads(f'"{word}"') for word in text.split()]


def is_line(said, message):
    return re.fullmatch(f"pacatune: error: .*{re.escape(message)}.*\n", said) is not None


@pytest.mark.parametrize("words", WRONG_RUNS)
def test_runs_before_weights_are_loaded(words, folder, monkeypatch, capsys):
    monkeypatch.setattr(Task, "load_model", lambda *_: pytest.fail("weights were loaded"))
    assert main(words_of(words)) == 2
    said = capsys.readouterr().err
    assert is_line(said, WRONG_RUNS[words]), said


def test_before_anything_heavy_is_imported(folder):
    heavy = ["trl", "peft", "datasets", "transformers.modeling_utils"]
    argv = [sys.executable, "-c", SCRIPT, *heavy]
    done = subprocess.run(argv, input=json.dumps(list(EARLY)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words, (status, out, imported, said) in json.loads(done.stdout).items():
        assert (words, status, out, imported) == (words, 2, "", [])
        assert (words, is_line(said, EARLY[words])) == (words, True), said


@pytest.mark.parametrize("words", LATER)
def test_before_a_model_is_loaded(words, folder, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_language_model", lambda *_, **__: pytest.fail("loaded"))
    assert main(words_of(words)) == 2
    out, said = capsys.readouterr()
    assert (out, is_line(said, LATER[words])) == ("", True), said
