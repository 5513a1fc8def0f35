"""The loss on general text."""

import pytest
import torch

from experiments.perplexity import general_text, text_loss
from tests.conftest import build_model


@torch.no_grad()
def test_each_token_counts_once_after_half_a_window_or_all_that_is_before_it(tokenizer):
    model = build_model(len(tokenizer), max_position_embeddings=16).eval()
    ids = tokenizer(general_text(), return_tensors="pt", verbose=False)["input_ids"][:, :45]
    losses = []
    for place in range(1, 45):
        start = max(0, place // 8 - 1) * 8
        log_probs = model(ids[:, start:place]).logits[0, -1].log_softmax(-1)
        losses.append(-log_probs[ids[0, place]].item())
    found = text_loss(model, tokenizer, general_text(), max_tokens=45)
    assert found == pytest.approx(sum(losses) / 44)
    with pytest.raises(ValueError, match="1 tokens are too few: nothing predicts the first"):
        text_loss(model, tokenizer, general_text(), max_tokens=1)
