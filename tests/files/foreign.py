"""Random folders with files of the user's, commands that write there, kills: no byte may change.

python -m tests.files.foreign --folders 2000     (make soak)

Each case begins with a copy of the same small project: a model, data, an adapter, the folders of a
finished and of an interrupted run. Files are added and changed in one of them,
by names that commands use. Then commands run, each in a fork that is killed at a random time.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

NAMES = (
    *("config.yaml", "README.md", "report.json", "report.md", "loss.png", "config.json"),
    *("adapter_config.json", "adapter_model.safetensors", "model.safetensors", "pacatune.json"),
    *("tokenizer.json", "tokenizer_train.py", "tokenizers/mine.py", "vocab.txt", "merges.txt"),
    *("completions/d.txt", "runs/mine/e", "runs/events.out.tfevents.1", "notes.txt", "train.log"),
    *("checkpoint-1/trainer_state.json", "checkpoint-2/mine", "checkpoint-9/model.safetensors"),
    *("times.png", "runs/a.json"),
    *("demo.json", "paca/config.yaml", "p.safetensors"),
    *(".lock", ".incomplete/checkpoint-2/a", ".pacatune/mine", ".config.yaml", "data.jsonl"),
    *("source.json", "chat_template.jinja", "generation_config.json", "new/a.txt"),
)
PLACES = ("out", "out", "run", "cut", "model", "adapter", "new", ".")
_TRAIN = (
    *("--training.max_steps", "2", "--training.save_steps", "1", "--training.use_cpu", "true"),
    *("--training.bf16", "false", "--training.eval_strategy", "no"),
)


def commands(draw, place):
    """Return the words of a random command whose output is at a place of the project."""
    model = draw.choice(("model", "model", "model", place))
    data = draw.choice(("data.jsonl", "data.jsonl", f"{place}/data.jsonl"))
    logs = draw.choice(("none", "tensorboard"))
    run = [*_TRAIN, "--training.report_to", logs, "--training.output_dir", place]
    sources = ["--model.path", model, "--data.path", data]
    if draw.random() < 0.2:
        sources = ["--config", draw.choice(("run/config.yaml", f"{place}/config.yaml"))]
    adapter = ["--model", model, "--adapter", draw.choice(("adapter", "run", place))]
    output = ["--output", place]
    flag = draw.choice(([], ["--overwrite"], ["--overwrite"], ["--resume"], ["--auto_resume"]))
    return draw.choice(
        (
            ["train", *sources, *run, *flag],
            ["train", *sources, *run, *flag],
            ["train", *sources, *run, *flag],
            ["merge", *adapter, *output],
            ["export", *adapter, "--to", "lora", *output],
            ["patch", "make", *adapter, "--output", f"{place}/p.safetensors"],
            ["patch", "apply", "--model", model, "--patch", f"{place}/p.safetensors", *output],
        )
    )


def make_project(folder):
    from pacatune.cli import main
    from tests.conftest import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i % 7}."} for i in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--model.path", "model", "--data.path", "data.jsonl", *_TRAIN]
    for name in ("run", "cut"):
        logs = "tensorboard" if name == "run" else "none"
        more = ["--training.output_dir", name, "--training.report_to", logs]
        assert main([*words, *more]) == 0
    (folder / "cut" / "report.json").unlink()
    shutil.rmtree(folder / "cut" / "checkpoint-2")
    shutil.copytree(folder / "run", folder / "adapter")
    shutil.rmtree(folder / "adapter" / ".pacatune")


def add_files(draw, folder):
    """Add files of the user's to a folder of the project, and change some that are there."""
    folder.mkdir(exist_ok=True)
    for name in draw.sample(NAMES, draw.randrange(5)):
        path = folder / name
        if path.is_symlink() or (path.exists() and draw.random() < 0.5):
            continue
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if draw.random() < 0.1 and not path.exists():
                path.symlink_to(draw.choice(("../outside.txt", "/nowhere", "../model")))
            elif not path.is_dir():
                path.write_bytes(draw.randbytes(draw.randrange(200)))


def owned_files(folder):
    """Return the paths of the project that commands of ours may replace."""
    from pacatune.files.owned_folder import OwnedFolder

    owned = set()
    for name in ("run", "cut"):
        top = folder / name
        owned |= {top / inner for inner in OwnedFolder(path=top, kind="any").owned()}
        owned |= set((top / ".pacatune").rglob("*"))
    return owned


def state(folder, without):
    """Return what each file of the user's holds, or each link points to."""
    found = {}
    for path in folder.rglob("*"):
        if path in without or (path.is_dir() and not path.is_symlink()):
            continue
        found[path] = path.readlink() if path.is_symlink() else path.read_bytes()
    return found


def run_and_kill(words, folder, delay):
    """Run a command in a fork, and kill it after a delay; return how it ended."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.chdir(folder)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        status = 70
        try:
            from pacatune.cli import main

            status = main(words)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 70
        finally:
            os._exit(status)
    end = time.monotonic() + delay
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return "ended"
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed"


def try_case(project, seed):
    """Try one folder; return what was tried, and a line for each file that changed."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "project"
        shutil.copytree(project, folder, symlinks=True)
        (folder.parent / "outside.txt").write_text("outside")
        place = draw.choice(PLACES)
        add_files(draw, folder / place)
        before = state(folder, owned_files(folder)) | state(folder.parent, set(folder.rglob("*")))
        tried = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            words = commands(draw, place)
            # Half end by themselves: many are refused at once.
            delay = draw.choice((20, 10 ** draw.uniform(-2, 0.7)))
            tried.append(f"{' '.join(words)} ({run_and_kill(words, folder, delay)})")
            after = state(folder.parent, set())
            lost = [path for path, content in before.items() if after.get(path) != content]
            if lost:
                names = ", ".join(path.relative_to(folder.parent).as_posix() for path in lost)
                return tried, [f"seed {seed}: {names} after {'; '.join(tried)}"]
    return tried, []


def try_folders(number, first=0):
    """Try so many folders; print and return what was found."""
    import torch

    import pacatune.training.sft  # what a fork need not import anew  # noqa: F401

    torch.set_num_threads(1)
    findings, commands_tried, killed = [], 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch)
        with contextlib.chdir(project):
            make_project(project)
        for seed in range(first, first + number):
            tried, found = try_case(project, seed)
            commands_tried += len(tried)
            killed += sum(line.endswith("(killed)") for line in tried)
            findings += found
            for line in found:
                print(line, flush=True)
    print(f"{number} folders, {commands_tried} commands, {killed} killed, {len(findings)} findings")
    return findings


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folders", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    options = parser.parse_args()
    sys.exit(bool(try_folders(options.folders, options.first)))


if __name__ == "__main__":
    main()
