"""Options of a run: one per field of its configuration and sections, from words and YAML files."""

import ast
import sys
from argparse import SUPPRESS
from collections.abc import Collection, Iterator
from dataclasses import fields
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from pacatune.cli.options import SectionParser, refuse_unknown
from pacatune.methods import METHODS
from pacatune.names import choose
from pacatune.training.config import RunConfig, own_sections, sections_of
from pacatune.training.config_file import add_run_options, check_keys, read_values
from pacatune.training.tasks import TASKS

_SWITCHES = {
    "resume": "Continue the run in training.output_dir from its last checkpoint.",
    "auto_resume": "Continue the run in training.output_dir if it has a checkpoint, else start it; "
    "a finished one stays as it is. For launchers that repeat a command.",
    "overwrite": "Delete the files of another run in training.output_dir first.",
    "push_config": "With --push_to_hub: upload config.yaml too, which names files of this machine.",
}
_PUSH = (
    "Upload what the run wrote to this repository of the hub, which is created before training; "
    "private with training.hub_private_repo."
)
# Where TRL, transformers and we have classes of training options.
_SOURCES = (
    *("trainer/*_config.py", "experimental/*/*_config.py"),
    *("training_args.py", "training/arguments.py"),
)
_FLAGS = (*_SWITCHES, "push_to_hub", "preview")
_PRINT = "--print_config"
# What most runs set, of each task what it has; the options of a method are beside.
_COMMON = (
    *("config", "task", "method", "adapter", "reward"),
    *("model.path", "model.quantization", "data.path", "data.eval_path", "data.format"),
    *("training.output_dir", "training.num_train_epochs", "training.max_steps"),
    "training.learning_rate",
    *("training.per_device_train_batch_size", "training.gradient_accumulation_steps"),
    *("training.max_length", "training.gradient_checkpointing"),
    *("resume", "overwrite", "preview"),
)


