"""Image data sets of the hub: which column holds the images, which one the classes."""

from typing import Any

from pacatune.data.images.config import ImageDataConfig
from pacatune.data.images.sources import HubSource


def read_hub(config: ImageDataConfig, path: str, split: str) -> HubSource:
    """Load a split of a data set, its images still encoded.

    Raises:
        FileNotFoundError: If there is no such data set, or it cannot be reached.
        ValueError: If it has no such split, or its columns are not images and classes.
    """
    from datasets import ClassLabel, Image, Value, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    from pacatune.hub import check_on_hub

    check_on_hub(path, "data.path", kind="dataset")
    try:
        table = load_dataset(path, config.name, split=split)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{path!r} is neither a folder here nor a hub data set that can be reached "
            f"({type(error).__name__}); check `data.path` or the network."
        ) from error
    images = [name for name, kind in table.features.items() if isinstance(kind, Image)]
    column = _choose(images, config.image_column, table, path, "image_column", "images")
    kinds = {name: kind for name, kind in table.features.items() if name != column}
    named = [name for name, kind in kinds.items() if isinstance(kind, ClassLabel)]
    plain = [name for name, kind in kinds.items() if isinstance(kind, Value)]
    label = _choose(named or plain, config.label_column, table, path, "label_column", "classes")
    classes, labels = _read_classes(table, label)
    encoded = table.cast_column(column, Image(decode=False)).select_columns([column])
    return HubSource(
        name=f"{path} ({split})", classes=classes, labels=labels, table=encoded, column=column
    )


def _choose(
    found: list[str], given: str | None, table: Any, path: str, option: str, what: str
) -> str:
    if given is not None and given in table.column_names:
        return given
    if given is None and len(found) == 1:
        return found[0]
    problem = f"no column {given!r}" if given else f"{len(found)} columns that could hold {what}"
    raise ValueError(
        f"{path} has {problem}; set `data.{option}` to one of {', '.join(table.column_names)}."
    )


def _read_classes(table: Any, label: str) -> tuple[list[str], list[int]]:
    values = table[label][:]
    if None in values or -1 in values:
        missing = next(i for i, value in enumerate(values) if value in (None, -1))
        raise ValueError(
            f"row {missing + 1} has no class in {label!r}; give data whose every row has one."
        )
    names = getattr(table.features[label], "names", None)
    if names is not None:
        return list(names), list(values)
    classes = sorted(set(values))
    numbers = {value: number for number, value in enumerate(classes)}
    return [str(value) for value in classes], [numbers[value] for value in values]
