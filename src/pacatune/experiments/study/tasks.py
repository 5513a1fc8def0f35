"""What a study trains and evaluates: texts, images, texts with classes, each split in three."""

import copy
import dataclasses
import gc
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import concatenate_datasets
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from pacatune.data import prepare_data
from pacatune.data.checks import find_overlap, overlap_warning
from pacatune.data.encode import IGNORED
from pacatune.data.images import (
    ImageDataset,
    check_images,
    find_parts,
    images_digest,
    prepare_images,
)
from pacatune.experiments.study.result import Measured
from pacatune.methods import readers_of
from pacatune.pretrained import find_model
from pacatune.reports.provenance import sha256_of
from pacatune.training import RunConfig, language
from pacatune.training.classifier import encode, read_texts, split_texts, texts_digest
from pacatune.training.config_file import add_run_options, check_keys, option_parser
from pacatune.training.recipe import make_trainer, prepare, run_trainer
from pacatune.training.report import train_curve
from pacatune.training.sections import ADAPTER_SECTIONS
from pacatune.training.task import Task, count_trainable, task_of

Values = dict[str, Any]

# A run of a study is measured once, when it has ended, and leaves nothing but the numbers.
_FIXED = {"eval_strategy": "steps", "save_strategy": "no", "report_to": "none"}


class StudyTask(ABC):
    """A model and data, split into what is trained on, chosen by and reported.

    `values` are the options of the base run, in sections. Its evaluation data is the test data
    here; a share of its training data is held out to choose learning rates by.
    """

    kind: ClassVar[str]
    """Name of the task in the table of `train`."""
    metrics: ClassVar[tuple[str, ...]]
    """What is measured; the first is that of `metric: auto`."""

    def __init__(self, values: Values, validation_fraction: float, forgetting_tokens: int) -> None:
        self.values = copy.deepcopy(values)
        self.forgetting_tokens = forgetting_tokens
        self.metric = self.metrics[0]
        """What is compared."""
        self.warnings: list[str] = []
        """What looks wrong with the data, as far as `digest` has seen it."""
        self._parsed: dict[str, Values] = {}
        self.test_options = self._take_test(self.values.setdefault("data", {}))
        if self.values.get("early_stopping_patience") is not None:
            raise ValueError(
                "`early_stopping_patience` is set, but a study trains every arm for as long; drop "
                "it."
            )
        self.values["data"]["eval_fraction"] = validation_fraction
        self.values["training"] = {**self.values.get("training", {}), **_FIXED}

    def _take_test(self, data: Values) -> Values:
        """Remove the evaluation data from the data section and return it as options of one."""
        path, split = data.pop("eval_path", None), data.pop("eval_split", None)
        if path is None and split is None:
            raise ValueError(
                "the task has no `data.eval_path` or `data.eval_split`; give one: it is what is "
                "reported, and the learning rate is chosen on a part of the training data."
            )
        test = {"path": path or data.get("path", ""), "eval_fraction": 0}
        return test | ({"split": split} if split is not None else {})

    @abstractmethod
    def test_data(self, task: Task) -> Any:
        """Return the test data as the trainer takes it, for a task that is prepared."""

    @abstractmethod
    def digest(self, config: Any) -> str:
        """Return what tells model and data from others of the same names; warn of the data."""

    def _warn(self, *warnings: str) -> None:
        self.warnings += [text for text in warnings if text not in self.warnings]

    def count(self, config: Any) -> int:
        """Return how many parameters a run trains, without weights; checks what it can."""
        number: int = task_of(config).plan().num_trainable_parameters
        return number

    def run(self, config: Any, console: Console) -> Measured:
        """Train and evaluate."""
        with released():
            task = task_of(config)
            prepared = prepare(task, console)
            test = self.test_data(task)
            before = self._general_loss(task, None)
            trainer = make_trainer(task, prepared, None, console)
            trainer.args.eval_on_start, trainer.args.eval_strategy = False, "no"
            run_trainer(trainer, task, None, console)
            found = {
                name: self.measure(task, trainer, data)
                for name, data in (("validation", prepared.evaluation), ("test", test))
            }
            general = {"before": before, "after": self._general_loss(task, trainer.model)}
            return Measured(
                **found,
                num_trainable_parameters=count_trainable(trainer.model),
                train_loss=train_curve(trainer.state.log_history)[1],
                num_steps=trainer.state.global_step,
                step_ms=trainer.meter.step_ms,
                saved_activation_bytes=trainer.saved_activation_bytes,
                forgetting={name: value for name, value in general.items() if value is not None},
            )

    def measure(self, task: Task, trainer: Any, data: Any) -> dict[str, float]:
        """Return metric -> value of the trained model on some data."""
        values = trainer.evaluate(data)
        return {metric: float(values[f"eval_{metric}"]) for metric in self.metrics}

    def _general_loss(self, task: Task, model: Any) -> float | None:
        """Return the loss on general text of the trained model, or of the base where None."""
        return None

    def make_run(self, options: Values, rate: float, seed: int, folder: Path) -> Any:
        """Build a run by options over the task's, and what the study decides over those."""
        method = options.get("method")
        # What the task says of another method is for other arms.
        others = {name for name in ADAPTER_SECTIONS if method not in readers_of(name)}
        values = merged({k: v for k, v in self.values.items() if k not in others}, options)
        text = repr(values)
        if text not in self._parsed:  # checking takes longer than all that follows
            self._parsed[text] = self._parse(values)
        decided: Values = {
            "training": {"learning_rate": rate, "seed": seed, "output_dir": str(folder)}
        }
        if "paca" not in others:
            decided["paca"] = {"random_seed": seed}
        return RunConfig(**merged(self._parsed[text], decided))

    def _parse(self, values: Values) -> Values:
        parser, known = _parser(self.kind)
        check_keys(values, known, "the study's options")
        try:
            parsed: Values = parser.parse_object(values).as_dict()
        except Exception as error:  # jsonargparse's own classes of errors
            raise ValueError(f"the study's options: {error}") from error
        return parsed


