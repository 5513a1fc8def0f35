"""Language models for training: tokenizer, plan, weights; and what all tasks on them share."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pacatune import pretrained
from pacatune.adapters import base
from pacatune.adapters.folder import locate_folder
from pacatune.data import PreparedData, row_digests
from pacatune.data.read import read_template
from pacatune.installation import repository_command
from pacatune.methods import METHODS
from pacatune.precision import choose_dtype, dtype_name
from pacatune.training.config import BaseRunConfig
from pacatune.training.metrics import MetricReport, metrics_of
from pacatune.training.progress import main_console, show_warnings
from pacatune.training.report import RunReport, curve_of
from pacatune.training.task import (
    Plan,
    Prepared,
    ReportedTask,
    make_adapter_config,
    make_plan,
    put_adapter,
    task_of,
)
from pacatune.training.trainer import RunTrainer

C = TypeVar("C", bound=BaseRunConfig[Any])


class LanguageTask(ReportedTask[C]):
    """A run on a language model, by one of TRL's trainers."""

    unit = "tokens"
    less_memory = "`training.max_length`, or set `training.gradient_checkpointing` to true"
    pipeline_tag = "text-generation"

    auto_class: Any = AutoModelForCausalLM
    """Class of transformers that makes the model."""
    task_type: str | None = "CAUSAL_LM"
    """PEFT's name of what the adapted model does."""
    length_option: ClassVar[str] = "`training.max_length`"
    """What to lower where examples are longer than the model's positions."""
    columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    """Columns of the data by which a resumed run knows it again."""
    model_options: ClassVar[dict[str, Any]] = {}
    """Changes to the configuration of the model."""

    tokenizer: PreTrainedTokenizerBase

    def plan(self) -> Plan:
        """Say what would be trained; only the model's configuration is read."""
        return self.plan_training()[0]

    def plan_training(self) -> tuple[Plan, PeftConfig | None, int | None]:
        """Plan what is trained; see `plan_training`."""
        return plan_training(
            self.config,
            auto_class=self.auto_class,
            task_type=self.task_type,
            **self.model_options,
        )

    @abstractmethod
    def read_data(self) -> PreparedData:
        """Read, encode and check the data, with the task's `tokenizer`."""

    def prepare(self) -> Prepared:
        """Load the tokenizer, encode the data, plan what is trained."""
        config = self.config
        self.tokenizer = load_tokenizer(config)
        data = self.read_data()
        plan, adapter_config, max_positions = self.plan_training()
        if max_positions is not None and data.longest > max_positions:
            data.warnings.append(
                f"the longest training example has {data.longest} tokens, but the model was made "
                f"for {max_positions}; lower {self.length_option}."
            )
        held_out = 0 if data.evaluation is None else len(data.evaluation)
        rows = data.train if data.sample is None else data.sample
        how_many = f"{len(rows):,}" if data.sample is None else "streamed"
        return Prepared(
            train=data.train,
            evaluation=data.evaluation,
            fingerprint=fingerprint(rows, self.columns),
            about_data=f"{how_many} examples, {held_out:,} held out",
            adapter_config=adapter_config,
            plan=plan,
            model=model_path(config),
            dtype=dtype_name(weights_dtype(config)),
            warnings=data.warnings,
        )

    def collate(self, examples: Any, places: list[int]) -> dict[str, Tensor]:
        """Return some rows as one padded batch with labels."""
        padding = self.tokenizer.pad_token_id
        collator = DataCollatorForLanguageModeling(
            pad_token_id=self.tokenizer.eos_token_id if padding is None else padding
        )
        return dict(collator([self.learned(examples[place]) for place in places]))

    def learned(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """Return `input_ids` and `labels` of a row, by which columns are chosen."""
        return {key: row[key] for key in ("input_ids", "labels")}

    def load_model(self) -> nn.Module:
        """Load the weights in the type that the run asks for."""
        return load_model(self.config, auto_class=self.auto_class, **self.model_options)

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Return the last loss that the trainer has logged, if it is that of what is saved."""
        curve = curve_of(trainer.state.log_history, "eval_loss")
        last_step, after = curve[-1]
        # The best checkpoint may have replaced the last weights since they were evaluated.
        if last_step != trainer.state.global_step or trainer.args.load_best_model_at_end:
            after = float(trainer.evaluate()["eval_loss"])
        if last_step != trainer.state.global_step:
            curve.append((trainer.state.global_step, after))
        return {"eval_loss_after": after, "eval_losses": curve}

    @abstractmethod
    def show(self, data: Any, num_examples: int, console: Console) -> None:
        """Print the first examples of prepared data, and what is learned of them."""

    def how_to_load(self, report: RunReport) -> str:
        """Return code that loads the model, or the adapter on its base."""
        method, model = METHODS[self.config.method], report.model
        auto_class, changes = self.auto_class.__name__, self._load_arguments()
        if not method.has_adapter:
            return (
                f"```python\nfrom transformers import {auto_class}, AutoTokenizer\n\n"
                f'model = {auto_class}.from_pretrained("FOLDER")\n'
                'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n\n'
            )
        kind = "PaCA" if method.is_paca else method.title
        ours = f"import pacatune  # makes {kind} known to PEFT\n" if method.needs_pacatune else ""
        code = (
            f"```python\n{ours}from peft import PeftModel\n"
            f"from transformers import {auto_class}\n\n"
            f"base = {auto_class}.from_pretrained({model!r}{changes})\n"
            'model = PeftModel.from_pretrained(base, "FOLDER")\n```\n\n'
        )
        if not method.needs_pacatune:
            return code
        return f"Install pacatune ({repository_command()}), then:\n\n{code}{self._commands(model)}"

    def _load_arguments(self) -> str:
        return "".join(f", {name}={value!r}" for name, value in self.model_options.items())

    def _commands(self, model: str) -> str:
        """Return what pacatune's own commands do with the adapter."""
        both = f"--model {model} --adapter FOLDER"
        writes_text = self.auto_class is AutoModelForCausalLM
        generate = f'pacatune generate {both} --prompt "..."\n' if writes_text else ""
        return (
            f"```bash\n{generate}"
            f"pacatune merge {both} --output MERGED      # a plain model\n"
            f"pacatune export {both} --to lora --output LORA  "
            "# an exact LoRA adapter, for any server\n```\n\n"
        )


class MetricTask(LanguageTask[C]):
    """A task whose trainer logs more than a loss."""

    report_class: ClassVar[type[MetricReport]]
    """Class of its reports."""

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Return loss and metrics of what is saved, and their curves."""
        known = super().evaluate(trainer)
        # `super` may have evaluated once more, which is logged too.
        metrics = metrics_of(trainer.state.log_history, "eval_")
        return {
            **known,
            "eval_metrics": metrics,
            "eval_metrics_after": {name: curve[-1][1] for name, curve in metrics.items()},
        }

    def make_report(
        self, known: dict[str, Any], trainer: Any, items_per_second: float
    ) -> MetricReport:
        """Return the report, with the metrics of training."""
        train = metrics_of(trainer.state.log_history)
        return self.report_class(**known, tokens_per_second=items_per_second, train_metrics=train)


class LanguageTrainer(RunTrainer):
    """Put before a trainer of TRL: what the recipe needs, and tokens are counted."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if getattr(self.model, "is_quantized", False):
            # TRL holds adapters on quantised models in bfloat16, which loses small updates.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if self.is_fsdp_enabled:
            self._gather_trained_head()

    def _gather_trained_head(self) -> None:
        """Gather a trained head by FSDP2 itself before each pass.

        accelerate makes it a group of its own under PEFT, and TRL multiplies by its weight without
        calling it. So TRL would find a shard and gather it by a call that does not add up the
        gradients of the processes.
        """
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        head = base.get_output_embeddings()
        if head is None or not any(parameter.requires_grad for parameter in head.parameters()):
            return

        def gather(*_: Any) -> None:
            if isinstance(head, FSDPModule):
                head.unshard()

        base.base_model.register_forward_pre_hook(gather)

    def num_items(self, inputs: dict[str, Any]) -> int | Tensor:
        """Return how many tokens of a micro-batch are not padding."""
        mask: Tensor | None = inputs.get("attention_mask")
        return int(inputs["input_ids"].numel()) if mask is None else mask.sum()


def fingerprint(data: Dataset, columns: Sequence[str] = ("input_ids", "labels")) -> str:
    """Return a digest of every row, in order."""
    return hashlib.blake2b(b"".join(row_digests(data, columns)), digest_size=16).hexdigest()


def model_path(config: BaseRunConfig[Any]) -> str:
    """Return the hub id, or the absolute path of a local folder."""
    return pretrained.find_model(config.model.path)


def load_tokenizer(config: BaseRunConfig[Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the chat template and stop token of the run.

    An adapter that is trained on may have brought its own, with the template it was trained with.
    """
    tokenizer = (
        None if config.start is None else base.load_tokenizer(str(locate_folder(config.start)))
    )
    if tokenizer is None:
        tokenizer = pretrained.load_tokenizer(model_path(config), revision=config.model.revision)
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_template(config.data.chat_template)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template["default"]
    stop = getattr(config.training, "eos_token", None)
    if stop is not None:
        if stop not in tokenizer.get_vocab():
            raise ValueError(
                f"`training.eos_token` ({stop!r}) is not in the vocabulary of the tokenizer; "
                f"use one of its tokens (its own is {tokenizer.eos_token!r})."
            )
        tokenizer.eos_token = stop
    return tokenizer


def find_stop_ids(config: BaseRunConfig[Any], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens at which a generation of this model ends."""
    ids = {tokenizer.eos_token_id}
    try:
        generation = GenerationConfig.from_pretrained(
            model_path(config), revision=config.model.revision
        )
    except OSError:  # Older models have no generation_config.json.
        return ids - {None}
    stops = generation.eos_token_id
    return ids | set(stops if isinstance(stops, list) else [stops]) - {None}


def plan_training(
    config: BaseRunConfig[Any],
    *,
    auto_class: Any = AutoModelForCausalLM,
    task_type: str | None = "CAUSAL_LM",
    **changes: Any,
) -> tuple[Plan, PeftConfig | None, int | None]:
    """Plan what is trained of a model without weights.

    Returns the adapter's configuration with its targets too, and the longest sequence that the
    model has positions for. `changes` are made to the configuration of the model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model_config = _load_model_config(config)
    model_config.update(changes)
    check_quantization(config, model_config)
    attention = config.model.attn_implementation
    try:
        model = pretrained.empty_model(auto_class, model_config, attn_implementation=attention)
    except ImportError as error:
        raise ValueError(
            f"`model.attn_implementation` ({attention!r}) cannot be used: {error}. Install it or "
            "choose another."
        ) from error
    adapter = make_adapter_config(config, model, task_type=task_type)
    plan = make_plan(model, lambda base: put_adapter(base, adapter), config)
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        # TRL multiplies by the weight of the head itself, past any adapter on it.
        section = METHODS[config.method].sections[0]
        raise ValueError(
            f"`{section}.target_modules` names the output head, which the loss reads "
            "directly, so an adapter there would not be trained; drop it."
        )
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return plan, adapter, positions


def load_model(
    config: BaseRunConfig[Any], *, auto_class: Any = AutoModelForCausalLM, **changes: Any
) -> nn.Module:
    """Load the weights, in the type that `model.dtype` asks for."""
    dtype = weights_dtype(config)
    options: dict[str, Any] = dict(getattr(config.training, "model_init_kwargs", None) or {})
    options |= quantization_options(config, dtype) | changes
    model: nn.Module = pretrained.load_weights(
        auto_class,
        model_path(config),
        dtype=dtype,
        revision=config.model.revision,
        attn_implementation=config.model.attn_implementation,
        use_safetensors=True,
        **options,
    )
    return model


def check_quantization(config: BaseRunConfig[Any], model_config: Any) -> None:
    """Refuse a quantisation that the method, the model or the installation cannot have."""
    quantization = config.model.quantization
    if not config.model.double_quantization and quantization not in ("nf4", "fp4"):
        raise ValueError(
            f"`model.double_quantization` (False) is for 4 bits, and `model.quantization` is "
            f"{quantization!r}; set that to nf4 or fp4, or drop the option."
        )
    if quantization is None:
        return
    if config.method == "full":
        raise ValueError(
            f"`model.quantization` ({quantization!r}) with `method` ('full'): quantised weights "
            "cannot be trained; choose another method or drop the option."
        )
    pretrained.check_quantizable(
        quantization, model_config, config.model.path, option="model.quantization"
    )


def quantization_options(config: BaseRunConfig[Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return what from_pretrained needs to quantise the model, with products in `dtype`."""
    quantization = config.model.quantization
    if quantization is None:
        return {}
    # FSDP shards weights of one dtype together, and floating ones only.
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    made = pretrained.bitsandbytes_config(
        quantization,
        dtype,
        double=config.model.double_quantization,
        storage=dtype if is_sharded else None,
    )
    return {"quantization_config": made}


def weights_dtype(config: BaseRunConfig[Any]) -> torch.dtype:
    """Return the type in which the weights of the run's model are held."""
    checkpoint = getattr(_load_model_config(config), "dtype", None)
    return choose_dtype(
        config.model.dtype,
        checkpoint if isinstance(checkpoint, torch.dtype) else None,
        full=config.method == "full",
        use_cpu=config.training.use_cpu,
    )


def _load_model_config(config: BaseRunConfig[Any]) -> Any:
    return pretrained.load_config(model_path(config), revision=config.model.revision)


def preview(
    config: BaseRunConfig[Any], num_examples: int, *, console: Console | None = None
) -> None:
    """Show the first training examples and what is learned of them, without loading weights."""
    console = main_console(config, console)
    task = task_of(config)
    assert isinstance(task, LanguageTask), "the command is `train`"
    task.tokenizer = load_tokenizer(config)
    data = task.read_data()
    task.show(data.train if data.sample is None else data.sample, num_examples, console)
    show_warnings(data.warnings, console)  # after the examples, where they are seen
