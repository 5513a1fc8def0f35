"""One run, declared once: the command line, YAML files and Python build the same object."""

import copy
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_type_hints

from trl import SFTConfig

from pacatune.data import DataConfig
from pacatune.measure.setting import check_lean_level
from pacatune.methods import METHODS, TEXT_METHODS, method_of, readers_of
from pacatune.names import check_choices
from pacatune.precision import Dtype
from pacatune.pretrained import refuse_no_path
from pacatune.training.arguments import SharedDefaults
from pacatune.training.report import Report, RunReport
from pacatune.training.sections import (
    ADAPTER_SECTIONS,
    LoraSection,
    MosLoraSection,
    PacaSection,
)

# Options of `data` that say what to evaluate on.
_EVALUATION = ("eval_path", "eval_split", "eval_fraction")
_MODEL_ARGUMENTS = {
    "trust_remote_code": "code of a model is never executed",
    "dtype": "set `model.dtype`",
    "torch_dtype": "set `model.dtype`",
    "revision": "set `model.revision`",
    "attn_implementation": "set `model.attn_implementation`",
}


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

    dtype: Dtype = "auto"
    """Type of the weights. `auto`: the checkpoint's, but float32 for full fine-tuning and where
    the device computes in the checkpoint's type slowly."""

    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Hold the frozen weights in 4 bits (nf4, fp4) or 8 (int8), by bitsandbytes; null: as they
    are. The method paca is then QPaCA."""

    double_quantization: bool = True
    """With 4 bits, quantise the scales of the weights too."""

    attn_implementation: str | None = None
    """Attention: eager, sdpa, flash_attention_2, ...; the model's own choice where null."""

    def __post_init__(self) -> None:
        refuse_no_path(self.path, "train")
        check_choices(self, "model.")


R = TypeVar("R", bound="RunReport")
"""Report of a run."""


