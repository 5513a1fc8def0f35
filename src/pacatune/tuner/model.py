"""The PEFT tuner: finds and replaces the target modules, and answers for the adapter as a whole."""

import dataclasses
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import onload_layer
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from pacatune.format.options import IN_TENSORS, idle_layers
from pacatune.format.tensors import (
    MIX,
    check_tensors,
)
from pacatune.residency import resident
from pacatune.tuner import several
from pacatune.tuner.columns import (
    NOT_LOADED,
    choose_columns,
    note_columns,
    settle_scaling,
)
from pacatune.tuner.compat import (
    NoMatchingPeftModuleError,
    Tuner,
    get_quantization_kwargs,
    note_parameters,
    resolve_quantization_backend,
)
from pacatune.tuner.config import PacaConfig, seeded
from pacatune.tuner.defaults import settle_targets
from pacatune.tuner.experts import ExpertParameter, Experts
from pacatune.tuner.fast_path import allow_fast_path, forbid_fast_path
from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.layout import adaptable_kind
from pacatune.tuner.quantized import (
    QuantizedLinear,
    find_originals,
    forbid_packing,
    settle_columns,
)
from pacatune.tuner.saving import (
    PlainNames,
    Selected,
    check_fits,
    frozen_embeddings,
    kinds_beyond_peft,
    warn_of_replaced,
)
from pacatune.tuner.targets import (
    LAYERS,
    available_targets,
    check_targets,
    find_parameters,
    parameters_count,
    ranks_of,
)

# Finds weights that two modules share, such as an lm_head tied to the embedding.


