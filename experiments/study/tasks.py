"""One run of a study: what it trains, and all that is measured of it."""

import copy
import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from trl import SFTTrainer

from experiments.study.config import Arm, StudyConfig, Values, merged
from pacatune.data.encode import IGNORED
from pacatune.methods import METHODS, readers_of
from pacatune.training import RunConfig
from pacatune.training.config_file import read_values
from pacatune.training.language import Task
from pacatune.training.recipe import make_trainer, run_trainer, show_plan
from pacatune.training.report import train_curve
from pacatune.training.sections import ADAPTER_SECTIONS
from pacatune.training.task import count_trainable

KINDS = {"train": "sft", "classify": "classifier"}
"""Name of a study's command -> its task in the table of `train`."""
# A run of a study is measured once, when it has ended, and leaves nothing but the numbers.
_FIXED = {"eval_strategy": "steps", "save_strategy": "no", "report_to": "none"}
_TEST = ("eval_path", "eval_split", "eval_per_class")
_QUIET = Console(quiet=True)
_WINDOW = 1024


class StudyTask:
    """A model and data, split into what is trained on, chosen by and reported.

    The task's evaluation data is the test data; a share of its training data is held out to choose
    learning rates by.
    """

    def __init__(self, config: StudyConfig) -> None:
        task = read_values(Path(config.task).expanduser()) if config.task else {}
        values = merged(task, config.options)
        data = dict(values.get("data", {}))
        self.test_options = {name: data.pop(name) for name in _TEST if data.get(name) is not None}
        if not {"eval_path", "eval_split"} & self.test_options.keys():
            raise ValueError(
                "the task has no `data.eval_path` or `data.eval_split`; give one: it is what is "
                "reported, and the learning rate is chosen on a part of the training data."
            )
        self.kind, self.config = KINDS[config.command], config
        self.metric = config.metric
        if self.metric == "auto":
            self.metric = "loss" if self.kind == "sft" else "accuracy"
        data["eval_fraction"] = config.validation_fraction
        training = {**values.get("training", {}), **_FIXED}
        self.values = values | {"task": self.kind, "data": data, "training": training}

    def make_run(self, arm: Arm, rate: float, seed: int, folder: Path) -> RunConfig:
        """Build a run by an arm's options over the task's, and what the study decides over both."""
        # What the task says of another method is for other arms.
        others = {name for name in ADAPTER_SECTIONS if arm.method not in readers_of(name)}
        shared = {name: value for name, value in self.values.items() if name not in others}
        training = {"learning_rate": rate, "seed": seed, "output_dir": str(folder)}
        decided: Values = {"training": training}
        if "paca" not in others:
            decided["paca"] = {"random_seed": seed}
        return RunConfig(**merged(merged(shared, arm.run_options()), decided))

    def run(self, config: RunConfig) -> dict[str, float]:
        """Train and evaluate; return what is measured -> value."""
        with released(), mock.patch.object(SFTTrainer, "compute_loss", answer_loss):
            # First, since each new set of training options resets what a trainer has set up.
            test, others = _data(config, self.test_options), None
            if path := self.config.unrelated:
                others = _data(config, {"eval_path": str(Path(path).expanduser())})
            task = Task(config)
            show_plan(task, _QUIET)
            trainer = make_trainer(task, None, _QUIET)
            trainer.args.eval_on_start, trainer.args.eval_strategy = False, "no"
            numbers = self._forgetting(task, trainer, others, "before")
            run_trainer(trainer, task, None, _QUIET)
            numbers |= self._forgetting(task, trainer, others, "after")
            for part, data in (("validation", task.evaluation), ("test", test)):
                values = trainer.evaluate(data)
                names = [name for name in ("accuracy", "loss") if f"eval_{name}" in values]
                numbers |= {f"{part} {name}": values[f"eval_{name}"] for name in names}
            if self.metric == "exact_match":
                numbers["test exact_match"] = exact_match(trainer, test)
            numbers |= {
                "train loss": train_curve(trainer.state.log_history)[1],
                "trained parameters": count_trainable(trainer.model),
                "steps": trainer.state.global_step,
                "step, ms": trainer.meter.step_ms,
                "kept for backward, bytes": trainer.saved_activation_bytes,
            }
            for share in self.config.rewind if METHODS[config.method].has_scale else ():
                with rewound(trainer.model, share):
                    numbers |= self._forgetting(task, trainer, others, f"at {share:g}")
                    numbers[f"test loss at {share:g}"] = trainer.evaluate(test)["eval_loss"]
        numbers = {what: float(value) for what, value in numbers.items() if value is not None}
        for what, value in numbers.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{what} is {value}: training diverged; lower the rate.")
        return numbers

    def _forgetting(self, task: Any, trainer: Any, unrelated: Any, when: str) -> dict[str, Any]:
        """Return the losses on what no run trains on: general text, and another task."""
        numbers, limit = dict[str, Any](), self.config.forgetting_tokens
        if limit:
            measure = pairing_loss if self.kind == "classifier" else text_loss
            with trainer.accelerator.autocast():
                numbers[f"general loss {when}"] = measure(trainer.model, task.tokenizer, limit)
        if unrelated is not None:
            numbers[f"unrelated loss {when}"] = trainer.evaluate(unrelated)["eval_loss"]
        return numbers


