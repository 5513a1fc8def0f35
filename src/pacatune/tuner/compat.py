"""What an old PEFT or transformers lacks, supplied here; the rest of us is written for new ones.

    PEFT 0.21         see `old_peft.py`
    PEFT 0.20         an error of its own where nothing matches
    PEFT 0.19         how transformers 5 renames the tensors of adapters
    transformers 5    the names of tied weights

Where one has what we need, nothing here is used. What cannot be supplied names the version that
has it.
"""

import importlib
from typing import Any, cast

from peft.tuners import tuners_utils
from torch import Tensor

from pacatune.grid.layers import PackedLinear
from pacatune.tuner import old_peft


def _module(name: str) -> Any:
    """Return a module, None where this release has none of the name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(str(error.name)):
            raise
        return None


# PEFT < 0.21: the serialisation of a method is not yet its tuner's.
_IS_OLD = not hasattr(tuners_utils.BaseTuner, "_get_adapter_state_dict")

_errors = _module("peft.utils.error")
NoMatchingPeftModuleError: type[ValueError] = getattr(
    _errors, "NoMatchingPeftModuleError", ValueError
)


_backends = _module("peft.utils.quantization_utils") or old_peft


class BlocksBackend:
    """What PEFT calls a quantisation: weights in the blocks of their file."""

    backend_name, layer_type, supports_merge = "blocks", "linear", True

    def get_base_weight(self, base_layer: Any) -> Tensor:
        """Return the (O, I) weight as a new tensor."""
        return cast(Tensor, base_layer.weight)

    def maybe_clone_base_result(self, result: Tensor) -> Tensor:
        """Return it."""
        return result


_BLOCKS = BlocksBackend()


def resolve_quantization_backend(base_layer: Any, **kwargs: Any) -> Any:
    """Return how a layer's weight is quantised, None if it is not."""
    if isinstance(base_layer, PackedLinear):
        return _BLOCKS
    return _backends.resolve_quantization_backend(base_layer, **kwargs)


get_quantization_kwargs = _backends.get_quantization_kwargs
quantization_extra_repr = _backends.quantization_extra_repr

TunerLayer: Any = old_peft.OldTunerLayer if _IS_OLD else tuners_utils.BaseTunerLayer
Tuner: Any = old_peft.OldTuner if _IS_OLD else tuners_utils.BaseTuner


def note_parameters(tuner: Any, names: list[str]) -> None:
    """Tell an old PEFT which parameters are adapted; a new one takes what is returned."""
    if _IS_OLD:
        tuner.targeted_parameter_names.extend(names)


def teach_saving() -> None:
    """Let an old PEFT ask our tuner what is saved and loaded, as PEFT 0.21 does of itself."""
    if _IS_OLD:
        old_peft.teach_saving()


# transformers.


def find_weight_renaming() -> Any:
    """Return the module whose `build_peft_weight_mapping` transformers uses to load adapters.

    None with transformers 4, which loads them through PEFT.
    """
    for name in ("peft.utils.transformers_weight_conversion", "transformers.integrations.peft"):
        try:
            module = _module(name)
        except ImportError:  # PEFT's needs transformers 5
            continue
        if hasattr(module, "build_peft_weight_mapping"):
            return module
    return None


def as_saved(base: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model as its checkpoint has them; transformers 4 converts nothing."""
    loading = _module("transformers.core_model_loading")
    if loading is None:
        return tensors
    return dict(loading.revert_weight_conversion(base, tensors))


def tied_weights(model: Any) -> dict[str, str]:
    """Return the names of a transformers model's tied parameters -> those that they are tied to.

    transformers 5 keeps them, and reads them when it saves; 4 ties the head alone.
    """
    if hasattr(model, "all_tied_weights_keys"):
        return cast(dict[str, str], model.all_tied_weights_keys)
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    try:
        ends = (model.get_output_embeddings(), model.get_input_embeddings())
    except NotImplementedError:  # of a model that has no tokens
        return {}
    names = {module: name for name, module in model.named_modules()}
    if any(end not in names for end in ends):
        return {}
    head, embedding = (f"{names[end]}.weight" for end in ends)
    return {head: embedding}
