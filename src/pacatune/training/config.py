"""One run, declared once: the command line, YAML files and Python build the same object."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, Literal, cast

from pacatune.data.config import DataSection
from pacatune.measure.setting import check_lean_level
from pacatune.methods import METHODS, TEXT_METHODS, method_of, readers_of
from pacatune.names import choose, suggest
from pacatune.training.sections import (
    ADAPTER_SECTIONS,
    LoraSection,
    ModelConfig,
    PacaSection,
)
from pacatune.training.tasks import DEFAULT_TASK, TASKS, TaskSpec

_EMPTY: Any = dict  # of which a section is made
HEAD_RATE = 3e-3
"""Learning rate of a new head, beside any method."""

# Options of `data` that say what to evaluate on.
_EVALUATION = ("eval_path", "eval_split", "eval_fraction")


def own_sections(task: str) -> dict[str, type[Any]]:
    """Return the class of each section of a task's runs that is ours, by its name."""
    return {
        "model": ModelConfig,
        "data": TASKS[task].data,
        "paca": PacaSection,
        "lora": LoraSection,
    }


@cache
def sections_of(task: str) -> dict[str, type[Any]]:
    """Return the class of each section of a task's runs by its name."""
    from pacatune.training.arguments import training_class

    return {**own_sections(task), "training": training_class(task)}


