"""What every kind of run has, and the checks that concern several of its sections."""

from dataclasses import fields
from typing import Any, ClassVar, Protocol

from pacatune.methods import TEXT_METHODS, method_of, readers_of

# Sections that only some methods read.
ADAPTER_SECTIONS = ("paca", "lora", "moslora")


class AnyRun(Protocol):
    """A run on text or on images."""

    command: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    """Names of the methods that are offered: of language models, or of classifiers."""

    method: str
    """How to fine-tune; a name of `METHODS`."""

    @property
    def model(self) -> Any:
        """The pretrained model: `path` and `revision` at least."""

    @property
    def paca(self) -> Any:
        """The options of PaCA."""

    @property
    def moslora(self) -> Any:
        """Further options of MosLoRA."""

    @property
    def lora(self) -> Any:
        """The options of LoRA and its kin."""

    @property
    def data(self) -> Any:
        """The data, with the options `eval_path`, `eval_split` and `eval_fraction`."""

    @property
    def training(self) -> Any:
        """The arguments of the trainer, of a class that begins with `SharedDefaults`."""

    @property
    def lean(self) -> str:
        """Whether modules keep less for backward: auto, off or require."""

    @property
    def early_stopping_patience(self) -> int | None:
        """After how many evaluations without progress to stop."""


def settle(run: AnyRun, training_class: type[Any]) -> None:
    """Check what concerns several sections, and fill in what one leaves to another.

    Args:
        run: The run; its sections are changed.
        training_class: Class that the training section must be of.

    Raises:
        ValueError: If the sections contradict each other.
        TypeError: If the training section is of another class.
    """
    training: Any = run.training
    if not isinstance(training, training_class):
        package = training_class.__module__.rpartition(".")[0]
        raise TypeError(
            f"`training` is a {type(training).__name__}; it must be a "
            f"{package}.{training_class.__name__}."
        )
    method = method_of(run.method, run.methods)
    run.method = method.name
    if method.quantization is not None and run.model.quantization is None:
        run.model.quantization = method.quantization
    if method.dropout is not None and run.lora.lora_dropout == 0:
        run.lora.lora_dropout = method.dropout
    _refuse_other_methods(run)
    if training.learning_rate is None:
        rate = method.text_rate if run.methods is TEXT_METHODS else method.head_rate
        training.learning_rate = training.given["learning_rate"] = rate
    if run.early_stopping_patience is not None:
        _set_early_stopping(training, run.early_stopping_patience)
    chooses = training.load_best_model_at_end or _name(training.save_strategy) == "best"
    if chooses and not (run.data.eval_path or run.data.eval_split or run.data.eval_fraction):
        raise ValueError(
            "the best checkpoint is to be kept (`early_stopping_patience`, "
            "`training.load_best_model_at_end` or `training.save_strategy`), but there is no "
            "evaluation data; set `data.eval_path` or `data.eval_fraction`."
        )


def _refuse_other_methods(run: AnyRun) -> None:
    for name in ADAPTER_SECTIONS:
        section: Any = getattr(run, name, None)
        methods = readers_of(name)
        if run.method in methods or section is None:
            continue
        default = type(section)()
        for option in fields(section):
            value = getattr(section, option.name)
            if value != getattr(default, option.name):
                raise ValueError(
                    f"`{name}.{option.name}` ({value!r}) is an option of {', '.join(methods)}, and "
                    f"`method` ({run.method!r}) would ignore it; drop it or change `method`."
                )


def _set_early_stopping(training: Any, patience: int) -> None:
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
