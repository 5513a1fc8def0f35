"""The page of all commands, from their own parsers; built with the site."""

import argparse
import importlib
from collections.abc import Iterator

from pacatune.cli.entry import COMMANDS
from pacatune.cli.options import parser_of
from pacatune.cli.train import parser_of_task
from pacatune.reports.rows import Table
from pacatune.training.tasks import DEFAULT_TASK

_INTRODUCTION = """# Commands

Every command with its options, which `pacatune COMMAND --help` shows too. Options of `train` form
sections: a YAML file (`--config`) has them as mappings, options on the command line override it,
and `--print_config` prints every option with its explanation as such a file. Of `training` every
option of TRL's or transformers' class may be given; listed are those that are ours or have other
defaults here.
"""
# Sections of the options of train, and tasks whose `data` has options of its own.
_SECTIONS = ("model", "data", "paca", "lora", "training")
_OTHER_DATA = {"dpo": "of dpo, kto and reward", "grpo": "of grpo and rloo"}


def page() -> str:
    """Return the page as Markdown."""
    return "\n".join([_INTRODUCTION, *_sections()])


def _sections() -> Iterator[str]:
    for command in COMMANDS:
        yield f"## pacatune {command}\n"
        if command == "train":
            yield f"{find_parser(command).description}\n\n{_table(_own_actions())}\n"
            for section in _SECTIONS:
                yield f"### `{section}` of train\n\n{_table(_own_actions(section))}\n"
            for task, whose in _OTHER_DATA.items():
                yield f"### `data` {whose}\n\n{_table(_own_actions('data', task))}\n"
            continue
        module = importlib.import_module(f"pacatune.cli.{command}")
        for name in getattr(module, "SUBCOMMANDS", [""]):
            heading = f"### pacatune {command} {name}\n\n" if name else ""
            parser = find_parser(f"{command}-{name}" if name else command)
            yield f"{heading}{parser.description}\n\n{_table(parser._actions)}\n"


def find_parser(command: str, task: str = "") -> argparse.ArgumentParser:
    """Return the parser of a command (`merge`, `patch-make`), for one of its tasks."""
    first, _, second = command.partition("-")
    if command not in COMMANDS:
        module = importlib.import_module(f"pacatune.cli.{first}")
        return parser_of(f"{first} {second}", module.SUBCOMMANDS[second])
    if command == "train":
        return parser_of_task(task or DEFAULT_TASK)
    module = importlib.import_module(f"pacatune.cli.{command}")
    return parser_of(command, module.command)


def _own_actions(section: str = "", task: str = "") -> list[argparse.Action]:
    """Return the options of `train` in one section; those of training that are ours."""
    from pacatune.training import TrainingConfig
    from pacatune.training.arguments import own_options

    ours = {f"training.{name}" for name in own_options(TrainingConfig)}
    return [
        action
        for action in find_parser("train", task)._actions
        if action.option_strings
        and action.dest != section
        and action.dest.rpartition(".")[0] == section
        and (section != "training" or action.dest in ours)
        and action.dest not in _SECTIONS
    ]


def _table(actions: list[argparse.Action]) -> str:
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


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.default in (None, False, "", [], argparse.SUPPRESS):
        return ""
    value = getattr(action.default, "value", action.default)
    return f"`{value}`"


def _help(action: argparse.Action) -> str:
    text = " ".join((action.help or "").replace("(default: %(default)s)", "").split())
    text = text.replace("%%", "%").replace("|", r"\|")
    return text.strip() or ", ".join(f"`{choice}`" for choice in action.choices or ())