@dataclass(kw_only=True)
class BaseRunConfig(Generic[R]):
    """One fine-tuning run, whatever its task.

    The class of a task has its own sections for model, data and training, and names the task.
    """

    command: ClassVar[str]
    """Name of the command that does such runs."""
    methods: ClassVar[tuple[str, ...]]
    """Names of the methods that are offered: of language models, or of classifiers."""
    task_class: ClassVar[str]
    """`module:class` of its `Task`; imported when it runs, since it needs the trainer."""
    rate_share: ClassVar[float] = 1.0
    """Learning rates where a run says none, as a share of those of `METHODS`."""
    best_metric: ClassVar[str] = "eval_loss"
    """What the best checkpoint is best in."""

    method: str = "paca"
    """How to fine-tune; a name of `METHODS`."""

    model: Any
    """The pretrained model: `path` and `revision` at least."""

    data: Any
    """The data, with the option `eval_fraction`."""

    paca: PacaSection = field(default_factory=PacaSection)
    """Options of the methods paca and qpaca."""

    lora: LoraSection = field(default_factory=LoraSection)
    """Options of the methods lora, lora_dropout, dora, moslora and qlora."""

    moslora: MosLoraSection = field(default_factory=MosLoraSection)
    """Options of the method moslora."""

    training: Any
    """The arguments of the trainer, of a class that begins with `SharedDefaults`."""

    lean: Literal["auto", "off", "require"] = "auto"
    """Keep less for backward, exactly: gated MLPs, norms, attention and loss as `pacatune.lean`
    makes them. `auto`: where the model allows it; `require`: refuse a model that does not."""

    lean_level: int = 1
    """How much less: 2 computes gate and up of MLPs again in the backward pass, from the norm's
    input; 3 query, key and value, too. Gradients stay the same."""

    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a lower eval_loss, and keep the best result."""

    @property
    def start(self) -> str | None:
        """The adapter that is trained on, where the task can do that and the run asks for it."""
        return None

    @classmethod
    def sections(cls) -> dict[str, type[Any]]:
        """Return the class of each section by its name."""
        hints = get_type_hints(cls)
        return {f.name: hints[f.name] for f in fields(cls) if is_dataclass(hints[f.name])}

    @classmethod
    def default_rate(cls, method: str) -> float:
        """Return the learning rate of a method where the run says none."""
        found = METHODS[method]
        rate = found.text_rate if cls.methods is TEXT_METHODS else found.head_rate
        assert rate is not None, "the method is offered"
        return rate * cls.rate_share

    def repeat_command(self, config_file: object) -> str:
        """Return the command that does this run, as a saved configuration says it."""
        return f"pacatune {self.command} --config {config_file}"

    def adapter_options(self) -> dict[str, Any]:
        """Return the options of the adapter, as PEFT's class of the method takes them."""
        method = METHODS[self.method]
        if method.is_paca:
            return self.paca.adapter_options()
        more = asdict(self.moslora) if method.is_moslora else {}
        return {**asdict(self.lora), **more}

    def __post_init__(self) -> None:
        """Check what concerns several sections, and fill in what one leaves to another.

        What is filled in is filled into copies: the caller's sections may serve other runs.
        """
        sections = self.sections()
        for name in sections:
            setattr(self, name, copy.copy(getattr(self, name)))
        training_class = sections["training"]
        if not isinstance(self.training, training_class):
            package = training_class.__module__.rpartition(".")[0]
            raise TypeError(
                f"`training` is a {type(self.training).__name__}; it must be a "
                f"{package}.{training_class.__name__}."
            )
        self.training.given = dict(self.training.given)
        check_lean_level(self.lean_level, lean=self.lean)
        method = method_of(self.method, self.methods)
        self.method = method.name
        if method.quantization is not None and self.model.quantization is None:
            self.model.quantization = method.quantization
        if method.dropout is not None and self.lora.lora_dropout == 0:
            self.lora.lora_dropout = method.dropout
        self._refuse_other_methods()
        training = self.training
        if training.learning_rate is None:
            rate = self.default_rate(self.method)
            training.learning_rate = training.given["learning_rate"] = rate
        if self.early_stopping_patience is not None:
            _set_early_stopping(training, self.early_stopping_patience, self.best_metric)
        wanted = [n for n in _EVALUATION if getattr(self.data, n, None)]
        if training.eval_strategy == "no":
            self._evaluate_nothing(wanted)
            wanted = []
        chooses = training.load_best_model_at_end or _name(training.save_strategy) == "best"
        if chooses and not wanted:
            raise ValueError(
                "the best checkpoint is to be kept (`early_stopping_patience`, "
                "`training.load_best_model_at_end` or `training.save_strategy`), but there is no "
                "evaluation data; set `data.eval_path` or `data.eval_fraction`, and "
                "`training.eval_strategy` to steps or epoch."
            )

    def _evaluate_nothing(self, wanted: list[str]) -> None:
        """Hold nothing out; refuse what asks for an evaluation all the same."""
        if self.data.eval_fraction == type(self.data).eval_fraction:
            self.data.eval_fraction = 0.0
        given = [f"data.{name}" for name in wanted if getattr(self.data, name)]
        given += [f"training.{n}" for n in ("do_eval", "eval_on_start") if self.training.given[n]]
        if given:
            raise ValueError(
                f"`training.eval_strategy` ('no') evaluates nothing, and `{given[0]}` asks for an "
                "evaluation; drop one of them (steps with a large `training.eval_steps` evaluates "
                "before and after training alone)."
            )

    def _refuse_other_methods(self) -> None:
        for name in ADAPTER_SECTIONS:
            section: Any = getattr(self, name)
            methods = readers_of(name)
            if self.method in methods:
                continue
            default = type(section)()
            for option in fields(section):
                value = getattr(section, option.name)
                if value != getattr(default, option.name):
                    raise ValueError(
                        f"`{name}.{option.name}` ({value!r}) is an option of {', '.join(methods)}, "
                        f"and `method` ({self.method!r}) would ignore it; drop it or change "
                        "`method`."
                    )


def _set_early_stopping(training: Any, patience: int, metric: str) -> None:
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
    training.metric_for_best_model = metric
    training.greater_is_better = not metric.endswith("loss")


