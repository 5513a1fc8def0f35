"""What a run trains: its adapter and heads, and the plan of them, made without a weight."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from pacatune import lean
from pacatune.data.prepare import PreparedData
from pacatune.methods import METHODS, adapter_config
from pacatune.training.config import RunConfig
from pacatune.training.start import read_start
from pacatune.training.tasks import ModelKind
from pacatune.tuner.ignored import put_adapter
from pacatune.tuner.layer import PacaLayer


@dataclass(frozen=True)
class Plan:
    """What will be trained, known without a single weight."""

    adapter: PeftConfig | None
    """The adapter's configuration with its targets; None without an adapter."""
    targets: dict[str, str]
    """Name of each adapted module -> its shape, as "576 -> 192"."""
    num_trainable_parameters: int
    num_parameters: int

    def summary(self) -> list[str]:
        """Return a line per kind of target, such as `30 x q_proj (576 -> 576)`.

        Where layers of a name differ in size, the name alone.
        """
        shapes: dict[str, list[str]] = {}
        for name, shape in self.targets.items():
            shapes.setdefault(name.rpartition(".")[2], []).append(shape)
        return [
            f"{len(sizes)} x {name}" + (f" ({sizes[0]})" if len(set(sizes)) == 1 else "")
            for name, sizes in shapes.items()
        ]


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What a task on a language model makes of its data, and what that asks of the others."""

    examples: PreparedData
    kind: ModelKind | None = None
    """What the model does, where that is not what the task's table says."""
    columns: tuple[str, ...] = ("input_ids", "labels")
    """Those by which a resumed run knows the data again."""
    collator: Callable[[list[Any]], Any] | None = None
    """Makes a batch of rows by which columns are chosen; None: pads what is learned of them."""
    loss: Callable[[Any, Any], Tensor] | None = None
    """Loss of a model on such a batch; the model's own where None."""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the configuration of the model."""
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of the trainer."""
    new_head: str | None = None
    """Why the model gets a new head for its classes; None: it gets none."""
    is_split_fixed: bool = False
    """Whether a run must go on with the processes and batches that it began with."""
    length_option: str = "`training.max_length`"
    """What to lower where examples are longer than the model's positions."""


def make_adapter_config(
    config: RunConfig, model: nn.Module, task_type: str | None
) -> PeftConfig | None:
    """Return the PEFT configuration of a run on a model; None without an adapter.

    Targets that are not set become the model's default, the same for every method.
    """
    from pacatune.tuner.columns import fit_ranks
    from pacatune.tuner.config import refuse_idle_layers
    from pacatune.tuner.defaults import default_targets

    method = METHODS[config.method]
    if not method.has_adapter:
        return None
    if config.adapter is not None:
        adapter = read_start(config)
    else:
        adapter = adapter_config(method, **config.adapter_options(), task_type=task_type)
    if adapter.target_modules is None:
        adapter.target_modules = default_targets(model)
    if config.adapter is None:
        refuse_idle_layers(adapter)
        if method.is_paca:
            fit_ranks(model, adapter)
    return adapter


def make_trainable(model: Any, adapter: PeftConfig | None, method: str) -> nn.Module:
    """Put the adapter on a model; of the method `head`, freeze all but the head."""
    if method == "head":
        model.requires_grad_(False)
        for name in find_heads(model):
            model.get_submodule(name).requires_grad_(True)
    return model if adapter is None else put_adapter(model, adapter)


def find_heads(model: Any) -> list[str]:
    """Return the names of the modules that turn features into classes."""
    body = getattr(model, model.base_model_prefix, None)
    others = [child for child in model.children() if child is not body]
    modules = model.named_modules()
    return [
        name
        for name, module in modules
        if module in others and any(True for _ in module.parameters())
    ]


def reset_heads(model: nn.Module) -> None:
    """Draw the weights of the heads anew, from torch's global generator."""
    heads = [model.get_submodule(name) for name in find_heads(model)]
    parameters = [parameter for head in heads for parameter in head.parameters()]
    with gather_params_ctx(parameters, modifier_rank=0):  # ZeRO-3 shards them
        layers: list[Any] = [layer for head in heads for layer in head.modules()]
        for layer in layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()


def make_plan(model: nn.Module, adapter: PeftConfig | None, config: RunConfig) -> Plan:
    """Make a model trainable, which needs no weights, and return what of it is trained.

    With `lean: require` it must be able to keep no more for backward than it has to.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    num_parameters, planned = sum(p.numel() for p in model.parameters()), adapter
    if hasattr(adapter, "mask_fn"):  # SHiRA's, which looks at values; as many are trained without
        adapter = copy.copy(adapter)
        setattr(adapter, "mask_fn", None)  # noqa: B010 (PEFT's own field of that class)
    make_trainable(model, adapter, config.method)
    if config.lean == "require":
        lean.enable(model, config.lean, level=config.lean_level)
        lean.disable(model)
    targets = {
        name: f"{module.in_features} -> {module.out_features}{_whole(module)}"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    return Plan(planned, targets, count_trainable(model), num_parameters)


def _whole(module: Any) -> str:
    is_whole = isinstance(module, PacaLayer) and module.in_features in module.r.values()
    return ", every column" if is_whole else ""


def count_trainable(model: nn.Module) -> int:
    """Return the number of trained values, counting sharded ones in full."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
