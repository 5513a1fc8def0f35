"""`pacatune generate`: what is printed, and from where prompts come."""

import io
import os
import re
import sys

import pytest

from pacatune.cli import main
from pacatune.cli.generate import _print_text
from tests.adapters.fixtures import save_adapter


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
    adapted, base = answer(), answer("--without-adapter")
    plain = shown(*words[:3], *words[5:], "--prompt", "What is")
    assert adapted != base == plain
    assert answer("--compare") == f"base:\n{base}\nwith the adapter:\n{adapted}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is"))
    assert answer(prompt="-") == adapted


def test_options_reach_the_generation(words, answer, shown):
    system = shown(*words, "--prompt", "What is", "--system", "Be brief.")
    assert len({answer(), answer("--no-chat"), system}) == 3
    sampled = "--temperature 1 --top-p 0.9 --seed"
    assert answer(f"{sampled} 1") == answer(f"{sampled} 1") != answer(f"{sampled} 2")


def test_a_terminal_without_prompt_is_asked(words, answer, capsys, monkeypatch):
    expected = answer()
    terminal, ours = os.openpty()
    with os.fdopen(ours) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(terminal, b"What is\n\n" + b"x" * 2000 + b"\n\x04")
        assert main(words) == 0
        out, err = capsys.readouterr()
    os.close(terminal)
    assert out.startswith(f"> {expected}> > ")
    assert err.startswith("Each line is answered on its own.")
    assert re.search(r"pacatune: error: the prompt \(\d+ tokens\) .* context of 256", err)


def test_notes_go_to_stderr(adapter_copy, capsys):
    (adapter_copy / "pacatune.json").unlink()
    words = ["generate", "--adapter", str(adapter_copy), "--max-new-tokens", "1"]
    assert main([*words, "--prompt", "a"]) == 0
    assert capsys.readouterr().err.startswith("note: the adapter has no fingerprint")


def test_a_terminal_gets_no_control_characters(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), "a[2J\n\tb"), (io.StringIO(), "a\x1b[2J\n\tb")):
        monkeypatch.setattr(sys, "stdout", stream)
        _print_text("a\x1b[2J\n\tb")
        assert stream.getvalue() == expected