def _name(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


@dataclass
class TrlDefaults(SharedDefaults):
    """Put before one of TRL's classes of arguments.

    Raises:
        ValueError: If an option is set that the task decides elsewhere or does not offer.
    """

    elsewhere: ClassVar[dict[str, str]] = {
        **SharedDefaults.elsewhere,
        "trust_remote_code": "code of a model is never executed; use a converted model",
        "remove_unused_columns": "the data has the columns that training needs",
    }

    learning_rate: float | None = None
    """Peak learning rate; where null, that of the method: 5e-4 paca and qpaca, 1e-5 full,
    2e-4 the others."""

    def check_options(self) -> None:
        """Refuse also model arguments of other sections, and what this device cannot do."""
        super().check_options()
        for name in getattr(self, "model_init_kwargs", None) or {}:
            if name in _MODEL_ARGUMENTS:
                raise ValueError(
                    f"`training.model_init_kwargs` has {name!r}, which is not offered: "
                    f"{_MODEL_ARGUMENTS[name]}."
                )
        if getattr(self, "activation_offloading", False) and self.on_cpu:
            raise ValueError(
                "`training.activation_offloading` (True) moves activations off an accelerator, and "
                "this run is on the CPU; drop it."
            )


@dataclass
class TrainingConfig(TrlDefaults, SFTConfig):
    """Every option of TRL's SFTConfig, with these defaults."""

    elsewhere: ClassVar[dict[str, str]] = {
        **TrlDefaults.elsewhere,
        "chat_template_path": "set `data.chat_template`",
        "dataset_text_field": "name the column 'text'",
        "dataset_kwargs": "data is always prepared before the model is loaded",
        "completion_only_loss": "set `data.loss` to completion or all",
        "assistant_only_loss": "set `data.loss` to completion or all",
        "truncation_mode": "examples are cut at their end; shorten them yourself",
    }

    def check_options(self) -> None:
        """Refuse also packing that lets examples see each other."""
        super().check_options()
        if self.packing and self.packing_strategy == "wrapped":
            raise ValueError(
                "`training.packing_strategy` ('wrapped') lets examples attend to each other; "
                "use 'bfd' or 'bfd_split'."
            )


@dataclass(kw_only=True)
class LanguageRunConfig(BaseRunConfig[R]):
    """One run of a language model, whatever is learned.

    Raises:
        ValueError: If the sections contradict each other.
        TypeError: If `training` is of another task.
    """

    command: ClassVar[str] = "train"
    methods: ClassVar[tuple[str, ...]] = TEXT_METHODS

    method: str = "paca"
    """How to fine-tune: `paca`, `qpaca` (PaCA on a quantised base, nf4 unless `model.quantization`
    says otherwise), `lora`, `lora_dropout`, `dora`, `moslora` (LoRA with a trained mixer), `qlora`
    (LoRA on a quantised base), or `full` (every weight)."""

    model: ModelConfig
    """The pretrained model."""

    adapter: str | None = None
    """Folder or hub id of a finished adapter of the same method, which is trained on: its columns
    and options stay, its values go on. Null: a new adapter."""

    def __post_init__(self) -> None:
        """Refuse a TRL whose trainers ours cannot be put before, and options that do not fit."""
        from pacatune.training.start import find_start, settle_start
        from pacatune.tuner.compat import require

        # 1.13 does not await a reward that is an object; without Triton, 1.15 computes no loss.
        require("TRL", "1.16", f"`pacatune {self.command}`")
        super().__post_init__()
        find_start(self)
        settle_start(self)

    @property
    def start(self) -> str | None:
        """The adapter that is trained on."""
        return self.adapter


@dataclass(kw_only=True)
class RunConfig(LanguageRunConfig[Report]):
    """One run of supervised fine-tuning."""

    task_class: ClassVar[str] = "pacatune.training.sft:SftTask"

    task: Literal["sft"] = "sft"
    """What to do: `sft` (supervised fine-tuning), `dpo`, `kto`, `reward`, `grpo` or `rloo`. Each
    has options of its own: `--task dpo --help`."""

    data: DataConfig
    """Training and evaluation data."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Every option of TRL's SFTConfig."""

    def __post_init__(self) -> None:
        """Refuse also what cannot be done with a stream."""
        super().__post_init__()
        if not self.data.streaming:
            return
        training = self.training
        if training.max_steps < 1:
            raise ValueError(
                f"`data.streaming` needs `training.max_steps` ({training.max_steps}), since a "
                "stream has no end; set it to at least 1."
            )
        defaults = {
            "packing": False,
            "padding_free": False,
            "shuffle_dataset": False,
            "train_sampling_strategy": "random",
        }
        for name, default in defaults.items():
            if (value := getattr(training, name)) != default:
                raise ValueError(
                    f"`training.{name}` ({value!r}) needs the whole data, and `data.streaming` "
                    "reads it piece by piece; drop one of them."
                )
