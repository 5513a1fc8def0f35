"""A misspelt option is found before anything heavy is imported."""

import subprocess
import sys
from dataclasses import is_dataclass
from typing import Any

import pytest

from pacatune.cli import train, train_image
from pacatune.cli.option_names import option_annotations
from pacatune.cli.run_early import option_types
from pacatune.training.tasks import TASKS

NO_OPTIONS = {
    *("help", "config", "resume", "auto_resume", "overwrite", "push_to_hub", "print_config"),
    *("preview", "preset"),
}


@pytest.mark.parametrize(
    ("run_class", "options"),
    [
        *((path, lambda task=task: train.all_options(task)) for task, path in TASKS.items()),
        ("pacatune.training.image.config.ImageRunConfig", train_image.all_options),
    ],
)
def test_names_and_types_in_the_source_are_those_of_the_parser(run_class, options):
    known = {action.dest: action for action in options().parser._actions}
    annotations = option_annotations(*run_class.rsplit(".", 1))
    assert annotations.keys() == {n for n in known.keys() - NO_OPTIONS if not n.endswith(".help")}
    for name, kind in option_types(annotations).items():
        if kind is Any:  # of transformers
            assert name.partition(".")[0] in ("model", "training"), name
        elif not is_dataclass(kind):
            assert kind == getattr(known[name], "_typehint", known[name].type), name


def test_class_that_does_not_exist():
    with pytest.raises(LookupError, match=r"no class Nosuch in pacatune.training.config"):
        option_annotations("pacatune.training.config", "Nosuch")
    with pytest.raises(LookupError, match=r"no source of nosuch.config"):
        option_annotations("nosuch.config", "Nosuch")


SCRIPT = """
import sys
from pacatune.cli import main

assert main(sys.argv[1:]) == 2
heavy = {"torch", "transformers", "trl", "peft", "jsonargparse", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", ["train", "train --task grpo", "train-image"])
@pytest.mark.parametrize("place", ["word", "file"])
def test_nothing_heavy_is_imported_for_a_typo(command, place, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {learning_rte: 1}")
    words = ["--config", str(path)] if place == "file" else ["--training.learning_rte", "1"]
    argv = [sys.executable, "-c", SCRIPT, *command.split(), *words]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'training.learning_rate'?" in done.stderr
