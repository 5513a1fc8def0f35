"""The kinds of tasks that a study takes: texts, images, texts with classes."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from torch import Tensor

from pacatune.data import prepare_data
from pacatune.data.checks import find_overlap, overlap_warning
from pacatune.experiments.study.forgetting import general_rows, text_loss
from pacatune.experiments.study.task import StudyTask, Values, weights_digest
from pacatune.pretrained import find_model
from pacatune.training import sft
from pacatune.training.recipe import prepare
from pacatune.training.task import task_of

__all__ = ["TASKS", "ClassifyTask", "ImageTask", "TextTask"]


class TextTask(StudyTask):
    """Runs of `pacatune train`: the loss per learned token, and what the model forgets."""

    metrics: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._before: dict[tuple[Any, ...], float] = {}
        self._rows: dict[str, Tensor] = {}

    @classmethod
    def run_class(cls) -> Any:
        """Return RunConfig."""
        from pacatune.training import RunConfig

        return RunConfig

    def test_data(self, task: Any) -> Any:
        """Return the test examples, encoded."""
        config, tokenizer = task.config, task.tokenizer
        return prepare_data(
            dataclasses.replace(config.data, **self.test_options),
            tokenizer,
            max_length=config.training.max_length,
            stop_ids=sft.find_stop_ids(config, tokenizer),
        ).train

    def digest(self, config: Any) -> str:
        """Return hashes of all tokens and of the weights; warn of the data."""
        from datasets import concatenate_datasets

        task = task_of(config)
        run = prepare(task, Console(quiet=True))
        assert run.evaluation is not None, "a fraction is always held out"
        parts = (run.train, run.evaluation, self.test_data(task))
        whole = concatenate_datasets([run.train, run.evaluation])
        self._warn(*run.warnings, *find_overlap(whole, parts[2], "test"))
        weights = weights_digest(sft.model_path(config), config.model.revision)
        return " ".join([*map(sft.fingerprint, parts), weights, str(self.forgetting_tokens)])

    def _general_loss(self, task: Any, model: Any) -> float | None:
        """Return the loss on general text; the base's is measured once for each way to hold it."""
        if self.forgetting_tokens == 0:
            return None
        config = task.config
        path, quantization = config.model.path, config.model.quantization
        bf16 = config.training.bf16
        if path not in self._rows:
            self._rows[path] = general_rows(task.tokenizer, self.forgetting_tokens)
        if model is not None:
            return text_loss(model, self._rows[path], bf16=bf16)
        key = (path, sft.weights_dtype(config), quantization, bf16)
        if key not in self._before:
            base = sft.load_model(config)
            if quantization is None:
                base.to(config.training.device)
            self._before[key] = text_loss(base, self._rows[path], bf16=bf16)
        return self._before[key]


class ImageTask(StudyTask):
    """Runs of `pacatune train-image`: the accuracy of an image classifier."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")

    @classmethod
    def run_class(cls) -> Any:
        """Return ImageRunConfig."""
        from pacatune.training.image import ImageRunConfig

        return ImageRunConfig

    def _take_test(self, data: Values) -> Values:
        from pacatune.data.images.sources import find_split

        path, split = data.pop("eval_path", None), data.pop("eval_split", None)
        folder = Path(data.get("path", "")).expanduser()
        if path is None and split is None and folder.is_dir() and (found := find_split(folder)):
            data["path"], path = str(folder / "train"), str(folder / found)
        if path is None and split is None:
            raise ValueError(
                "the task has no `data.eval_path` or `data.eval_split`, nor a folder `test` beside "
                "`train`; give one: it is what is reported, and the learning rate is chosen on a "
                "part of the training images."
            )
        data["check_images"] = False  # once for the study, by `digest`, and not in each run
        return {
            "eval_path": path,
            "eval_split": split,
            "eval_per_class": data.pop("eval_per_class", None),
        }

    def test_data(self, task: Any) -> Any:
        """Return the test images."""
        from pacatune.data.images import ImageDataset

        part = self._test_images(task.config).evaluation
        return ImageDataset(part.source, part.indices, task.base.preprocessing)

    def digest(self, config: Any) -> str:
        """Return hashes of all pixels and classes, and of the weights; finds broken images."""
        from pacatune.data.checks import overlap_warning
        from pacatune.data.images import prepare_images
        from pacatune.data.images.prepare import check_images, run_digest

        images = prepare_images(config.data)
        texts, seen = [], []
        for part in (images.train, images.evaluation, self._test_images(config).evaluation):
            assert part is not None, "a fraction is held out, and there is test data"
            (digests,) = check_images(part)
            texts.append(run_digest(part, digests))
            seen.append(digests)
        train, validation, test = seen
        self._warn(
            *images.warnings,
            *overlap_warning(train, validation, "validation images"),
            *overlap_warning(train + validation, test, "test images"),
        )
        return " ".join([*texts, weights_digest(config.model.path, config.model.revision)])

    def _test_images(self, config: Any) -> Any:
        from pacatune.data.images import prepare_images

        return prepare_images(dataclasses.replace(config.data, **self.test_options))


class ClassifyTask(StudyTask):
    """Runs of a classifier of texts: its accuracy."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")

    @classmethod
    def run_class(cls) -> Any:
        """Return ClassifierConfig."""
        from pacatune.training.classifier import ClassifierConfig

        return ClassifierConfig

    def test_data(self, task: Any) -> Any:
        """Return the test texts, encoded."""
        return task.encode(self._test_texts(task.config))

    def digest(self, config: Any) -> str:
        """Return hashes of all texts and labels, and of the weights."""
        from pacatune.training.classifier import split_texts

        train, held_out = split_texts(config.data)
        test = self._test_texts(config)
        self._warn(
            *overlap_warning(train.texts, held_out.texts, "validation texts"),
            *overlap_warning(train.texts + held_out.texts, test.texts, "test texts"),
        )
        weights = weights_digest(find_model(config.model.path), config.model.revision)
        return " ".join([*(part.fingerprint() for part in (train, held_out, test)), weights])

    def _test_texts(self, config: Any) -> Any:
        from pacatune.training.classifier import read_texts

        data = dataclasses.replace(config.data, **self.test_options)
        return read_texts(data.path, data.split, "data.eval_path")


TASKS: dict[str, type[StudyTask]] = {
    "train": TextTask,
    "train-image": ImageTask,
    "classify": ClassifyTask,
}
"""Name of a command -> its tasks."""
