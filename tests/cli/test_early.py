"""Wrong words are refused before what takes seconds is imported."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pacatune.cli import main, train, train_image

RUN = "train --model.path tiny --data.path d.jsonl"

# Words of a run -> part of what is said.
WRONG_RUNS = {
    "train": "`model.path` is ''; give",
    "train --model tiny --data d.jsonl": ") is a section of options; did you mean --",
    "train --model.path ./nosuch --data.path d.jsonl": "./nosuch does not exist; check `model",
    "train --model.path empty --data.path d.jsonl": "empty holds no config.json",
    "train --model.path tiny": "`data.path` is ''; give",
    "train --model.path tiny --data.path no.jsonl": "no.jsonl does not exist; check `data.path`",
    f"{RUN} --data.eval_path no.csv": "no.csv does not exist; check `data.eval_path`",
    "train --model.path tiny --data.datasets=[{path:\\u0020no.csv}]": "check `data.datasets`",
    f"{RUN} --data.chat_template no.jinja": "`data.chat_template` ('no.jinja') is neither",
    f"{RUN} --data.format messages": "row 1: the columns ['completion', 'prompt'] are not",
    f"{RUN} --model.dtype bf61": "model.dtype",
    f"{RUN} --training.max_steps abc": "<class 'int'>. Got value: abc; see `pacatune train --help`",
    f"{RUN} --training.max_steps 0": "`training.max_steps` (0) must be above 0; raise",
    f"{RUN} --paca.r 0": "`r` (0) must be an integer of at least 1",
    f"{RUN} --paca.rank_pattern.q_proj x": "paca.rank_pattern",
    f"{RUN} --method lore": "did you mean 'lora'?",
    f"{RUN} --task dpo": "d.jsonl, row 1: field 'chosen' is missing",
    f"{RUN} --task kto": "d.jsonl, row 1: field 'label' is missing",
    f"{RUN} --task grpo --reward a:b --data.path wrong.csv": "field 'prompt' is missing",
    "train-image": "`model.path` is ''; give a hub id, the name of a timm model,",
    "train-image --model.path ./nosuch --data.path images": "./nosuch does not exist; check",
    "train-image --model.path resnet18 --data.path ./nosuch": "./nosuch does not exist; check `",
    "train-image --model.path m --data.path images --data.image_size 0": "`data.image_size` (0)",
}

# Words of commands that load adapters or models -> part of what is said.
WRONG_WORDS = {
    "merge --adapter ./nosuch --output out": "adapter folder './nosuch' does not exist",
    "merge --adapter tiny --output out": "'tiny' has no adapter_config.json; is it the right",
    "merge --adapter adapter --output images": "output folder 'images' is not empty",
    "merge --adapter adapter --model ./nosuch --output out": "./nosuch does not exist; check `mod",
    "merge --adapter adapter --output out --device gpu": "`device` ('gpu') is unknown to torch",
    "export --to lora --adapter ./nosuch --output out": "adapter folder './nosuch' does not exist",
    "export --to lora --adapter adapter --output images": "output folder 'images' is not empty",
    "generate --prompt a": "give --model, --adapter or both; see `pacatune generate --help`.",
    "generate --prompt a --model ./nosuch": "./nosuch does not exist; check `model`",
    "generate --prompt a --adapter ./nosuch": "adapter folder './nosuch' does not exist",
    "generate --prompt a --model tiny --device gpu": "`device` ('gpu') is unknown to torch",
    "generate --prompt a --model tiny --temperature -1": "`temperature` (-1.0) must be",
    "evaluate perplexity --model ./nosuch --output out": "./nosuch does not exist; check `model`",
    "evaluate perplexity --model tiny --output adapter": "output folder 'adapter' is not empty",
    "evaluate perplexity --model tiny --output out --text no": "`text` ('no') is no file in UTF-8",
    "patch make --adapter ./nosuch --output p": "adapter folder './nosuch' does not exist",
    "patch apply --model tiny --patch no --output out": "patch 'no' does not exist, or is no file",
    "patch diff --model tiny --with ./nosuch": "./nosuch does not exist; check `with`",
    "patch to-adapter --patch no --output out": "patch 'no' does not exist",
    "inspect ./nosuch": "adapter folder './nosuch' does not exist",
    "estimate nosuch": "unknown model 'nosuch'; ",
    "estimate llama3-8b --gpu foo": "foo",
    "estimate llama3-8b --rank 0": "`rank` (0) must be",
    "bench --output out --model ./nosuch": "./nosuch does not exist; check `model`",
    "bench --output out --shape 3": "3",
    "compare --config wrong.yaml --output out": "wrong.yaml: unknown key 'training'",
}

SCRIPT = """
import json, sys
from contextlib import redirect_stderr
from io import StringIO
from pacatune.cli import main

