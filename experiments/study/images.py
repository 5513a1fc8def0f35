"""One run of a study on images, by the trainer of examples/images.py."""

from pathlib import Path
from typing import Any

from examples.images import kept_bytes, load_images, make_trainer
from experiments.study.config import Arm, StudyConfig, Values, merged
from experiments.study.tasks import released
from pacatune.training.config_file import read_values


class ImageTask:
    """A model and images, of which a part is trained on, one chooses rates and one is reported.

    The task has `model` (`path`, `attn_implementation`), `data` (`path`, `train_per_class`,
    `eval_per_class`, `image_size`) and `training` (`max_steps`, `head_learning_rate`, `bf16`); arms
    give `method`, size and options as they do for texts.
    """

    metric, test_options = "accuracy", Values()

    def __init__(self, config: StudyConfig) -> None:
        task = read_values(Path(config.task).expanduser()) if config.task else {}
        self.values, self.config = merged(task, config.options), config

    def make_run(self, arm: Arm, rate: float, seed: int, folder: Path) -> Values:
        """Return all that decides a run."""
        options = arm.run_options()
        training = {**self.values["training"], "learning_rate": rate, "seed": seed}
        training["output_dir"] = str(folder)
        return {**self.values, **options, "training": training}

    def trainer_of(self, run: Values) -> tuple[Any, Any]:
        """Return a run's trainer, and the images that choose rates."""
        data, training, method = run["data"], run["training"], run["method"]
        options = dict(run["paca" if method == "paca" else "lora"])
        rank = options.pop("r")
        options.pop("lora_dropout", None)
        seed = training["seed"]
        train, test = load_images(Path(data["path"]).expanduser())
        train = _per_class(train, data["train_per_class"])
        test = _per_class(test, data["eval_per_class"])
        parts = train.train_test_split(
            self.config.validation_fraction, stratify_by_column="label", seed=seed
        )
        trainer = make_trainer(
            str(Path(run["model"]["path"]).expanduser()),
            method,
            (parts["train"], test),
            Path(training["output_dir"]),
            rank,
            training["learning_rate"],
            training["max_steps"],
            seed=seed,
            size=data["image_size"],
            head_rate=training["head_learning_rate"],
            bf16=training.get("bf16", False),
            attention=run["model"].get("attn_implementation"),
            **options,
        )
        see = trainer.eval_dataset.format["format_kwargs"]["transform"]
        return trainer, parts["test"].with_transform(see)

    def run(self, run: Values) -> dict[str, float]:
        """Train and evaluate; return what is measured -> value."""
        import transformers

        steps = run["training"]["max_steps"]
        with released():
            trainer, chosen_by = self.trainer_of(run)
            trainer.remove_callback(transformers.PrinterCallback)
            kept = kept_bytes(trainer.model, next(iter(trainer.get_train_dataloader())))
            trainer.model.zero_grad()
            trained = trainer.train().metrics
            numbers: dict[str, Any] = {
                "train loss": trained["train_loss"],
                "step, ms": 1000 * trained["train_runtime"] / steps,
                "steps": steps,
                "kept for backward, bytes": kept,
                "trained parameters": trainer.get_num_trainable_parameters(),
            }
            for name, part in (("validation", chosen_by), ("test", None)):
                values = trainer.evaluate(part)
                numbers |= {
                    f"{name} {what}": values[f"eval_{what}"] for what in ("loss", "accuracy")
                }
        return {what: float(value) for what, value in numbers.items()}


def _per_class(images: Any, number: int) -> Any:
    """Return the first images of each class."""
    seen: dict[int, int] = {}
    places = []
    for place, label in enumerate(images["label"]):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= number:
            places.append(place)
    return images.select(places)
