"""Write a run's configuration to YAML, read it back as plain values, compare two of them.

This module imports nothing heavy: a misspelt key is found before anything is.
"""

from collections.abc import Collection
from dataclasses import MISSING, Field, asdict, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from pacatune.names import suggest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from pacatune.training.config import RunConfig

CONFIG_NAME = "config.yaml"

# Never written: secrets, and what only this process knows.
_UNSAVED = ("hub_token", "local_rank")
# Local files and folders, written as absolute paths so that the run can be repeated elsewhere.
_PATHS = (
    *("model.path", "adapter"),
    *("data.path", "data.eval_path", "data.chat_template", "data.root"),
)
# Where results go and how they are shown: free to change when a run is resumed.
_FREE_ON_RESUME = (
    "training.logging_nan_inf_filter",
    "training.output_dir",
    "training.report_to",
    "training.run_name",
    "training.disable_tqdm",
    "training.save_total_limit",
    # Of these, what a step sees is compared with the checkpoint's.
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
)


class _Constructor(SafeConstructor):
    """Takes dates for the words that they are."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def to_values(config: "RunConfig") -> dict[str, Any]:
    """Return every option of ours and every training option that has not its default.

    What our class of training options sets otherwise than TRL's or transformers' is always there,
    so that a later version with other defaults repeats the run.
    """
    from pacatune.training.arguments import own_options

    ours = own_options(type(config.training))
    training = {
        f.name: _plain(config.training.given[f.name])
        for f in fields(config.training)
        if f.name in config.training.given
        and f.name not in _UNSAVED
        and (f.name in ours or config.training.given[f.name] != _default_of(f))
    }
    others = {"training", *others_options(config.task)}
    names = [f.name for f in fields(config) if f.name not in others]
    values = {name: getattr(config, name) for name in names}
    plain = {
        name: asdict(value) if hasattr(value, "__dataclass_fields__") else value
        for name, value in values.items()
    }
    plain["training"] = training
    for path in _PATHS:
        section, _, key = path.rpartition(".")
        holder: dict[str, Any] = plain[section] if section else plain
        if key in holder:
            holder[key] = _absolute(holder[key])
    for source in plain["data"].get("datasets") or ():
        source["path"] = _absolute(source["path"])
    if config.paca.from_file:
        plain["paca"]["selection"] = _absolute(plain["paca"]["selection"])
    return plain


def config_text(config: "RunConfig", name: str) -> str:
    """Return the configuration as YAML with which the command `--config NAME` repeats the run."""
    text = yaml.safe_dump(to_values(config), sort_keys=False, allow_unicode=True)
    return f"# Repeat with: {config.repeat_command(name)}\n{text}"


def read_values(path: Path) -> dict[str, Any]:
    """Read a YAML file as plain values."""
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist; check the path.")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        what = error if mark is None else f"{vars(error)['problem']} (line {mark.line + 1})"
        raise ValueError(f"config file {path} is not valid YAML: {what}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"config file {path} holds a {type(values).__name__}; it must be a mapping with "
            "sections such as model and data."
        )
    return values


def check_keys(values: dict[str, Any], known: Collection[str], source: str) -> None:
    """Refuse keys of nested values that are no dotted name in `known`; `source` is their file."""
    sections = {name.rpartition(".")[0] for name in known} - {""}
    for key in _dotted(values, sections):
        if key not in known and key not in sections:
            raise ValueError(f"{source}: unknown key {key!r}; {suggest(key, {*known, *sections})}")


def load_yaml(text: str) -> Any:
    """Parse YAML 1.2, in which `no` is a word, 1e-3 a number, and each key stands once."""
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = _Constructor
    return reader.load(text)


def option_parser() -> "ArgumentParser":
    """Return a parser without options that takes values as `load_yaml` reads them."""
    from jsonargparse import ArgumentParser, set_loader

    set_loader("yaml_1_2", load_yaml, exceptions=(YAMLError,))
    return ArgumentParser(exit_on_error=False, print_config=None, parser_mode="yaml_1_2")


def add_run_options(parser: "ArgumentParser", task: str) -> Collection[str]:
    """Add an option for each field of a task's runs and of their sections; return the sections."""
    from pacatune.training.config import RunConfig, sections_of

    sections = sections_of(task)
    parser.add_class_arguments(RunConfig, skip={*sections, *others_options(task)})
    for name, section in sections.items():
        parser.add_class_arguments(section, name)
    parser.set_defaults({"task": task})
    return sections.keys()


def others_options(task: str) -> set[str]:
    """Return the options of a run that only other tasks have."""
    from pacatune.training.tasks import TASKS

    return {"adapter", "reward"} - {*TASKS[task].reads}


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line per option that differs, without those that a resumed run may change."""
    flat_old, flat_new = (
        _dotted(values, {key for key, value in values.items() if isinstance(value, dict)})
        for values in (old, new)
    )
    return [
        f"{key}: {flat_old.get(key)!r} -> {flat_new.get(key)!r}"
        for key in sorted({*flat_old, *flat_new})
        if key not in _FREE_ON_RESUME and flat_old.get(key) != flat_new.get(key)
    ]


def _default_of(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _absolute(value: str | None) -> str | None:
    return str(Path(value).expanduser().resolve()) if value and _exists(value) else value


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except OSError:  # A chat template given as text may be too long for a file name.
        return False


def local_paths(config: "RunConfig") -> dict[str, str]:
    """Return the options that name a local file or folder that exists."""
    values = to_values(config)
    given = _dotted(values, {name for name, value in values.items() if isinstance(value, dict)})
    given |= {
        f"data.datasets[{number}].path": source["path"]
        for number, source in enumerate(given.get("data.datasets") or ())
    }
    return {
        name: path
        for name, path in given.items()
        if ((name in _PATHS or name.startswith("data.datasets[")) and path and _exists(path))
        # The name of a strategy is not absolute.
        or (name == "paca.selection" and isinstance(path, str) and Path(path).is_absolute())
    }


def _dotted(values: dict[Any, Any], sections: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        is_section = name in sections and isinstance(value, dict)
        found |= _dotted(value, sections, f"{name}.") if is_section else {name: value}
    return found
