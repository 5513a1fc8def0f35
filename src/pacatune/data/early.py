"""The first row of each file of a run's data, read before anything heavy is imported."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from pacatune.data.choices import CSV_COLUMNS
from pacatune.data.config import (
    TORCHVISION_PREFIX,
    DataConfig,
    ImageDataConfig,
    PromptDataConfig,
    SourceConfig,
    TextDataConfig,
)
from pacatune.data.formats import to_examples
from pacatune.data.preference import to_judged, to_pairs
from pacatune.data.prompts import to_row
from pacatune.data.read import is_image_folder, is_local, read_rows
from pacatune.hub import check_on_hub


def check_first_rows(config: TextDataConfig, *, judged: bool = False) -> None:
    """Refuse data that is not there, or whose first row has columns that the task cannot use.

    With `judged`, answers may have a label, as KTO takes them.
    """
    for source, option in _sources(config):
        if not is_local(source.path, option):
            check_on_hub(source.path, option, kind="dataset")
            continue
        columns = CSV_COLUMNS if source.format == "mmlu" else None
        rows = islice(read_rows(source.path, csv_columns=columns, option=option), 1)
        for _ in _checked(config, source.format, judged)(rows):
            pass


def _sources(config: TextDataConfig) -> Iterator[tuple[SourceConfig, str]]:
    if isinstance(config, DataConfig):
        option = "data.path" if config.datasets is None else "data.datasets"
        yield from ((source, option) for source in config.sources())
    elif not (isinstance(config, PromptDataConfig) and config.is_generated):
        yield SourceConfig(path=config.path), "data.path"
    if found := config.evaluation_source():
        yield SourceConfig(path=found[0], format=getattr(config, "format", "auto")), found[2]


def _checked(config: TextDataConfig, format: str, judged: bool) -> Callable[[Any], Iterator[Any]]:
    """Return what checks the rows of a task."""
    if isinstance(config, DataConfig):
        return lambda rows: to_examples(rows, format, has_template=True)
    if isinstance(config, PromptDataConfig):
        return lambda rows: (to_row(row, None) for row in rows)
    # Without a prompt, TRL looks for one; that is left for later.
    return to_judged if judged else lambda rows: to_pairs(rows, needs_prompt=False)


def check_image_folders(config: ImageDataConfig) -> None:
    """Refuse folders of images that are not there."""
    for option in ("path", "eval_path"):
        path = getattr(config, option)
        if path is not None and not path.startswith(TORCHVISION_PREFIX):
            is_image_folder(path, f"data.{option}")
