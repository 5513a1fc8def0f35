"""Supervised fine-tuning of a language model, by TRL's SFTTrainer."""

import hashlib
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor, nn
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pacatune.data import PreparedData, prepare_data, row_digests, show_preview
from pacatune.installation import repository_command
from pacatune.methods import METHODS
from pacatune.precision import dtype_name
from pacatune.training import model as models
from pacatune.training.checkpoints import RunTrainer
from pacatune.training.config import RunConfig
from pacatune.training.plan import Plan
from pacatune.training.progress import main_console, show_warnings
from pacatune.training.report import Report, RunReport, eval_curve
from pacatune.training.task import Prepared, ReportedTask

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase


class SftTask(ReportedTask[RunConfig]):
    """A run of supervised fine-tuning."""

    unit = "tokens"
    less_memory = "`training.max_length`, or set `training.gradient_checkpointing` to true"
    pipeline_tag = "text-generation"
    tags = ("sft", "trl")

    tokenizer: "PreTrainedTokenizerBase"

    def plan(self) -> Plan:
        """Say what would be trained; only the model's configuration is read."""
        return models.plan_training(self.config)[0]

    def prepare(self) -> Prepared:
        """Load the tokenizer, encode the data, plan what is trained."""
        config = self.config
        check_attention(config)
        self.tokenizer = models.load_tokenizer(config)
        data = read_data(config, self.tokenizer)
        plan, adapter_config, max_positions = models.plan_training(config)
        if max_positions is not None and data.longest > max_positions:
            data.warnings.append(
                f"the longest training example has {data.longest} tokens, but the model was made "
                f"for {max_positions}; lower `training.max_length`."
            )
        held_out = 0 if data.evaluation is None else len(data.evaluation)
        return Prepared(
            train=data.train,
            evaluation=data.evaluation,
            fingerprint=fingerprint(data.train),
            about_data=f"{len(data.train):,} examples, {held_out:,} held out",
            adapter_config=adapter_config,
            plan=plan,
            model=models.model_path(config),
            dtype=dtype_name(models.weights_dtype(config)),
            warnings=data.warnings,
        )

    def load_model(self) -> nn.Module:
        """Load the weights in the type that the run asks for."""
        model: nn.Module = models.load_model(self.config)
        return model

    def collate(self, examples: Any, places: list[int]) -> dict[str, Tensor]:
        """Return some rows as one padded batch."""
        return collate_rows(examples, self.tokenizer, places)

    def make_trainer(
        self, model: nn.Module, adapter_config: "PeftConfig | None", **options: Any
    ) -> "SftRunTrainer":
        """Return TRL's trainer, which puts the adapter on the model."""
        arguments = options["args"]
        if not (arguments.packing or arguments.eval_packing or arguments.shuffle_dataset):
            arguments.dataset_kwargs = {"skip_prepare_dataset": True}
            arguments.max_length = None
        return SftRunTrainer(
            model=model, processing_class=self.tokenizer, peft_config=adapter_config, **options
        )

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Return the last loss that the trainer has logged, if it is that of what is saved."""
        curve = eval_curve(trainer.state.log_history)
        last_step, after = curve[-1]
        # The best checkpoint may have replaced the last weights since they were evaluated.
        if last_step != trainer.state.global_step or trainer.args.load_best_model_at_end:
            after = super().evaluate(trainer)["eval_loss_after"]
        if last_step != trainer.state.global_step:
            curve.append((trainer.state.global_step, after))
        return {"eval_loss_after": after, "eval_losses": curve}

    def make_report(self, known: dict[str, Any], trainer: Any, items_per_second: float) -> Report:
        """Return the report, with tokens per second."""
        return Report(**known, tokens_per_second=items_per_second)

    def how_to_load(self, report: RunReport) -> str:
        """Return code that loads the model, or the adapter on its base."""
        method, model = METHODS[self.config.method], report.model
        if not method.has_adapter:
            return (
                "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
                'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n\n'
            )
        kind = "PaCA" if method.is_paca else method.title
        ours = f"import pacatune  # makes {kind} known to PEFT\n" if method.needs_pacatune else ""
        code = (
            f"```python\n{ours}from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f"base = AutoModelForCausalLM.from_pretrained({model!r})\n"
            'model = PeftModel.from_pretrained(base, "FOLDER")\n```\n\n'
        )
        if not method.needs_pacatune:
            return code
        both = f"--model {model} --adapter FOLDER"
        return (
            f"Install pacatune ({repository_command()}), then:\n\n{code}```bash\n"
            f'pacatune generate {both} --prompt "..."\n'
            f"pacatune merge {both} --output MERGED      # a plain model\n"
            f"pacatune export {both} --to lora --output LORA  "
            "# an exact LoRA adapter, for any server\n```\n\n"
        )


class SftRunTrainer(RunTrainer, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with what the recipe needs, which counts tokens.

    Args:
        kwargs: As for RunTrainer and SFTTrainer.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if getattr(self.model, "is_quantized", False):
            # TRL holds adapters on quantised models in bfloat16, which loses small updates.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Take one micro-batch forward and backward, counting its tokens."""
        self._meter.add(num_tokens(inputs))
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss


def collate_rows(data: Any, tokenizer: Any, places: list[int]) -> dict[str, Tensor]:
    """Return the rows at some places as one padded batch, as the trainer makes it.

    Args:
        data: Rows of `input_ids` and `labels`.
        tokenizer: Its padding, or where it has none the end of a text, fills rows up.
        places: Positions of the rows.
    """
    padding = tokenizer.pad_token_id
    collator = DataCollatorForLanguageModeling(
        pad_token_id=tokenizer.eos_token_id if padding is None else padding
    )
    rows = [data[place] for place in places]
    return dict(collator([{k: row[k] for k in ("input_ids", "labels")} for row in rows]))


def num_tokens(inputs: dict[str, Any]) -> int | Tensor:
    """Return how many tokens of a micro-batch are not padding."""
    mask: Tensor | None = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel()) if mask is None else mask.sum()


def check_attention(config: RunConfig) -> None:
    """Refuse to pack examples with attention that would let them see each other.

    Raises:
        ValueError: If packing or padding-free batches are asked for without flash attention.
    """
    training = config.training
    packed = training.packing or training.eval_packing or training.padding_free
    attention = config.model.attn_implementation
    if packed and "flash" not in (attention or ""):
        raise ValueError(
            f"`training.packing` or `training.padding_free` with `model.attn_implementation` "
            f"({attention!r}): flash attention alone keeps packed examples apart in every model; "
            "set it to flash_attention_2, flash_attention_3 or a flash-attn kernel, or do not pack."
        )


def read_data(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> PreparedData:
    """Read, encode and check the data of a run."""
    training = config.training
    splits = training.packing and training.packing_strategy == "bfd_split"
    return prepare_data(
        config.data,
        tokenizer,
        max_length=None if splits else training.max_length,
        stop_ids=models.find_stop_ids(config, tokenizer),
        num_processes=training.dataset_num_proc,
    )


def fingerprint(data: "Dataset") -> str:
    """Return a digest of every token id and label, in order."""
    return hashlib.blake2b(b"".join(row_digests(data)), digest_size=16).hexdigest()


def preview(config: RunConfig, num_examples: int, *, console: Console | None = None) -> None:
    """Show the first training examples and what is learned of them, without loading weights."""
    console = main_console(config, console)
    tokenizer = models.load_tokenizer(config)
    data = read_data(config, tokenizer)
    show_preview(data.train, tokenizer, num_examples, console)
    show_warnings(data.warnings, console)  # after the examples, where they are seen
