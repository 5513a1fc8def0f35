"""Load a language model for inference: base, tokenizer, quantisation, adapter."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pacatune.adapters.base import (
    CLASSIFIERS,
    DTypeName,
    base_name,
    find_tokenizer,
    load_base,
)
from pacatune.adapters.fingerprint import (
    differing_modules,
    fingerprint,
    unwrap,
)
from pacatune.adapters.folder import (
    FINGERPRINT_KEY,
    SIDECAR_NAME,
    Adapter,
    LoraAdapter,
    open_adapter,
    read_adapter,
)
from pacatune.adapters.target import target_of_module
from pacatune.format.options import PacaOptions
from pacatune.format.tensors import (
    PEFT_PREFIX,
    ColumnUpdate,
    is_equal,
    plain_name,
    split_tensor_name,
)
from pacatune.names import choose
from pacatune.ops.columns import Update
from pacatune.ops.whole import whole_shape
from pacatune.pretrained import QUANTIZATIONS, check_quantizable, load_config
from pacatune.tuner import PacaLayer
from pacatune.tuner.columns import keep_columns
from pacatune.tuner.layout import Layout
from pacatune.tuner.quantized import settle_columns

_OTHER_BASE = "pass `allow_other_base` (--allow_other_base) if this base is meant."


def check_base(
    adapter: str | Path | Adapter | LoraAdapter,
    model: nn.Module,
    *,
    allow_other_base: bool = False,
) -> list[str]:
    """Refuse a base model that the adapter was not trained on.

    Names and shapes of the adapted modules must fit. Beyond that the fingerprint decides, which
    training stores with the adapter; without one, the name of the base. Of a LoRA adapter nothing
    is known that could be checked.

    Args:
        adapter: A PaCA adapter or its folder, or a LoRA adapter that is open.
        model: The base, or a PEFT model around it; weights on the meta device are not compared.
        allow_other_base: Report a base of other weights or name as a note instead of an error.

    Returns:
        Notes for the user: what could not be checked, or was let through.

    Raises:
        ValueError: If a module is missing or of another shape, or the base is another one.
    """
    if isinstance(adapter, LoraAdapter):
        return [f"the base is not checked against {adapter.folder}: it is no PaCA adapter."]
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    model = unwrap(model)
    check_shapes(adapter.modules, model, source=str(adapter.folder))
    _check_extra(adapter, model)
    problem, notes = _compare(adapter, model)
    if problem and not allow_other_base:
        raise ValueError(f"{adapter.folder}: {problem}; choose the right base, or {_OTHER_BASE}")
    return [problem, *notes] if problem else notes


def check_shapes(modules: Mapping[str, ColumnUpdate], model: nn.Module, *, source: str) -> None:
    """Refuse a base without the modules of the adapter `source`, or with other sizes of them."""
    for name, update in modules.items():
        _check_sizes(name, update, target_of_module(model, name).layout, source)


def _check_sizes(name: str, update: ColumnUpdate, layout: Layout, source: str) -> None:
    shape, last = update.dense_shape, int(update.indices.max())
    out_features, in_features, *others = layout.file_shape
    needed = (out_features, shape[1], *others)
    if shape != needed or last >= in_features:
        raise ValueError(
            f"{source}: module {name!r} has a delta of {shape} and columns up to "
            f"{last}, but the base needs {needed} and has {in_features} columns; the adapter is "
            "damaged or belongs to another base."
        )
    layout.check(update.rank, name)


def _check_extra(adapter: Adapter, model: nn.Module) -> None:
    # PEFT passes over a tensor that it has no place for, and the model is silently not the trained.
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    copies = adapter.copies()
    for key, tensor in adapter.extra.items():
        name = plain_name(key)
        if name.endswith(".token_adapter.trainable_tokens_delta"):
            continue
        if name not in parameters:
            raise ValueError(
                f"{adapter.folder}: the base ({type(model).__name__}) has no parameter {name!r} "
                "that the adapter brings; the adapter belongs to another base or head."
            )
        shape = whole_shape(parameters[name])
        # bitsandbytes keeps a quantised weight as bytes in a shape of its own.
        if shape != tensor.shape and parameters[name].is_floating_point():
            raise ValueError(
                f"{adapter.folder}: {name!r} is {tuple(tensor.shape)} in the adapter but {shape} "
                "in the base; the adapter belongs to another base or the vocabulary was changed."
            )
        is_known = key in copies and not parameters[name].is_meta
        if is_known and not is_equal(tensor, parameters[name]):
            raise ValueError(
                f"{adapter.folder}: {key!r} would replace a weight of the base, and nothing in its "
                "configuration trains that. Remove the tensor from the file, or name its module in "
                "`modules_to_save` if it was trained."
            )


def _compare(adapter: Adapter, model: nn.Module) -> tuple[str, list[str]]:
    stored = adapter.sidecar.get(FINGERPRINT_KEY)
    if stored is None:
        problem = _compare_names(adapter, model)
        return problem, ["the adapter has no fingerprint; only names and shapes could be compared."]
    _check_fingerprint(stored, adapter.folder / SIDECAR_NAME)
    columns = {name: update.indices for name, update in adapter.modules.items()}
    current = fingerprint(model, columns)
    for key in ("model_type", "hidden_size", "num_hidden_layers"):
        if key in stored and key in current and stored[key] != current[key]:
            return (
                f"it was trained on a base with `{key}` = {stored[key]!r} but this one has "
                f"{current[key]!r}"
            ), []
    others, num_others = differing_modules(stored["modules"], current["modules"])
    started, num_started = differing_modules(stored["trained"], current["trained"])
    compared = max(num_others, num_started)
    if started and num_others and not others:
        return (
            f"{len(started)} of {num_started} adapted modules, first {started[0]!r}, have other "
            "values in its columns, and in all others those it was trained on: it is merged into "
            "this base already, or another adapter is"
        ), []
    if differing := others or started:
        return (
            f"the weights of {len(differing)} of {compared} adapted modules are not those it "
            f"was trained on, first {differing[0]!r}"
        ), []
    notes = []
    if compared < len(columns):
        notes.append(
            f"{len(columns) - compared} of {len(columns)} adapted modules could not be compared by "
            "weight (not here, saved in another form, quantised, sharded, or in another 16-bit "
            "dtype)."
        )
    return "", notes


def _compare_names(adapter: Adapter, model: nn.Module) -> str:
    expected = adapter.config.base_model_name_or_path
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    if not expected or not source or _last_part(expected) == _last_part(source):
        return ""
    return (
        f"it names the base {expected!r} but this one is {source!r}, and it has no fingerprint to "
        "tell them apart"
    )


def _last_part(name: str) -> str:
    return Path(name.replace("\\", "/")).name.lower()


def _check_fingerprint(stored: Any, path: Path) -> None:
    kinds: list[Any] = [None]
    if isinstance(stored, dict):
        kinds = [stored.get("modules"), stored.get("trained")]
    if not all(isinstance(modules, dict) for modules in kinds) or not all(
        isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values())
        for modules in kinds
        for hashes in modules.values()
    ):
        raise ValueError(
            f"{path}: `{FINGERPRINT_KEY}` must be an object with `modules` and `trained`, hashes "
            "by module and dtype; it is damaged. Remove the file to go without."
        )


# Put a checked adapter onto its base model, through PEFT, and see that it really is there.


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
    notes = check_base(adapter, model, allow_other_base=allow_other_base)
    with _loading(adapter, model):
        peft_model = PeftModel.from_pretrained(cast(Any, model), str(adapter.folder))
    if isinstance(adapter, Adapter):
        _check_loaded(peft_model, adapter)
    return peft_model.eval(), notes


def load_values(peft_model: PeftModel, adapter: Adapter | LoraAdapter) -> None:
    """Give the fresh adapter of a model the columns and values of a saved one, to train on.

    Raises:
        ValueError: If what PEFT loaded is not what the file holds.
    """
    with _loading(adapter, peft_model.get_base_model()):
        peft_model.load_adapter(str(adapter.folder), _ADAPTER_NAME, is_trainable=True)
    if isinstance(adapter, Adapter):
        _check_loaded(peft_model, adapter)


@contextmanager
def _loading(adapter: Adapter | LoraAdapter, model: nn.Module) -> Iterator[None]:
    """Say whose adapter it is that PEFT cannot load in this block, or loads in part."""
    try:
        with answered_warnings():
            if isinstance(adapter, LoraAdapter):
                warnings.filterwarnings("error", message="Found missing adapter keys")
            yield
    except (RuntimeError, UserWarning) as error:
        raise ValueError(
            f"{adapter.folder}: PEFT cannot load the adapter onto {type(model).__name__} "
            f"({error}); it belongs to another base."
        ) from error


@contextmanager
def answered_warnings() -> Iterator[None]:
    """Silence those of PEFT's warnings that we have dealt with."""
    with warnings.catch_warnings():
        for message in _ANSWERED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def _check_loaded(peft_model: PeftModel, adapter: Adapter) -> None:
    layers = _layers_of(peft_model, _ADAPTER_NAME)
    if odd := sorted(layers.keys() ^ adapter.modules.keys()):
        where = "configuration" if odd[0] in layers else "tensors"
        raise ValueError(
            f"{adapter.folder}: module {odd[0]!r} is adapted by its {where} only ({len(odd)} such "
            "modules); both must name the same modules. The folder mixes two runs, or the file "
            "is incomplete."
        )
    for name, update in adapter.modules.items():
        loaded = layers[name].update_of(_ADAPTER_NAME)
        delta = layers[name].layout.from_file(update.delta)
        is_same = torch.equal(loaded.indices.cpu(), update.indices)
        pairs: list[Any] = [(loaded.delta, delta), (loaded.mix, update.mix)]
        is_same &= all(x is y or torch.equal(x.detach().cpu(), y.to(x.dtype)) for x, y in pairs)
        if not is_same:
            raise ValueError(
                f"{adapter.folder}: module {name!r} does not hold the file's values after loading; "
                "another package has replaced PaCA in PEFT. Import pacatune before it."
            )


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to be asked."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """Folder or hub id of the base."""
    adapter: Adapter | LoraAdapter | None
    notes: list[str]
    """What the user should know about base and adapter."""


def load_language_model(
    model: str | None,
    adapter: str | Path | None = None,
    *,
    dtype: DTypeName = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    packed: bool = False,
    allow_other_base: bool = False,
) -> LoadedModel:
    """Load a causal language model with its tokenizer, and its adapter if it has one.

    Args:
        model: Folder or hub id of the base; None takes the one that the adapter names.
        adapter: Folder or hub id of a PaCA or LoRA adapter; None goes without.
        dtype: Type of the base's weights; `auto` is the one it was saved in.
        device: Such as `cpu` or `cuda`; `auto` takes the accelerator if there is one.
        quantization: Hold the base in fewer bits: `nf4`, `fp4` or `int8`, as training does. A PaCA
            adapter that was trained so knows it, a LoRA adapter does not.
        packed: Keep the matrices of a GGUF file, or of a folder in FP8 or INT4, as they are there.
        allow_other_base: As for `check_base`.

    Returns:
        Model, tokenizer, the opened adapter, and notes for the user.

    Raises:
        FileNotFoundError: If base or adapter are missing.
        ValueError: If the adapter is damaged or belongs to another base or another quantisation,
            or the base has no tokenizer.
    """
    if adapter is None and model is None:
        raise ValueError("`model` and `adapter` are both missing; give at least one of them.")
    checked = None if adapter is None else open_adapter(adapter)
    if checked is not None and checked.config.task_type in CLASSIFIERS:
        raise ValueError(
            f"{checked.folder} is of a classifier or reward model (`task_type` = "
            f"{checked.config.task_type!r}), which writes no text. Load it with transformers' "
            "AutoModelForSequenceClassification or AutoModelForTokenClassification and "
            "PeftModel.from_pretrained, or merge it (`pacatune merge`)."
        )
    name = str(model) if checked is None else base_name(model, checked.config)
    tokenizer = find_tokenizer(name, None if checked is None else checked.folder)
    if tokenizer is None:
        raise ValueError(
            f"base model {name!r} has no tokenizer; put its tokenizer files into the folder."
        )
    base = load_base(
        name,
        task_type="CAUSAL_LM",
        dtype=dtype,
        device=device,
        quantization=_base_quantization(checked, quantization, name),
        packed=packed,
    )
    if checked is None:
        return LoadedModel(model=base, tokenizer=tokenizer, name=name, adapter=None, notes=[])
    adapted, notes = attach(base, checked, allow_other_base=allow_other_base)
    return LoadedModel(model=adapted, tokenizer=tokenizer, name=name, adapter=checked, notes=notes)


def _base_quantization(
    adapter: Adapter | LoraAdapter | None, wanted: str | None, base: str
) -> dict[str, Any] | None:
    """Return the quantisation as `load_base` wants it: the adapter's own, or the one asked for."""
    trained: dict[str, Any] | None = getattr(adapter and adapter.config, "base_quantization", None)
    if wanted is None:
        return trained
    wanted = choose(wanted, QUANTIZATIONS, option="quantization")
    check_quantizable(wanted, load_config(base, option="model"), base, option="quantization")
    if trained is not None and trained.get("type") != wanted:
        raise ValueError(
            f"`quantization` ({wanted!r}) is not the one that the adapter was trained on "
            f"({trained.get('type')!r}); leave it out."
        )
    return trained or {"method": "bitsandbytes", "type": wanted, "block_size": 64, "double": True}