def _data(config: RunConfig, options: Values) -> Any:
    """Return what evaluation data that a run's options name are to its trainer."""
    changed = copy.copy(config)
    changed.data = replace(config.data, eval_fraction=0, **options)
    return Task(changed).evaluation


@contextmanager
def rewound(model: Any, share: float) -> Iterator[None]:
    """Let an adapter's update count by a share: 1 is all of it."""
    # Set as numbers, since not every class of PEFT that multiplies by them has a method for it.
    scalings = [layer.scaling for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [dict(scales) for scales in scalings]
    try:
        for scales in scalings:
            scales.update({name: share * scale for name, scale in scales.items()})
        yield
    finally:
        for scales, old in zip(scalings, before, strict=True):
            scales.update(old)


def general_text() -> str:
    """Return a text that every Python has, prose with some code: its reference manual."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any, max_tokens: int) -> float:
    """Return the loss of the next token of general text, in windows that do not overlap."""
    ids = tokenizer(general_text(), return_tensors="pt", verbose=False)["input_ids"]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", _WINDOW)
    total, number = 0.0, 0
    for window in ids[0, :max_tokens].split(min(_WINDOW, longest)):
        if len(window) > 1:
            rows = window.unsqueeze(0).to(model.device)
            total += (len(window) - 1) * model.eval()(input_ids=rows, labels=rows).loss.item()
            number += len(window) - 1
    return total / number


@torch.no_grad()
def pairing_loss(model: Any, tokenizer: Any, max_tokens: int) -> float:
    """Return the loss of finding a paragraph's second half by its first, among 32 paragraphs.

    Sentence encoders are trained for this: the cross-entropy of 20 times the cosines of means over
    tokens. Where `max_tokens` asks for more paragraphs than there are, of all.
    """
    words = [part.split() for part in general_text().split("\n\n")]
    pairs = [(w[: len(w) // 2], w[len(w) // 2 :]) for w in words if 16 <= len(w) <= 64]
    losses = []
    for start in range(0, min(max(32, max_tokens // 64), len(pairs) // 32 * 32), 32):
        sides = zip(*pairs[start : start + 32], strict=True)
        first, second = (_embeddings(model.eval(), tokenizer, side) for side in sides)
        target = torch.arange(len(first), device=first.device)
        losses.append(F.cross_entropy(20 * first @ second.T, target).item())
    return sum(losses) / len(losses)


def _embeddings(model: Any, tokenizer: Any, texts: Sequence[list[str]]) -> torch.Tensor:
    length = min(128, getattr(model.config, "max_position_embeddings", 128))
    limit = {"padding": True, "truncation": True, "max_length": length}
    batch = tokenizer([" ".join(words) for words in texts], return_tensors="pt", **limit)
    batch = batch.to(model.device)
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def answer_loss(
    trainer: Any,
    model: Any,
    inputs: Values,
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """Return the mean loss of learned tokens, as TRL's trainer does, from their logits alone.

    Without a GPU, TRL's own takes the head's products in float32, which is half of a small model's
    step.
    """
    logits, labels, _ = learned_logits(trainer, model, inputs)
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
    return (loss, {"loss": loss, "logits": loss.detach()[None]}) if return_outputs else loss


def learned_logits(trainer: Any, model: Any, batch: Values) -> tuple[Any, Any, Any]:
    """Return the logits and labels of learned tokens, and where they are (B, T - 1)."""
    causal = trainer.accelerator.unwrap_model(model)
    causal = causal.get_base_model() if isinstance(causal, PeftModel) else causal
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORED
    with trainer.accelerator.autocast():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        return causal.lm_head(hidden[:, :-1][learned]), labels[learned], learned


@torch.no_grad()
def exact_match(trainer: Any, data: Any) -> float:
    """Return the share of examples of which greedy decoding would give what is learned.

    One pass is enough: it gives just the learned tokens where each is the likeliest after those
    before it. That holds where they are one stretch at the end, as in answers.
    """
    model, matches = trainer.model.eval(), list[bool]()
    for batch in trainer.get_eval_dataloader(data):
        logits, labels, learned = learned_logits(trainer, model, batch)
        right = torch.ones_like(learned)
        right[learned] = logits.argmax(-1) == labels
        matches += right.all(1).tolist()
    return sum(matches) / len(matches)


@contextmanager
def released() -> Iterator[None]:
    """Give memory back afterwards: a model is in a cycle with its trainer."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
