"""Weights of packages as plain model folders."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Initialisers of DINO's graph that lost their names when it was exported.
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"
# What DINOv2's own preprocessor_config.json says, for 224 pixels.
_PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
}


def copy_gguf(files: list[Path], folder: Path) -> None:
    """Keep a GGUF as it is, as model.gguf."""
    (gguf,) = files
    shutil.copyfile(gguf, folder / "model.gguf")


def convert_gguf(files: list[Path], folder: Path) -> None:
    """Write a Llama GGUF with its tokenizer as a plain bfloat16 transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    (gguf,) = files
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # `dequantize`: packed blocks would have no nn.Linear weights to train.
    loaded = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # Some releases of transformers mark the loaded model as quantised and then refuse to save it.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    clean = LlamaForCausalLM(loaded.config).to(torch.bfloat16)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    clean.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def convert_efficientnet(files: list[Path], folder: Path) -> None:
    """Write weights under timm's names, which come in the same order, with timm's description."""
    import timm
    import torch
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    architecture = "tf_efficientnet_lite0"
    description = timm.get_pretrained_cfg(architecture).to_dict()
    # Filled in by transformers: the names of ImageNet's classes.
    config = TimmWrapperConfig.from_dict(
        {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": description}
    )
    model = AutoModelForImageClassification.from_config(config)
    names = model.timm_model.state_dict()
    weights = torch.load(files[0], weights_only=True).values()
    model.timm_model.load_state_dict(dict(zip(names, weights, strict=True)))
    model.save_pretrained(folder)


def convert_dino(files: list[Path], folder: Path) -> None:
    """Write the DINOv2 backbone of an ONNX graph as a folder that transformers loads."""
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    weights = _read_dino(files[0])
    width = len(weights["layernorm.weight"])
    num_layers = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("encoder.layer."))
    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    num_patches = weights["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=patch * round(num_patches**0.5),
        architectures=["Dinov2Model"],
    )
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSING, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _read_dino(path: Path) -> dict[str, "Tensor"]:
    """Read the backbone's weights out of the ONNX graph, under transformers' (older) names."""
    import numpy as np
    import onnx
    import torch
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    found = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    for node in graph.node:
        # A linear layer's weight lost its name, but its product kept the layer's: /a/b/MatMul.
        layer = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
        if node.op_type == "MatMul" and layer.startswith(prefix):
            for name in arrays.keys() & set(node.input):
                found[f"{layer.removeprefix(prefix)}.weight"] = arrays[name].T
    positions = [arrays[CLASS_POSITION], arrays[PATCH_POSITIONS]]
    found["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    found["embeddings.mask_token"] = np.zeros((1, found["layernorm.weight"].size), np.float32)
    return {name: torch.tensor(array).contiguous() for name, array in found.items()}