class TextTask(StudyTask):
    """Runs of `pacatune train`: loss per learned token, exact answers, what the model forgets."""

    kind = "sft"
    metrics = ("loss", "exact_match")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._before: dict[tuple[Any, ...], float] = {}
        self._rows: dict[str, Tensor] = {}

    def test_data(self, task: Any) -> Any:
        """Return the test examples, encoded."""
        config, tokenizer = task.config, task.tokenizer
        return prepare_data(
            dataclasses.replace(config.data, **self.test_options),
            tokenizer,
            max_length=config.training.max_length,
            stop_ids=language.find_stop_ids(config, tokenizer),
        ).train

    def measure(self, task: Any, trainer: Any, data: Any) -> dict[str, float]:
        """Return the loss; with exact answers as the metric, those too, in one pass for both."""
        if self.metric != "exact_match":
            return {"loss": float(trainer.evaluate(data)["eval_loss"])}
        training = task.config.training
        places = torch.arange(len(data)).split(training.per_device_eval_batch_size)
        batches = (task.collate(data, part.tolist()) for part in places)
        loss, matches = loss_and_matches(trainer.model, batches, bf16=training.bf16)
        return {"loss": loss, "exact_match": sum(matches) / len(matches)}

    def digest(self, config: Any) -> str:
        """Return hashes of all tokens and of the weights; warn of the data."""
        task = task_of(config)
        run = prepare(task, Console(quiet=True))
        assert run.evaluation is not None, "a fraction is always held out"
        parts = (run.train, run.evaluation, self.test_data(task))
        whole = concatenate_datasets([run.train, run.evaluation])
        self._warn(*run.warnings, *find_overlap(whole, parts[2], "test"))
        weights = _weights_digest(language.model_path(config), config.model.revision)
        return " ".join([*map(language.fingerprint, parts), weights, str(self.forgetting_tokens)])

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
        key = (path, language.weights_dtype(config), quantization, bf16)
        if key not in self._before:
            base = language.load_model(config)
            if quantization is None:
                base.to(config.training.device)
            self._before[key] = text_loss(base, self._rows[path], bf16=bf16)
        return self._before[key]


class ImageTask(StudyTask):
    """Runs of `pacatune train-image`: the accuracy of an image classifier."""

    kind = "image"
    metrics = ("accuracy", "loss")

    def _take_test(self, data: Values) -> Values:
        path, split = data.pop("eval_path", None), data.pop("eval_split", None)
        if path is None and split is None and (parts := find_parts(data.get("path", ""))):
            data["path"] = parts.pop("train")
            path = parts.pop("test" if "test" in parts else "validation") if parts else None
            self._warn(*(f"{part} is not used." for part in parts.values()))
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
        return ImageDataset(self._test_images(task.config).evaluation, task.base.processor)

    def digest(self, config: Any) -> str:
        """Return hashes of all pixels and classes, and of the weights; finds broken images."""
        images = prepare_images(config.data)
        texts, seen = [], []
        for part in (images.train, images.evaluation, self._test_images(config).evaluation):
            assert part is not None, "a fraction is held out, and there is test data"
            (digests,) = check_images(part)
            texts.append(images_digest(part, digests))
            seen.append(digests)
        train, validation, test = seen
        self._warn(
            *images.warnings,
            *overlap_warning(train, validation, "validation images"),
            *overlap_warning(train + validation, test, "test images"),
        )
        return " ".join([*texts, _weights_digest(config.model.path, config.model.revision)])

    def _test_images(self, config: Any) -> Any:
        return prepare_images(dataclasses.replace(config.data, **self.test_options))


