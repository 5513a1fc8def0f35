"""Runs blocks of code of README and docs, in a folder with a tiny model and some data.

The blocks of a document run in order in one folder, as a reader would paste them. A YAML block is
written to the file that its first line names. A model and data of the hub have stand-ins. A block
that cannot run here (GPU, another program) has a comment above it that says why. `make` lines run
dry, `pip install` lines not at all.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from pacatune.cli import main
from tests.training.launching import launch

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.md")]
)
# What a reader sees first runs in `make test`, the rest in `make test-docs`.
FIRST = ("README.md", "docs/index.md")
OF_PROCESSES = ("docs/distributed.md", "docs/rl.md")
NOT_RUN_MARK = "<!-- not run: "
# What is on the hub -> what stands for it in the folder of a reader.
STAND_INS = {
    "meta-llama/Llama-3.2-1B-Instruct": "my-model",
    "trl-lib/Capybara": "my-data.jsonl",
}
# Languages that are shown only.
SHOWN = ("text", "math")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    is_run: bool


def read_blocks(document):
    blocks, language, lines, start, above = [], None, [], 0, ""
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            if language is not None:
                lines.append(line)
            elif line.strip():
                above = line
        elif language is None:
            language, lines, start = line[3:].strip(), [], number
        else:
            is_run = not above.startswith(NOT_RUN_MARK)
            code = "\n".join(lines) + "\n"
            for name, stand_in in STAND_INS.items():
                code = code.replace(name, stand_in)
            blocks.append(Block(language, code, start, is_run))
            language, above = None, ""
    assert language is None, f"{document}:{start}: the block is not closed"
    return blocks


def run_blocks(document, folder, monkeypatch):
    for block in read_blocks(document):
        if block.is_run and block.language not in SHOWN:
            print(f"{document}:{block.line}")
            run_block(block, folder, monkeypatch)


def run(command, folder):
    env = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="100")
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    env.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def commands_of(code):
    """Lines without their remarks; a here-document is one command, as are lines that go on."""
    command, end = [], None
    for line in code.splitlines():
        command.append(line if end else line.partition("  #")[0])
        if end is None and (opened := re.search(r"<<'(\w+)'$", line)):
            end = opened[1]
        if line == end or (end is None and not line.endswith("\\")):
            yield "\n".join(command)
            command, end = [], None
    assert not command, f"the command does not end: {command}"


def is_plain(words):
    """Whether there is nothing for a shell to do."""
    return not re.search(r"[|&;<>$`*\\]", words)


def run_command(line, folder, monkeypatch):
    """Run it in this process or a fork where that is the same, which spares loading torch anew."""
    words, _, output = line.partition(" > ")
    program, *rest = shlex.split(words) if is_plain(words) else [""]
    if program == "pip":
        return
    if program == "make":
        done = run(["make", "-n", *rest], ROOT)
        assert done.returncode == 0, done.stderr
    elif program == "torchrun":
        run_by_torchrun(rest, folder)
    elif program == "pacatune":
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            patch.chdir(folder)
            if output:
                file = stack.enter_context(Path(output).open("w"))
                stack.enter_context(contextlib.redirect_stdout(file))
            assert main(rest) == 0, line
    else:
        done = run(["bash", "-euo", "pipefail", "-c", line], folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def run_by_torchrun(words, folder):
    """Fork what torchrun would start; `accelerate launch` has it start new programs."""
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words)
    assert args.nproc_per_node == "2"
    how = "run_module" if args.module else "run_path"
    program = f"runpy.{how}({args.training_script!r}, run_name='__main__')"
    code = f"import os, runpy; os.chdir({str(folder)!r}); {program}"
    launch(*args.training_script_args, code=code)


def run_python(block, folder, monkeypatch):
    """Run a block in this process, as a new program as far as it can see."""
    code = compile(block.code, f"block at line {block.line}", "exec")
    with monkeypatch.context() as patch, warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("default")
        patch.chdir(folder)
        exec(code, {"__name__": "__main__"})


def run_block(block, folder, monkeypatch):
    if block.language == "yaml":
        name = re.match(r"# ([\w.-]+\.ya?ml)\n", block.code)
        assert name, "the first line of a YAML block names its file: # run.yaml"
        (folder / name[1]).write_text(block.code)
        return
    if block.language == "bash":
        for line in commands_of(block.code):
            run_command(line, folder, monkeypatch)
    else:
        run_python(block, folder, monkeypatch)
