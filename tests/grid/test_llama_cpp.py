"""llama.cpp runs what was trained in a GGUF file; skipped where it can't be fetched."""

import pytest
import torch

from pacatune.adapters.base import load_base
from pacatune.adapters.loading import load_language_model
from pacatune.patch import apply_in_place, make
from pacatune.patch.packed import merge_packed
from tests.grid.conftest import digest
from tests.llama_cpp import TOKENS, folders, logprobs
from tests.releases import needs

pytestmark = [
    pytest.mark.slow,
    needs("gguf"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in .*gguf"),
]


def test_it_computes_what_was_trained(model_file, run_dir, tmp_path):
    """Its probabilities follow the trained model's as closely as the base file's the base's."""
    _, server = folders()
    tuned = tmp_path / "tuned.gguf"
    merge_packed(model_file, run_dir, tuned)

    def expected(model):
        with torch.no_grad():
            return model(torch.tensor([TOKENS])).logits[0, -1].float().log_softmax(-1)

    base, written = (
        load_base(str(path), task_type="CAUSAL_LM", dtype="float32") for path in (model_file, tuned)
    )
    before, after = logprobs(server, model_file), logprobs(server, tuned)
    torch.testing.assert_close(before, expected(base), atol=2e-2, rtol=0)
    torch.testing.assert_close(after, expected(written), atol=2e-2, rtol=0)
    trained = load_language_model(str(model_file), run_dir).model
    gap = (after - expected(trained)).abs().mean()
    assert gap < (after - before).abs().mean() / 2
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model_file.read_bytes())
    patch, _ = make(model_file, run_dir)
    for revert, wanted in ((False, tuned), (True, model_file)):
        apply_in_place(copy, patch, revert=revert)
        assert digest(copy) == digest(wanted)
        assert torch.equal(logprobs(server, copy), before if revert else after)