# Replaces an adapter's values in a running model by those of a saved adapter.
#
# PEFT's own `hotswap_adapter` knows LoRA only. Swapping a PaCA adapter costs one copy per layer now
# and one column write per layer at the next forward pass; no module is replaced.


# Options that a swapped adapter has of the model that it comes to.
_OF_THE_MODEL = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type"),
)


def hotswap_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Give the adapter `adapter_name` all that a saved one has, its configuration too.

    That are columns, deltas and scaling, and what is trained beside them: a head, biases, tokens.
    An optimiser of the old adapter keeps its parameters where the ranks are equal.

    Args:
        model: A model with that adapter, PeftModel or not.
        folder: The saved adapter: a local folder or a hub id.
        adapter_name: The adapter to be replaced; it keeps its name.

    Raises:
        ValueError: If the two adapters do not adapt the same modules of the same shapes, or train
            other things beside them, or the adapter is merged, or was trained on a base that is
            quantised otherwise; nothing has been changed then.
    """
    adapter = read_adapter(folder)
    layers = _layers_of(model, adapter_name)
    _check_swap(layers, adapter, adapter_name)
    config = cast(Any, model).peft_config[adapter_name]
    _check_swapped_extra(model, config, adapter, adapter_name)
    # Refuses a quantised base that the adapter was not trained on.
    settled = settle_columns(unwrap(model), cast(Any, adapter.config), adapter_name, None)
    for name, layer in layers.items():
        update = adapter.modules[name]
        delta = layer.layout.from_file(update.delta)
        own = Update(delta, update.indices, adapter.scaling(name), update.mix)
        layer.replace_update(adapter_name, own, update.rank)
    if adapter.extra:
        set_peft_model_state_dict(model, dict(adapter.extra), adapter_name)
    for option in fields(PacaOptions):
        if option.name not in _OF_THE_MODEL:
            value = getattr(settled, option.name)
            is_set = option.name in ("target_modules", "exclude_modules")
            setattr(config, option.name, {*value} if is_set and type(value) is list else value)
    keep_columns(config, {name: adapter.modules[name].indices for name in layers})


def _check_swapped_extra(
    model: nn.Module, config: Any, adapter: Adapter, adapter_name: str
) -> None:
    """Refuse an adapter that brings other things than columns, or of other sizes, than are here."""
    here: dict[str, Tensor] = {}
    if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
        state = get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        )
        here = {name: state[name] for name in state if split_tensor_name(name) is None}
    shapes, others = (
        {name.removeprefix(PEFT_PREFIX): tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (here, adapter.extra)
    )
    if odd := sorted(dict(shapes.items() ^ others.items())):
        raise ValueError(
            f"{adapter.folder} and adapter {adapter_name!r} do not train the same beside columns; "
            f"only one of them has {odd[0]!r} of its shape. Load it under another name with "
            "`load_adapter`."
        )


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, PacaLayer]:
    return {
        name: module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, PacaLayer) and adapter_name in module.r
    }


def _check_swap(layers: dict[str, PacaLayer], adapter: Adapter, adapter_name: str) -> None:
    if not layers:
        raise ValueError(f"`adapter_name` ({adapter_name!r}) is no adapter of this model.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged; call `unmerge_adapter()` first.")
    difference = sorted(set(layers) ^ set(adapter.modules))
    if difference:
        raise ValueError(
            f"{adapter.folder} and adapter {adapter_name!r} do not adapt the same modules; only "
            f"one of them has {difference[:5]}. Load it under another name with `load_adapter`."
        )
    for name, layer in layers.items():
        _check_sizes(name, adapter.modules[name], layer.layout, str(adapter.folder))
