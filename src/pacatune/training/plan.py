"""What a run would train: its adapter, on a model without a single weight."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from pacatune import lean
from pacatune.methods import METHODS, adapter_config
from pacatune.training.config import BaseRunConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class Plan:
    """What will be trained, known without a single weight."""

    targets: dict[str, str]
    """Name of each adapted module -> its shape, as "576 -> 192"."""
    num_trainable_parameters: int
    num_parameters: int

    def summary(self) -> list[str]:
        """Return a line per kind of target, such as `30 x q_proj (576 -> 576)`.

        Where layers of a name differ in size, as in a CNN, the name alone: `17 x conv_pw`.
        """
        shapes: dict[str, list[str]] = {}
        for name, shape in self.targets.items():
            shapes.setdefault(name.rpartition(".")[2], []).append(shape)
        return [
            f"{len(found)} x {name}" + (f" ({found[0]})" if len(set(found)) == 1 else "")
            for name, found in shapes.items()
        ]


def make_adapter_config(config: BaseRunConfig[Any], **options: Any) -> "PeftConfig | None":
    """Return the PEFT configuration of a run; None where its method has no adapter.

    Args:
        config: The run.
        **options: Of PEFT's class, over those of the run.
    """
    method = METHODS[config.method]
    if not method.has_adapter:
        return None
    return adapter_config(method, **{**config.adapter_options(), **options})


def complete_targets(adapter: "PeftConfig", model: nn.Module) -> None:
    """Set targets that are not set to the default, the same for every method, in place.

    Args:
        adapter: The adapter's configuration.
        model: The base, weights not needed.

    Raises:
        ValueError: If the options leave no layer, or name layers that there are not.
    """
    from pacatune.tuner.config import refuse_idle_layers
    from pacatune.tuner.defaults import default_targets

    if adapter.target_modules is None:
        adapter.target_modules = default_targets(model)
    refuse_idle_layers(adapter)


def put_adapter(model: nn.Module, adapter: "PeftConfig") -> "PeftModel":
    """Put an adapter on a model, in place; no weight is read of a model that has none.

    Raises:
        ValueError: If the targets match nothing or cannot be adapted.
    """
    from pacatune.tuner.ignored import get_strict_peft_model

    options: Any = copy.deepcopy(adapter)
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    if is_empty and options.peft_type == "PACA":
        options.columns_from = "dequantized"
        if options.columns is None:
            options.selection = "random"
    return get_strict_peft_model(model, options, low_cpu_mem_usage=is_empty)


def make_plan(model: nn.Module, num_parameters: int, lean_mode: str) -> Plan:
    """Return what a model trains, that has its adapter.

    Args:
        model: The base, changed in place; weights not needed.
        num_parameters: Size of the base without the adapter.
        lean_mode: `lean` of the run.

    Raises:
        ValueError: If the model keeps more for backward than `require` allows.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if lean_mode == "require":
        lean.enable(model, lean_mode)
        lean.disable(model)
    targets = {
        name: f"{module.in_features} -> {module.out_features}"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    return Plan(targets, count_trainable(model), num_parameters)


def count_trainable(model: nn.Module) -> int:
    """Return the number of trained values, counting sharded ones in full."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