@dataclass(kw_only=True)
class RunConfig:
    """One fine-tuning run, of any task.

    Sections are given as mappings, as YAML has them, or as objects of their classes, which stay as
    they are. Made, a run is complete: what its options leave to others is filled in, those of an
    `adapter` are read from its folder, and config.yaml says the same. What is set on it afterwards
    changes nothing else.

    Raises:
        ValueError: If options contradict each other, or have values that they cannot have.
        TypeError: If a section is of another task.
        FileNotFoundError: If the adapter is not there.
    """

    task: str = DEFAULT_TASK
    """What to do: `sft` (supervised fine-tuning), `dpo`, `kto`, `reward`, `grpo`, `rloo` or
    `classifier`. Each has options of its own: `--task dpo --help`."""

    method: str = "paca"
    """How to fine-tune: `paca`, `qpaca` (PaCA on a quantised base, nf4 unless `model.quantization`
    says otherwise), `lora`, `lora_dropout`, `dora`, `shira`
    (single weights at random places), `gralora` (LoRA of blocks), `miss` (one update for all blocks
    of inputs), `oft` (a rotation of each block of r inputs), `qlora` (LoRA on a quantised base), or
    `full` (every weight); for classifiers also `head` (the new head alone)."""

    model: ModelConfig = field(default_factory=_EMPTY)
    """The pretrained model: a `ModelConfig`."""

    data: DataSection = field(default_factory=_EMPTY)
    """Training and evaluation data: a `DataConfig`, or that of another task."""

    paca: PacaSection = field(default_factory=_EMPTY)
    """Options of the methods paca and qpaca: a `PacaSection`."""

    lora: LoraSection = field(default_factory=_EMPTY)
    """Options of the methods lora, lora_dropout, dora, shira, gralora, miss, oft and
    qlora: a `LoraSection`."""

    training: Any = field(default_factory=_EMPTY)
    """Every option of the trainer's class of arguments; of SFTConfig: a `TrainingConfig`."""

    lean: Literal["auto", "off", "require"] = "auto"
    """Keep less for backward, exactly: gated MLPs, norms, attention and loss as `pacatune.lean`
    makes them. `auto`: where the model allows it; `require`: refuse a model that does not."""

    lean_level: int = 1
    """How much less: 2 computes gate and up of MLPs again in the backward pass, from the norm's
    input; 3 query, key and value, too. Gradients stay the same."""

    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a better eval_loss (or eval_reward, where there are
    rewards), and keep the best result."""

    adapter: str | None = None
    """Folder or hub id of a finished adapter of the same method, which is trained on: its columns
    and options stay, its values go on. Null: a new adapter."""

    reward: Any = field(default_factory=list)
    """Rewards: Python functions as module:name, which only the command line may give
    (`--reward my_rewards:is_short`, several times for several). In Python also a function, or a
    list of functions, as TRL takes them."""

    def __post_init__(self) -> None:
        """Make sections of mappings, fill in what options leave to others, and check all of it."""
        from pacatune.installation import require

        spec = TASKS[choose(self.task, TASKS, option="task")]
        if spec.is_of_trl:
            # 1.13 does not await a reward that is an object; without Triton, 1.15 has no loss.
            require("TRL", "1.16", "`pacatune train`")
        method = method_of(self.method, spec.methods)
        self.method = method.name
        # What of these is set although it is the default, which no adapter may contradict either.
        sections = {name: getattr(self, name) for name in ADAPTER_SECTIONS}
        typed = {name: {*s} if isinstance(s, Mapping) else set() for name, s in sections.items()}
        for name, kind in sections_of(self.task).items():
            setattr(self, name, _section(name, getattr(self, name), kind))
        self._refuse_options_of_others(spec)
        check_lean_level(self.lean_level, self.lean)
        if self.model.quantization is None:
            self.model.quantization = cast(Any, method.quantization)
        if method.dropout is not None and self.lora.lora_dropout == 0:
            self.lora.lora_dropout = method.dropout
        self._fill_training(spec)
        self._check_evaluation()
        if "reward" not in spec.lacks:
            self._fill_reward()
        if self.lora.lora_dropout and getattr(self.training, "disable_dropout", False):
            raise ValueError(
                f"`lora.lora_dropout` ({self.lora.lora_dropout:g}, of `method` {self.method!r}) is "
                "switched off by `training.disable_dropout` (True); set that to false, or take "
                "the dropout out."
            )
        if spec.reference is not None:
            self._check_reference(spec.reference)
        self.training.pin_bf16()
        if self.adapter is not None:
            from pacatune.training.start import take_options

            take_options(self, typed)

    @property
    def spec(self) -> TaskSpec:
        """The row of the table of tasks."""
        return TASKS[self.task]

    def repeat_command(self, config_file: object) -> str:
        """Return the command that does this run, as a saved configuration says it."""
        # Functions are named in it, since a file runs no code.
        words = "".join(f" --reward {reward_name(reward)}" for reward in self.reward)
        return f"pacatune train --config {config_file}{words}"

    def adapter_options(self) -> dict[str, Any]:
        """Return the options of the adapter, as PEFT's class of the method takes them."""
        options: dict[str, Any] = {}
        for name in METHODS[self.method].sections:
            section = getattr(self, name)
            options |= section.adapter_options() if name == "paca" else asdict(section)
        return options

    def _refuse_options_of_others(self, spec: TaskSpec) -> None:
        """Refuse what another task or another method would read."""
        if self.method == "full" and (kind := self.model.quantization):
            raise ValueError(
                f"`model.quantization` ({kind!r}) with `method` ('full'): quantised weights cannot "
                "be trained; choose another method or drop the option."
            )
        for name in spec.lacks:
            if value := getattr(self, name):
                raise ValueError(f"the task {self.task} has no `{name}` ({value!r}); drop it.")
        for name in ADAPTER_SECTIONS:
            methods = readers_of(name)
            for option, value in changed(getattr(self, name)).items():
                if self.method not in methods:
                    raise ValueError(
                        f"`{name}.{option}` ({value!r}) is an option of {', '.join(methods)}, and "
                        f"`method` ({self.method!r}) would ignore it; drop it or change `method`."
                    )
        if not METHODS[self.method].has_scale and (alpha := changed(self.lora).get("lora_alpha")):
            raise ValueError(
                f"`lora.lora_alpha` ({alpha}): what `method` ({self.method!r}) trains is not "
                "scaled; drop it."
            )

    def _fill_training(self, spec: TaskSpec) -> None:
        """Fill in the learning rate, and what the best checkpoint is best in."""
        training = self.training
        if training.learning_rate is None:
            training.learning_rate = default_rate(spec, self.method)
        if hasattr(training, "head_learning_rate"):
            self._fill_head_rate(training)
        training.refuse_nothing()
        if self.early_stopping_patience is not None:
            training.load_best_model_at_end = True
        if training.load_best_model_at_end or training.save_strategy == "best":
            best = "eval_reward" if spec.is_rewarded else "eval_loss"
            training.metric_for_best_model = training.metric_for_best_model or best

    def _fill_head_rate(self, training: Any) -> None:
        """Fill in the learning rate of a new head: the same one beside any method."""
        head_rate, rate = training.head_learning_rate, training.learning_rate
        is_alone = self.method == "head"
        if is_alone and head_rate not in (None, rate):
            raise ValueError(
                f"`training.head_learning_rate` ({head_rate}) is another rate than "
                f"`training.learning_rate` ({rate}), and `method` ('head') trains nothing else; "
                "set one of them."
            )
        if head_rate is None:
            training.head_learning_rate = rate if is_alone else HEAD_RATE

    def _check_evaluation(self) -> None:
        """Hold nothing out where nothing is evaluated; refuse what asks for it all the same."""
        data, training = self.data, self.training
        evaluates = training.eval_strategy != "no"
        if not evaluates and data.eval_fraction == type(data).eval_fraction:
            data.eval_fraction = 0.0
        wanted = [name for name in _EVALUATION if getattr(data, name, None)]
        if wanted and not evaluates:
            raise ValueError(
                f"`training.eval_strategy` ('no') evaluates nothing, and `data.{wanted[0]}` asks "
                "for an evaluation; drop one of them (steps with a large `training.eval_steps` "
                "evaluates before and after training alone)."
            )
        if not wanted and (training.load_best_model_at_end or training.save_strategy == "best"):
            raise ValueError(
                "`early_stopping_patience`, `training.load_best_model_at_end` and "
                "`training.save_strategy` 'best' need evaluation data; set `data.eval_path` or "
                "`data.eval_fraction`, and `training.eval_strategy` to steps or epoch."
            )

    def _fill_reward(self) -> None:
        """Make a list of the rewards."""
        is_one = isinstance(self.reward, str) or callable(self.reward)
        self.reward = [self.reward] if is_one else list(self.reward)
        if not self.reward:
            raise ValueError(
                "there is no reward; give one on the command line, as in `--reward "
                "my_rewards:is_short` (a Python function by module and name)."
            )

    def _check_reference(self, option: str) -> None:
        """Refuse what would make another model of the reference: the model with the adapter off.

        `option` is `beta`, which asks no reference at 0, or `precompute_ref_log_probs`, which asks
        it before the model trains.
        """
        method, asks_before = METHODS[self.method], option == "precompute_ref_log_probs"
        asks = bool(getattr(self.training, option)) != asks_before
        if self.adapter is not None and (asks or asks_before):
            wrong = f"`adapter` ({self.adapter!r})"
            fix = "merge it (`pacatune merge`), which is exact, and give the result as `model.path`"
        elif asks and not method.has_adapter:
            wrong, value = f"`method` ({self.method!r})", "true" if asks_before else 0
            fix = f"choose one with an adapter, or set `training.{option}` to {value}"
        elif asks and method.is_paca and self.paca.bias != "none":
            wrong, fix = f"`paca.bias` ({self.paca.bias!r}), which stays trained", "set it to none"
        else:
            return
        raise ValueError(
            f"{wrong} with `task` ({self.task!r}): the reference is the model with the adapter "
            f"off, and must be the pretrained one, without a second copy in memory; {fix}."
        )


