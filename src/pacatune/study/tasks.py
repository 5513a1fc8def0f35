"""What a study trains and measures: runs of one command, whose data has three parts."""

import copy
import gc
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console

from experiments.perplexity import general_text, text_loss
from pacatune.data.checks import overlap_warning, row_digests
from pacatune.data.encode import IGNORED
from pacatune.data.images import ImageDataset, check_images, find_parts, images_digest
from pacatune.methods import METHODS, readers_of
from pacatune.reports.provenance import sha256_of
from pacatune.training import RunConfig
from pacatune.training.config_file import add_run_options, check_keys, option_parser, to_values
from pacatune.training.recipe import make_trainer, prepare, run_trainer
from pacatune.training.report import train_curve
from pacatune.training.sections import ADAPTER_SECTIONS
from pacatune.training.task import count_trainable, task_of

Values = dict[str, Any]

KINDS = {"train": "sft", "train-image": "image", "classify": "classifier"}
"""Name of a study's command -> its task in the table of `train`."""
# A run of a study is measured once, when it has ended, and leaves nothing but the numbers.
_FIXED = {"eval_strategy": "steps", "save_strategy": "no", "report_to": "none"}
_QUIET = Console(quiet=True)


class StudyTask:
    """A model and data, split into what is trained on, chosen by and reported.

    `values` are the options of the base run, in sections. Its evaluation data is the test data
    here; a share of its training data is held out to choose learning rates by.
    """

    def __init__(
        self, command: str, values: Values, validation_fraction: float, forgetting_tokens: int
    ) -> None:
        self.kind = KINDS[command]
        is_text = self.kind == "sft"
        self.metrics = ("loss", "exact_match") if is_text else ("accuracy", "loss")
        """What can be compared; the first is that of `metric: auto`."""
        self.metric = self.metrics[0]
        self.forgetting_tokens = 0 if self.kind == "image" else forgetting_tokens
        self.matched: tuple[str, ...] = ("validation", "test")
        """Parts of which exact answers are counted."""
        self.unrelated = ""
        """Data of another task, whose loss is measured before and after."""
        self.rewind: list[float] = []
        """Shares of the update with which a run is tested too."""
        self.warnings: list[str] = []
        """What looks wrong with the data, as far as `look` has seen it."""
        self._seen: dict[str, tuple[str, Any, Any]] = {}
        self._before: dict[tuple[str, str], dict[str, Any]] = {}
        self.values = copy.deepcopy(values)
        self.test_options = self._take_test(self.values.setdefault("data", {}))
        if self.values.get("early_stopping_patience") is not None:
            raise ValueError(
                "`early_stopping_patience` is set, but a study trains every arm for as long; drop "
                "it."
            )
        self.values["data"]["eval_fraction"] = validation_fraction
        self.values["training"] = {**self.values.get("training", {}), **_FIXED}

    def _take_test(self, data: Values) -> Values:
        """Move the options of evaluation out of the data section, and return them."""
        names = ("eval_path", "eval_split", "eval_per_class")
        test = {name: data.pop(name) for name in names if data.get(name) is not None}
        if self.kind == "image":
            data["check_images"] = False  # once for the study, by `look`, and not in each run
            parts = find_parts(data.get("path", ""))
            if "eval_path" not in test and parts:
                data["path"] = parts.pop("train")
                if parts:
                    test["eval_path"] = parts.pop("test" if "test" in parts else "validation")
                self._warn(*(f"{part} is not used." for part in parts.values()))
        if not {"eval_path", "eval_split"} & test.keys():
            raise ValueError(
                "the task has no `data.eval_path` or `data.eval_split` (nor, for images, a folder "
                "`test` beside `train`); give one: it is what is reported, and the learning rate "
                "is chosen on a part of the training data."
            )
        return test

    def _warn(self, *warnings: str) -> None:
        self.warnings += [text for text in warnings if text not in self.warnings]

    def make_run(self, options: Values, rate: float, seed: int, folder: Path) -> RunConfig:
        """Build a run by options over the task's, and what the study decides over those."""
        # What the task says of another method is for other arms.
        others = {name for name in ADAPTER_SECTIONS if options["method"] not in readers_of(name)}
        values = merged({k: v for k, v in self.values.items() if k not in others}, options)
        decided: Values = {
            "training": {"learning_rate": rate, "seed": seed, "output_dir": str(folder)}
        }
        if "paca" not in others:
            decided["paca"] = {"random_seed": seed}
        return RunConfig(**merged(_parsed(self.kind, json.dumps(values)), decided))

    def count(self, config: RunConfig) -> int:
        """Return how many parameters a run trains, without weights; checks what it can."""
        number: int = task_of(config).plan().num_trainable_parameters
        return number

    def look(self, config: RunConfig) -> tuple[str, Any, Any]:
        """Return a digest of model and data, test data as the trainer takes it, and the unrelated.

        It looks once at what several runs share, and warns of it.
        """
        if (where := _where(config)) not in self._seen:
            run, test = prepare(task_of(config), _QUIET), _data(config, self.test_options)
            unrelated = _data(config, {"eval_path": self.unrelated}) if self.unrelated else None
            parts = [_digests(part) for part in (run.train, run.evaluation, test)]
            train, validation, asked = (examples for examples, _ in parts)
            parts += [_digests(unrelated)] if self.unrelated else []
            table: Any = getattr(test, "table", test)
            places = table["place"][:] if "place" in table.column_names else None
            if self.kind == "image":
                self._warn(*overlap_warning(train, validation, "validation images"))
            known = train + validation
            self._warn(*run.warnings, *overlap_warning(known, asked, "test examples", places))
            digests = [digest for _, digest in parts]
            digests += [_weights_digest(run.model, config.model.revision)]
            self._seen[where] = " ".join([*digests, str(self.forgetting_tokens)]), test, unrelated
        return self._seen[where]

    def run(self, config: RunConfig) -> dict[str, float]:
        """Train and evaluate; return what is measured -> value."""
        with released():
            (_, test, unrelated), task = self.look(config), task_of(config)
            prepared = prepare(task, _QUIET)
            trainer = make_trainer(task, prepared, None, _QUIET)
            trainer.args.eval_on_start, trainer.args.eval_strategy = False, "no"
            others = partial(self._others, task, trainer, unrelated)
            # An adapter changes nothing yet, so one run of a method says it for all.
            if (where := (_where(config), config.method)) not in self._before:
                self._before[where] = others("before")
            found = dict(self._before[where])
            run_trainer(trainer, task, None, _QUIET)
            found |= others("after")
            for part, data in (("validation", prepared.evaluation), ("test", test)):
                for metric, value in self._measure(trainer, data, part).items():
                    found[f"{part} {metric}"] = value
            found |= {
                "train loss": train_curve(trainer.state.log_history)[1],
                "trained parameters": count_trainable(trainer.model),
                "steps": trainer.state.global_step,
                "step": trainer.meter.step_ms,
                "kept for backward": trainer.saved_activation_bytes,
            }
            for share in self.rewind if METHODS[config.method].has_scale else ():
                with rewound(trainer.model, share):
                    found |= others(at := f"at {share:g}")
                    found[f"test loss {at}"] = trainer.evaluate(test)["eval_loss"]
        known = {what: value for what, value in found.items() if value is not None}
        for what, value in known.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{what} is {value}: training diverged; lower the rate.")
        return known

    def _measure(self, trainer: Any, data: Any, part: str) -> dict[str, float]:
        values = trainer.evaluate(data)
        found = {name: values.get(f"eval_{name}") for name in self.metrics}
        if self.metric == "exact_match" and part in self.matched:
            found["exact_match"] = exact_match(trainer, data)
        return {name: float(value) for name, value in found.items() if value is not None}

    def _others(self, task: Any, trainer: Any, unrelated: Any, when: str) -> dict[str, Any]:
        """Return the losses on what no run trains on."""
        found = {f"general loss {when}": self._general_loss(task, trainer)}
        if unrelated is not None:
            found[f"unrelated loss {when}"] = trainer.evaluate(unrelated)["eval_loss"]
        return found

    def _general_loss(self, task: Any, trainer: Any) -> float | None:
        """Return the loss on general text, which no run trains on: English prose with some code.

        Of an encoder it is that of finding the second half of a paragraph by its first.
        """
        if not self.forgetting_tokens:
            return None
        limit = self.forgetting_tokens
        with trainer.accelerator.autocast():
            if self.kind == "classifier":
                return pairing_loss(trainer.model, task.tokenizer, limit)
            return text_loss(trainer.model, task.tokenizer, general_text(), limit)


