"""Loads a GGUF file into a model of transformers whose weights stay in blocks.

Tensor by tensor, so that nothing but what the model keeps is ever in memory. Names and layouts are
transformers' own (`modeling_gguf_pytorch_utils`): what it would do to a dequantised matrix is done
to one of row numbers, and where that only orders rows, the rows of blocks are ordered so.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pacatune.grid.formats import GRIDS
from pacatune.grid.gguf import GgufCheckpoint
from pacatune.grid.layers import PackedEmbedding, PackedLinear, decoded


def fill_packed(model: Any, path: str | Path, dtype: torch.dtype) -> None:
    """Fill a model of the meta device from a file, with packed layers wherever blocks can stay.

    Args:
        model: A language model of transformers, changed in place.
        path: The file.
        dtype: Of what is no block, and what blocks are decoded to.

    Raises:
        ValueError: If the file lacks a tensor of the model, or has one of another shape.
    """
    from transformers import modeling_gguf_pytorch_utils as loading

    checkpoint = GgufCheckpoint.open(path)
    parsed = loading.load_gguf_checkpoint(str(path), return_tensors=False)
    processor_class = loading.TENSOR_PROCESSORS.get(
        checkpoint.architecture, loading.TensorProcessor
    )
    processor = processor_class(config=parsed["config"])
    names = loading.get_gguf_hf_weights_map(model, processor)

    def arranged(values: Any, name: str) -> Any:
        result = processor.process(
            weights=values, name=name, tensor_key_mapping=names, parsed_parameters=parsed
        )
        return result.weights

    for name, entry in checkpoint.entries.items():
        if name not in names:
            continue
        module_name, _, own = names[name].rpartition(".")
        module = model.get_submodule(module_name)
        rows: Tensor | None = None
        order: Tensor | None = None
        if entry.dtype in GRIDS and len(entry.shape) == 2:
            rows = checkpoint.rows(name)
            numbers = np.repeat(np.arange(len(rows))[:, None], entry.shape[1], axis=1)
            order = _order_of(arranged(numbers.astype(np.float32), name), entry.shape)
        packed = None
        if rows is not None and order is not None:
            packed = _packed(module, own, rows[order], entry.dtype, dtype)
        if packed is not None:
            model.set_submodule(module_name, packed)
            continue
        values = checkpoint.tensor(name) if rows is None else decoded(GRIDS[entry.dtype], rows)
        values = torch.from_numpy(np.array(arranged(values.float().numpy(), name))).to(dtype)
        setattr(module, own, nn.Parameter(values, requires_grad=False))
    _tie(model)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if any(name in dict(model.named_parameters()) for name in left):
        raise ValueError(f"{path} holds no {left[0]!r}, which the model needs; copy it again.")


def _order_of(numbers: np.ndarray, shape: tuple[int, ...]) -> Tensor | None:
    """Return which row of the file each row of the model is; None if it is not that."""
    if numbers.shape != shape or (numbers != numbers[:, :1]).any():
        return None
    order = torch.from_numpy(numbers[:, 0].astype(np.int64))
    return order if torch.equal(order.sort().values, torch.arange(len(order))) else None


def _packed(
    module: nn.Module, own: str, rows: Tensor, kind: str, dtype: torch.dtype
) -> nn.Module | None:
    """Return the layer that holds these blocks in place of a module, None where there is none."""
    grid = GRIDS[kind]
    if own != "weight" or grid.steps is None:
        return None
    if type(module) is nn.Linear:
        bias = module.bias
        return PackedLinear(rows, grid, dtype, bias)
    if isinstance(module, nn.Embedding):
        options = {"padding_idx": module.padding_idx}
        if type(module) is not nn.Embedding:
            return None
        return PackedEmbedding(rows, grid, dtype, **options)
    return None


def _tie(model: Any) -> None:
    """Let a tied head use the blocks of the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not any(p.is_meta for p in head.parameters()):
        return
    if isinstance(embedding, PackedEmbedding):
        packed = PackedLinear(embedding.blocks.data, embedding.grid, embedding.dtype)
        packed.blocks = embedding.blocks
        model.set_output_embeddings(packed)
    else:
        head.weight = embedding.weight
