import pytest
import torch
from transformers import AutoModelForCausalLM

from pacatune.adapters.generation import Sampling, TextGenerator
from tests.adapters.fixtures import save_adapter

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def generator(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation") / "adapter"
    save_adapter(tiny_model_dir, folder, r=16, paca_alpha=64)
    return TextGenerator(str(tiny_model_dir), folder)


def greedy(model, tokens, num_tokens):
    """The likeliest continuation, token by token."""
    for _ in range(num_tokens):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def test_greedy_text_is_the_likeliest_and_is_streamed(generator, tiny_model_dir, tiny_tokenizer):
    tokens = generator.encode("What is", chat=False)
    pieces = []
    text = generator.generate(tokens, SHORT, with_adapter=False, on_text=pieces.append)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    expected = greedy(base, tokens, 8)[0, tokens.shape[1] :].tolist()
    if 2 in expected:
        expected = expected[: expected.index(2)]
    assert text == tiny_tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(pieces) == text


def test_the_adapter_changes_the_text_and_can_be_left_out(generator, tiny_model_dir):
    tokens = generator.encode("What is the capital")
    without = generator.generate(tokens, SHORT, with_adapter=False)
    assert generator.generate(tokens, SHORT) != without
    assert generator.generate(tokens, SHORT, with_adapter=False) == without
    plain = TextGenerator(str(tiny_model_dir))
    assert plain.generate(tokens, SHORT) == without


def test_sampling_is_seeded_and_leaves_the_global_state(generator):
    tokens = generator.encode("What is")
    texts = []
    for seed in (1, 1, 2):
        state = torch.get_rng_state()
        sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=seed)
        texts.append(generator.generate(tokens, sampling))
        assert torch.equal(torch.get_rng_state(), state)
    assert texts[0] == texts[1] != texts[2]


def test_a_narrow_top_p_is_greedy(generator):
    tokens = generator.encode("What is")
    narrow = Sampling(max_new_tokens=8, temperature=1.0, top_p=1e-6)
    assert generator.generate(tokens, narrow) == generator.generate(tokens, SHORT)


def test_prompts_are_written_as_conversations_if_there_is_a_template(generator, tiny_tokenizer):
    text = tiny_tokenizer.decode(generator.encode("Hello", system="Be kind.")[0])
    assert text.index("<|system|>\nBe kind.") < text.index("<|user|>\nHello")
    assert text.endswith("<|assistant|>\n")
    assert text.count("<s>") == 1
    raw = generator.encode("Hello", chat=False)[0]
    assert tiny_tokenizer.decode(raw) == "<s>Hello"


def test_the_adapter_names_its_base(tiny_model_dir, adapter_dir):
    assert TextGenerator(None, adapter_dir).notes == []


def test_the_wrong_base_is_refused_before_generating(model_copy, adapter_dir):
    model = AutoModelForCausalLM.from_pretrained(model_copy)
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.weight)
    model.save_pretrained(model_copy)
    with pytest.raises(ValueError, match="weights of 1 of 6 adapted modules"):
        TextGenerator(str(model_copy), adapter_dir)
    notes = TextGenerator(str(model_copy), adapter_dir, allow_other_base=True).notes
    assert "weights of 1 of 6" in notes[0]


def test_neither_model_nor_adapter_is_refused():
    with pytest.raises(ValueError, match="`model` and `adapter` are both missing"):
        TextGenerator(None)


def test_a_base_without_tokenizer_is_refused(model_copy):
    for path in [*model_copy.glob("tokenizer*"), model_copy / "chat_template.jinja"]:
        path.unlink()
    with pytest.raises(ValueError, match="has no tokenizer; put its tokenizer files"):
        TextGenerator(str(model_copy))


def test_without_a_template_text_is_continued(model_copy):
    (model_copy / "chat_template.jinja").unlink()
    generator = TextGenerator(str(model_copy))
    assert not generator.has_chat_template
    assert generator.encode("Hello").shape == generator.encode("Hello", chat=False).shape
    with pytest.raises(ValueError, match=r"`system` \('Be kind\.'\) needs a chat template"):
        generator.encode("Hello", system="Be kind.")


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(generator, prompt):
    with pytest.raises(ValueError, match="`prompt` is empty; write at least one word"):
        generator.encode(prompt)


def test_a_lora_adapter_generates_as_well(tiny_model_dir, lora_dir):
    generator = TextGenerator(str(tiny_model_dir), lora_dir)
    assert "is not checked" in generator.notes[0]
    tokens = generator.encode("What is")
    without = generator.generate(tokens, SHORT, with_adapter=False)
    assert generator.generate(tokens, SHORT) != without


def test_more_tokens_than_the_model_can_read_are_refused(generator):
    tokens = generator.encode("What is", chat=False)
    message = rf"prompt \({tokens.shape[1]} tokens\) and `max_new_tokens` \(256\) exceed .* of 256"
    with pytest.raises(ValueError, match=message):
        generator.generate(tokens, Sampling(max_new_tokens=256))


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