class RunOptions:
    """The command line of `train` for a task: one option per field of the run and its sections."""

    def __init__(self, task: str) -> None:
        self.task, self.spec, self.sections = task, TASKS[task], own_sections(task)
        self._names = {f.name for f in fields(RunConfig)} - {*TASKS[task].lacks}

    @cached_property
    def parser(self) -> SectionParser:
        """The parser, for which docstrings are read: that takes half a second."""
        others = ", ".join(name for name in TASKS if name != self.task)
        parser = SectionParser(
            "train",
            f"Fine-tune a language model. These are the options of the task {self.task}; those of "
            f"others ({others}) are shown with --task NAME --help. Options of a config file come "
            "first, options here override them.",
            print_config=_PRINT,
        )
        parser.add_argument("--config", action="config", help="YAML file with options.")
        for name, text in _SWITCHES.items():
            parser.add_argument(f"--{name}", action="store_true", default=SUPPRESS, help=text)
        parser.add_argument("--push_to_hub", metavar="OWNER/NAME", default=SUPPRESS, help=_PUSH)
        parser.add_argument(
            "--preview",
            type=PositiveInt,
            metavar="N",
            default=SUPPRESS,
            help="Show N examples with what is learned of them, and stop.",
        )
        add_run_options(parser, self.task)
        # TRL and transformers have the help of most training options in their fields.
        training = fields(sections_of(self.task)["training"])
        helps = {f"training.{f.name}": f.metadata.get("help") for f in training}
        for action in parser._actions:
            action.help = helps.get(action.dest) or action.help
        if sys.modules.get("torch", self) is None:  # where only options are shown
            parser.set_defaults({"training.optim": "adamw_torch_fused"})
        return parser

    def help(self, argv: list[str]) -> str:
        """Return the help of all options, or of those that most runs set with this method."""
        parser, shown = self.parser, [*_COMMON, "paca.r", "paca.target_modules"]
        if "all" in argv:
            return parser.format_help()
        if method := find_value(argv, "method", self.spec.methods):
            starts = tuple(f"{section}." for section in METHODS[method].sections)
            shown = [*_COMMON, *(a.dest for a in parser._actions if a.dest.startswith(starts))]
        others = [action for action in parser._actions if action.dest not in shown]
        for action in others:
            action.help = SUPPRESS
        for group in parser._action_groups:
            group.title, group.description = group.title and group.title.split(" (")[0], None
        kind = self.spec.arguments.rpartition(".")[2]
        parser.usage, parser.epilog = (
            f"{parser.prog} [OPTIONS]",
            (
                f"{len(others)} more, among them every option of {kind} and of other methods: "
                f"--help all; {_PRINT} writes them as a config file."
            ),
        )
        return parser.format_help()

    def parse(self, argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parse the words of the command line and its config files, once; wrong is a ValueError.

        Returns options of a `RunConfig`, which fills in what they do not say, and flags.
        """
        self._check_names(argv)
        if {"-h", "--help"} & {*argv}:
            print(self.help(argv))
            raise SystemExit(0)
        if _PRINT in argv:
            self.parser.parse_args([_PRINT + "=comments" if w == _PRINT else w for w in argv])
        given = self.parser.parse_args(argv, defaults=False).as_dict()
        if (task := given.setdefault("task", self.task)) != self.task:
            raise ValueError(
                f"`task` ({task!r}) of a config file is another one than `--task` "
                f"({self.task!r}); give one of them."
            )
        options = {name: given[name] for name in self._names & given.keys()}
        return options, {name: given[name] for name in _FLAGS if name in given}

    def _check_names(self, argv: list[str]) -> None:
        """Refuse unknown options and unknown keys of config files."""
        kind = self.spec.arguments.rpartition(".")[2]
        sections = {name: [f.name for f in fields(own)] for name, own in self.sections.items()}
        sections["training"] = ["output_dir", *fields_in_source(kind)]
        known = self._names - sections.keys()
        for section, names in sections.items():
            known |= {f"{section}.{name}" for name in names}
            for value in values_of(argv, section):
                if not value.startswith("{"):
                    raise ValueError(
                        f"`--{section}` ({value!r}) is a section of options; did you mean "
                        f"--{section}.{names[0]}?"
                    )
        others = ("help", "config", "print_config", *_FLAGS, *sections)
        refuse_unknown(argv, [f"--{name}" for name in (*known, *others)])
        for path in values_of(argv, "config"):
            values = read_values(Path(path))
            for flag in set(_FLAGS) & values.keys():
                raise ValueError(f"{path}: {flag!r} belongs on the command line, as --{flag}.")
            check_keys(values, known, path)


@cache
def fields_in_source(name: str) -> set[str]:
    """Return the fields of a class of training options, read from its source.

    To import it takes seconds, which a wrong word need not wait for.
    """
    for package in ("trl", "transformers", "pacatune"):
        folder = Path(str(getattr(find_spec(package), "origin", ""))).parent
        for path in (file for pattern in _SOURCES for file in folder.glob(pattern)):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for found in tree.body:
                if isinstance(found, ast.ClassDef) and found.name == name:
                    return _declared(found)
    return set()


def _declared(found: ast.ClassDef) -> set[str]:
    """Return the fields that a class declares, and those of its bases."""
    lines = [line for line in found.body if isinstance(line, ast.AnnAssign)]
    fields = [line.target for line in lines if "ClassVar" not in ast.unparse(line.annotation)]
    own = {field.id for field in fields if isinstance(field, ast.Name)}
    bases = (base.id for base in found.bases if isinstance(base, ast.Name))
    names = own.union(*map(fields_in_source, bases))
    return {name for name in names if not name.startswith("_")}


def find_value(argv: list[str], option: str, among: Collection[str]) -> str | None:
    """Return the choice that the words make for an option, or else a config file that they name."""
    if words := [*values_of(argv, option)]:
        return choose(words[-1], among, option=f"--{option}")
    for path in values_of(argv, "config"):
        if (value := read_values(Path(path)).get(option)) is not None:
            return choose(str(value), among, option=f"{option} of {path}")
    return None


def values_of(argv: list[str], flag: str) -> Iterator[str]:
    """Yield what is given to a flag, as `--flag VALUE` or `--flag=VALUE`."""
    for position, word in enumerate(argv):
        if word == f"--{flag}" and position + 1 < len(argv):
            yield argv[position + 1]
        elif word.startswith(f"--{flag}="):
            yield word.partition("=")[2]
