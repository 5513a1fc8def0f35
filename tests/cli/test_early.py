"""Wrong words are refused before what takes seconds is imported, in the words of the run itself."""

import json
import subprocess
import sys

import pytest
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
    "train --model.path tiny --data.path empty": "empty has no .jsonl, .json, .csv or",
    f"{RUN} --data.eval_path no.csv": "no.csv does not exist; check `data.eval_path`",
    "train --model.path tiny --data.datasets=[{path:\\u0020no.csv}]": "check `data.datasets`",
    f"{RUN} --data.chat_template no.jinja": "`data.chat_template` ('no.jinja') is neither",
    f"{RUN} --data.eval_fraction 2": "`data.eval_fraction` (2.0) must be in [0, 1)",
    f"{RUN} --data.format messages": "d.jsonl, row 1: format 'prompt-completion' among rows",
    f"{RUN} --model.dtype bf61": "`model.dtype` (bf61) must be one of auto, float32, bfloat16",
    f"{RUN} --training.max_steps abc": "`training.max_steps` (abc) must be an integer; see",
    f"{RUN} --training.max_steps 0": "`training.max_steps` (0) must be above 0, or -1",
    f"{RUN} --training.learning_rate 0": "`training.learning_rate` (0.0) must be above 0",
    f"{RUN} --paca.r 0.5": "`paca.r` (0.5) must be an integer; see `pacatune train --help`.",
    f"{RUN} --paca.r 0": "`r` (0) must be an integer of at least 1",
    f"{RUN} --paca.rank_pattern.q_proj x": "`paca.rank_pattern` (x) must be an integer",
    f"{RUN} --lora.lora_dropout 1": "`lora.lora_dropout` (1.0) must be in [0, 1)",
    f"{RUN} --method lore": "did you mean 'lora'?",
    f"{RUN} --config wrong.yaml": "`training.max_steps` (many) must be an integer; see",
    f"{RUN} --data.path wrong.jsonl": "wrong.jsonl, row 1: columns ['a', 'q'] fit no format",
    f"{RUN} --data.path wrong.csv": "wrong.csv, row 1: columns ['a', 'q'] fit no format",
    f"{RUN} --data.eval_path wrong.csv": "wrong.csv, row 1: columns ['a', 'q'] fit no format",
    f"{RUN} --task dpo": "d.jsonl, row 1: field 'chosen' is missing",
    f"{RUN} --task kto": "d.jsonl, row 1: field 'label' is missing",
    f"{RUN} --task grpo --reward a:b --data.path wrong.csv": "field 'prompt' is missing",
    "train-image": "`model.path` is ''; give a hub id, the name of a timm model,",
    "train-image --model.path ./nosuch --data.path images": "./nosuch does not exist; check",
    "train-image --model.path resnet18 --data.path ./nosuch": "./nosuch does not exist; `data",
    "train-image --model.path m --data.path d.jsonl": "d.jsonl is a file; `data.path` must be",
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
    "evaluate perplexity --model tiny --output out --text no": "'no' is not a file; check `--text`",
    "patch make --adapter ./nosuch --output p": "adapter folder './nosuch' does not exist",
    "patch apply --model tiny --patch no --output out": "patch 'no' does not exist, or is no file",
    "patch diff --model tiny --with ./nosuch": "./nosuch does not exist; check `with`",
    "patch to-adapter --patch no --output out": "patch 'no' does not exist",
    "inspect ./nosuch": "adapter folder './nosuch' does not exist",
    "estimate nosuch": "unknown model 'nosuch'; ",
    "estimate llama3-8b --gpu foo": "foo",
    "estimate llama3-8b --rank 0": "`rank` (0) must be",
    "bench --output out --model ./nosuch": "./nosuch does not exist; give a config.json",
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


@pytest.mark.parametrize(
    ("wrong", "heavy"),
    [
        (WRONG_RUNS, ["torch", "transformers", "trl", "peft", "datasets", "matplotlib"]),
        (WRONG_WORDS, ["trl", "peft", "datasets", "lm_eval", "transformers.modeling_utils"]),
    ],
    ids=["runs", "other commands"],
)
def test_before_anything_heavy_is_imported(wrong, heavy, folder):
    argv = [sys.executable, "-c", SCRIPT, *heavy]
    done = subprocess.run(argv, input=json.dumps(list(wrong)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words, said in json.loads(done.stdout).items():
        assert said.startswith("pacatune: error: "), said
        assert said.count("\n") == 1, said
        assert wrong[words] in said, (words, said)


@pytest.mark.parametrize("words", [words for words in WRONG_RUNS if "--paca" not in words])
def test_in_the_words_of_the_run_itself(words, folder, capsys, monkeypatch):
    argv = [json.loads(f'"{word}"') for word in words.split()]
    assert main(argv) == 2
    early = capsys.readouterr().err
    for command in (train, train_image):
        monkeypatch.setattr(command, "check_options", lambda *_: {})
    assert main(argv) == 2
    assert capsys.readouterr().err == early


@pytest.mark.parametrize("words", ["--print_config", "--resume", "--auto_resume"])
def test_a_run_that_reads_no_files(words, folder, capsys):
    status = main([*RUN.replace("d.jsonl", "no.jsonl").split(), words])
    assert status == (0 if words == "--print_config" else 2)
    assert ("no.jsonl does not exist" in capsys.readouterr().err) == (words == "--auto_resume")


@pytest.mark.parametrize("command", ["train --task dpo", "train --task grpo", "train-image"])
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
    assert capsys.readouterr().out == done.stdout


def test_help_without_torch():
    code = (
        "import sys; from pacatune.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sys.modules['torch'], 'accelerate' in sys.modules)\n"
    )
    argv = [sys.executable, "-c", code, "train", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert "Number of trained input columns of each weight" in done.stdout
    assert done.stdout.endswith("None False\n")
    assert done.stderr == ""
