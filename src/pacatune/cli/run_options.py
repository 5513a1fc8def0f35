"""Options of a run: one per field of its configuration and sections, from words and YAML files."""

import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pacatune.names import choose, suggest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

FLAGS: Mapping[str, Mapping[str, Any]] = {
    "config": {"action": "config", "help": "YAML file with options."},
    "resume": {
        "action": "store_true",
        "help": "Continue the run in training.output_dir from its last checkpoint.",
    },
    "auto_resume": {
        "action": "store_true",
        "help": "Continue the run in training.output_dir if it has a checkpoint, else start it; a "
        "finished one stays as it is. For launchers that repeat a command.",
    },
    "overwrite": {
        "action": "store_true",
        "help": "Delete the files of another run in training.output_dir first.",
    },
    "push_to_hub": {
        "type": str | None,
        "metavar": "ORGANISATION/NAME",
        "help": "Upload the finished result to this repository of the hub, which is created before "
        "training; private with training.hub_private_repo.",
    },
    "print_config": {
        "action": "store_true",
        "help": "Print all options as a commented config file, and stop.",
    },
}
"""What is no option of a run: by name, arguments of `add_argument`."""


class RunOptions:
    """The command line of a command that trains: one option per field of the run and its sections.

    The class of the run names the command; `flags` are those that only this command has.
    """

    def __init__(
        self, run_class: Any, description: str, flags: Mapping[str, Mapping[str, Any]]
    ) -> None:
        from jsonargparse import set_parsing_settings

        from pacatune.training.config_file import option_parser

        self.run_class = run_class
        self.sections = run_class.sections()
        self.flags = ("help", *FLAGS, *flags)
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        self.parser = option_parser(
            prog=f"pacatune {run_class.command}",
            description=f"{description} Options of a config file come first, options here override "
            "them.",
        )
        for name, arguments in {**FLAGS, **flags}.items():
            self.parser.add_argument(f"--{name}", **arguments)
        self.parser.add_class_arguments(run_class, skip=set(self.sections))
        for name, section in self.sections.items():
            self.parser.add_class_arguments(section, name)
        self._add_help_of_arguments()
        if sys.modules.get("torch", self) is None:  # where only options are shown
            self.parser.set_defaults({"training.optim": "adamw_torch_fused"})

    def _add_help_of_arguments(self) -> None:
        """Take the help of training options from where TRL and transformers write it."""
        # What we declare ourselves has its help in docstrings instead.
        kind = self.sections["training"]
        texts = {f"training.{f.name}": f.metadata.get("help") for f in fields(kind)}
        for action in self.parser._actions:
            text = texts.get(action.dest)
            if text:
                action.help = text.replace("%%", "%").replace("%", "%%")

    def parse(self, argv: list[str]) -> "Namespace":
        """Parse the words of the command line and its config files; wrong ones are a ValueError."""
        check_names(argv, {action.dest for action in self.parser._actions}, self.flags)
        self._words = argv
        return parse_words(self.parser, argv)

    def to_config(self, options: "Namespace") -> Any:
        """Build the run, which refuses options that contradict each other."""
        values = options.as_dict()
        choose(values["method"], self.run_class.methods, option="method")
        sections = {name: kind(**values[name]) for name, kind in self.sections.items()}
        names = [f.name for f in fields(self.run_class) if f.name not in self.sections]
        run = self.run_class(**{name: values[name] for name in names}, **sections)
        if run.start is not None:
            self._refuse_replaced(run)
        return run

    def _refuse_replaced(self, run: Any) -> None:
        """Refuse options that were given, if only their defaults, where an adapter has others."""
        from pacatune.training.sections import ADAPTER_SECTIONS
        from pacatune.training.start import check_given

        given = self.parser.parse_args(self._words, defaults=False).as_dict()
        for name in ADAPTER_SECTIONS:
            for option, value in given.get(name, {}).items():
                check_given(run, f"{name}.{option}", value, getattr(getattr(run, name), option))

    def template(self, options: "Namespace") -> str:
        """Return the options as YAML, each under a comment that explains it."""
        values = options.as_dict()
        help_of = {action.dest: _plain_help(action.help) for action in self.parser._actions}
        names = [name for name in values if name not in (*self.flags, *self.sections)]
        names.sort(key=lambda name: name != "task")  # first, since it says what the others are
        head = f"# Options of `{self.parser.prog}`. Those left out have these values.\n"
        parts = [head, *(_entry(name, values[name], help_of[name], "") for name in names)]
        for section in self.sections:
            parts.append(f"\n{section}:\n")
            parts += [
                _entry(name, value, help_of.get(f"{section}.{name}", ""), "  ")
                for name, value in values[section].items()
            ]
        return "".join(parts)


