"""What a trainer has adapted."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import nn

from pacatune.format.tensors import plain_name
from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.saving import is_foreign


def base_of(model: Any) -> nn.Module:
    """Return the base model inside wrappers (DDP, torch.compile, PEFT)."""
    while not callable(getattr(model, "get_base_model", None)):
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None:
            return cast(nn.Module, model)
        model = inner
    return cast(nn.Module, model.get_base_model())


class Adapted(NamedTuple):
    """An adapted weight of a model."""

    parameter: str
    """Its name, without that of a wrapper."""
    layer: PacaLayer
    adapter: str
    """The adapter's name."""

    @property
    def state(self) -> tuple[int, ...]:
        """Another one where another adapter or other columns have come, while this one is held."""
        indices = self.layer.paca_indices[self.adapter]
        return id(self.layer), id(indices), indices._version


def layers_of(model: nn.Module, adapter: str | None) -> Iterator[Adapted]:
    """Yield each weight that the adapter adapts; None: the one that is active."""
    has_layers = has_adapter = False
    for name, module in base_of(model).named_modules():
        if is_foreign(module):
            raise ValueError(
                f"{name!r} is a layer of PEFT's own PaCA; make the adapter with "
                "`pacatune.PacaConfig`, which loads its adapters too."
            )
        if not isinstance(module, PacaLayer):
            continue
        has_layers = True
        active = [adapter] if adapter else module.active_adapters
        names = [own for own in active if own in module.paca_delta]
        if len(names) > 1:
            raise ValueError(
                f"{len(names)} adapters are active ({', '.join(names)}), whose columns may "
                "overlap; name one by `adapter`, or add them up by `model.add_weighted_adapter`."
            )
        if names:
            has_adapter = True
            is_own = name.rpartition(".")[2] == module.parameter_name
            full = name if is_own else f"{name}.{module.parameter_name}"
            yield Adapted(plain_name(full), module, names[0])
    if not has_layers:
        raise ValueError(
            "the model has no PaCA layers; adapt it first: `get_peft_model(model, "
            "PacaConfig(...))`. LoRA and full fine-tuning change every column."
        )
    if not has_adapter:
        which = f"adapter {adapter!r}" if adapter else "active adapter"
        raise ValueError(f"no layer has an {which} of PaCA; check its name, or `set_adapter` it.")
