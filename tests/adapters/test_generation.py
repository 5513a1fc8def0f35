"""Text with and without an adapter: one prompt or several at once, each as if it were alone."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from pacatune.adapters.generation import Sampling, TextGenerator, _SeededChoice
from tests.adapters.fixtures import save_adapter

GREEDY = Sampling(max_new_tokens=12)
PROMPTS = ("What is", "Please write a short answer to the question", "capital")
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture(scope="module")
def generator(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation") / "adapter"
    save_adapter(tiny_model_dir, folder, r=16, paca_alpha=64)
    return TextGenerator(str(tiny_model_dir), folder)


@pytest.fixture(scope="module")
def prompts(generator):
    return [generator.encode(prompt) for prompt in PROMPTS]


@pytest.fixture
def without_template(model_copy):
    (model_copy / "chat_template.jinja").unlink()
    return model_copy


def texts(generator, prompts, samplings):
    return [one.text for one in generator.generate_batch(prompts, samplings)]


def test_greedy_text_is_the_likeliest_and_is_streamed(generator, tiny_model_dir, tiny_tokenizer):
    start = tokens = generator.encode("What is", chat=False)
    pieces = []
    text = generator.generate(tokens, GREEDY, with_adapter=False, on_text=pieces.append)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        while tokens.shape[1] < start.shape[1] + 12 and tokens[0, -1] != 2:
            tokens = torch.cat([tokens, base(tokens).logits[:, -1:].argmax(-1)], dim=1)
    expected = tiny_tokenizer.decode(tokens[0, start.shape[1] :], skip_special_tokens=True)
    assert text == "".join(pieces) == expected


def test_the_adapter_changes_the_text_and_can_be_left_out(
    generator, tiny_model_dir, lora_dir, prompts
):
    plain = TextGenerator(str(tiny_model_dir)).generate(prompts[0], GREEDY)
    lora = TextGenerator(None, lora_dir)
    assert "is not checked" in lora.notes[0]
    for one in (generator, lora):
        assert one.generate(prompts[0], GREEDY) != plain
        assert one.generate(prompts[0], GREEDY, with_adapter=False) == plain


def test_greedy_answers_are_those_of_one_prompt_alone(generator, prompts):
    expected = [generator.generate(prompt, GREEDY) for prompt in prompts]
    assert texts(generator, prompts, [GREEDY] * 3) == expected
    assert len(set(expected)) == 3
    narrow = dataclasses.replace(GREEDY, temperature=1.0, top_p=1e-6)
    assert texts(generator, prompts, [narrow] * 3) == expected


def test_each_row_has_its_own_seed_and_temperature(generator, prompts):
    samplings = [dataclasses.replace(GREEDY, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    state = torch.get_rng_state()
    together = texts(generator, prompts, samplings)
    for prompt, sampling, text in zip(prompts, samplings, together, strict=True):
        assert generator.generate(prompt, sampling) == text
    assert torch.equal(torch.get_rng_state(), state)
    mixed = texts(generator, prompts, [samplings[0], GREEDY, samplings[2]])
    assert mixed == [together[0], generator.generate(prompts[1], GREEDY), together[2]]
    other = dataclasses.replace(samplings[0], seed=9)
    assert texts(generator, prompts[:1], [other]) != together[:1]


def test_tokens_are_drawn_from_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    for options, kept in (({}, 4), ({"top_p": 0.9}, 2)):
        samplings = [Sampling(temperature=0.5, seed=seed, **options) for seed in range(len(logits))]
        scores = _SeededChoice(samplings)(torch.zeros(4000, 1, dtype=torch.long), logits)
        share = scores.argmax(-1).bincount(minlength=4) / len(logits)
        expected = (logits[0] / 0.5).softmax(-1)
        expected[kept:] = 0
        torch.testing.assert_close(share, expected / expected.sum(), atol=0.02, rtol=0)
    assert torch.equal(logits[0], torch.tensor([2.0, 1.0, 0.0, -1.0]))


def test_why_an_answer_ended_is_known(generator, prompts, monkeypatch):
    (whole,) = generator.generate_batch(prompts[:1], [GREEDY])
    assert (whole.finish_reason, whole.num_tokens) == ("length", 12)
    # A token of the answer becomes the one that ends answers.
    tokens = generator._model.generate(prompts[0], max_new_tokens=12, do_sample=False)
    answer = tokens[0, prompts[0].shape[1] :].tolist()
    stops = {"eos_token_id": [answer[5]], "pad_token_id": 0}
    monkeypatch.setattr(generator, "_stop_tokens", lambda: stops)
    cut, other = generator.generate_batch([prompts[0], prompts[2]], [GREEDY, GREEDY])
    assert (cut.finish_reason, cut.num_tokens) == ("stop", answer.index(answer[5]))
    assert whole.text.startswith(cut.text)
    assert other.num_tokens > 0


def test_prompts_are_written_as_conversations_if_there_is_a_template(generator, tiny_tokenizer):
    text = tiny_tokenizer.decode(generator.encode("Hello", system="Be kind.")[0])
    assert text.index("<|system|>\nBe kind.") < text.index("<|user|>\nHello")
    assert text.endswith("<|assistant|>\n")
    assert text.count("<s>") == 1
    raw = generator.encode("Hello", chat=False)[0]
    assert tiny_tokenizer.decode(raw) == "<s>Hello"
    text = tiny_tokenizer.decode(generator.encode_chat([*CHAT, CHAT[0]])[0])
    assert text.index("Hello") < text.index("Hi") < text.rindex("Hello")
    assert text.endswith("<|assistant|>\n")


def test_without_a_template_text_is_continued(without_template, tiny_tokenizer):
    generator = TextGenerator(str(without_template))
    assert not generator.has_chat_template
    assert generator.encode("Hello").shape == generator.encode("Hello", chat=False).shape
    with pytest.raises(ValueError, match=r"`system` \('Be kind\.'\) needs a chat template"):
        generator.encode("Hello", system="Be kind.")
    with pytest.raises(ValueError, match=r"no chat template, .*: --chat-template FILE"):
        generator.encode_chat(CHAT)
    template = "{% for message in messages %}({{ message.content }}){% endfor %}"
    given = TextGenerator(str(without_template), chat_template=template)
    assert tiny_tokenizer.decode(given.encode_chat(CHAT)[0]).endswith("(Hello)(Hi)")
    for path in without_template.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no tokenizer; put its tokenizer files"):
        TextGenerator(str(without_template))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([12, 5], r"`samplings` \(2, with `max_new_tokens` \[5, 12\]\) must be one for each of 1"),
        ([256], r"prompt \(\d+ tokens\) and `max_new_tokens` \(256\) exceed the .* context of 256"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(generator, prompts, lengths, message):
    samplings = [Sampling(max_new_tokens=length) for length in lengths]
    with pytest.raises(ValueError, match="`prompt` is empty; write at least one word"):
        generator.encode(" \n")
    with pytest.raises(ValueError, match=message):
        generator.generate_batch(prompts[:1], samplings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"`max_new_tokens` \(0\) must be at least 1"),
        ({"temperature": -0.5}, r"`temperature` \(-0\.5\) must be 0 \(greedy\) or a positive"),
        ({"temperature": float("nan")}, r"`temperature` \(nan\) must be 0"),
        ({"top_p": 0.0}, r"`top_p` \(0\.0\) must be in \(0, 1\]"),
        ({"seed": -1}, r"`seed` \(-1\) must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
