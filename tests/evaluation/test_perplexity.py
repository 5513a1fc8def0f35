"""The loss of texts: against a plain loop, by tokens and by bytes."""

import math

import pytest
import torch
from tokenizers import processors

from pacatune.evaluation import default_text, evaluate_perplexity

TEXT = "What is the capital of France? Été: the capital of France is Paris. " * 6


def score_of(model, tokenizer, **options):
    return evaluate_perplexity(model, tokenizer, {"a": TEXT}, **options)["a"]


def plain_loss(model, ids, window, stride):
    """The same in one loop: the best context that a window gives to each token."""
    total, done, start = 0.0, 1, 0
    while done < len(ids):
        end = min(start + window, len(ids))
        with torch.no_grad():
            log_probs = model(torch.tensor([ids[start:end]])).logits[0].log_softmax(-1)
        for position in range(done, end):
            total -= log_probs[position - start - 1, ids[position]].item()
        done, start = end, start + stride
    return total


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (64, 63), (50, 1), (4096, None)])
def test_equals_a_plain_loop(model, tokenizer, window, stride):
    ids, num_bytes = tokenizer(TEXT)["input_ids"], len(TEXT.encode())
    expected = plain_loss(model, ids, window, stride or window)
    for batch_size in (1, 5):
        options = {"window": window, "stride": stride, "batch_size": batch_size}
        score = score_of(model, tokenizer, **options)
        assert (score.num_tokens, score.num_bytes) == (len(ids) - 1, num_bytes)
        assert score.loss == pytest.approx(expected / (len(ids) - 1), rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(score.loss))
        assert score.bits_per_byte == pytest.approx(expected / math.log(2) / num_bytes, rel=1e-5)
        assert (score.loss_stderr is None) is (window > len(ids))


def test_texts_are_weighted_by_tokens(model, tokenizer):
    scores = evaluate_perplexity(model, tokenizer, {"a": TEXT, "b": "short"}, window=64)
    a, b, both = scores["a"], scores["b"], scores["all"]
    assert both.num_tokens == a.num_tokens + b.num_tokens
    assert both.num_bytes == a.num_bytes + b.num_bytes
    total = a.loss * a.num_tokens + b.loss * b.num_tokens
    assert both.loss == pytest.approx(total / both.num_tokens)


def test_standard_error_of_equal_windows_is_that_of_their_means(model, tokenizer):
    score = score_of(model, tokenizer, window=26, stride=25, max_tokens=101)
    ids = tokenizer(TEXT)["input_ids"][:101]
    assert len(ids) == 101
    parts = [ids[start : start + 26] for start in (0, 25, 50, 75)]
    losses = torch.tensor([plain_loss(model, part, 26, 25) / 25 for part in parts])
    assert score.loss_stderr == pytest.approx(losses.std().item() / 2, rel=1e-4)


def test_what_the_tokenizer_adds_and_what_is_cut_is_not_text(model, tokenizer):
    plain = score_of(model, tokenizer, window=64)
    score = score_of(model, tokenizer, max_tokens=20)
    spelt = tokenizer.decode(tokenizer(TEXT)["input_ids"][1:20])
    assert (score.num_tokens, score.num_bytes) == (19, len(spelt.encode()))
    process, special = processors.TemplateProcessing, [("<s>", 1), ("</s>", 2)]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = process(single="<s> $A </s>", special_tokens=special)
    assert score_of(model, tokenizer, window=64) == plain
    # Without <s>, the first token and its bytes are left out.
    backend.post_processor = process(single="$A")
    score, ids = score_of(model, tokenizer, window=64), tokenizer(TEXT)["input_ids"]
    assert score.num_tokens == len(ids) - 1
    assert score.num_bytes == len(TEXT.encode()) - len(tokenizer.decode(ids[:1]).encode())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4097}, r"`window` \(4097\) must be in \[2, 4096\]"),
        ({"window": 8, "stride": 8}, r"`stride` \(8\) must be in \[1, window - 1 = 7\]"),
        ({"stride": 0}, r"`stride` \(0\) must be in \[1, "),
        ({"batch_size": 0}, r"`batch_size` \(0\) must be at least 1"),
        ({"max_tokens": 1}, "a has 1 tokens; a text needs two, one to predict"),
    ],
)
def test_wrong_options(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(model, tokenizer, {"a": TEXT}, **options)


def test_default_text_is_pythons_manual():
    (text,) = default_text().values()
    assert 'The "assert" statement' in text
    assert len(text) > 300_000
