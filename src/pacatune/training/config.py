"""One run, declared once: the command line, YAML files and Python build the same object."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from trl import SFTConfig

from pacatune.data import DataConfig
from pacatune.training.option_checks import check_ranges, refuse_foreign_options
from pacatune.training.precision import bfloat16_is_fast

Method = Literal["paca", "lora", "dora", "full"]

# A PaCA column moves by learning_rate * paca_alpha / r per step, whatever its weight.
LEARNING_RATES: dict[str, float] = {"paca": 5e-4, "lora": 2e-4, "dora": 2e-4, "full": 1e-5}


@dataclass(kw_only=True)
class ModelConfig:
    """The pretrained model. Code that comes with a model is never executed.

    Raises:
        ValueError: If `path` is missing.
    """

    path: str = ""
    """Hub id or local folder of a causal language model. Required."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights. `auto`: the checkpoint's, but float32 for full fine-tuning and where
    the device computes in the checkpoint's type slowly."""

    attn_implementation: str | None = None
    """Attention: eager, sdpa, flash_attention_2, ...; the model's own choice where null."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                f"`model.path` is {self.path!r}; give a hub id or the folder of a model."
            )


@dataclass(kw_only=True)
class PacaSection:
    """Options of the method `paca`; see `pacatune.PacaConfig`, which checks them."""

    r: int = 16
    """Number of trained input columns of each weight."""

    paca_alpha: float = 16
    """Scale of the update: it is multiplied by paca_alpha / r."""

    target_modules: list[str] | str | None = "all-linear"
    """Names of modules, a regular expression, `all-linear` (every linear layer but the output
    head), or null (PEFT's default for the architecture)."""

    exclude_modules: list[str] | str | None = None
    """Names or a regular expression of modules to leave out."""

    selection: str = "random"
    """Strategy that chooses the columns."""

    random_seed: int = 42
    """Seed of the choice of the columns."""

    layers_to_transform: list[int] | int | None = None
    """Numbers of the layers to adapt; all where null."""

    layers_pattern: list[str] | str | None = None
    """Name of the list of layers, where it is not a usual one."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of modules that differ from `r`: name or regular expression to rank."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of modules that differ from `paca_alpha`: name or regular expression to alpha."""

    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter."""

    bias: Literal["none", "all", "paca_only"] = "none"
    """Biases that are trained."""


@dataclass(kw_only=True)
class LoraSection:
    """Options of the methods `lora` and `dora`; see `peft.LoraConfig`, which checks them."""

    r: int = 8
    """Rank."""

    lora_alpha: int = 16
    """Scale of the update: it is multiplied by lora_alpha / r."""

    lora_dropout: float = 0.0
    """Dropout on the input of A."""

    target_modules: list[str] | str | None = "all-linear"
    """As `paca.target_modules`."""

    exclude_modules: list[str] | str | None = None
    """As `paca.exclude_modules`."""

    layers_to_transform: list[int] | int | None = None
    """As `paca.layers_to_transform`."""

    layers_pattern: list[str] | str | None = None
    """As `paca.layers_pattern`."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """As `paca.rank_pattern`."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """As `paca.alpha_pattern`."""

    modules_to_save: list[str] | None = None
    """As `paca.modules_to_save`."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""


@dataclass
class TrainingConfig(SFTConfig):  # type: ignore[misc]
    """Every option of TRL's SFTConfig, with these defaults.

    Raises:
        ValueError: If an option is set that this recipe decides elsewhere or does not offer.
    """

    output_dir: str | None = "pacatune-run"
    """Folder of the run and its results."""

    num_train_epochs: float = 1.0
    """Number of passes over the training data."""

    learning_rate: float | None = None
    """Peak learning rate; where null, that of the method: 5e-4 paca, 2e-4 lora and dora,
    1e-5 full."""

    lr_scheduler_type: SchedulerType | str = "cosine"
    """Shape of the learning rate over the run: cosine, linear, constant, ..."""

    warmup_steps: float = 0.03
    """Steps in which the learning rate rises; below 1, a share of all steps."""

    bf16: bool | None = None
    """bfloat16 mixed precision; where null, if the device computes in it fast."""

    gradient_checkpointing: bool | None = None
    """Recompute activations in backward: less memory, more time. Off where null."""

    use_cpu: bool = False
    """Train on the CPU even where there is an accelerator."""

    report_to: str | list[str] | None = "tensorboard"
    """Where to log: tensorboard, wandb, trackio, ... or none."""

    logging_steps: float = 0.01
    """Steps between logs; below 1, a share of all steps."""

    logging_first_step: bool = True
    """Log the first step too."""

    eval_strategy: IntervalStrategy | str = "steps"
    """When to evaluate: steps, epoch or no."""

    eval_steps: float | None = 0.2
    """Steps between evaluations; below 1, a share of all steps."""

    save_strategy: SaveStrategy | str = "steps"
    """When to save checkpoints: steps, epoch, best or no."""

    save_steps: float = 0.2
    """Steps between checkpoints; below 1, a share of all steps."""

    save_total_limit: int | None = 2
    """Number of checkpoints kept."""

    def __post_init__(self) -> None:
        # As given, before TRL and transformers resolve them: what a saved config must say.
        self.given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        refuse_foreign_options(self)
        check_ranges(self)
        if self.bf16 is None:
            # Pinned, so that a saved config gives the same numbers on another machine.
            self.bf16 = not self.fp16 and bfloat16_is_fast(use_cpu=self.use_cpu)
            self.given["bf16"] = self.bf16
        if not _has_accelerator():
            # Unless it is said, transformers takes no bf16, and accelerate takes each of several
            # processes for the only one.
            self.use_cpu = True
        super().__post_init__()
        if self.use_cpu:
            self.dataloader_pin_memory = False


@dataclass(kw_only=True)
class RunConfig:
    """One fine-tuning run.

    Raises:
        ValueError: If the sections contradict each other.
        TypeError: If `training` is not a TrainingConfig.
    """

    method: Method = "paca"
    """How to fine-tune: `paca`, `lora`, `dora`, or `full` (every weight)."""

    model: ModelConfig
    """The pretrained model."""

    data: DataConfig
    """Training and evaluation data."""

    paca: PacaSection = field(default_factory=PacaSection)
    """Options of the method paca."""

    lora: LoraSection = field(default_factory=LoraSection)
    """Options of the methods lora and dora."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Every option of TRL's SFTConfig."""

    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a lower eval_loss, and keep the best adapter."""

    def __post_init__(self) -> None:
        if not isinstance(self.training, TrainingConfig):
            raise TypeError(
                f"`training` is a {type(self.training).__name__}; it must be a "
                "pacatune.training.TrainingConfig, which takes every option of SFTConfig."
            )
        if self.method not in LEARNING_RATES:
            raise ValueError(
                f"`method` ({self.method!r}) must be one of {', '.join(LEARNING_RATES)}."
            )
        if self.training.learning_rate is None:
            rate = LEARNING_RATES[self.method]
            self.training.learning_rate = self.training.given["learning_rate"] = rate
        if self.early_stopping_patience is not None:
            self._set_early_stopping(self.early_stopping_patience)
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        """Refuse to choose the best of several checkpoints without data to judge them by."""
        training = self.training
        chooses = training.load_best_model_at_end or _name(training.save_strategy) == "best"
        if chooses and not (self.data.eval_path or self.data.eval_split or self.data.eval_fraction):
            raise ValueError(
                "the best checkpoint is to be kept (`early_stopping_patience`, "
                "`training.load_best_model_at_end` or `training.save_strategy`), but there is no "
                "evaluation data; set `data.eval_path` or `data.eval_fraction`."
            )

    def _set_early_stopping(self, patience: int) -> None:
        training = self.training
        if patience < 1:
            raise ValueError(f"`early_stopping_patience` ({patience}) must be at least 1, or null.")
        same = training.save_strategy == training.eval_strategy and (
            training.eval_strategy != "steps" or training.save_steps == training.eval_steps
        )
        if training.eval_strategy == "no" or not same:
            raise ValueError(
                "`early_stopping_patience` keeps the best adapter, so each evaluation needs its "
                f"checkpoint: `training.save_strategy` ({_name(training.save_strategy)}) and "
                f"`training.save_steps` ({training.save_steps}) must equal "
                f"`training.eval_strategy` ({_name(training.eval_strategy)}) and "
                f"`training.eval_steps` ({training.eval_steps}), and not be 'no'."
            )
        training.load_best_model_at_end = True
        training.metric_for_best_model = "eval_loss"
        training.greater_is_better = False


def _name(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
