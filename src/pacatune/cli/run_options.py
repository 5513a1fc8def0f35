"""Options of a run: one per field of its configuration and sections, from words and YAML files."""

import sys
from argparse import SUPPRESS
from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from pacatune.cli.options import SectionParser, refuse_unknown
from pacatune.data.config import REASONING_GYM
from pacatune.files.plain import find_file
from pacatune.methods import METHODS
from pacatune.names import choose
from pacatune.pretrained import find_adapter, find_model, refuse_absent, refuse_no_weights
from pacatune.training.config import RunConfig, check_training, sections_of
from pacatune.training.config_file import add_run_options, check_keys, read_values
from pacatune.training.folder import check_place
from pacatune.training.rewards import check_reward
from pacatune.training.sections import ADAPTER_SECTIONS, check_selection_file
from pacatune.training.tasks import TASKS, TaskSpec, load

_SWITCHES = {
    "resume": "Continue the run in training.output_dir from its last checkpoint.",
    "auto_resume": "Continue the run in training.output_dir if it has a checkpoint, else start it; "
    "a finished one stays as it is. For launchers that repeat a command.",
    "overwrite": "Delete the files of another run in training.output_dir first.",
    "push_config": "With --push_to_hub: upload config.yaml too, which names files of this machine.",
}
_PUSH = (
    "Upload the finished result to this repository of the hub, which is created before training; "
    "private with training.hub_private_repo."
)
_FLAGS = (*_SWITCHES, "push_to_hub")


class RunOptions:
    """The command line of a command that trains: one option per field of the run and its sections.

    `flag` is one that only the command of this task has, with the arguments of `add_argument`.
    """

    def __init__(self, task: str, description: str, flag: str, **arguments: Any) -> None:
        self.task, self.spec, self.sections = task, TASKS[task], sections_of(task)
        self._names = {f.name for f in fields(RunConfig)} - {*TASKS[task].lacks}
        self.flags = (*_FLAGS, flag)
        self._description, self._arguments = description, arguments

    @cached_property
    def parser(self) -> SectionParser:
        """The parser, for which docstrings are read: that takes half a second."""
        parser = SectionParser(
            self.spec.command,
            f"{self._description} Options of a config file come first, options here override them.",
            print_config="--print_config",
        )
        parser.add_argument("--config", action="config", help="YAML file with options.")
        for name, text in _SWITCHES.items():
            parser.add_argument(f"--{name}", action="store_true", default=SUPPRESS, help=text)
        parser.add_argument("--push_to_hub", metavar="OWNER/NAME", default=SUPPRESS, help=_PUSH)
        parser.add_argument(f"--{self.flags[-1]}", default=SUPPRESS, **self._arguments)
        add_run_options(parser, self.task)
        # TRL and transformers have the help of most training options in their fields.
        training = fields(self.sections["training"])
        helps = {f"training.{f.name}": f.metadata.get("help") for f in training}
        for action in parser._actions:
            action.help = helps.get(action.dest) or action.help
        if sys.modules.get("torch", self) is None:  # where only options are shown
            parser.set_defaults({"training.optim": "adamw_torch_fused"})
        return parser

    def parse(self, argv: list[str]) -> Namespace:
        """Parse the words of the command line and its config files; wrong ones are a ValueError."""
        self._check_names(argv)
        shown = {"--print_config": "--print_config=comments"}
        self._words = [shown.get(word, word) for word in argv]
        options = self.parser.parse_args(self._words)
        if options.task != self.task:
            raise ValueError(
                f"`task` ({options.task!r}) of a config file is another one than `--task` "
                f"({self.task!r}); give one of them."
            )
        return options

    def _check_names(self, argv: list[str]) -> None:
        """Refuse unknown options and unknown keys of config files."""
        known = self._names - self.sections.keys()
        for section, kind in self.sections.items():
            known |= {f"{section}.{f.name}" for f in fields(kind) if f.init}
            for value in values_of(argv, section):
                if not value.startswith("{"):
                    first = fields(kind)[0].name
                    raise ValueError(
                        f"`--{section}` ({value!r}) is a section of options; did you mean "
                        f"--{section}.{first}?"
                    )
        others = ("help", "config", "print_config", *self.flags, *self.sections)
        refuse_unknown(argv, [f"--{name}" for name in (*known, *others)])
        for path in values_of(argv, "config"):
            values = read_values(Path(path))
            for flag in set(self.flags) & values.keys():
                raise ValueError(f"{path}: {flag!r} belongs on the command line, as --{flag}.")
            check_keys(values, known, path)

    def to_config(self, options: Namespace) -> RunConfig:
        """Build the run, which refuses options that contradict each other."""
        values = options.as_dict()
        given = self.parser.parse_args(self._words, defaults=False).as_dict()
        # What an adapter that is trained on has is no contradiction of a default.
        values |= {name: given.get(name, {}) for name in ADAPTER_SECTIONS}
        return RunConfig(**{name: values[name] for name in self._names & values.keys()})

    def check(self, options: Namespace) -> None:
        """Refuse what can be seen to be wrong without torch, as the run would do later.

        That are values of sections; a model or data that is not there; and data without the columns
        of the task. A run that goes on may need no files.
        """
        choose(options.method, self.spec.methods, option="method")
        built = {
            name: kind(**options[name].as_dict())
            for name, kind in self.sections.items()
            if name != "training"
        }
        for name in ("model", "data"):
            built[name].refuse_missing()
        check_training(options.training.as_dict())
        if METHODS[options.method].is_paca and built["paca"].from_file:
            check_selection_file(str(built["paca"].selection))
        goes_on = "resume" in options or "auto_resume" in options
        if "preview" not in options and "auto_resume" not in options:
            how = {name: name in options for name in ("resume", "overwrite")}
            check_place(str(options.training.output_dir), **how)
        if goes_on:
            return
        adapter = options.get("adapter")
        if adapter is not None and (folder := find_adapter(adapter)) is not None:
            find_file(folder, "adapter_config.json")
        _check_files(built["model"], built["data"], self.spec)
        if "preview" not in options and self.spec.command == "train":
            refuse_no_weights(built["model"].path)
        for name in options.get("reward") or ():
            if not name.startswith(REASONING_GYM):
                check_reward(name)


