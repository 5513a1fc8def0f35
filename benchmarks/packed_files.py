"""Files of few bits of `packed`: the bases, and what each form of a trained method writes."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from examples.packaged import default_cache
from pacatune.adapters.base import load_base
from pacatune.adapters.loading import load_language_model
from pacatune.grid.checkpoint import heads_of, row_order
from pacatune.grid.gguf import GgufCheckpoint
from pacatune.patch import apply_to_folder
from pacatune.patch.packed import make_packed, open_paca

FORMATS = ("Q4_1", "Q8_0", "Q4_0")


@dataclass(frozen=True)
class Form:
    """What is served of a trained method."""

    method: str
    title: str
    write: Callable[["Base", Path, Path], Path | None]
    """From base, adapter or model, and path to write: an adapter to serve beside the base, or
    None where it wrote a file of its own."""


class Base:
    """A file, the model that transformers makes of it, and where its matrices lie in the file."""

    def __init__(self, file: Path) -> None:
        self.file, self.checkpoint = file, GgufCheckpoint.open(file)
        loaded = load_language_model(str(file), dtype="bfloat16")
        self.model: Any = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.heads = heads_of(self.model.config)

    def modules(self) -> list[str]:
        """Return the names of the linear layers in the blocks."""
        named = self.model.get_decoder().named_modules()
        return [f"model.{n}" for n, layer in named if isinstance(layer, torch.nn.Linear)]

    def with_adapter(self, adapter: Path) -> Any:
        """Return a copy of the model with an adapter."""
        return PeftModel.from_pretrained(deepcopy(self.model), adapter)

    def with_file(self, file: Path) -> Any:
        """Return a copy of the model with the matrices of another file of its layout."""
        model, checkpoint = deepcopy(self.model), GgufCheckpoint.open(file)
        for module in self.modules():
            values = checkpoint.values(*self.every(module)).bfloat16()
            model.get_submodule(module).weight.data[self.order(module)] = values
        return model

    def name(self, module: str) -> str:
        """Return the name in the file of a module's weight."""
        blocks = self.model.config.num_hidden_layers
        return self.checkpoint.name_of(f"{module}.weight", blocks)

    def every(self, module: str) -> tuple[str, Tensor]:
        """Return a weight's name in the file, and all its columns."""
        return (name := self.name(module)), torch.arange(self.checkpoint.entries[name].shape[1])

    def order(self, module: str) -> Tensor:
        """Return which row of the model's weight each row of the file is."""
        weight = self.model.get_submodule(module).weight.detach()
        return row_order(self.checkpoint.values(*self.every(module)), weight, self.heads, module)


def requantised(base: Base, trained: Any, output: Path, *, keeps_scales: bool = False) -> None:
    """Write a copy of a file in which the matrices are those of a model, quantised again."""
    content, checkpoint = bytearray(base.file.read_bytes()), base.checkpoint
    for module in base.modules():
        name, every = base.every(module)
        entry, grid = checkpoint.entries[name], checkpoint.grid(name)
        assert grid is not None
        after = trained.get_submodule(module).weight.detach().float()[base.order(module)]
        if keeps_scales:
            codes, rows = checkpoint.columns(name, 1, every), checkpoint.rows(name).clone()
            change = after - checkpoint.values(name, every)
            grid.put_codes_(
                rows, every, grid.moved(codes, checkpoint.scales(name, every)[0], change).after
            )
            data = rows.numpy().tobytes()
        else:
            kind = gguf.GGMLQuantizationType[entry.dtype]
            data = gguf.quants.quantize(after.contiguous().numpy(), kind).tobytes()
        content[entry.start : entry.start + entry.num_bytes] = data
    output.write_bytes(content)


def _codes(base: Base, adapter: Path, output: Path) -> None:
    patch, _ = make_packed(base.model, base.checkpoint, open_paca(adapter))
    apply_to_folder(base.file, patch, output)


def _merged(base: Base, adapter: Path, output: Path) -> None:
    requantised(base, base.with_adapter(adapter).merge_and_unload(), output)


def _merged_on_scales(base: Base, adapter: Path, output: Path) -> None:
    merged = base.with_adapter(adapter).merge_and_unload()
    requantised(base, merged, output, keeps_scales=True)


def _full(base: Base, model: Path, output: Path) -> None:
    trained = load_base(str(model), task_type="CAUSAL_LM", dtype="bfloat16")
    requantised(base, trained, output)


def _beside(base: Base, adapter: Path, output: Path) -> Path:
    """Write a LoRA adapter as the GGUF that llama.cpp serves beside a model."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    path = output.with_suffix(".lora.gguf")
    writer = gguf.GGUFWriter(str(path), base.checkpoint.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        rows = tensor.float() if part.startswith("A") else tensor.float()[base.order(module)]
        suffix = f"lora_{part[0].lower()}"
        writer.add_tensor(f"{base.name(module)}.{suffix}", rows.contiguous().numpy())
    _close(writer)
    return path


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FORMS = {
    "paca": Form("paca", "PaCA, r = 8; its columns as codes of the file", _codes),
    "lora": Form("lora", "PEFT's LoRA, r = 4; merged, and quantised again by gguf", _merged),
    "lora, scales kept": Form(
        "lora", "merged, and rounded to the codes of the scales that are there", _merged_on_scales
    ),
    "lora, beside": Form("lora", "not merged: served beside the file", _beside),
    "full": Form("full", "all weights of linear layers trained, and quantised again", _full),
}


def base_file(kind: str, folder: Path) -> Path:
    """Return the file of a format: somebody's, or made of that by gguf."""
    source = default_cache() / "smollm2-135m-instruct-gguf" / "model.gguf"
    path = folder / f"{kind}.gguf"  # transformers and we know a GGUF file by its name
    if kind == FORMATS[0] or path.is_file():
        return source if kind == FORMATS[0] else path
    reader, checkpoint = gguf.GGUFReader(source), GgufCheckpoint.open(source)
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), checkpoint.architecture)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in reader.tensors:
        data, to = tensor.data, tensor.tensor_type
        if to.name == FORMATS[0]:
            to = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(gguf.quants.dequantize(data, tensor.tensor_type), to)
        writer.add_tensor(tensor.name, data, raw_dtype=to)
    _close(writer)
    return part.rename(path)


@cache
def base_of(kind: str, folder: Path) -> Base:
    """Return the base of a format."""
    return Base(base_file(kind, folder))


def changed_bytes(before: Path, after: Path) -> int:
    """Return how many bytes of two files of one size differ."""
    pair = (torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in (before, after))
    return int(torch.ne(*pair).sum())
