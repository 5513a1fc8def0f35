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


def output(capsys, words):
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_only_the_answer_is_printed(words, capsys):
    adapted = output(capsys, [*words, "--prompt", "What is"])
    base = output(capsys, [*words, "--prompt", "What is", "--without-adapter"])
    plain = output(capsys, [*words[:3], *words[5:], "--prompt", "What is"])
    assert adapted != base == plain
    both = output(capsys, [*words, "--prompt", "What is", "--compare"])
    assert both == f"base:\n{base}\nwith the adapter:\n{adapted}"


def test_options_reach_the_generation(words, capsys):
    chat = output(capsys, [*words, "--prompt", "What is"])
    raw = output(capsys, [*words, "--prompt", "What is", "--no-chat"])
    system = output(capsys, [*words, "--prompt", "What is", "--system", "Be brief."])
    assert len({chat, raw, system}) == 3
    sampled = ["--temperature", "1", "--top-p", "0.9"]
    first = output(capsys, [*words, "--prompt", "What is", *sampled, "--seed", "1"])
    again = output(capsys, [*words, "--prompt", "What is", *sampled, "--seed", "1"])
    other = output(capsys, [*words, "--prompt", "What is", *sampled, "--seed", "2"])
    assert first == again != other
    output(capsys, [*words, "--prompt", "What is", "--dtype", "bfloat16"])


def test_a_dash_reads_the_prompt_from_stdin(words, capsys, monkeypatch):
    expected = output(capsys, [*words, "--prompt", "What is"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is"))
    assert output(capsys, [*words, "--prompt", "-"]) == expected


def test_a_terminal_without_prompt_is_asked(words, capsys, monkeypatch):
    expected = output(capsys, [*words, "--prompt", "What is"])
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


def test_no_prompt_and_no_terminal_is_an_error(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(words) == 2
    assert "--prompt is missing; give a text, or - to read it" in capsys.readouterr().err


def test_notes_go_to_stderr(adapter_copy, capsys):
    (adapter_copy / "pacatune.json").unlink()
    words = ["generate", "--adapter", str(adapter_copy), "--max-new-tokens", "1"]
    assert main([*words, "--prompt", "a"]) == 0
    assert capsys.readouterr().err.startswith("note: the adapter has no fingerprint")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-new-tokens", "0"], "`max_new_tokens` (0) must be at least 1"),
        (["--temperature", "-1"], "`temperature` (-1.0) must be 0 (greedy)"),
        (["--adapter", "nowhere"], "adapter folder 'nowhere' does not exist"),
    ],
)
def test_a_mistake_is_one_line(words, capsys, more, message):
    assert main([*words, "--prompt", "a", *more]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pacatune: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_comparing_needs_an_adapter(capsys):
    assert main(["generate", "--model", "a", "--prompt", "b", "--compare"]) == 2
    assert "--compare needs --adapter" in capsys.readouterr().err


def test_a_terminal_gets_no_control_characters(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), "a[2J\n\tb"), (io.StringIO(), "a\x1b[2J\n\tb")):
        monkeypatch.setattr(sys, "stdout", stream)
        _print_text("a\x1b[2J\n\tb")
        assert stream.getvalue() == expected
