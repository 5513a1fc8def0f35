"""Makes PaCA known to PEFT from outside: the one place that touches PEFT's registry.

PEFT up to 0.21 has no `PeftType.PACA`. Its enum is extended with a real member, so that everything
which looks the type up (the `peft_type` string of adapter_config.json, iteration, `.value`, pickle)
finds it. PEFT from 0.22 on ships a PaCA of its own for plain Linear layers; ours reads and writes
the same files and takes its place, so that an adapter is loaded by one implementation whichever
package wrote it.
"""

import functools
import inspect
import re
import sys
from typing import Any

from peft import mapping
from peft.utils import save_and_load
from peft.utils.peft_types import PeftType, register_peft_method

from pacatune.format.options import FILE_TYPES
from pacatune.tuner.compat import find_weight_renaming, teach_saving

_NAME = "PACA"


def ensure_peft_type(name: str = _NAME) -> PeftType:
    """Return the member of PeftType of that name, adding it where PEFT has none."""
    if name in PeftType.__members__:
        return PeftType.__members__[name]
    # PeftType is a str enum whose members are found by plain strings: name and value must be equal.
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    hashable_values = getattr(PeftType, "_hashable_values_", None)  # Python >= 3.12.4
    if hashable_values is not None and name not in hashable_values:
        hashable_values.append(name)
    type.__setattr__(PeftType, name, member)  # EnumType's own would refuse
    return member


def register(config_class: type, model_class: type) -> None:
    """Register the method with PEFT, in place of a PaCA that PEFT itself ships."""
    peft_type = ensure_peft_type()
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING.pop(peft_type, None)
    foreign = mapping.PEFT_TYPE_TO_TUNER_MAPPING.pop(peft_type, None)
    mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING.pop(peft_type, None)
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING.pop(peft_type, None)
    register_peft_method(name=_NAME.lower(), config_cls=config_class, model_cls=model_class)
    for name in FILE_TYPES:  # as files call it; a configuration in memory is PACA's
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config_class
    teach_saving()
    _teach_transformers()
    _teach_base_names()
    if foreign is None or foreign is model_class:
        return
    _guard(foreign, config_class)
    for module_name in ("peft", "peft.tuners"):
        module = sys.modules[module_name]
        for attribute, ours in (("PacaConfig", config_class), ("PacaModel", model_class)):
            if hasattr(module, attribute):
                setattr(module, attribute, ours)


def _guard(foreign: Any, config_class: Any) -> None:
    """Refuse what PEFT's own PaCA would ignore, in models that it made before ours was there.

    Their further adapters are made by it too; it reads ours as far as it has the same options.
    """
    inject = foreign.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        ours: list[str] = []
        if isinstance(config, config_class):
            ours = config.needs_pacatune() + ["`selection`"] * (config.selection != "random")
        if ours:
            raise ValueError(
                f"Adapter {adapter_name!r} needs pacatune ({', '.join(ours)}), but this model was "
                "made by PEFT's own PaCA, before pacatune was imported. Import pacatune first, "
                "then make or load the model again."
            )
        inject(self, model, adapter_name, *args, **kwargs)

    foreign.inject_adapter = inject_adapter


def _teach_transformers() -> None:
    """Let `model.load_adapter` and `AutoModel.from_pretrained(adapter)` find the deltas.

    transformers loads adapters by itself, with renamings from PEFT that put the adapter's name
    after `paca_delta`; the parameter is called `paca_delta.<adapter>.weight`. Without this one more
    renaming the deltas would be skipped, with a message that is easily missed.
    """
    renaming = find_weight_renaming()
    build = getattr(renaming, "build_peft_weight_mapping", None)
    if build is None or hasattr(build, "knows_paca"):
        return

    @functools.wraps(build)
    def build_with_paca(*args: Any, **kwargs: Any) -> list[Any]:
        renamings: list[Any] = build(*args, **kwargs)
        arguments = inspect.signature(build).bind(*args, **kwargs).arguments
        if renamings and getattr(arguments.get("peft_config"), "peft_type", None) == _NAME:
            adapter_name = re.escape(arguments["adapter_name"])
            for kind, name in (("delta", "weight"), ("mix", "mix")):
                parameter = rf"paca_delta.\1.{name}"
                renamings.append(
                    renaming.WeightRenaming(rf"paca_{kind}\.({adapter_name})$", parameter)
                )
        return renamings

    build_with_paca.knows_paca = True  # type: ignore[attr-defined]
    renaming.build_peft_weight_mapping = build_with_paca


def _teach_base_names() -> None:
    """Let PEFT's `get_base_model_state_dict` see through the owners of adapted parameters.

    It takes `base_layer` out of names only below the layers that it calls tuner layers.
    """
    from pacatune.tuner.experts import Experts  # needs the enum's member

    convert = getattr(save_and_load, "_peft_key_to_original_key", None)  # PEFT >= 0.20
    if convert is None or hasattr(convert, "knows_paca"):
        return

    @functools.wraps(convert)
    def convert_with_owners(model: Any, peft_key: str) -> str:
        parts, current = [], model.base_model.model
        for part in peft_key.split("."):
            if part != "base_layer" or not isinstance(current, Experts):
                parts.append(part)
            current = getattr(current, part, None)
        return str(convert(model, ".".join(parts)))

    convert_with_owners.knows_paca = True  # type: ignore[attr-defined]
    save_and_load._peft_key_to_original_key = convert_with_owners
