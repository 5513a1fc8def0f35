"""A study's task on texts and their classes."""

import dataclasses
import hashlib
from typing import Any, ClassVar

from rich.console import Console

from pacatune import pretrained
from pacatune.data.checks import overlap_warning
from pacatune.experiments.study import classifier
from pacatune.experiments.study.labelled_texts import LabelledTexts, encode, read_texts, split_texts
from pacatune.experiments.study.task import (
    Measured,
    Task,
    Values,
    released,
    take_test_path,
    weights_digest,
)
from pacatune.methods import CLASSIFIER_METHODS
from pacatune.training.config import LoraSection, ModelConfig, MosLoraSection, PacaSection
from pacatune.training.model import count_trainable
from pacatune.training.report import train_curve
from pacatune.training.running import run_trainer


class ClassifyTask(Task):
    """Runs of the classifier recipe."""

    command: ClassVar[str] = "classify"
    methods: ClassVar[tuple[str, ...]] = CLASSIFIER_METHODS
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")

    @classmethod
    def classes(cls) -> tuple[type[Any], dict[str, type[Any]]]:
        """Return ClassifierConfig and its sections."""
        from pacatune.experiments.study import classifier_config as configs

        return configs.ClassifierConfig, {
            "model": ModelConfig,
            "data": configs.TextClassConfig,
            "paca": PacaSection,
            "lora": LoraSection,
            "moslora": MosLoraSection,
            "training": configs.ClassifierTrainingConfig,
        }

    def _take_test(self, data: Values) -> Values:
        return take_test_path(data)

    def count(self, config: Any) -> int:
        """Return how many parameters a run trains."""
        from transformers import AutoModelForSequenceClassification

        classes = _classes(split_texts(config.data)[0])
        model_config = pretrained.load_config(config.model.path, revision=config.model.revision)
        model_config.num_labels = len(classes)
        model = pretrained.empty_model(AutoModelForSequenceClassification, model_config)
        adapter = classifier.complete_adapter_config(config, model)
        return count_trainable(classifier.make_trainable(model, config, adapter))

    def digest(self, config: Any) -> str:
        """Return hashes of all texts and labels, and of the weights."""
        train, held_out = split_texts(config.data)
        test = self._test_texts(config)
        parts = (train, held_out, test)
        self._warn(
            *overlap_warning(train.texts, held_out.texts, "validation texts"),
            *overlap_warning(train.texts + held_out.texts, test.texts, "test texts"),
        )
        weights = weights_digest(pretrained.find_model(config.model.path), config.model.revision)
        return " ".join([*map(_fingerprint, parts), weights])

    def run(self, config: Any, console: Console) -> Measured:
        """Train and evaluate."""
        with released():
            train, held_out = split_texts(config.data)
            classes = _classes(train)
            tokenizer = pretrained.load_tokenizer(
                pretrained.find_model(config.model.path), revision=config.model.revision
            )
            parts = {"train": train, "validation": held_out, "test": self._test_texts(config)}
            data = {
                name: encode(part, classes, tokenizer, config.data.max_length)
                for name, part in parts.items()
            }
            model = classifier.load_classifier(config, classes)
            trainer = classifier.make_trainer(config, model, tokenizer, data["train"], console)
            run_trainer(trainer, config, None, console, less_memory="`data.max_length`")
            found = {name: trainer.evaluate(data[name]) for name in ("validation", "test")}
            return Measured(
                **{k: {m: float(v[f"eval_{m}"]) for m in self.metrics} for k, v in found.items()},
                num_trainable_parameters=count_trainable(trainer.model),
                train_loss=train_curve(trainer.state.log_history)[1],
                num_steps=trainer.state.global_step,
            )

    def _test_texts(self, config: Any) -> LabelledTexts:
        data = dataclasses.replace(config.data, **self.test_options)
        return read_texts(data.path, data.split, "data.eval_path")


def _classes(data: LabelledTexts) -> list[str]:
    return sorted(set(data.labels))


def _fingerprint(data: LabelledTexts) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text, label in zip(data.texts, data.labels, strict=True):
        digest.update(f"{text}\0{label}\0".encode())
    return digest.hexdigest()
