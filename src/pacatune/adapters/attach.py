"""Put a checked adapter onto its base model, through PEFT, and see that it really is there."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from pacatune.adapters.compatibility import check_base
from pacatune.adapters.folder import Adapter, LoraAdapter
from pacatune.tuner import PacaLayer

_ADAPTER_NAME = "default"
_ANSWERED_WARNINGS = (
    "Found missing adapter keys",  # an error below
    ".*is_gradient_checkpointing",  # PEFT asks transformers in an old way; not the user's concern
    "Model (has|with) `tie_word_embeddings=True`",  # the tuner gives a tied target its own weight
    "Input and output embeddings are no longer tied",  # the same, after the fact
    "Merging into a quantised model",  # `merge` does it on request only, and says what it costs
)


def attach(
    model: nn.Module, adapter: Adapter | LoraAdapter, *, allow_other_base: bool = False
) -> tuple[PeftModel, list[str]]:
    """Load an adapter onto its base for inference.

    Args:
        model: The base; it is changed in place, as PEFT does.
        adapter: What `read_adapter` or `open_adapter` returned.
        allow_other_base: As for `check_base`.

    Returns:
        The PEFT model, and notes for the user.

    Raises:
        ValueError: If the adapter does not belong to the base, or if what PEFT loaded is not
            what the file holds.
    """
    notes = [f"the base is not checked against {adapter.folder}: it is a LoRA adapter."]
    if isinstance(adapter, Adapter):
        notes = check_base(adapter, model, allow_other_base=allow_other_base)
    try:
        with answered_warnings():
            if isinstance(adapter, LoraAdapter):
                warnings.filterwarnings("error", message="Found missing adapter keys")
            peft_model = PeftModel.from_pretrained(cast(Any, model), str(adapter.folder))
    except (RuntimeError, UserWarning) as error:
        raise ValueError(
            f"{adapter.folder}: PEFT cannot load the adapter onto {type(model).__name__} "
            f"({error}); it belongs to another base."
        ) from error
    if isinstance(adapter, Adapter):
        _check_loaded(peft_model, adapter)
    return peft_model.eval(), notes


@contextmanager
def answered_warnings() -> Iterator[None]:
    """Silence those of PEFT's warnings that we have dealt with."""
    with warnings.catch_warnings():
        for message in _ANSWERED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def _check_loaded(peft_model: PeftModel, adapter: Adapter) -> None:
    layers = {
        name: module
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, PacaLayer)
    }
    if odd := sorted(layers.keys() ^ adapter.modules.keys()):
        where = "configuration" if odd[0] in layers else "tensors"
        raise ValueError(
            f"{adapter.folder}: module {odd[0]!r} is adapted by its {where} only ({len(odd)} such "
            "modules); both must name the same modules. The folder mixes two runs, or the file "
            "is incomplete."
        )
    for name, (delta, indices) in adapter.modules.items():
        loaded = cast(Tensor, layers[name].paca_delta[_ADAPTER_NAME].weight).detach().cpu()
        columns = layers[name].paca_indices[_ADAPTER_NAME].cpu()
        delta = layers[name].as_stored(delta)
        if not (torch.equal(columns, indices) and torch.equal(loaded, delta.to(loaded.dtype))):
            raise ValueError(
                f"{adapter.folder}: module {name!r} does not hold the file's values after loading; "
                "another package has replaced PaCA in PEFT. Import pacatune before it."
            )