class ClassifyTask(StudyTask):
    """Runs of a classifier of texts: its accuracy."""

    kind = "classifier"
    metrics = ("accuracy", "loss")

    def test_data(self, task: Any) -> Any:
        """Return the test texts, encoded."""
        classes = sorted(set(split_texts(task.config.data)[0]["label"]))
        return encode(task, self._test_texts(task.config), classes)

    def digest(self, config: Any) -> str:
        """Return hashes of all texts and labels, and of the weights."""
        train, held_out = split_texts(config.data)
        test = self._test_texts(config)
        known = [*train["text"], *held_out["text"]]
        self._warn(
            *overlap_warning(train["text"], held_out["text"], "validation texts"),
            *overlap_warning(known, test["text"], "test texts"),
        )
        weights = _weights_digest(find_model(config.model.path), config.model.revision)
        return " ".join([*(texts_digest(part) for part in (train, held_out, test)), weights])

    def _test_texts(self, config: Any) -> Any:
        data = dataclasses.replace(config.data, **self.test_options)
        return read_texts(data.path, data.split, "data.eval_path")


TASKS: dict[str, type[StudyTask]] = {
    "train": TextTask,
    "train-image": ImageTask,
    "classify": ClassifyTask,
}
"""Name of a command -> its tasks."""


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """Return options with others over them, section by section; neither is changed."""
    result = dict(copy.deepcopy(dict(base)))
    for key, value in over.items():
        # Below a section, dictionaries (columns, patterns) are values and replaced as a whole.
        is_section = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = {**result[key], **value} if is_section else copy.deepcopy(value)
    return result


@contextmanager
def released() -> Iterator[None]:
    """Give memory back afterwards: a model is in a cycle with its trainer."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@cache
def _weights_digest(path: str, revision: str | None) -> str:
    """Return the hash of a local model's weights, or the name of one of the hub."""
    if not Path(path).is_dir():
        return f"{path}@{revision}"
    files = sorted(p for p in Path(path).iterdir() if p.suffix in (".safetensors", ".json"))
    return " ".join(f"{p.name}:{sha256_of(p)[:16]}" for p in files)


@cache
def _parser(task: str) -> tuple[Any, frozenset[str]]:
    parser = option_parser()
    sections = add_run_options(parser, task)
    known = {action.dest for action in parser._actions} - {"help", *sections}
    return parser, frozenset(known)


@torch.no_grad()
def loss_and_matches(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, bf16: bool
) -> tuple[float, list[bool]]:
    """Return the loss, and for each example whether greedy decoding would give what is learned.

    The loss is that of the trainer: the mean over the learned tokens of each batch, averaged over
    the batches by their size. One pass is enough for both: greedy decoding gives just the learned
    tokens where each is the likeliest after those before it. That holds where they are one stretch
    at the end, as in answers.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses: list[float] = []
    matches: list[bool] = []
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        labels = batch["labels"][:, 1:].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(**inputs).logits[:, :-1]
        found = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
        matches += found.tolist()
        losses += [float(F.cross_entropy(logits.float().mT, labels, ignore_index=IGNORED))] * len(
            labels
        )
    model.train(was_training)
    return sum(losses) / len(losses), matches


# What a language model forgets: its loss on general text, which no run trains on. The text is that
# of Python's own language reference and manual, in every installation of Python
# (`pydoc_data.topics`, PSF licence): English prose with some code, far from chats.
ROW_TOKENS = 256
_ROWS_PER_BATCH = 4


def general_rows(tokenizer: Any, num_tokens: int) -> Tensor:
    """Return general text from evenly spaced places, in rows of (num_tokens / 256, 256)."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    num_rows = -(-num_tokens // ROW_TOKENS)
    if len(ids) < num_rows * ROW_TOKENS:
        raise ValueError(
            f"`forgetting_tokens` ({num_tokens}) must be at most {len(ids)}, the length of the "
            "text; lower it."
        )
    starts = [place * (len(ids) - ROW_TOKENS) // max(num_rows - 1, 1) for place in range(num_rows)]
    return torch.tensor([ids[start : start + ROW_TOKENS] for start in starts])


@torch.no_grad()
def text_loss(model: nn.Module, rows: Tensor, *, bf16: bool) -> float:
    """Return the mean loss per token of (B, T) ids, in bfloat16 mixed precision as the runs."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in rows.to(device).split(_ROWS_PER_BATCH):
            total += float(model(input_ids=batch, labels=batch).loss) * len(batch)
    model.train(was_training)
    return total / len(rows)
