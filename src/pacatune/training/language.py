"""Language models for training: tokenizer, plan, weights; and what all tasks on them share."""

import copy
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

import torch
import transformers
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pacatune import pretrained
from pacatune.adapters import base
from pacatune.adapters.folder import locate_folder
from pacatune.data.checks import fingerprint, overlap_warning
from pacatune.data.encode import Encoder, reads_variable, with_defaults
from pacatune.data.formats import VARIABLES
from pacatune.data.prepare import show_preview
from pacatune.data.prompts import prompt_ids
from pacatune.data.read import read_template
from pacatune.files.journal import is_gguf
from pacatune.grid import is_packed
from pacatune.grid.loading import NotPackableError
from pacatune.installation import install_command
from pacatune.methods import CLASSIFIER_METHODS, METHODS
from pacatune.precision import choose_dtype, dtype_name
from pacatune.training.config import RunConfig
from pacatune.training.output import TrainedOn
from pacatune.training.progress import main_console, show_warnings
from pacatune.training.report import Report
from pacatune.training.task import (
    Plan,
    TaskData,
    make_adapter_config,
    make_plan,
    reset_heads,
)
from pacatune.training.tasks import ModelKind
from pacatune.training.trainer import RunTrainer


class Task:
    """One run, whose methods may be called in any order: what they need is found out by then."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.spec = config, config.spec
        self.trainer_class: type[RunTrainer] = resolve_name(self.spec.trainer)
        self.arguments = config.training.resolved()
        """The options of `training` as a trainer takes them."""

    @cached_property
    def data(self) -> TaskData:
        """The data, read when it is first asked for."""
        data: TaskData = self.trainer_class.prepare(self)
        return data

    @property
    def kind(self) -> ModelKind:
        """What the model does, which images in the data may change."""
        return self.data.kind or self.spec.kind

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the chat template and stop token of the run."""
        return load_tokenizer(self.config)

    @cached_property
    def model_config(self) -> Any:
        """The configuration of the base."""
        return pretrained.load_config(self.model_path, revision=self.config.model.revision)

    @property
    def model_path(self) -> str:
        """The hub id of the base, or the absolute path of a local folder."""
        return pretrained.find_model(self.config.model.path)

    @property
    def stop_ids(self) -> set[int]:
        """Tokens at which a generation of this model ends."""
        ids = {self.tokenizer.eos_token_id}
        if not is_gguf(self.config.model.path):  # which has one such token, the tokenizer's
            with suppress(OSError):  # Older models have no generation_config.json.
                revision = self.config.model.revision
                generation = GenerationConfig.from_pretrained(self.model_path, revision=revision)
                stops = generation.eos_token_id
                ids |= set(stops if isinstance(stops, list) else [stops])
        return ids - {None}

    def encoder(self, **options: Any) -> Encoder:
        """Return what makes tokens of the task's examples; `options` are its own."""
        limit = self.config.training.max_length
        return Encoder(
            **{
                "tokenizer": self.tokenizer,
                "stop_ids": self.stop_ids,
                "max_length": limit,
                **options,
            }
        )

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type in which the weights of the model are held."""
        checkpoint = getattr(self.model_config, "dtype", None)
        return choose_dtype(
            self.config.model.dtype,
            checkpoint if isinstance(checkpoint, torch.dtype) else None,
            # A new head learns with the rest.
            full=self.config.method == "full" or self.spec.methods is CLASSIFIER_METHODS,
            use_cpu=self.arguments.use_cpu,
        )

    @cached_property
    def is_packed(self) -> bool:
        """Whether matrices are to stay in the blocks of their file.

        Raises:
            ValueError: If that was asked for, and the run cannot.
        """
        wanted = self.config.model.packed
        if wanted is False or (wanted is None and self.arguments.device.type != "cuda"):
            return False
        reason = self.why_not_packed()
        if reason and wanted:
            raise ValueError(f"`model.packed` (true): {reason}; drop the option.")
        return not reason

    def why_not_packed(self) -> str:
        """Return why the run's weights cannot stay in blocks; nothing where they can."""
        adapter, names = self.plan.adapter, ("modules_to_save", "trainable_token_indices")
        trained = [name for name in names if getattr(adapter, name, None)]
        if not is_packed(self.model_path):
            return f"{self.config.model.path} is no GGUF file, and no folder of FP8 or INT4"
        if self.config.method not in ("paca", "lora"):
            return f"`method` ({self.config.method!r}) is not paca or lora"
        if self.kind.task_type != "CAUSAL_LM":
            return f"`task` ({self.config.task!r}) trains another model than one that writes text"
        if trained:
            return f"`{trained[0]}` trains whole weights, and those in blocks are frozen"
        if self.arguments.torch_compile:
            return "`training.torch_compile` would compile the decoding of each weight"
        if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true":
            return "blocks are not shared out over processes (FSDP, ZeRO-3)"
        return ""

    @property
    def train(self) -> Any:
        """Training examples, as the trainer takes them."""
        return self.data.examples.train

    @property
    def evaluation(self) -> Any | None:
        """Held-out examples of the same kind."""
        return self.data.examples.evaluation

    @cached_property
    def trained_on(self) -> TrainedOn:
        """What checkpoints say of the run, by which it is continued."""
        parts = [part for part in (self.train, self.evaluation) if part is not None]
        sizes = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")
        return TrainedOn(
            fingerprint=fingerprint(parts, self.data.columns),
            split=[getattr(self.arguments, name) for name in sizes],
        )

    @cached_property
    def plan(self) -> Plan:
        """What is trained, found out on a model without weights, as the data asks for it."""
        config, model_config = self.config, copy.deepcopy(self.model_config)
        model_config.update(dict(self.data.model_options))
        if (bits := config.model.quantization) is not None:
            path = config.model.path
            pretrained.check_quantizable(bits, model_config, path, option="model.quantization")
        model = pretrained.empty_model(
            getattr(transformers, self.kind.auto_class),
            model_config,
            attn_implementation=config.model.attn_implementation,
        )
        adapter = make_adapter_config(config, model, self.kind.task_type)
        return make_plan(model, adapter, config)

    def about_data(self) -> str:
        """Return one line for the user."""
        held_out = 0 if self.evaluation is None else len(self.evaluation)
        head = "" if self.data.new_head is None else f"; the head is new: {self.data.new_head}"
        return f"{len(self.train):,} examples, {held_out:,} held out{head}"

    @cached_property
    def warnings(self) -> list[str]:
        """What looks wrong with data or model."""
        examples, text_config = self.data.examples, self.model_config.get_text_config()
        longest, most = examples.longest, getattr(text_config, "max_position_embeddings", None)
        warnings = [*examples.warnings]
        # Other images may have the same tokens.
        if examples.evaluation is not None and examples.processor is None:
            warnings += overlap_warning(self.train, examples.evaluation, self.data.columns)
        if most is not None and longest > most:
            warnings.append(
                f"the longest training example has {longest} tokens, but the model was made for "
                f"{most}; lower {self.data.length_option}."
            )
        return warnings

    def collate(self, examples: Any, places: list[int]) -> dict[str, Tensor]:
        """Return some rows as one padded batch with labels."""
        rows = [examples[place] for place in places]
        if self.data.collator is not None:
            return dict(self.data.collator(rows))
        collator = DataCollatorForLanguageModeling(pad_id(self.tokenizer))
        return dict(collator([self._learned(row) for row in rows]))

    def _learned(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """Return ids and labels of a row, by which columns are chosen.

        Of a pair it is the first answer; of a prompt itself, the only text before training.
        """
        if "input_ids" in row:
            return {key: row[key] for key in ("input_ids", "labels")}
        if "prompt" in row:
            ids = prompt_ids(row, self.tokenizer)
            return {"input_ids": ids, "labels": ids}
        prompt = row["prompt_ids"]
        answer = row["chosen_ids" if "chosen_ids" in row else "completion_ids"]
        ids, labels = [*prompt, *answer], [*[-100] * len(prompt), *answer]
        limit = self.config.training.max_length
        return {"input_ids": ids[:limit], "labels": labels[:limit]}

    def load_model(self) -> nn.Module:
        """Load the weights in the type that the run asks for."""
        config, data = self.config, self.data
        options: dict[str, Any] = dict(getattr(config.training, "model_init_kwargs", None) or {})
        options |= quantization_options(config, self.dtype) | dict(data.model_options)
        if "num_labels" in data.model_options:
            options["ignore_mismatched_sizes"] = True  # a head of other classes is replaced
        model_class = getattr(transformers, self.kind.auto_class)
        attention = config.model.attn_implementation
        if self.is_packed:
            how: Any = {"dtype": self.dtype, "attn_implementation": attention}
            try:
                return cast(nn.Module, pretrained.load_packed(model_class, self.model_path, **how))
            except NotPackableError as error:
                if config.model.packed:
                    raise ValueError(f"`model.packed` (true): {error}; drop the option.") from error
                said = f"{error}; the model is loaded in {dtype_name(self.dtype)}."
                show_warnings([said], main_console(self.arguments, None))
        with suppress_seqcls_warning():  # that a head is new
            model: nn.Module = pretrained.load_weights(
                model_class,
                self.model_path,
                dtype=self.dtype,
                revision=config.model.revision,
                attn_implementation=attention,
                use_safetensors=True,
                **options,
            )
        if data.new_head is not None:  # of other classes, it may have the same size
            reset_heads(model)
        return model

    def show(self, data: Any, num_examples: int, console: Console) -> None:
        """Print the first examples of prepared data, and what is learned of them."""
        if "place" in data.column_names and "input_ids" in data.column_names:
            show_preview(data, self.tokenizer, num_examples, console)
            return
        for row in data.select(range(min(num_examples, len(data)))):
            console.rule()
            console.print(Text(row.get("place", "example")), soft_wrap=True)
            for name, value in row.items():
                if name in ("place", "attention_mask", "KL_completion_ids"):
                    continue
                if name == "prompt":
                    name, value = "prompt_ids", prompt_ids(row, self.tokenizer)
                if name.endswith("_ids"):
                    name = f"{name.removesuffix('_ids')} ({len(value)} tokens)"
                    value = self.tokenizer.decode(value)
                console.print(Text(f"{name}: {value}"), soft_wrap=True)

    def how_to_load(self, report: Report) -> str:
        """Return code that loads the model, or the adapter on its base, and pacatune's commands."""
        method, (auto_class, task_type, _) = METHODS[self.config.method], self.kind
        if not method.has_adapter:
            return (
                f"```python\nfrom transformers import {auto_class}, AutoTokenizer\n\n"
                f'model = {auto_class}.from_pretrained("FOLDER")\n'
                'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n\n'
            )
        options = dict(self.data.model_options)
        if task_type == "SEQ_CLS":
            # a head of another size in the base is replaced by the adapter's
            options |= {"pad_token_id": pad_id(self.tokenizer), "ignore_mismatched_sizes": True}
        changes = "".join(f", {name}={value!r}" for name, value in options.items())
        source = repr(report.model)
        if is_gguf(report.model):
            source = f'".", gguf_file={Path(report.model).name!r}'
        code = (
            f"from peft import PeftModel\nfrom transformers import {auto_class}\n\n"
            f"base = {auto_class}.from_pretrained({source}{changes})\n"
            'model = PeftModel.from_pretrained(base, "FOLDER")\n```\n\n'
        )
        if not method.is_paca:
            return f"```python\n{code}"
        both = f"--model {report.model} --adapter FOLDER"
        commands = [f"pacatune merge {both} --output MERGED      # a plain model"]
        if task_type != "SEQ_CLS":  # the others are for models that write
            export = f"pacatune export {both} --to lora --output LORA"
            commands.append(f"{export}  # an exact LoRA adapter, for any server")
        if task_type == "CAUSAL_LM":
            commands.insert(0, f'pacatune generate {both} --prompt "..."')
        return (
            f"Install pacatune ({install_command()}), then:\n\n"
            f"```python\nimport pacatune  # makes PaCA known to PEFT\n{code}"
            "```bash\n" + "\n".join(commands) + "\n```\n\n"
        )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the token that pads: the tokenizer's own, or the one that ends."""
    padding = tokenizer.pad_token_id
    return tokenizer.eos_token_id if padding is None else padding


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the chat template and stop token of the run.

    An adapter that is trained on may have brought its own, with the template it was trained with.
    """
    tokenizer = (
        None if config.adapter is None else base.load_tokenizer(str(locate_folder(config.adapter)))
    )
    if tokenizer is None:
        tokenizer = pretrained.load_tokenizer(
            pretrained.find_model(config.model.path), revision=config.model.revision
        )
    if getattr(config.data, "chat_template", None) is not None:
        tokenizer.chat_template = read_template(config.data.chat_template)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template["default"]
    set_variables(tokenizer, config)
    stop = getattr(config.training, "eos_token", None)
    if stop is not None:
        if stop not in tokenizer.get_vocab():
            raise ValueError(
                f"`training.eos_token` ({stop!r}) is not in the vocabulary of the tokenizer; "
                f"use one of its tokens (its own is {tokenizer.eos_token!r})."
            )
        tokenizer.eos_token = stop
    return tokenizer


def set_variables(writer: Any, config: RunConfig) -> None:
    """Give the chat template of a tokenizer or processor the variables of the run."""
    variables = getattr(config.data, VARIABLES, None)
    if not variables:
        return
    if not writer.chat_template:
        raise ValueError(
            f"`data.{VARIABLES}` ({variables!r:.80}) is for a chat template, and the tokenizer has "
            "none; give `data.chat_template`, or drop it."
        )
    for name in variables:
        if not reads_variable(writer.chat_template, name):
            raise ValueError(
                f"`data.{VARIABLES}` ({name!r}) is no variable that the chat template reads; mend "
                "its name, or drop it."
            )
    writer.chat_template = with_defaults(writer.chat_template, variables)


def quantization_options(config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return what from_pretrained needs to quantise the model, with products in `dtype`."""
    if config.model.quantization is None:
        return {}
    # FSDP shards weights of one dtype together, and floating ones only.
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    quantization = pretrained.bitsandbytes_config(
        config.model.quantization,
        dtype,
        double=config.model.double_quantization,
        storage=dtype if is_sharded else None,
    )
    return {"quantization_config": quantization}


def preview(config: RunConfig, num_examples: int, *, console: Console | None = None) -> None:
    """Show the first training examples and what is learned of them, without loading weights."""
    task = Task(config)
    console = main_console(task.arguments, console)
    data = task.data.examples
    task.show(data.train, num_examples, console)
    show_warnings(data.warnings, console)  # after the examples, where they are seen
