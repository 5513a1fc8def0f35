"""Write the tables of options in docs/cli.md from the commands' own parsers.

python -m tools.cli_reference
"""

import argparse
import importlib
import sys
from pathlib import Path

from jsonargparse import capture_parser

from pacatune.cli.options import parser_of
from pacatune.reports.rows import Table
from tools.doc_block import rewrite

DOCUMENT = Path(__file__).parents[1] / "docs" / "cli.md"
# Commands whose options form sections, the longer name first.
_WITH_SECTIONS = ("train-image", "train")
_SECTIONS = ("model", "data", "paca", "moslora", "lora", "training")


def options_table(name):
    """Return the options of a command (`merge`), or of a section of one (`train-data`).

    With a task too: `train-data-of-grpo`.
    """
    name, _, task = name.partition("-of-")
    for command in _WITH_SECTIONS:
        if name == command or name.startswith(f"{command}-"):
            return _section_table(command, name.removeprefix(command).removeprefix("-"), task)
    return _table(find_parser(name)._actions)


def find_parser(command, task=""):
    """Return the parser of a command, for one of its tasks where it has several."""
    first, _, second = command.partition("-")
    if first in ("evaluate", "patch"):
        module = importlib.import_module(f"pacatune.cli.{first}")
        return parser_of(f"{first} {second}", module.SUBCOMMANDS[second])
    module = importlib.import_module(f"pacatune.cli.{command.replace('-', '_')}")
    if command in _WITH_SECTIONS:
        return module.all_options(*([task] if task else [])).parser
    if hasattr(module, "command"):
        return parser_of(command, module.command)
    return capture_parser(module.run, [])


def _section_table(command, section, task):
    """Return the options of one section; those of training that are not transformers' own."""
    from pacatune.training import TrainingConfig
    from pacatune.training.arguments import own_options
    from pacatune.training.image import ImageTrainingConfig

    training = ImageTrainingConfig if command == "train-image" else TrainingConfig
    ours = {f"training.{name}" for name in own_options(training)}
    actions = [
        action
        for action in find_parser(command, task)._actions
        if action.option_strings
        and action.dest != section
        and action.dest.rpartition(".")[0] == section
        and (section != "training" or action.dest in ours)
        and action.dest not in _SECTIONS
    ]
    return _table(actions)


def _table(actions):
    rows = []
    for action in actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if action.dest.endswith(".help") or action.help == argparse.SUPPRESS:
            continue
        shown = ", ".join(f"`{option}`" for option in action.option_strings)
        shown = shown or f"`{action.metavar or action.dest}`"
        rows.append([shown, _default(action), _help(action)])
    return "\n".join(Table(header=["option", "default", ""], cells=rows, num_index=3).markdown())


def _default(action):
    if action.required:
        return "required"
    if action.default in (None, False, "", [], argparse.SUPPRESS):
        return ""
    value = getattr(action.default, "value", action.default)
    return f"`{value}`"


def _help(action):
    text = " ".join((action.help or "").replace("(default: %(default)s)", "").split())
    text = text.replace("%%", "%").replace("|", r"\|")
    return text.strip() or _choices(action)


def _choices(action):
    return ", ".join(f"`{choice}`" for choice in action.choices or ())


def main():
    """Rewrite docs/cli.md."""
    for path in rewrite([DOCUMENT], "options", options_table):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