def default_rate(spec: TaskSpec, method: str) -> float:
    """Return the learning rate of a method where a run of a task says none."""
    row = METHODS[method]
    if spec.adapter_rate is not None and row.has_adapter:
        return spec.adapter_rate
    rate = row.text_rate if spec.methods is TEXT_METHODS else row.head_rate
    assert rate is not None, "the method is offered"
    return rate * spec.rate_share


def _section(name: str, section: Any, kind: type[Any]) -> Any:
    """Return a section of the run's own, of a class."""
    if isinstance(section, Mapping):
        names = [option.name for option in fields(kind) if option.init]
        for option in section:
            if option not in names:
                raise ValueError(f"unknown option {name}.{option}; {suggest(str(option), names)}")
        return kind(**section)
    if not isinstance(section, kind):
        raise TypeError(
            f"`{name}` is a {type(section).__name__}; it must be a mapping of options, or a "
            f"{kind.__module__.rpartition('.')[0]}.{kind.__name__}."
        )
    # Anew: the caller's serves other runs.
    return kind(**{o.name: getattr(section, o.name) for o in fields(kind) if o.init})


def reward_name(reward: Any) -> str:
    """Return how a reward is written: a function by its module and name."""
    if isinstance(reward, str):
        return reward
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    return f"{getattr(reward, '__module__', '?')}:{name}"


def changed(section: Any) -> dict[str, Any]:
    """Return the options of an adapter's section that have not their defaults."""
    default = type(section)()
    return {
        option.name: value
        for option in fields(section)
        if (value := getattr(section, option.name)) != getattr(default, option.name)
    }
