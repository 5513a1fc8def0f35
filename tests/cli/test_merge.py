import re

import pytest
from transformers import AutoModelForCausalLM

from pacatune.cli import main


def test_a_merge_reports_what_it_did(tiny_model_dir, adapter_dir, tmp_path, capsys):
    words = ["--model", str(tiny_model_dir), "--adapter", str(adapter_dir)]
    assert main(["merge", *words, "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert f"base      {tiny_model_dir}\n" in out
    assert "merged    6 modules, float32\n" in out
    assert "verified  outputs are those of the adapter, rounded by 0.0e+00 " in out
    assert f"written   {tmp_path / 'out'} (147.6 KiB)\n" in out
    assert err == ""
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_rounding_is_called_so(lora_dir, tmp_path, capsys):
    words = ["merge", "--adapter", str(lora_dir), "--output", str(tmp_path / "out")]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    number = r"\d\.\de[+-]\d\d"
    assert re.search(
        rf"verified  outputs are those of the adapter, rounded by {number} "
        rf"\({number} of their size; {number} is allowed\); it changes them by {number}\n",
        out,
    )


def test_options_reach_the_merge(adapter_dir, tmp_path, capsys):
    words = ["merge", "--adapter", str(adapter_dir), "--output", str(tmp_path / "out")]
    assert main([*words, "--dtype", "bfloat16", "--no-verify", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "merged    6 modules, bfloat16\n" in out
    assert "verified  no (--no-verify)\n" in out


def test_notes_go_to_stderr(adapter_copy, tmp_path, capsys):
    (adapter_copy / "pacatune.json").unlink()
    assert main(["merge", "--adapter", str(adapter_copy), "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert err == "note: the adapter has no fingerprint; only names and shapes could be compared.\n"
    assert "note:" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "nowhere", "--output", "out"], "adapter folder 'nowhere' does not exist"),
        (["--adapter", "{adapter}", "--output", "{adapter}"], "is not empty; choose another"),
        (
            ["--adapter", "{adapter}", "--output", "out", "--model", "nowhere"],
            "`model` ('nowhere') is neither a file or folder here nor a model of the hub",
        ),
        (
            ["--adapter", "{adapter}", "--output", "out", "--device", "cuda:99"],
            "`device` ('cuda:99') is not on this machine",
        ),
    ],
)
def test_a_mistake_is_one_line(adapter_dir, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["merge", *(word.format(adapter=adapter_dir) for word in words)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pacatune: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_missing_option_is_named(capsys):
    assert main(["merge", "--adapter", "a"]) == 2
    assert "the following arguments are required: output" in capsys.readouterr().err
