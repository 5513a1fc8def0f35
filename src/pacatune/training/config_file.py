"""Write a run's configuration to YAML, read it back as plain values, compare two of them.

This module imports nothing heavy: a misspelt key is found before anything is.
"""

import json
import re
from collections.abc import Collection
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import set_loader
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from pacatune.names import suggest

if TYPE_CHECKING:
    from pacatune.training.config import RunConfig

CONFIG_NAME = "config.yaml"
PARSER_MODE = "yaml_1_2"
"""Name by which jsonargparse knows `load_yaml`."""

# Local files and folders, written as absolute paths so that the run can be repeated elsewhere.
_PATHS = ("adapter", "path", "eval_path", "chat_template", "root")
# Where data lies, whose digest the checkpoint has, and where results go and how they are shown:
# free to change when a run is resumed.
_FREE_ON_RESUME = (
    *("data.path", "data.eval_path", "data.datasets.path"),
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
    from pacatune.training.config import reward_name, sections_of

    ours = own_options(type(config.training))
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(config.training)
        if f.init
    }
    training = {
        name: value
        for name, default in defaults.items()
        if (value := getattr(config.training, name)) != default or name in ours
    }
    values: dict[str, Any] = {
        f.name: getattr(config, f.name) for f in fields(config) if f.name not in config.spec.lacks
    }
    values |= {
        name: asdict(values[name]) for name in sections_of(config.task) if name != "training"
    }
    if "reward" in values:
        values["reward"] = [*map(reward_name, config.reward)]
    # In JSON choices are words, tuples lists, and keys words.
    values["training"] = json.loads(json.dumps(training, default=str))
    data = values["data"]
    for holder in (values, values["model"], data, *(data.get("datasets") or ())):
        holder |= {key: _absolute(holder[key]) for key in _PATHS if holder.get(key)}
    if config.paca.from_file:
        values["paca"]["selection"] = _absolute(values["paca"]["selection"])
    return values


def config_text(values: dict[str, Any], command: str) -> str:
    """Return a run's options as YAML that says by which command they repeat it."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"# Repeat with: {command}\n{text}"


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


def check_keys(values: dict[str, Any], names: Collection[str], source: str) -> None:
    """Refuse keys of nested values that are no dotted name in `names`; `source` is their file."""
    sections = {name.partition(".")[0] for name in names if "." in name}
    for key, value in values.items():
        inside = value if key in sections and isinstance(value, dict) else ()
        for name in (key, *(f"{key}.{option}" for option in inside)):
            if name not in names and name not in sections:
                nearest = suggest(name, {*names, *sections})
                raise ValueError(f"{source}: unknown key {name!r}; {nearest}")


def load_yaml(text: str) -> Any:
    """Parse YAML 1.2, in which `no` is a word, 1e-3 a number, and each key stands once."""
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = _Constructor
    return reader.load(text)


set_loader(PARSER_MODE, load_yaml, exceptions=(YAMLError,))


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line per option that differs, without those that a resumed run may change."""
    flat_old, flat_new = _dotted(old), _dotted(new)
    return [
        f"{key}: {flat_old.get(key)!r} -> {flat_new.get(key)!r}"
        for key in sorted({*flat_old, *flat_new})
        if re.sub(r"\[\d+\]", "", key) not in _FREE_ON_RESUME
        and flat_old.get(key) != flat_new.get(key)
    ]


def local_paths(config: "RunConfig") -> dict[str, str]:
    """Return the options that name what a run reads here, by their dotted names."""
    values = _dotted({**to_values(config), "training": {}})
    return {k: v for k, v in values.items() if isinstance(v, str) and Path(v).is_absolute()}


def without_folders(text: str, config: "RunConfig") -> str:
    """Return a text in which what a run reads here has its name alone."""
    data = config.data
    holders = (config, config.model, data, *(getattr(data, "datasets", None) or ()))
    typed = [getattr(holder, key, None) for holder in holders for key in _PATHS]
    typed += [config.paca.selection] if config.paca.from_file else []
    paths = {*local_paths(config).values()}
    paths |= {str(Path(path).expanduser().absolute()) for path in typed if isinstance(path, str)}
    for path in sorted(paths, key=len, reverse=True):  # no part of a longer name
        name = Path(path).name.replace("\\", r"\\")
        text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", name, text)
    return text


def _absolute(value: str) -> str:
    """Return the absolute path of what is here; a hub id, or a template's text, as it is."""
    try:
        return str(Path(value).expanduser().resolve(strict=True))
    except OSError:
        return value


def _dotted(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run by their dotted names, those of several data sets by number."""
    dotted: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, dict)
        dotted |= {f"{name}.{k}": v for k, v in value.items()} if is_section else {name: value}
    for number, source in enumerate(dotted.pop("data.datasets", None) or ()):
        dotted |= {f"data.datasets[{number}].{key}": value for key, value in source.items()}
    return dotted
