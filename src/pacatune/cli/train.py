"""`pacatune train`: fine-tune a model on your data."""

import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from pacatune.training import RunConfig

_SECTIONS = ("model", "data", "paca", "lora", "training")
_FLAGS = ("help", "config", "resume", "overwrite", "preview", "print_config")


def run(argv: list[str]) -> int:
    """Run `pacatune train` with the words after it; return the exit status."""
    from pacatune.training import preview, train

    parser = build_parser()
    options = _parse(parser, argv)
    if options.print_config:
        print(config_template(parser, options), end="")
        return 0
    config = _to_config(options)
    if options.preview is not None:
        preview(config, options.preview)
        return 0
    train(config, resume=options.resume, overwrite=options.overwrite)
    return 0


def build_parser() -> "ArgumentParser":
    """Return the parser: one option per field of RunConfig and its sections, and the flags."""
    from jsonargparse import ArgumentParser, set_loader, set_parsing_settings
    from jsonargparse.typing import PositiveInt

    from pacatune import training
    from pacatune.training.config_file import load_yaml

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml_1_2", load_yaml, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(
        prog="pacatune train",
        description="Fine-tune a causal language model. Options of a config file come first, "
        "options here override them.",
        exit_on_error=False,
        print_config=None,
        parser_mode="yaml_1_2",
    )
    parser.add_argument("--config", action="config", help="YAML file with options.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Continue the run in training.output_dir from its last checkpoint.",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Delete the files of another run in training.output_dir first.",
    )
    parser.add_argument(
        "--preview",
        type=PositiveInt | None,
        metavar="N",
        help="Show N examples with the tokens that are learned, and stop.",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="Print all options as a commented config file, and stop.",
    )
    parser.add_class_arguments(training.RunConfig, skip=set(_SECTIONS))
    for name, section in _section_classes().items():
        parser.add_class_arguments(section, name)
    _add_help_of_trl(parser)
    return parser


def config_template(parser: "ArgumentParser", options: "Namespace") -> str:
    """Return the options as YAML, each under a comment that explains it."""
    values = options.as_dict()
    help_of = {action.dest: _plain_help(action.help) for action in parser._actions}
    names = [name for name in values if name not in (*_FLAGS, *_SECTIONS)]
    parts = ["# Options of `pacatune train`. All have these values where they are left out.\n"]
    parts += [_entry(name, values[name], help_of[name], "") for name in names]
    for section in _SECTIONS:
        parts.append(f"\n{section}:\n")
        parts += [
            _entry(name, value, help_of.get(f"{section}.{name}", ""), "  ")
            for name, value in values[section].items()
        ]
    return "".join(parts)


def _section_classes() -> dict[str, Any]:
    from pacatune import training

    return {
        "model": training.ModelConfig,
        "data": training.DataConfig,
        "paca": training.PacaSection,
        "lora": training.LoraSection,
        "training": training.TrainingConfig,
    }


def _parse(parser: "ArgumentParser", argv: list[str]) -> "Namespace":
    from argparse import ArgumentError

    _check_words(parser, argv)
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        raise ValueError(f"{error}; see `pacatune train --help`.") from error


def _check_words(parser: "ArgumentParser", argv: list[str]) -> None:
    """Refuse unknown options and unknown keys of config files, naming the nearest known ones."""
    from pathlib import Path

    from pacatune.training.config_file import check_keys, read_values, suggest

    known = {action.dest for action in parser._actions} - {*_FLAGS, *_SECTIONS}
    for word in argv:
        name = word[2:].partition("=")[0].rstrip("+")
        if not word.startswith("--") or name in (*_FLAGS, *_SECTIONS):
            continue
        # A key inside an option that holds a dictionary, such as paca.rank_pattern.q_proj.
        if not any(name == option or name.startswith(f"{option}.") for option in known):
            raise ValueError(f"unknown option --{name}; {suggest(name, known)}")
    for path in _config_files(argv):
        values = read_values(Path(path))
        for flag in set(_FLAGS) & set(values):
            raise ValueError(f"{path}: {flag!r} belongs on the command line, as --{flag}.")
        check_keys(values, known, path)


def _config_files(argv: list[str]) -> Iterator[str]:
    for position, word in enumerate(argv):
        if word == "--config" and position + 1 < len(argv):
            yield argv[position + 1]
        elif word.startswith("--config="):
            yield word.partition("=")[2]


def _to_config(options: "Namespace") -> "RunConfig":
    from pacatune.training import RunConfig

    values = options.as_dict()
    sections = {name: kind(**values[name]) for name, kind in _section_classes().items()}
    single = {f.name: values[f.name] for f in fields(RunConfig) if f.name not in _SECTIONS}
    return RunConfig(**single, **sections)


def _add_help_of_trl(parser: "ArgumentParser") -> None:
    """Take the help of training options from where TRL and transformers write it."""
    from pacatune.training import TrainingConfig

    # What we declare ourselves has its help in docstrings instead.
    texts = {f"training.{f.name}": f.metadata.get("help") for f in fields(TrainingConfig)}
    for action in parser._actions:
        text = texts.get(action.dest)
        if text:
            action.help = text.replace("%%", "%").replace("%", "%%")


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
