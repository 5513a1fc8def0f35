import copy

import pytest

from pacatune.data.encode import Encoder
from pacatune.data.formats import Example
from tests.conftest import CHAT_TEMPLATE

MARKED_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Like Qwen3's: reasoning of earlier turns disappears when more turns follow.
REWRITING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' and loop.last %}(thinks) {% endif %}"
    "{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


def encode(tokenizer, prompt, completion, **options):
    encoder = Encoder(tokenizer, {tokenizer.eos_token_id}, **options)
    return encoder(Example("f, row 1", prompt, completion))


def learned_text(tokenizer, encoded):
    """Learned runs, decoded, between bars."""
    text, before = "", False
    for token, learned in zip(encoded.input_ids, encoded.learned, strict=True):
        text += "|" * (learned != before) + (tokenizer.decode([token]) if learned else "")
        before = learned
    return text.rstrip("|")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_chat_learns_every_assistant_turn_with_its_stop_token(tokenizer, template):
    tokenizer.chat_template = template
    messages = turns("Hi?", "It is so.", "And?", "No.")
    encoded = encode(tokenizer, [], messages)
    assert encoded.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert learned_text(tokenizer, encoded) == "|It is so.</s>||No.</s>"
    assert not encoded.boundary_moved


def test_both_ways_to_find_turns_agree(tokenizer):
    messages = turns("Hi?", "It is so.", "And?", "No.")
    plain = encode(tokenizer, [], messages)
    tokenizer.chat_template = MARKED_TEMPLATE
    marked = encode(tokenizer, [], messages)
    assert plain.input_ids == marked.input_ids
    assert plain.learned == marked.learned


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_chat_prompt_is_not_learned_even_where_the_assistant_speaks(tokenizer, template):
    tokenizer.chat_template = template
    prompt, completion = turns("Hi?", "It is so.", "And?"), turns("", "No.")[1:]
    assert learned_text(tokenizer, encode(tokenizer, prompt, completion)) == "|No.</s>"


def test_system_and_tool_turns_are_context(tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        *turns("Hi?", "Call."),
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Four."},
    ]
    encoded = encode(tokenizer, [], messages)
    assert learned_text(tokenizer, encoded) == "|Call.</s>||Four.</s>"


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = REWRITING_TEMPLATE
    assert learned_text(tokenizer, encode(tokenizer, [], turns("Hi?", "Yes."))) == (
        "|(thinks) Yes.</s>"
    )
    with pytest.raises(ValueError, match=r"renders turn 2 otherwise.*\{% generation %\} marks"):
        encode(tokenizer, [], turns("Hi?", "Yes.", "And?", "No."))


def test_cue_that_the_answer_drops(tokenizer):
    """A generation prompt with an opened block, as of reasoning models."""
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "<|assistant|>\n{% endif %}", "<|assistant|>\n(thinks){% endif %}"
    )
    encoded = encode(tokenizer, [], turns("Hi?", "Yes."))
    assert learned_text(tokenizer, encoded) == "|Yes.</s>"
    assert encoded.boundary_moved


def test_opening_assistant_turn_is_refused(tokenizer):
    messages = [{"role": "assistant", "content": "Hello."}, *turns("Hi?", "Yes.")]
    with pytest.raises(ValueError, match="f, row 1: the chat opens with an assistant turn"):
        encode(tokenizer, [], messages)


def test_template_error_names_the_row(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"f, row 1: the chat template cannot render it \(roles"):
        encode(tokenizer, [], turns("Hi?", "Yes."))


def test_known_template_uses_that_of_trl(tokenizer):
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = qwen2_5_chat_template
    encoded = encode(tokenizer, [], turns("Hi?", "It is so.", "And?", "No."))
    assert learned_text(tokenizer, encoded).replace("\n", "") == (
        "|It is so.<|im_end|>||No.<|im_end|>"
    )


def test_text_is_learned_whole_and_ends(tokenizer):
    encoded = encode(tokenizer, "", "It is so.")
    assert tokenizer.decode(encoded.input_ids) == "<s>It is so.</s>"
    assert all(encoded.learned)
    assert encode(tokenizer, "", "It is so.</s>").input_ids == encoded.input_ids


def test_prompt_and_completion_texts(tokenizer):
    encoded = encode(tokenizer, "Hi?", " It is so.")
    assert tokenizer.decode(encoded.input_ids) == "<s>Hi? It is so.</s>"
    assert learned_text(tokenizer, encoded) == "| It is so.</s>"
    assert not encoded.boundary_moved


def test_boundary_inside_a_token_is_noticed(tokenizer):
    """` is` is one token, so a prompt that ends in a space is not seen as such."""
    encoded = encode(tokenizer, "It ", "is so.")
    assert learned_text(tokenizer, encoded) == "| is so.</s>"
    assert encoded.boundary_moved


def test_tokenizer_that_adds_stop_tokens_itself(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    encoded = encode(tokenizer, "Hi?", " Yes.")
    assert tokenizer.decode(encoded.input_ids) == "<s>Hi? Yes.</s>"
    assert learned_text(tokenizer, encoded) == "| Yes.</s>"
    assert not encoded.boundary_moved


def test_learn_all(tokenizer):
    assert all(encode(tokenizer, "Hi?", " Yes.", learn_all=True).learned)
    assert all(encode(tokenizer, [], turns("Hi?", "Yes."), learn_all=True).learned)


def test_labels_are_cut_and_masked(tokenizer):
    encoded = encode(tokenizer, "Hi?", " It is so.")
    labels = encoded.labels(None)
    assert [i for i, label in zip(encoded.input_ids, labels, strict=True) if label != -100] == [
        i for i, learned in zip(encoded.input_ids, encoded.learned, strict=True) if learned
    ]
    assert encoded.labels(3) == labels[:3]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("", "It is so."),
        ("Hi?", " It is so."),
        ("It ", "is so."),
        (turns("Hi?"), turns("", "It is so.")[1:]),
    ],
)
def test_same_tokens_and_labels_as_trl(tokenizer, tmp_path, prompt, completion):
    """TRL's own preparation is the reference where it has a mask of its own."""
    import trl
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.conftest import build_model

    row = {"prompt": prompt, "completion": completion} if prompt else {"text": completion}
    trainer = SFTTrainer(
        model=build_model(len(tokenizer)),
        args=SFTConfig(
            str(tmp_path), bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=None
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]
    ours = encode(tokenizer, prompt, completion)
    if ours.boundary_moved and not hasattr(trl.data_utils, "common_prefix_length"):
        pytest.skip("older versions of TRL mask a token that holds part of the completion")
    assert ours.input_ids == theirs["input_ids"]
    labels = ours.labels(None)
    # They also learn the line break behind the stop token, which no generation reaches.
    end = len(labels) - (labels[-1] == -100)
    assert labels[:end] == theirs["labels"][:end]
