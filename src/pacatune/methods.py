"""The methods of fine-tuning, in one table that every command reads.

A method is a row of `METHODS`, and that is enough to train, compare and measure it: a row names the
class of its configuration, PEFT's or ours; rows may be added. This module imports nothing heavy.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

from pacatune.names import choose

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "CLASSIFIER_METHODS",
    "METHODS",
    "TEXT_METHODS",
    "Method",
    "adapter_config",
    "config_class",
    "method_of",
    "readers_of",
    "size_options",
]


_WITHOUT_SCALE = ("ShiraConfig", "MissConfig", "OFTConfig")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune a model."""

    name: str
    """Name in commands, files and results."""
    title: str
    """Name in reports."""
    summary: str
    """What it does, in half a line."""
    variant_of: str | None = None
    """The method that it is, with quantisation or dropout beside."""
    sections: tuple[str, ...] = ()
    """Sections of a run's options that configure its adapter; none without one."""
    config: Any = "LoraConfig"
    """Class of its adapter's configuration: its name in `pacatune` or `peft`, or itself."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Options of that class which make it this method."""
    quantization: str | None = None
    """Quantisation of the base that belongs to the method."""
    dropout: float | None = None
    """Dropout on the adapter's input that belongs to the method."""
    text_rate: float | None = None
    """Learning rate for a language model; None where the method is not offered for one."""
    head_rate: float | None = None
    """Learning rate for a classifier with a new head; None where it is not offered for one."""

    @property
    def has_adapter(self) -> bool:
        """Whether PEFT makes an adapter, with a rank."""
        return bool(self.sections)

    @property
    def is_paca(self) -> bool:
        """Whether columns of the weights are trained."""
        return "paca" in self.sections

    @property
    def has_dropout(self) -> bool:
        """Whether the adapter's input may have dropout."""
        return self.has_adapter and (
            self.config == "LoraConfig" or hasattr(self.config, "lora_dropout")
        )

    @property
    def has_scale(self) -> bool:
        """Whether the update is multiplied by alpha / r."""
        return self.has_adapter and self.config not in _WITHOUT_SCALE


# A PaCA column moves by learning_rate * paca_alpha / r per step, whatever its weight. The head of a
# classifier is new, whatever the method, and learns at the same rate as the rest. Rates of adapters
# suit the default ranks; what is stable falls as the rank rises.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="paca",
            title="PaCA",
            summary="columns of each weight, trained in place",
            sections=("paca",),
            config="PacaConfig",
            text_rate=5e-4,
            head_rate=1e-3,
        ),
        Method(
            name="qpaca",
            title="QPaCA",
            summary="PaCA on a base in 4 bits (nf4)",
            variant_of="paca",
            sections=("paca",),
            config="PacaConfig",
            quantization="nf4",
            text_rate=5e-4,
        ),
        Method(
            name="lora",
            title="LoRA",
            summary="PEFT's LoRA",
            sections=("lora",),
            text_rate=2e-4,
            head_rate=1e-3,
        ),
        Method(
            name="lora_dropout",
            title="LoRA with dropout",
            summary="PEFT's LoRA with dropout on its input",
            variant_of="lora",
            sections=("lora",),
            dropout=0.05,
            text_rate=2e-4,
            head_rate=1e-3,
        ),
        Method(
            name="dora",
            title="DoRA",
            summary="PEFT's DoRA: LoRA on the directions of the weight, and a magnitude",
            sections=("lora",),
            options={"use_dora": True},
            text_rate=2e-4,
            head_rate=1e-3,
        ),
        Method(
            name="shira",
            title="SHiRA",
            summary="PEFT's SHiRA: single weights at random places, as many as LoRA has",
            sections=("lora",),
            config="ShiraConfig",
            text_rate=2e-4,
            head_rate=1e-3,
        ),
        Method(
            name="gralora",
            title="GraLoRA",
            summary="PEFT's GraLoRA: LoRA on each block of the weight, of two by two",
            sections=("lora",),
            config="GraloraConfig",
            text_rate=2e-4,
            head_rate=1e-3,
        ),
        Method(
            name="miss",
            title="MiSS",
            summary="PEFT's MiSS: one update for all blocks of a weight's inputs",
            sections=("lora",),
            config="MissConfig",
            text_rate=2e-4,
            head_rate=1e-3,
        ),
        Method(
            name="oft",
            title="OFT",
            summary="PEFT's OFT: a rotation of each block of r inputs",
            sections=("lora",),
            config="OFTConfig",
            text_rate=2e-4,
            head_rate=1e-3,
        ),
        Method(
            name="qlora",
            title="QLoRA",
            summary="PEFT's LoRA on a base in 4 bits (nf4)",
            variant_of="lora",
            sections=("lora",),
            quantization="nf4",
            text_rate=2e-4,
        ),
        Method(
            name="full",
            title="Full",
            summary="every weight",
            text_rate=1e-5,
            head_rate=1e-4,
        ),
        Method(
            name="head",
            title="Linear probe",
            summary="the new head of a classifier alone",
            head_rate=3e-3,
        ),
    )
}
"""Name -> method."""


