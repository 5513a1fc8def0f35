"""`pacatune inspect`: what an adapter holds, as text, JSON and a picture."""

import json

from tests.adapters.fixtures import edit_json, save_adapter
from tests.cli.conftest import run_without


def test_a_report_tells_what_an_adapter_holds(adapter_dir, tiny_model_dir, shown):
    out = shown("inspect", adapter_dir)
    for text in (str(tiny_model_dir), "4, 8 (scaling 2)", "640 parameters"):
        assert text in out
    assert "columns" not in out
    report = json.loads(shown("inspect", adapter_dir, "--columns", "--json"))
    assert (report["method"], report["rank"], len(report["modules"])) == ("PACA", 4, 6)
    (columns, *_) = (one["columns"] for one in report["modules"])
    assert " ".join(map(str, columns)) in shown("inspect", adapter_dir, "--columns")


def test_names_are_printed_as_they_are_and_damage_is_one_line(adapter_copy, shown, refused):
    edit_json(adapter_copy / "adapter_config.json", base_model_name_or_path="[red]x[/red]")
    assert "[red]x[/red]" in shown("inspect", adapter_copy)
    (adapter_copy / "adapter_model.safetensors").write_bytes(b"x")
    assert "truncated or no safetensors file" in refused("inspect", adapter_copy)


def test_the_strategy(tiny_model_dir, tmp_path, shown):
    save_adapter(tiny_model_dir, tmp_path / "adapter", selection="weight_norm")
    words = ["inspect", tmp_path / "adapter"]
    lines = shown(*words).splitlines()
    assert ["selection", "weight_norm"] in [line.split() for line in lines]
    edit_json(tmp_path / "adapter/adapter_config.json", selection_options={"num_batches": 100})
    assert "weight_norm, num_batches 100" in shown(*words)


def test_an_adapter_is_read_without_peft_or_transformers(tiny_model_dir, tmp_path):
    folder = str(tmp_path / "adapter")
    save_adapter(tiny_model_dir, folder, rank_pattern={"q_proj": 2})
    heavy = ("peft", "transformers", "trl", "datasets", "rich")
    done = run_without(heavy, ["inspect", folder])
    assert done.returncode == 0, done.stderr
