"""Options of a run: one per field of its configuration and sections, from words and YAML files."""

import os
import sys
from argparse import SUPPRESS
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from pacatune.cli.options import SectionParser, refuse_unknown
from pacatune.data.config import REASONING_GYM
from pacatune.files.plain import find_file
from pacatune.methods import METHODS
from pacatune.names import choose
from pacatune.pretrained import find_adapter, find_model, refuse_absent, refuse_no_weights
from pacatune.training.config import RunConfig, sections_of
from pacatune.training.config_file import add_run_options, check_keys, read_values
from pacatune.training.folder import check_folder
from pacatune.training.sections import check_selection_file
from pacatune.training.tasks import TASKS, TaskSpec

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
        self.task, self.spec, self.sections = task, TASKS[task], sections_of(task)
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
        training = fields(self.sections["training"])
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

    def parse(self, argv: list[str]) -> "Request":
        """Parse the words of the command line and its config files, once; wrong is a ValueError.

        What they do not say is for `RunConfig` to fill in.
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
        values = {name: given[name] for name in self._names & given.keys()}
        return Request(values, {name: given[name] for name in _FLAGS if name in given})

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
        others = ("help", "config", "print_config", *_FLAGS, *self.sections)
        refuse_unknown(argv, [f"--{name}" for name in (*known, *others)])
        for path in values_of(argv, "config"):
            values = read_values(Path(path))
            for flag in set(_FLAGS) & values.keys():
                raise ValueError(f"{path}: {flag!r} belongs on the command line, as --{flag}.")
            check_keys(values, known, path)


@dataclass(frozen=True)
class Request:
    """What the words ask for, in values of JSON: options of a `RunConfig`, and flags."""

    values: dict[str, Any]
    flags: dict[str, Any]

    def check(self) -> RunConfig:
        """Return the run; refuse what can be seen to be wrong without torch, as it would do later.

        That are contradictions, and a model or data that is not there. A run that goes on may
        need no files.
        """
        config, flags = RunConfig(**self.values), self.flags
        is_paca = METHODS[config.method].is_paca
        for section in (config.model, config.data):
            section.refuse_missing()
        if is_paca and config.paca.from_file:
            check_selection_file(str(config.paca.selection))
        if "preview" not in flags and "auto_resume" not in flags:
            how = {name: name in flags for name in ("resume", "overwrite")}
            check_folder(config, **how)
        if "resume" in flags or "auto_resume" in flags:
            return config
        if config.adapter is not None and (folder := find_adapter(config.adapter)) is not None:
            find_file(folder, "adapter_config.json")
        _check_files(config.model, config.data, config.spec)
        if "preview" not in flags:
            refuse_no_weights(config.model.path)
        return config

    def carry_out(self, words: list[str]) -> int:
        """Train as the words say: anew, or going on; or show the data.

        The words are those after `pacatune`; on several GPUs, each runs them.
        """
        import torch

        from pacatune.training.language import preview
        from pacatune.training.recipe import start_or_resume, train

        config, how = RunConfig(**self.values), dict(self.flags)
        if "preview" in how:
            preview(config, int(how["preview"]))
            return 0
        if "push_config" in how and "push_to_hub" not in how:
            raise ValueError("--push_config needs --push_to_hub, which uploads the result.")
        auto_resume = how.pop("auto_resume", False)
        if auto_resume and how.keys() & {"resume", "overwrite"}:
            raise ValueError("--auto_resume decides what --resume and --overwrite say; drop these.")
        num_gpus = 0 if config.training.use_cpu else torch.cuda.device_count()
        if num_gpus > 1 and "LOCAL_RANK" not in os.environ:
            return _run_on_gpus(num_gpus, words)
        (start_or_resume if auto_resume else train)(config, **how)
        return 0


def _run_on_gpus(number: int, words: list[str]) -> int:
    """Run the words in a process for each GPU, as torchrun does; return the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    print(f"{number} GPUs, a process on each; CUDA_VISIBLE_DEVICES=0 takes one", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a warning
    how = ["--standalone", "--nproc_per_node", str(number), "-m", "pacatune"]
    try:
        run(parse_args([*how, *words]))
    except ChildFailedError as error:  # the process has said why
        return int(error.get_first_failure()[1].exitcode)
    except SignalException as stop:
        raise KeyboardInterrupt from stop
    return 0


def _check_files(model: Any, data: Any, spec: TaskSpec) -> None:
    from pacatune.data.read import is_local, read_template

    if not Path(find_model(model.path)).exists():
        refuse_absent(model.path, option="model.path", revision=model.revision)
    if getattr(data, "chat_template", None) is not None:
        read_template(data.chat_template)
    for source, option in filter(None, (*data.sources(), data.evaluation_source())):
        is_made = source.path.startswith(REASONING_GYM)
        if not is_made and not is_local(source.path, option, source.split, source.name):
            refuse_absent(source.path, option=option, kind="dataset")


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