def _check_files(model: Any, data: Any, spec: TaskSpec) -> None:
    from pacatune.data.prepare import check_first_rows
    from pacatune.data.read import read_template

    is_name = spec.command == "train-image" and "/" not in model.path  # of timm
    if not Path(find_model(model.path)).exists() and not is_name:
        refuse_absent(model.path, option="model.path", revision=model.revision)
    if getattr(data, "chat_template", None) is not None:
        read_template(data.chat_template)
    check_first_rows(data, load(spec.rows) if spec.rows else None)


def carry_out(config: Any, options: Namespace) -> None:
    """Train as the options say: anew, or going on."""
    from pacatune.training.recipe import start_or_resume, train

    how = {name: options[name] for name in _FLAGS if name in options}
    if "push_config" in how and "push_to_hub" not in how:
        raise ValueError("--push_config needs --push_to_hub, which uploads the result.")
    if how.pop("auto_resume", False):
        if how.keys() & {"resume", "overwrite"}:
            raise ValueError("--auto_resume decides what --resume and --overwrite say; drop these.")
        start_or_resume(config, **how)
    else:
        train(config, **how)


def values_of(argv: list[str], flag: str) -> Iterator[str]:
    """Yield what is given to a flag, as `--flag VALUE` or `--flag=VALUE`."""
    for position, word in enumerate(argv):
        if word == f"--{flag}" and position + 1 < len(argv):
            yield argv[position + 1]
        elif word.startswith(f"--{flag}="):
            yield word.partition("=")[2]