said = {}
for words in json.load(sys.stdin):
    with redirect_stderr(StringIO()) as said[words]:
        status = main([json.loads(f'"{word}"') for word in words.split()])
    said[words] = said[words].getvalue()
    assert status == 2, (words, said[words])
    imported = set(sys.argv[1:]) & set(sys.modules)
    assert not imported, (words, imported, said[words])
json.dump(said, sys.stdout)
"""


@pytest.fixture
def folder(tiny_model_dir, tmp_path, monkeypatch):
    """The current folder, with what is right in the words, and what is wrong."""
    for name in ("adapter", "empty", "images", "images/a", "images/b"):
        (tmp_path / name).mkdir()
    for number, name in enumerate(("a/1", "a/2", "b/1", "b/2")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "tiny").symlink_to(tiny_model_dir)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "PACA"}')
    (tmp_path / "d.jsonl").write_text('{"prompt": "1?", "completion": " 1"}\n')
    (tmp_path / "wrong.jsonl").write_text('{"q": "1?", "a": "1"}\n')
    (tmp_path / "wrong.csv").write_text("q,a\n1,2\n")
    (tmp_path / "wrong.yaml").write_text("training: {max_steps: many}\n")
    monkeypatch.chdir(tmp_path)


def words_of(text):
    return [json.loads(f'"{word}"') for word in text.split()]


def test_before_anything_heavy_is_imported(folder):
    heavy = ["trl", "peft", "datasets", "lm_eval", "transformers.modeling_utils"]
    argv = [sys.executable, "-c", SCRIPT, *heavy]
    done = subprocess.run(argv, input=json.dumps(list(WRONG_WORDS)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words, said in json.loads(done.stdout).items():
        assert said.startswith("pacatune: error: "), said
        assert said.count("\n") == 1, said
        assert WRONG_WORDS[words] in said, (words, said)


@pytest.mark.parametrize("words", WRONG_RUNS)
def test_what_a_check_without_torch_refuses(words, folder):
    name, *rest = words_of(words)
    command = {"train": train, "train-image": train_image}[name]
    with pytest.raises((ValueError, OSError), match=re.escape(WRONG_RUNS[words])):
        command.check(rest)


TYPO = "--training.learning_rte"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{RUN} {TYPO} 1", f"unknown option {TYPO}; did you mean '--training.learning_rate'?"),
        ("train --config typo.yaml", "unknown key 'training.learning_rte'; did you mean 'training"),
        (f"{RUN} --task grpo --data.path wrong.csv", "field 'prompt' is missing"),
        (
            f"train-image {TYPO} 1",
            f"unknown option {TYPO}; did you mean '--training.learning_rate'?",
        ),
    ],
)
def test_a_process_checks_its_words_without_torch(words, message, folder):
    (Path.cwd() / "typo.yaml").write_text("training: {learning_rte: 1}\n")
    code = (
        "import sys; from pacatune.cli import main\n"
        "assert main() == 2\n"
        "assert not {'torch', 'transformers', 'trl', 'peft', 'datasets'} & {*sys.modules}\n"
    )
    argv = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("pacatune: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize("words", ["--print_config", "--resume", "--auto_resume"])
def test_a_run_that_reads_no_files(words, folder, capsys):
    status = main([*RUN.replace("d.jsonl", "no.jsonl").split(), words])
    assert status == (0 if words == "--print_config" else 2)
    assert ("no.jsonl does not exist" in capsys.readouterr().err) == (words == "--auto_resume")


@pytest.mark.parametrize(
    "command", [*(f"train --task {task}" for task in train.names_of_tasks()), "train-image"]
)
def test_options_are_shown_without_torch_as_with_it(command, capsys):
    words = [*command.split(), "--print_config"]
    code = (
        "import sys; from pacatune.cli import main\n"
        "assert main() == 0\n"
        "assert sys.modules['torch'] is None and 'accelerate' not in sys.modules\n"
    )
    argv = [sys.executable, "-c", code, *words]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert main(words) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(done.stdout)


@pytest.mark.parametrize("words", ["train --help", "completion bash"])
def test_options_without_torch(words):
    code = (
        "import sys; from pacatune.cli import main\n"
        "assert main() == 0\n"
        "print(sys.modules['torch'], 'accelerate' in sys.modules)\n"
    )
    argv = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(argv, capture_output=True, text=True)
    known = "Number of trained input columns of each weight"
    assert (known in done.stdout) == (words == "train --help")
    assert done.stdout.count("\n") > 300
    assert done.stdout.endswith("None False\n")
    assert done.stderr == ""
