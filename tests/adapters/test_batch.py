"""Several prompts at once: each as if it were alone."""

import dataclasses

import pytest
import torch

from pacatune.adapters.generation import Sampling, TextGenerator, _SeededChoice
from tests.adapters.fixtures import save_adapter

GREEDY = Sampling(max_new_tokens=12)
PROMPTS = ("What is", "Please write a short answer to the question", "capital")


@pytest.fixture(scope="module")
def generator(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch") / "adapter"
    save_adapter(tiny_model_dir, folder, r=16, paca_alpha=64)
    return TextGenerator(str(tiny_model_dir), folder)


@pytest.fixture(scope="module")
def prompts(generator):
    return [generator.encode(prompt) for prompt in PROMPTS]


def texts(generator, prompts, samplings):
    return [one.text for one in generator.generate_batch(prompts, samplings)]


def test_greedy_answers_are_those_of_one_prompt_alone(generator, prompts):
    expected = [generator.generate(prompt, GREEDY) for prompt in prompts]
    assert texts(generator, prompts, [GREEDY] * 3) == expected
    assert len(set(expected)) == 3


def test_each_row_has_its_own_seed_and_temperature(generator, prompts):
    samplings = [dataclasses.replace(GREEDY, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    together = texts(generator, prompts, samplings)
    alone = zip(prompts, samplings, strict=True)
    assert [generator.generate(prompt, sampling) for prompt, sampling in alone] == together
    state = torch.get_rng_state()
    for prompt, sampling, text in zip(prompts, samplings, together, strict=True):
        assert texts(generator, [prompt], [sampling]) == [text]
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
    stop = tokens[0, prompts[0].shape[1] + 5].item()
    place = tokens[0, prompts[0].shape[1] :].tolist().index(stop)
    monkeypatch.setattr(
        generator, "_stop_tokens", lambda: {"eos_token_id": [stop], "pad_token_id": 0}
    )
    cut, other = generator.generate_batch([prompts[0], prompts[2]], [GREEDY, GREEDY])
    assert (cut.finish_reason, cut.num_tokens) == ("stop", place)
    assert whole.text.startswith(cut.text)
    assert other.num_tokens > 0


def test_one_length_and_one_sampling_for_each_prompt(generator, prompts):
    message = r"`samplings` \(2, with `max_new_tokens` \[5, 12\]\) must be one for each of 2"
    with pytest.raises(ValueError, match=message):
        generator.generate_batch(prompts[:2], [GREEDY, Sampling(max_new_tokens=5)])


def test_more_tokens_than_the_model_can_read_are_refused(generator, prompts):
    with pytest.raises(ValueError, match="exceed the model's context of 256"):
        generator.generate_batch(prompts[:1], [Sampling(max_new_tokens=256)])


def test_conversations_need_a_template(generator, tiny_model_dir, model_copy, tiny_tokenizer):
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    text = tiny_tokenizer.decode(generator.encode_chat([*chat, chat[0]])[0])
    assert text.index("Hello") < text.index("Hi") < text.rindex("Hello")
    assert text.endswith("<|assistant|>\n")
    (model_copy / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no chat template, .*: --chat-template FILE"):
        TextGenerator(str(model_copy)).encode_chat(chat)
    template = "{% for message in messages %}({{ message.content }}){% endfor %}"
    given = TextGenerator(str(model_copy), chat_template=template)
    assert tiny_tokenizer.decode(given.encode_chat(chat)[0]).endswith("(Hello)(Hi)")