def _where(config: RunConfig) -> str:
    """Return what tells model, data and training from others, whatever the rate and the seed."""
    values = to_values(config.settled())
    for name in ("learning_rate", "seed", "output_dir"):
        values["training"].pop(name, None)
    return json.dumps([values["data"], values["model"], values["training"]])


def _data(config: RunConfig, options: Values) -> Any:
    """Return what evaluation data that a run's options name are to its trainer."""
    changed = copy.copy(config)
    changed.data = replace(config.data, eval_fraction=0, **options)
    return prepare(task_of(changed), _QUIET).evaluation


@contextmanager
def rewound(model: Any, share: float) -> Iterator[None]:
    """Let an adapter's update count by a share: 1 is all of it."""
    # Set as numbers, since not every class of PEFT that multiplies by them has a method for it.
    found = [layer.scaling for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [dict(scales) for scales in found]
    try:
        for scales in found:
            scales.update({name: share * scale for name, scale in scales.items()})
        yield
    finally:
        for scales, old in zip(found, before, strict=True):
            scales.update(old)


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


@torch.no_grad()
def exact_match(trainer: Any, data: Any) -> float:
    """Return the share of examples of which greedy decoding would give what is learned.

    One pass is enough: it gives just the learned tokens where each is the likeliest after those
    before it. That holds where they are one stretch at the end, as in answers.
    """
    model, matches = trainer.model.eval(), list[bool]()
    for batch in trainer.get_eval_dataloader(data):
        labels = batch.pop("labels")[:, 1:]
        with trainer.accelerator.autocast():
            likeliest = model(**batch).logits[:, :-1].argmax(-1)
        matches += ((likeliest == labels) | (labels == IGNORED)).all(1).tolist()
    return sum(matches) / len(matches)


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


def _digests(part: Any) -> tuple[list[Any], str]:
    """Return what tells each example of a part from others, and what tells the part."""
    if isinstance(part, ImageDataset):
        (digests,) = check_images(part.table)
        return digests, images_digest(part.table, digests)
    found = list(row_digests(part))
    return found, hashlib.blake2b(b"".join(found), digest_size=16).hexdigest()


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


@cache
def _parsed(task: str, text: str) -> Values:
    """Return options, given as JSON, checked; it takes longer than all that follows."""
    parser, known = _parser(task)
    values = json.loads(text)
    check_keys(values, known, "the study's options")
    try:
        parsed: Values = parser.parse_object(values).as_dict()
    except Exception as error:  # jsonargparse's own classes of errors
        raise ValueError(f"the study's options: {error}") from error
    return parsed
