"""`pacatune merge` and `export`: what they did, and what they refuse."""

from transformers import AutoModelForCausalLM

from pacatune.cli import main
from tests.adapters.fixtures import save_adapter


def test_a_merge_reports_what_it_did(tiny_model_dir, adapter_dir, tmp_path, capsys, shown):
    words = ["--model", str(tiny_model_dir), "--adapter", str(adapter_dir)]
    assert main(["merge", *words, "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "merged    6 modules, float32\n" in out
    assert "rounding  0 % of what the adapter changes\n" in out
    assert "verified  read back, bit for bit\n" in out
    assert err == ""
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = ["merge", *words, "--dtype", "bfloat16", "--no-verify", "--device", "cpu"]
    out = shown(*words, "--output", tmp_path / "other")
    assert "merged    6 modules, bfloat16\n" in out
    assert "verified  no (--no_verify)\n" in out


def test_losses_are_compared_where_codes_are_written(adapter_dir, tmp_path, refused):
    words = ["merge", "--adapter", adapter_dir, "--output", tmp_path / "out", "--held_out"]
    assert "this merge writes plain numbers; drop it" in refused(*words)
    assert not (tmp_path / "out").exists()


def test_options_reach_the_export(adapter_dir, tmp_path, shown, refused):
    words = ["export", "--adapter", adapter_dir, "--output", tmp_path / "lora"]
    out = shown(*words, "--to", "lora", "--dtype", "bfloat16")
    assert "6 modules as LoRA, bfloat16, rounded by at most" in out
    assert "`to` ('ia3')" in refused(*words, "--to", "ia3")


def test_other_tensors_are_refused_or_kept(tiny_model_dir, tmp_path, shown, refused):
    save_adapter(tiny_model_dir, tmp_path / "adapter", modules_to_save=["lm_head"])
    words = ["export", "--adapter", tmp_path / "adapter", "--to", "lora"]
    words += ["--output", tmp_path / "lora"]
    assert "--keep_extra" in refused(*words)
    shown(*words, "--keep-extra")
