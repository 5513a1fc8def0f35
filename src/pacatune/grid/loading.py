"""Loads a model whose matrices stay in the blocks of their file, or in the codes of their folder.

Tensor by tensor, so that nothing but what the model keeps is ever in memory. Names and layouts in a
GGUF file are transformers' own (`modeling_gguf_pytorch_utils`): what it would do to a dequantised
matrix is done to one of row numbers, and where that only orders rows, rows of blocks are ordered.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pacatune.files.checkpoint import DTYPES
from pacatune.files.journal import is_gguf
from pacatune.grid.checkpoint import PackedCheckpoint
from pacatune.grid.folder import PackedFolder
from pacatune.grid.formats import GRIDS
from pacatune.grid.gguf import GgufCheckpoint
from pacatune.grid.layers import PackedEmbedding, PackedLayer, PackedLinear

_ABLE = f"what can stay so are matrices (no experts) of {', '.join(GRIDS)}"


class NotPackableError(ValueError):
    """A model some of whose matrices cannot stay in blocks."""


class _Source(NamedTuple):
    """Where a parameter is in the checkpoint."""

    name: str
    arrange: Callable[[np.ndarray], np.ndarray]
    """What transformers does to an array as it lies in the file."""


def fill_packed(model: Any, path: str | Path, dtype: torch.dtype) -> None:
    """Fill a model of the meta device, with packed layers in place of those that hold codes.

    Args:
        model: A model of transformers, changed in place.
        path: A GGUF file, or a folder of FP8 or INT4.
        dtype: Of all else, and what blocks are decoded to.

    Raises:
        NotPackableError: If codes are of another format, or of experts or another kind of layer.
        ValueError: If a tensor is missing, or has not the shape that the model has.
    """
    checkpoint: PackedCheckpoint
    if is_gguf(path):
        checkpoint = GgufCheckpoint.open(path)
        sources = _in_gguf(model, checkpoint, path)
    else:
        checkpoint = PackedFolder.open(path)
        sources = _in_folder(model, checkpoint)
    for parameter, source in sources.items():
        module_name, _, own = parameter.rpartition(".")
        module = model.get_submodule(module_name)
        shape = tuple(getattr(module, own).shape)
        if checkpoint.entries[source.name].dtype in DTYPES:
            values = source.arrange(checkpoint.tensor(source.name).float().numpy())
            _check_shape(checkpoint, source.name, values.shape, shape)
            plain = torch.tensor(values, dtype=dtype, device="cpu")
            setattr(module, own, nn.Parameter(plain, requires_grad=False))
            continue
        layer = _layer(checkpoint, source, module if own == "weight" else None, dtype)
        _check_shape(checkpoint, source.name, layer.shape, shape)
        model.set_submodule(module_name, layer)
    tie(model)
    for name, tensor in model.named_parameters():
        if tensor.is_meta and tensor.ndim > 2:
            raise NotPackableError(
                f"{checkpoint.title} holds {name!r} of {tuple(tensor.shape)} in parts; {_ABLE}"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{checkpoint.title} holds no {name!r}, which the model needs; it is damaged, or "
                "of another model than it says. Copy it again."
            )


def pack_empty(model: Any, format_of: Callable[[str], str | None], dtype: torch.dtype) -> None:
    """Put packed layers without values in place of a model's linear layers and embeddings.

    Args:
        model: On the meta device; changed in place.
        format_of: Returns the format of a layer by its name, None for one of plain numbers.
        dtype: What blocks are decoded to.

    Raises:
        ValueError: If a row is no whole number of blocks.
    """
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    for name, module in list(model.named_modules()):
        if module is tied or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        if (kind := format_of(name)) is None:
            continue
        grid, (out_features, in_features) = GRIDS[kind], module.weight.shape
        if in_features % grid.block:
            raise ValueError(
                f"{grid.name} has blocks of {grid.block} elements, and {name!r} has rows of "
                f"{in_features:,}; choose another format."
            )
        shape = out_features, grid.row_bytes(in_features)
        packed = torch.empty(shape, dtype=torch.uint8, device="meta"), grid, dtype
        model.set_submodule(name, _layer_of(module, *packed))
    if tied is not None:
        tie(model)


def formats_in(model: Any, path: str | Path) -> dict[str, str]:
    """Return the format of each layer of a model in a GGUF file."""
    checkpoint = GgufCheckpoint.open(path)
    sources = _in_gguf(model, checkpoint, path)
    formats = {
        parameter.removesuffix(".weight"): checkpoint.entries[source.name].dtype
        for parameter, source in sources.items()
    }
    return {name: kind for name, kind in formats.items() if kind in GRIDS}


def _in_gguf(model: Any, checkpoint: GgufCheckpoint, path: str | Path) -> dict[str, _Source]:
    """Return where the file has each parameter, as transformers' loader finds it."""
    from transformers import modeling_gguf_pytorch_utils as loading

    if "processor" not in inspect.signature(loading.get_gguf_hf_weights_map).parameters:
        raise NotPackableError("transformers 5 and later name the tensors of a GGUF; upgrade it")
    parsed = loading.load_gguf_checkpoint(str(path), return_tensors=False)
    kind = loading.TENSOR_PROCESSORS.get(checkpoint.architecture, loading.TensorProcessor)
    processor = kind(config=parsed["config"])
    names = loading.get_gguf_hf_weights_map(model, processor)
    more = {"tensor_key_mapping": names, "parsed_parameters": parsed}

    def arranging(name: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda values: np.array(processor.process(weights=values, name=name, **more).weights)

    return {
        names[name]: _Source(name, arranging(name)) for name in checkpoint.entries if name in names
    }


def _in_folder(model: Any, checkpoint: PackedFolder) -> dict[str, _Source]:
    """Return where the folder has each parameter, under its own name or with `_packed`."""
    return {
        parameter: _Source(name, lambda values: values)
        for parameter, _ in model.named_parameters()
        for name in (parameter, f"{parameter}_packed")
        if name in checkpoint.entries
    }


def _layer(
    checkpoint: PackedCheckpoint, source: _Source, module: nn.Module | None, dtype: torch.dtype
) -> PackedLayer:
    """Return what computes with the blocks of a quantised matrix, in place of a module."""
    name, entry = source.name, checkpoint.entries[source.name]
    what = f"{checkpoint.title} holds {name!r} as {entry.dtype} of {entry.shape}"
    if entry.dtype not in GRIDS or len(entry.shape) != 2:
        raise NotPackableError(f"{what}; {_ABLE}")
    rows = checkpoint.rows(name)
    # A second column tells what orders rows from what does something else.
    size = len(rows)
    numbers = np.arange(size, dtype=np.float32)
    arranged = source.arrange(np.stack([numbers, numbers + size], axis=1))
    if arranged.shape != (size, 2) or (arranged[:, 1] - arranged[:, 0] != size).any():
        raise NotPackableError(f"{what}, laid out otherwise than in the model")
    order = torch.from_numpy(arranged[:, 0].astype(np.int64))
    packed = rows[order], GRIDS[entry.dtype], dtype, checkpoint.scale_of(name)
    if type(module) is nn.Linear or isinstance(module, nn.Embedding):
        return _layer_of(module, *packed)
    raise NotPackableError(
        f"{what}, which belongs to a {type(module).__name__}; linear layers and embeddings alone "
        "compute with blocks"
    )


def _layer_of(module: nn.Linear | nn.Embedding, *packed: Any) -> PackedLayer:
    if isinstance(module, nn.Embedding):
        return PackedEmbedding.of(module, *packed)
    return PackedLinear(module.bias, *packed)


def _check_shape(
    checkpoint: PackedCheckpoint, name: str, found: tuple[int, ...], needed: tuple[int, ...]
) -> None:
    if tuple(found) != needed:
        raise ValueError(
            f"{checkpoint.title} holds {name!r} of {tuple(found)}, where the model has {needed}; "
            "it is damaged, or of another model than it says."
        )


def tie(model: Any) -> None:
    """Let a head without a weight of its own use the embedding's."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or isinstance(head, PackedLinear) or not head.weight.is_meta:
        return
    if isinstance(embedding, PackedEmbedding):
        blocks, scales = embedding.blocks, embedding.scales
        layer = PackedLinear(head.bias, blocks, embedding.grid, embedding.dtype, scales)
        layer.blocks, layer.scales = blocks, scales  # the same ones
        model.set_output_embeddings(layer)
    else:
        head.weight = embedding.weight
