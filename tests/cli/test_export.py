import json
import re

import pytest

from pacatune.cli import main
from tests.adapters.fixtures import save_adapter


def test_an_exact_export_reports_what_it_did(tiny_model_dir, adapter_dir, tmp_path, capsys):
    words = ["--model", str(tiny_model_dir), "--adapter", str(adapter_dir), "--to", "lora"]
    assert main(["export", *words, "--output", str(tmp_path / "lora")]) == 0
    out, err = capsys.readouterr()
    assert "exported  6 modules as LoRA, float32, exact\n" in out
    assert "verified  no (--verify compares with plain PEFT)\n" in out
    assert f"written   {tmp_path / 'lora'} (" in out
    assert err == ""
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


@pytest.mark.usefixtures("forked_plain_peft")
def test_options_reach_the_export(adapter_dir, tmp_path, capsys):
    words = ["--adapter", str(adapter_dir), "--to", "lora", "--output", str(tmp_path / "lora")]
    assert main(["export", *words, "--dtype", "bfloat16", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "6 modules as LoRA, bfloat16, rounded by at most" in out
    assert "verified  outputs in plain PEFT differ by at most" in out
    assert re.search(r"of their size, \d\.\de-0\d is allowed\)", out)


def test_other_tensors_are_refused_or_kept(tiny_model_dir, tmp_path, capsys):
    save_adapter(tiny_model_dir, tmp_path / "adapter", modules_to_save=["lm_head"])
    words = ["export", "--adapter", str(tmp_path / "adapter"), "--to", "lora"]
    words += ["--output", str(tmp_path / "lora")]
    assert main(words) == 2
    assert "--keep-extra" in capsys.readouterr().err
    assert main([*words, "--keep-extra"]) == 0


def test_other_formats_are_refused(capsys):
    assert main(["export", "--adapter", "a", "--output", "b", "--to", "onnx"]) == 2
    error = capsys.readouterr().err
    assert "`to` ('onnx') must be one of lora" in error
