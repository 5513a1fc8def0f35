"""The first row of each file of a run's data, read before anything heavy is imported."""

from itertools import islice

from pacatune.data.choices import CSV_COLUMNS
from pacatune.data.config import (
    TORCHVISION_PREFIX,
    DataConfig,
    ImageDataConfig,
    PromptDataConfig,
    TextDataConfig,
)
from pacatune.data.formats import to_examples
from pacatune.data.preference import to_judged, to_pairs
from pacatune.data.prompts import to_row
from pacatune.data.read import is_image_folder, is_local, read_rows


def check_first_rows(config: TextDataConfig, *, judged: bool = False) -> None:
    """Refuse files that are not there, or whose first row has columns that the task cannot use.

    With `judged`, answers may have a label, as KTO takes them.
    """
    if isinstance(config, PromptDataConfig) and config.is_generated:
        return
    for source, option in filter(None, (*config.sources(), config.evaluation_source())):
        if not is_local(source.path, option):
            continue
        columns = CSV_COLUMNS if source.format == "mmlu" else None
        rows = islice(read_rows(source.path, csv_columns=columns, option=option), 1)
        if isinstance(config, DataConfig):
            list(to_examples(rows, source.format, has_template=True))
        elif isinstance(config, PromptDataConfig):
            [to_row(row, None) for row in rows]
        else:  # Without a prompt, TRL looks for one; that is left for later.
            list(to_judged(rows) if judged else to_pairs(rows, needs_prompt=False))


def check_image_folders(config: ImageDataConfig) -> None:
    """Refuse folders of images that are not there."""
    for option in ("path", "eval_path"):
        path = getattr(config, option)
        if path is not None and not path.startswith(TORCHVISION_PREFIX):
            is_image_folder(path, f"data.{option}")
