"""Steps of a cell that are pacatune's own commands: train, then evaluate; each done once."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pacatune.training.config_file import save_config

# Of a command that Ctrl-C or a signal stopped, as the shell has it.
EXIT_INTERRUPTED = 130

__all__ = ["Steps", "evaluate_words", "shell_line", "train_words"]

_LAST_LINES = 5
# Files that say that a command has ended well.
_DONE = {"train": "report.json", "train-image": "report.json", "evaluate": "evaluation.json"}


def train_words(run: Any, path: Path) -> list[str]:
    """Return the command that trains a run; its configuration is written to `path` when it runs."""
    return [run.command, "--config", str(path)]


def evaluate_words(kind: str, model: str, adapter: Path | None, *more: str) -> list[str]:
    """Return a command of `pacatune evaluate`, without its output folder.

    Args:
        kind: mmlu, choice or mt-bench.
        model: Folder or hub id.
        adapter: Folder of one, if there is one.
        *more: Further words.
    """
    with_adapter = [] if adapter is None else ["--adapter", str(adapter)]
    return ["evaluate", kind, "--model", model, *with_adapter, *more]


def shell_line(words: list[str]) -> str:
    """Return a command as it is typed."""
    return shlex.join(["pacatune", *words])


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Runs commands in the folder of a cell, and skips those that an earlier call ended."""

    folder: Path
    tell: Callable[[str], None]
    place: Literal["here", "apart"]
    """In this process, or in one of its own, which gives all its memory back."""

    def train(self, run: Any, name: str) -> tuple[dict[str, Any], Path]:
        """Train a run, going on from its last checkpoint; return its report and its folder.

        Args:
            run: A RunConfig or ImageRunConfig; its output folder is set.
            name: Of the run, in the cell's folder.
        """
        output, config = self.folder / name, self.folder / f"{name}.yaml"
        run.training.output_dir = run.training.given["output_dir"] = str(output)
        report = output / _DONE["train"]
        if not report.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            save_config(run, config)
            words = train_words(run, config)
            if output.is_dir():
                has_checkpoint = any(output.glob("checkpoint-*"))
                words.append("--resume" if has_checkpoint else "--overwrite")
            self._run(words, name)
        values: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return values, output

    def evaluate(self, words: list[str], name: str) -> dict[str, Any]:
        """Evaluate by a command; return what its evaluation.json holds.

        Args:
            words: Of `evaluate_words`.
            name: Of the evaluation's folder, in the cell's.
        """
        output = self.folder / name
        result = output / _DONE["evaluate"]
        values = _finished(result)
        if values is None:
            if output.is_dir():
                shutil.rmtree(output)  # half of an evaluation, which is never gone on with
            self._run([*words, "--output", str(output)], name)
            values = _finished(result)
        assert values is not None, "the command ended well"
        return values

    def mt_bench(self, words: list[str], name: str) -> dict[str, Any]:
        """Score by MT-Bench, going on with the answers and judgments that there are."""
        output = self.folder / name
        self._run([*words, "--output", str(output)], name)
        values: dict[str, Any] = json.loads((output / "mt_bench.json").read_text(encoding="utf-8"))
        return values

    def _run(self, words: list[str], name: str) -> None:
        self.tell(f"  {shell_line(words)}")
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"{name}.log"
        status = (_run_here if self.place == "here" else _run_apart)(words, log)
        if status == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise RuntimeError(
                f"`{shell_line(words)}` ended with status {status}: "
                f"{' '.join(lines[-_LAST_LINES:])} (all of it is in {log})"
            )


def _finished(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values if values.get("finished") else None


def _run_here(words: list[str], log: Path) -> int:
    from pacatune.cli import main

    with (
        log.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        return main(words)


def _run_apart(words: list[str], log: Path) -> int:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as file:
        command = [sys.executable, "-m", "pacatune", *words]
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    return done.returncode