def carry_out(config: Any, options: "Namespace") -> None:
    """Train as the options say: anew, or going on."""
    from pacatune.training.recipe import start_or_resume, train

    if not options.auto_resume:
        train(
            config,
            resume=options.resume,
            overwrite=options.overwrite,
            push_to_hub=options.push_to_hub,
        )
        return
    if options.resume or options.overwrite:
        raise ValueError("--auto_resume decides what --resume and --overwrite say; give it alone.")
    start_or_resume(config, push_to_hub=options.push_to_hub)


def parse_words(parser: "ArgumentParser", argv: list[str], *, defaults: bool = True) -> "Namespace":
    """Parse the words of a command line and its config files; wrong values are a ValueError."""
    from argparse import ArgumentError

    try:
        return parser.parse_args(argv, defaults=defaults)
    except ArgumentError as error:
        raise ValueError(f"{readable(str(error))}; see `{parser.prog} --help`.") from error


def check_names(argv: list[str], names: Collection[str], flags: tuple[str, ...]) -> None:
    """Refuse unknown options and unknown keys of config files."""
    from pacatune.training.config_file import check_keys, read_values

    sections = sections_of(names)
    others = {*flags, *sections}
    known = set(names) - others
    for section in sorted(sections, reverse=True):
        for value in values_of(argv, section):
            if not value.startswith("{"):
                near = f"; did you mean --{section}.path?" if f"{section}.path" in known else "."
                raise ValueError(f"`--{section}` ({value!r}) is a section of options{near}")
    for word in argv:
        name = word[2:].partition("=")[0].rstrip("+")
        if not word.startswith("--") or name in others:
            continue
        # A key inside an option that holds a dictionary, such as paca.rank_pattern.q_proj.
        if not any(name == option or name.startswith(f"{option}.") for option in known):
            raise ValueError(f"unknown option --{name}; {suggest(name, known)}")
    for path in values_of(argv, "config"):
        values = read_values(Path(path))
        for flag in set(flags) & set(values):
            raise ValueError(f"{path}: {flag!r} belongs on the command line, as --{flag}.")
        check_keys(values, known, path)


def sections_of(names: Collection[str]) -> set[str]:
    """Return the names of the sections in which options are."""
    return {name.partition(".")[0] for name in names if "." in name}


def readable(message: str) -> str:
    """Return what jsonargparse says of a wrong value in words that name value and rule."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message, re.DOTALL)
    rule = r"Expected (?:an? )?((?:\w+\.)*\w+\[.*?\]|<class '\w+'>)"
    expected = dict.fromkeys(re.findall(rule, message))
    if not (key and value and expected):
        return message
    kinds = [_kind(text) for text in expected]
    return f"`{key[1]}` ({value[1].strip()}) must be {' or '.join(kinds)}"


def _kind(text: str) -> str:
    name, _, inner = text.partition("[")
    if name == "typing.Literal":
        return "one of " + ", ".join(part.strip(" '\"") for part in inner[:-1].split(","))
    return _KINDS.get(text.removeprefix("<class '").removesuffix("'>"), text)


_KINDS = {
    "NoneType": "null",
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "an integer",
    "list": "a list",
    "str": "text",
}


def values_of(argv: list[str], flag: str) -> Iterator[str]:
    """Yield what is given to a flag, as `--flag VALUE` or `--flag=VALUE`."""
    for position, word in enumerate(argv):
        if word == f"--{flag}" and position + 1 < len(argv):
            yield argv[position + 1]
        elif word.startswith(f"--{flag}="):
            yield word.partition("=")[2]


def _plain_help(text: str | None) -> str:
    return " ".join((text or "").replace("%%", "%").split())


def _entry(name: str, value: Any, help_text: str, indent: str) -> str:
    comment = textwrap.fill(
        help_text, 98, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )
    # As the item of a list, since a scalar alone would get an end mark of its own.
    item = yaml.safe_dump([value], default_flow_style=True, width=10_000).strip()
    line = f"{indent}{name}: {item[1:-1]}\n"
    return f"{comment}\n{line}" if help_text else line