class _Offered(Collection[str]):
    """The names of the methods in `METHODS` that have a learning rate of a kind."""

    def __init__(self, rate: str) -> None:
        self._rate = rate

    def __iter__(self) -> Iterator[str]:
        return (name for name, row in METHODS.items() if getattr(row, self._rate) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == offered for offered in self)


TEXT_METHODS = _Offered("text_rate")
"""Methods for language models."""

CLASSIFIER_METHODS = _Offered("head_rate")
"""Methods for classifiers of texts."""


def method_of(name: str, among: Collection[str] = METHODS) -> Method:
    """Return a method by its name, as `names.choose` finds it."""
    return METHODS[choose(name, among, option="method")]


def readers_of(section: str) -> tuple[str, ...]:
    """Return the methods that read a section of a run's options."""
    return tuple(name for name, method in METHODS.items() if section in method.sections)


def size_options(method: Method, rank: int, alpha: float, dropout: float = 0.0) -> dict[str, Any]:
    """Return the size of an adapter as options of its PEFT configuration.

    Args:
        method: One with an adapter.
        rank: Columns of PaCA, or rank of LoRA's factors.
        alpha: Scale of the update, alpha / rank.
        dropout: Dropout on LoRA's input.
    """
    if method.is_paca:
        return {"r": rank, "paca_alpha": alpha}
    scale = {"lora_alpha": alpha} if method.has_scale else {}
    return {"r": rank, **scale, "lora_dropout": dropout}


def config_class(method: Method) -> Any:
    """Return the class of a method's configuration, PEFT's or ours.

    Raises:
        ValueError: If the PEFT that is installed is too old to have it.
    """
    import peft

    import pacatune

    if not isinstance(method.config, str):
        return method.config
    cls = getattr(pacatune, method.config, None) or getattr(peft, method.config, None)
    if cls is None:
        raise ValueError(
            f"{method.title} needs a newer PEFT than {peft.__version__}; pip install -U peft."
        )
    return cls


def adapter_config(method: Method, **options: Any) -> "PeftConfig":
    """Return the PEFT configuration of a method.

    Args:
        method: One with an adapter.
        **options: Options of its class. Those that say nothing are left out where the class has
            none of that name, and so is LoRA's alpha.

    Raises:
        ValueError: If an option says something, and the class does not have it; if PEFT is too old.
    """
    cls = config_class(method)
    names = {field.name for field in fields(cls)}
    if "alpha" in names and "lora_alpha" in options:
        options["alpha"] = options.pop("lora_alpha")
    if "oft_block_size" in names:  # its own r is the number of blocks
        options |= {"r": 0, "oft_block_size": options.get("r")}
    for name, value in options.items():
        if value and name not in {*names, "lora_alpha"}:
            raise ValueError(f"`{name}` ({value!r}): {method.title} has no such option; drop it.")
    taken = {name: value for name, value in options.items() if name in names}
    return cast("PeftConfig", cls(**taken, **method.options))
