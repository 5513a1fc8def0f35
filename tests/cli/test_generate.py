"""`pacatune generate`: what is answered and printed, and from where prompts come."""

import io
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from pacatune.cli import main
from pacatune.cli.generate import Generate, _encode, _print_text
from tests.adapters.fixtures import edit_json, save_adapter


@pytest.fixture(scope="module")
def words(tiny_model_dir, tmp_path_factory):
    """The command for an adapter strong enough to change what is said."""
    folder = tmp_path_factory.mktemp("generate") / "adapter"
    save_adapter(tiny_model_dir, folder, r=16, paca_alpha=64)
    model = ["--model", str(tiny_model_dir), "--adapter", str(folder)]
    return ["generate", *model, "--max-new-tokens", "8"]


@pytest.fixture
def answer(words, capsys):
    def run(line="", prompt="What is"):
        assert main([*words, "--prompt", prompt, *line.split()]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


def test_only_the_answer_is_printed(words, answer, shown, monkeypatch):
    adapted, base = answer(), shown(*words[:3], *words[5:], "--prompt", "What is")
    assert adapted != base
    assert answer("--compare") == f"base:\n{base}\nwith the adapter:\n{adapted}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is"))
    assert answer(prompt="-") == adapted


def test_an_answer_is_the_likeliest_text_up_to_its_end(model_copy, tiny_tokenizer, shown):
    """Whatever the base's own settings ask for; both the base and its tokenizer know ends."""
    words = ["generate", "--model", model_copy, "--max_new_tokens", 8, "--no_chat"]
    start = tokens = tiny_tokenizer("What is", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(model_copy)
    with torch.no_grad():
        while tokens.shape[1] < start.shape[1] + 8:
            tokens = torch.cat([tokens, base(tokens).logits[:, -1:].argmax(-1)], dim=1)
    new = tokens[0, start.shape[1] :].tolist()
    text = tiny_tokenizer.decode(new, skip_special_tokens=True)
    config = edit_json(model_copy / "generation_config.json", do_sample=True, temperature=9.0)
    assert shown(*words, "--prompt", "What is") == f"{text}\n"
    edit_json(config, eos_token_id=new[3])
    cut = tiny_tokenizer.decode(new[: new.index(new[3])], skip_special_tokens=True)
    assert shown(*words, "--prompt", "What is").startswith(cut)
    assert len(shown(*words, "--prompt", "What is")) < len(text)


def test_options_reach_the_generation(words, answer, shown):
    system = shown(*words, "--prompt", "What is", "--system", "Be brief.")
    assert len({answer(), answer("--no-chat"), system}) == 3
    sampled = "--temperature 1 --top-p 0.9 --seed"
    assert answer(f"{sampled} 1") == answer(f"{sampled} 1") != answer(f"{sampled} 2")
    assert answer("--temperature 1 --top-p 1e-6") == answer()


def test_prompts_are_conversations_if_there_is_a_template(tiny_tokenizer, model_copy, refused):
    chat = _encode(tiny_tokenizer, "Hello", Generate(prompt="Hello", system="Be kind."))
    text = tiny_tokenizer.decode(chat[0])
    assert text.index("<|system|>\nBe kind.") < text.index("<|user|>\nHello")
    assert text.endswith("<|assistant|>\n")
    assert text.count("<s>") == 1
    raw = _encode(tiny_tokenizer, "Hello", Generate(prompt="Hello", no_chat=True))
    assert tiny_tokenizer.decode(raw[0]) == "<s>Hello"
    words = ["generate", "--model", model_copy, "--prompt"]
    assert "`prompt` is empty; write at least one word" in refused(*words, " \n")
    (model_copy / "chat_template.jinja").unlink()
    needs = "`system` ('Be kind.') needs a chat template"
    assert needs in refused(*words, "Hello", "--system", "Be kind.")
    for path in model_copy.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer; put its tokenizer files" in refused(*words, "Hello")


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
        Generate(prompt="Hello", **options)


def test_notes_go_to_stderr(adapter_copy, lora_dir, capsys):
    (adapter_copy / "pacatune.json").unlink()
    notes = {adapter_copy: "the adapter has no fingerprint", lora_dir: "the base is not checked"}
    for folder, note in notes.items():
        words = ["generate", "--adapter", str(folder), "--max-new-tokens", "1"]
        assert main([*words, "--prompt", "a"]) == 0
        assert capsys.readouterr().err.startswith(f"note: {note}")


def test_a_terminal_gets_no_control_characters(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), "a[2J\n\tb"), (io.StringIO(), "a\x1b[2J\n\tb")):
        monkeypatch.setattr(sys, "stdout", stream)
        _print_text("a\x1b[2J\n\tb")
        assert stream.getvalue() == expected