def mark_shared_weights(model: nn.Module) -> None:
    """Tell every adapted layer whether another module sees its weight, so that it is not written.

    Sharing is seen from the whole model only; tie weights before adapting.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                address = _address(parameter)
                owners[address] = owners.get(address, 0) + 1
    for layer in model.modules():
        if isinstance(layer, PacaLayer):
            weight = layer.base_layer._parameters.get(layer.parameter_name)
            if weight is not None and owners.get(_address(weight), 0) > 1:
                layer.shares_weight = True
                if layer.residency is not None:
                    layer.residency.note_sharing()


def _address(parameter: Tensor) -> int:
    """What two tensors over one memory have in common."""
    try:
        return parameter.untyped_storage().data_ptr() or id(parameter)
    except (NotImplementedError, RuntimeError):  # tensor subclasses without a storage of their own
        return id(parameter)


# What `generate` takes and no forward does.
_GENERATION_OPTIONS = frozenset(
    ("generation_config", "max_new_tokens", "max_length", "do_sample", "num_beams", "streamer")
)


class PacaModel(Tuner):
    """Trains `r` columns of each target weight in place.

    Made by `peft.get_peft_model(model, PacaConfig(...))`; everything PEFT offers for its own
    methods works on it.
    """

    prefix = "paca_"
    tuner_layer_cls = PacaLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Put the adapter's layers into `model`, then see which weights are shared."""
        config = _adopt(self.peft_config[adapter_name])
        _warn_of_idle_layers(config)
        config = settle_scaling(model, config)
        if config.columns is None and config.selection == "random":
            config = seeded(config)
        elif config.columns != IN_TENSORS:
            config = choose_columns(model, config)
        self.peft_config[adapter_name] = config
        forbid_packing(model)
        originals = find_originals(model, config, **get_quantization_kwargs(self))
        try:
            with parameters_count(config):
                super().inject_adapter(model, adapter_name, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise type(error)(f"{error} {available_targets(model)}") from None
        mark_shared_weights(model)
        forbid_fast_path(model)
        try:
            config = settle_columns(model, config, adapter_name, originals)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        self.peft_config[adapter_name] = config
        if config.columns == IN_TENSORS:
            hook = _Unloaded(config, adapter_name)
            hook.handle = model.register_forward_pre_hook(hook)

    def _prepare_adapter_config(self, peft_config: PacaConfig, model_config: Any) -> PacaConfig:
        settle_targets(peft_config, self.model, **get_quantization_kwargs(self))
        return peft_config

    def _prepare_model(self, peft_config: PacaConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        check_targets(self, peft_config, model, **get_quantization_kwargs(self))

    def _create_and_replace(
        self,
        peft_config: PacaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks = ranks_of(peft_config, current_key)
        if isinstance(target, ExpertParameter):
            return  # no module of the base: `target_modules` does not mean it
        if isinstance(target, PacaLayer):
            target.update_layer(adapter_name, current_key, peft_config, **ranks)
            return
        kwargs = get_quantization_kwargs(self)
        kind = adaptable_kind(target, **kwargs)
        assert kind is not None, "check_targets refuses what no layer adapts"
        is_quantized = resolve_quantization_backend(target, **kwargs) is not None
        new = QuantizedLinear if is_quantized else LAYERS[kind]
        layer = new(target, adapter_name, current_key, peft_config, **ranks, **kwargs)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(
        self, peft_config: PacaConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        # Unlike PEFT's own: parameters that are adapted keep their names, whatever their order.
        names = list(find_parameters(self, peft_config, model))
        for name in names:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._adapt_parameter(name, adapter_name, peft_config)
        note_parameters(self, names)
        return names

    def _adapt_parameter(self, name: str, adapter_name: str, config: PacaConfig) -> None:
        module_name = name.rpartition(".")[0]
        experts = self.model.get_submodule(module_name)
        if not isinstance(experts, Experts):
            experts = Experts(experts)
            self.model.set_submodule(module_name, experts)
        layer = experts.adapt(adapter_name, name, config, **ranks_of(config, name))
        if adapter_name not in self.active_adapters:
            layer.paca_delta[adapter_name].requires_grad_(False)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # Unlike PEFT's own: never assign weights. Our layers bring their base layer, and an
        # unloaded embedding with trained tokens is no place for a bare tensor.
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        with warnings.catch_warnings():
            if merge and safe_merge:  # all of it before anything is taken apart
                self.merge_adapter(adapter_names, safe_merge=True)
                warnings.filterwarnings("ignore", message="All adapters are already merged")
            model: nn.Module = super()._unload_and_optionally_merge(
                merge, progressbar, safe_merge, adapter_names
            )
        allow_fast_path(model)
        return model

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into every weight, or into none if one of them fails.

        Args:
            adapter_names: Adapters to merge; None: the active ones.
            safe_merge: Refuse columns that are not finite.

        Raises:
            ValueError: If `safe_merge` finds such, or a weight cannot be merged into.
        """
        layers = [module for module in self.model.modules() if isinstance(module, PacaLayer)]
        before = [len(layer.merged_adapters) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for layer, number in zip(layers, before, strict=True):
                with onload_layer(layer):
                    layer.unmerge_to(number)
            raise

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add the exact weighted sum of adapters as a new one; see `several`.

        Raises:
            ValueError: If `combination_type` is not "linear", or as `several` says.
        """
        if combination_type != "linear":
            raise ValueError(
                f"`combination_type` ({combination_type!r}) must be 'linear': the sum of column "
                "updates is exact, so there is nothing to approximate."
            )
        several.add_weighted_adapter(self, adapters, weights, adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Map `...paca_delta.<adapter>.weight` to `...paca_delta`, and `.mix` to `...paca_mix`."""
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        key = re.sub(r"(^|\.)paca_delta\.mix$", rf"\1{MIX}", key)
        return re.sub(r"(^|\.)paca_delta\.weight$", r"\1paca_delta", key)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Select an adapter's entries of a state_dict, and refuse those whose values are elsewhere.

        Whoever saves an adapter asks for these first and saves the configuration then, so what that
        says of the adapted modules is filled in here.
        """
        selected = Selected(
            super()._get_adapter_state_dict(
                model=PlainNames(model), config=config, adapter_name=adapter_name, **kwargs
            )
        )
        selected.frozen = frozen_embeddings(model, config)
        if isinstance(config, PacaConfig):
            config.needs_pacatune_for = kinds_beyond_peft(PlainNames(model), adapter_name)
        for name, tensor in selected.items():
            if tensor.numel() == 0:
                raise ValueError(
                    f"Adapter {adapter_name!r}: {name!r} is empty, its values are spread over the "
                    "processes. Save it inside deepspeed.zero.GatheredParameters("
                    "list(model.parameters())), or give `state_dict` to save_pretrained."
                )
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Map a file's keys to the model's, and refuse tensors that do not belong to this model."""
        check_tensors(state_dict, source=f"adapter {adapter_name!r}")
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=PlainNames(model),
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
        )
        check_fits(PlainNames(model), adapter_name, remapped)
        warn_of_replaced(model, config, adapter_name, remapped)
        note_columns(config, PlainNames(model), adapter_name, remapped)
        for module in model.modules():
            for hook in list(module._forward_pre_hooks.values()):
                if isinstance(hook, _Unloaded) and hook.adapter_name == adapter_name:
                    hook.handle.remove()
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Prepare one call: hand `adapter_names` of a mixed batch to every adapted layer.

        `generate` has the columns in the weights, where its options show that it is that.
        """
        with ExitStack() as stack:
            if _GENERATION_OPTIONS & kwargs.keys():
                stack.enter_context(resident(self.model))
            if (names := kwargs.get("adapter_names")) is not None:
                num_beams = kwargs.get("num_beams") or 1
                stack.enter_context(several.adapter_names_passed(self.model, names, num_beams))
            yield


class _Unloaded:
    """Refuses to run a model with an adapter whose columns nobody has loaded from its file.

    transformers loads tensors without asking PEFT; then the columns are noted here.
    """

    handle: Any

    def __init__(self, config: PacaConfig, adapter_name: str) -> None:
        self.config, self.adapter_name = config, adapter_name

    def __call__(self, model: nn.Module, args: Any) -> None:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, PacaLayer)}
        layers = {n: layer for n, layer in layers.items() if self.adapter_name in layer.r}
        columns = {name: layer.paca_indices[self.adapter_name] for name, layer in layers.items()}
        if all((own >= 0).all() for own in columns.values()):
            self.config.columns = {name: own.tolist() for name, own in columns.items()}
            self.handle.remove()
        elif any(self.adapter_name in layer.active_adapters for layer in layers.values()):
            raise ValueError(f"adapter {self.adapter_name!r}: {NOT_LOADED}")


def _adopt(config: PeftConfig) -> PacaConfig:
    """Return our config for one of the PaCA that PEFT >= 0.22 ships."""
    if isinstance(config, PacaConfig):
        return config
    known = {field.name for field in dataclasses.fields(PacaConfig) if field.init}
    values = {key: value for key, value in vars(config).items() if key in known}
    return PacaConfig(**values)


def _warn_of_idle_layers(config: PacaConfig) -> None:
    if idle := idle_layers(config):
        warnings.warn(
            f"{idle} has no effect: `target_modules` is a regular expression "
            f"({config.target_modules!r}), which alone decides. Put the layers into it.",
            stacklevel=2,
        )
