"""What is wrong with the words of a run, found before torch and TRL are imported.

They take seconds. Each check is the one that a run makes of the same value later.
"""

import typing
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from pacatune import precision
from pacatune.cli.option_names import option_annotations
from pacatune.cli.run_options import FLAGS, check_names, parse_words, sections_of
from pacatune.names import choose

Given = dict[str, Any]
"""What words and config files give, as nested values."""


def check_options(
    argv: list[str], command: str, run_class: str, flags: Mapping[str, Mapping[str, Any]]
) -> Given:
    """Refuse unknown options, values of a wrong type, and sections that allow no such value.

    `run_class` is `module.Class`; `flags` are those that only this command has. Returns what is
    given; nothing where the package has no source, so that the run finds it all.
    """
    try:
        annotations = option_annotations(*run_class.rsplit(".", 1))
    except (LookupError, OSError):
        return {}
    flags = {**FLAGS, **flags}
    check_names(argv, annotations, ("help", *flags))
    sections = sections_of(annotations)
    if any(word.partition("=")[0][2:] in sections for word in argv):
        return {}  # one that is given as a whole

    from pacatune.training.config_file import option_parser

    parser = option_parser(prog=f"pacatune {command}")
    for name, arguments in flags.items():
        parser.add_argument(f"--{name}", **arguments)
    types = option_types(annotations)
    for name in types.keys() - sections:
        parser.add_argument(f"--{name}", type=types[name])
    given: Given = parse_words(parser, argv, defaults=False).as_dict()
    if not (given.get("print_config") or given.get("preset")):
        given["data"] = _check_sections(given, command, types["data"])
    return given


def option_types(annotations: Mapping[str, str]) -> dict[str, Any]:
    """Return the types of options, and the classes of sections, by their annotations.

    Any, which is no check, where only heavy modules know it.
    """
    from pacatune.data import config
    from pacatune.training import sections

    known = {**vars(typing), **vars(precision), **vars(config), **vars(sections)}
    types = {}
    for name, annotation in annotations.items():
        try:
            types[name] = eval(annotation, known)
        except NameError:
            types[name] = Any
    return types


def _check_sections(given: Given, command: str, data_class: type) -> Any:
    """Build what needs nothing heavy, and return the `data` section."""
    from pacatune.methods import CLASSIFIER_METHODS, TEXT_METHODS
    from pacatune.pretrained import refuse_no_path
    from pacatune.training.ranges import check_ranges
    from pacatune.training.sections import LoraSection, PacaSection

    methods = TEXT_METHODS if command == "train" else CLASSIFIER_METHODS
    choose(given.get("method", "paca"), methods, option="method")
    refuse_no_path(given.get("model", {}).get("path", ""), command)
    data = data_class(**given.get("data", {}))
    PacaSection(**given.get("paca", {}))
    LoraSection(**given.get("lora", {}))
    check_ranges(SimpleNamespace(**{"max_steps": -1, **given.get("training", {})}))
    return data


def check_files(given: Given, task: str) -> None:
    """Refuse a model, an adapter or data that is not there, and data without the task's columns.

    `task` is one of `TASKS`, or `image`. A run that goes on may need none of them.
    """
    skipping = ("print_config", "preset", "resume", "auto_resume")
    if not given or any(given.get(name) for name in skipping):
        return
    from pacatune.data.early import check_first_rows, check_image_folders
    from pacatune.data.read import read_template
    from pacatune.pretrained import find_model, is_adapter

    model, data = given["model"], given["data"]
    if task == "image":
        check_image_folders(data)
    if not is_adapter(model["path"]):  # which is trained on, on its own base
        find_model(model["path"])
    if task == "image":
        return
    if given.get("adapter") is not None:
        from pacatune.adapters.folder import CONFIG_NAME, locate_folder
        from pacatune.files.plain import find_file

        find_file(locate_folder(given["adapter"]), CONFIG_NAME)
    if data.chat_template is not None:
        read_template(data.chat_template)
    check_first_rows(data, judged=task == "kto")
