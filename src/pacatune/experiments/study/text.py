"""A study's task on `pacatune train`: the loss of a language model, and what it forgets."""

import dataclasses
from typing import Any, ClassVar

from rich.console import Console
from torch import Tensor

from pacatune.data import prepare_data
from pacatune.data.checks import find_overlap
from pacatune.experiments.study.forgetting import general_rows, text_loss
from pacatune.experiments.study.task import (
    Measured,
    Task,
    Values,
    released,
    take_test_path,
    weights_digest,
)
from pacatune.methods import TEXT_METHODS
from pacatune.training import model as models
from pacatune.training import recipe
from pacatune.training.preparation import fingerprint, prepare_run
from pacatune.training.report import train_curve
from pacatune.training.running import run_trainer


class TextTask(Task):
    """Runs of `pacatune train`; the metric is the loss per learned token."""

    command: ClassVar[str] = "train"
    methods: ClassVar[tuple[str, ...]] = TEXT_METHODS
    metrics: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._before: dict[tuple[Any, ...], float] = {}
        self._rows: dict[str, Tensor] = {}

    @classmethod
    def classes(cls) -> tuple[type[Any], dict[str, type[Any]]]:
        """Return RunConfig and its sections."""
        from pacatune import training

        return training.RunConfig, {
            "model": training.ModelConfig,
            "data": training.DataConfig,
            "paca": training.PacaSection,
            "lora": training.LoraSection,
            "moslora": training.MosLoraSection,
            "training": training.TrainingConfig,
        }

    def _take_test(self, data: Values) -> Values:
        return take_test_path(data)

    def count(self, config: Any) -> int:
        """Return how many parameters a run trains."""
        plan = models.plan_training(config, models.make_adapter_config(config))
        return plan.num_trainable_parameters

    def digest(self, config: Any) -> str:
        """Return hashes of all tokens and of the weights; warn of the data."""
        from datasets import concatenate_datasets

        run = prepare_run(config, Console(quiet=True))
        assert run.data.evaluation is not None, "a fraction is always held out"
        parts = (run.data.train, run.data.evaluation, self._test_data(config, run.tokenizer))
        whole = concatenate_datasets([run.data.train, run.data.evaluation])
        self._warn(*run.data.warnings, *find_overlap(whole, parts[2], "test"))
        weights = weights_digest(models.model_path(config), config.model.revision)
        return " ".join([*map(fingerprint, parts), weights, str(self.forgetting_tokens)])

    def run(self, config: Any, console: Console) -> Measured:
        """Train and evaluate."""
        with released():
            before = self._general_loss_before(config)
            run = prepare_run(config, console)
            test = self._test_data(config, run.tokenizer)
            trainer = recipe.make_trainer(config, run, "", None, console)
            trainer.args.eval_on_start = False
            run_trainer(trainer, config, None, console, less_memory="`training.max_length`")
            loss = {
                name: float(trainer.evaluate(data)["eval_loss"])
                for name, data in (("validation", run.data.evaluation), ("test", test))
            }
            forgetting = {}
            if before is not None:
                rows = self._general_rows(config.model.path, run.tokenizer)
                after = text_loss(trainer.model, rows, bf16=config.training.bf16)
                forgetting = {"before": before, "after": after}
            return Measured(
                validation={"loss": loss["validation"]},
                test={"loss": loss["test"]},
                num_trainable_parameters=models.count_trainable(trainer.model),
                train_loss=train_curve(trainer.state.log_history)[1],
                num_steps=trainer.state.global_step,
                forgetting=forgetting,
            )

    def _test_data(self, config: Any, tokenizer: Any) -> Any:
        options = self.test_options
        return prepare_data(
            dataclasses.replace(config.data, **options),
            tokenizer,
            max_length=config.training.max_length,
            stop_ids=models.find_stop_ids(config, tokenizer),
        ).train

    def _general_rows(self, path: str, tokenizer: Any) -> Tensor:
        if path not in self._rows:
            self._rows[path] = general_rows(tokenizer, self.forgetting_tokens)
        return self._rows[path]

    def _general_loss_before(self, config: Any) -> float | None:
        """Return the base's loss on general text, measured once for each way to hold the base."""
        if self.forgetting_tokens == 0:
            return None
        key = (
            config.model.path,
            models.weights_dtype(config),
            config.model.quantization,
            config.training.bf16,
        )
        if key not in self._before:
            rows = self._general_rows(config.model.path, models.load_tokenizer(config))
            model = models.load_model(config)
            if config.model.quantization is None:
                model.to(config.training.device)
            self._before[key] = text_loss(model, rows, bf16=config.training.bf16)
        return self._before[key]
