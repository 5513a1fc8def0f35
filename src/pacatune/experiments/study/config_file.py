"""Reads a study from YAML."""

from pathlib import Path
from typing import Any

from pacatune.experiments.study.config import Arm, StudyConfig
from pacatune.training.config_file import check_keys, option_parser, read_values


def read_study(path: Path) -> StudyConfig:
    """Read a study.

    Paths in it are taken as they are, from where the command runs.

    Args:
        path: A YAML file with the fields of StudyConfig.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no study; names the key and the nearest known one.
    """
    values = read_values(path)
    parser = option_parser()
    parser.add_class_arguments(StudyConfig)
    check_keys(values, _fields(StudyConfig), str(path))
    arms = values.get("arms")
    if arms is not None and not isinstance(arms, dict):
        raise ValueError(f"{path}: `arms` is a {type(arms).__name__}; it must map names to arms.")
    for name, arm in (arms or {}).items():
        check_keys(arm or {}, _fields(Arm), f"{path}, arm {name!r}")
    values["arms"] = {str(name): arm or {} for name, arm in (arms or {}).items()}
    try:
        parsed = parser.parse_object(values).as_dict()
    except Exception as error:  # jsonargparse's own classes of errors
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return StudyConfig(**parsed)


def _fields(kind: Any) -> set[str]:
    return set(kind.__dataclass_fields__)
