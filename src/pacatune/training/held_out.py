"""The held-out loss of a finished run, of its model and of what is made of it."""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from pacatune.training.config import RunConfig
from pacatune.training.config_file import CONFIG_NAME, read_values
from pacatune.training.language import Task

_BATCH_SIZE = 4
_TASKS = ("sft", "classifier")


class HeldOut:
    """The data that a run has held out. What its config.yaml names is opened: trust it.

    Raises:
        ValueError: If the folder is not that of such a run, or nothing was held out.
        FileNotFoundError: If its data is gone.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / CONFIG_NAME
        values = read_values(path)
        if (task := values.get("task", "sft")) not in _TASKS:
            raise ValueError(
                f"{path}: a run of the task {task!r} has no held-out loss of one model."
            )
        self._task = Task(RunConfig(**values))
        examples = self._task.evaluation
        if examples is None:
            raise ValueError(f"{path} holds out no data.")
        self._examples = examples

    @torch.no_grad()
    def loss(self, model: nn.Module, which: str = "the model") -> float:
        """Return the mean loss per learned token, or label; on a terminal a bar names the model."""
        device, total, num_tokens = next(model.parameters()).device, 0.0, 0
        places, terminal = range(len(self._examples)), Console(stderr=True)
        for start in track(
            places[::_BATCH_SIZE],
            f"held-out loss, {which}",
            console=terminal,
            transient=True,
            disable=not terminal.is_terminal,
        ):
            chosen = [*places[start : start + _BATCH_SIZE]]
            batch = self._task.collate(self._examples, chosen)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = batch["labels"]  # of tokens, or of whole texts
            number = int(((labels[:, 1:] if labels.ndim > 1 else labels) != -100).sum())
            total += float(model(**batch).loss) * number
            num_tokens += number
        return total / num_tokens
