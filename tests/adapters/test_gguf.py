"""An exported adapter as GGUF, converted and run by llama.cpp; skipped where it is not had."""

import pytest
import torch

from pacatune.adapters.export import export_lora
from tests.adapters.fixtures import save_adapter
from tests.llama_cpp import TOKENS, folders, logprobs, run
from tests.releases import needs
from tools.families import FAMILIES

pytestmark = [pytest.mark.slow, needs("gguf")]

# Our tokenizer is none that the converter knows: take its vocabulary as GPT-2's kind.
CONVERT_BASE = """
import runpy, sys
root, base, output = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import TextModel
from conversion.llama import LlamaModel
LlamaModel.set_vocab = lambda self: self._set_vocab_gpt2()
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", base, "--outfile", output, "--outtype", "f32"]
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""

CONVERT_ADAPTER = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_path(sys.path[0] + "/convert_lora_to_gguf.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def llama_cpp():
    """The folder of llama.cpp's converters, and that of its server's package."""
    return folders()


def export(base, folder, **options):
    adapted = save_adapter(base, folder / "adapter", target_modules=None, **options)
    export_lora(str(base), folder / "adapter", folder / "lora")
    return adapted


def convert(converters, base, folder):
    words = [folder / "lora", "--base", base, "--outfile", folder / "lora.gguf"]
    run(CONVERT_ADAPTER, converters, *words)
    return folder / "lora.gguf"


def test_llama_cpp_computes_the_same(llama_cpp, tiny_model_dir, tmp_path):
    converters, server = llama_cpp
    options = {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"v_proj": 3}}
    adapted = export(tiny_model_dir, tmp_path, **options)
    adapter = convert(converters, tiny_model_dir, tmp_path)
    run(CONVERT_BASE, converters, tiny_model_dir, tmp_path / "base.gguf")

    def expected():
        with torch.no_grad():
            return adapted(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)

    with_adapter = logprobs(server, tmp_path / "base.gguf", adapter)
    torch.testing.assert_close(with_adapter, expected(), atol=2e-3, rtol=0)
    with adapted.disable_adapter():
        base = expected()
    without = logprobs(server, tmp_path / "base.gguf")
    torch.testing.assert_close(without, base, atol=2e-3, rtol=0)
    assert (with_adapter - base).abs().max() > 0.1


def test_fused_projections_are_converted(llama_cpp, tmp_path):
    from gguf import GGUFReader

    FAMILIES["Phi-3"].build().save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path)
    adapter = convert(llama_cpp[0], tmp_path / "base", tmp_path)
    names = {tensor.name for tensor in GGUFReader(adapter).tensors}
    layers = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    assert names == {
        f"blk.{i}.{layer}.weight.lora_{side}" for i in (0, 1) for layer in layers for side in "ab"
    }
