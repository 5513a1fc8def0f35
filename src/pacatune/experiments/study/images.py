"""A study's task on `pacatune train-image`: the accuracy of an image classifier."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from pacatune.experiments.study.task import Measured, Task, Values, released, weights_digest
from pacatune.methods import CLASSIFIER_METHODS


class ImageTask(Task):
    """Runs of `pacatune train-image`."""

    command: ClassVar[str] = "train-image"
    methods: ClassVar[tuple[str, ...]] = CLASSIFIER_METHODS
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")

    @classmethod
    def classes(cls) -> tuple[type[Any], dict[str, type[Any]]]:
        """Return ImageRunConfig and its sections."""
        from pacatune.training import image

        return image.ImageRunConfig, {
            "model": image.ImageModelConfig,
            "data": image.ImageDataConfig,
            "paca": image.PacaSection,
            "lora": image.LoraSection,
            "moslora": image.MosLoraSection,
            "training": image.ImageTrainingConfig,
        }

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

    def count(self, config: Any) -> int:
        """Return how many parameters a run trains."""
        from pacatune.data.images.sources import read_sources
        from pacatune.training.image.base import describe_base
        from pacatune.training.image.model import make_adapter_config, plan_training

        classes = read_sources(config.data)[0].classes
        base = describe_base(
            config.model.path, config.model.revision, classes, config.data.image_size
        )
        adapter_config, _ = make_adapter_config(config, base)
        return plan_training(config, base, adapter_config).num_trainable_parameters

    def digest(self, config: Any) -> str:
        """Return hashes of all pixels and classes, and of the weights; finds broken images."""
        from pacatune.data.checks import overlap_warning
        from pacatune.data.images import prepare_images
        from pacatune.data.images.prepare import check_images, run_digest

        images = prepare_images(config.data)
        texts, seen = [], []
        for part in (images.train, images.evaluation, self._test_images(config).evaluation):
            assert part is not None, "a fraction is held out, and there is test data"
            (digests,) = check_images((part.source, part.indices))
            texts.append(run_digest(part.source, part.indices, digests))
            seen.append(digests)
        train, validation, test = seen
        self._warn(
            *images.warnings,
            *overlap_warning(train, validation, "validation images"),
            *overlap_warning(train + validation, test, "test images"),
        )
        return " ".join([*texts, weights_digest(config.model.path, config.model.revision)])

    def run(self, config: Any, console: Console) -> Measured:
        """Train and evaluate."""
        from pacatune.data.images import ImageDataset
        from pacatune.training.image import recipe
        from pacatune.training.model import count_trainable
        from pacatune.training.report import train_curve
        from pacatune.training.running import run_trainer

        with released():
            part = self._test_images(config).evaluation
            assert part is not None, "there is test data"
            run = recipe.prepare(config, console)
            test = ImageDataset(part.source, part.indices, run.base.preprocessing)
            trainer = recipe.make_trainer(config, run, None, console)
            trainer.args.eval_on_start = False
            run_trainer(trainer, config, None, console, less_memory="`data.image_size`")
            found = {
                name: trainer.evaluate(data)
                for name, data in (("validation", run.evaluation), ("test", test))
            }
            return Measured(
                **{k: {m: float(v[f"eval_{m}"]) for m in self.metrics} for k, v in found.items()},
                num_trainable_parameters=count_trainable(trainer.model),
                train_loss=train_curve(trainer.state.log_history)[1],
                num_steps=trainer.state.global_step,
            )

    def _test_images(self, config: Any) -> Any:
        from pacatune.data.images import prepare_images

        return prepare_images(dataclasses.replace(config.data, **self.test_options))
