import json
import re
import subprocess
import sys

from pacatune.cli import main
from tests.adapters.fixtures import save_adapter


def test_a_report_tells_what_an_adapter_holds(adapter_dir, tiny_model_dir, capsys):
    assert main(["inspect", str(adapter_dir)]) == 0
    out = capsys.readouterr().out
    for text in (
        str(adapter_dir),
        str(tiny_model_dir),
        "4, 8 (scaling 2)",
        "random, seed ",
        "6 modules: down_proj x 2, q_proj x 2, v_proj x 2",
        "640 parameters",
        "model.layers.1.self_attn.v_proj",
        "- PEFT 0.22 and newer read it without pacatune",
    ):
        assert text in out
    assert "columns" not in out


def test_columns_are_listed_when_asked_for(adapter_dir, capsys):
    assert main(["inspect", str(adapter_dir), "--columns", "--json"]) == 0
    module = json.loads(capsys.readouterr().out)["modules"][0]
    assert main(["inspect", str(adapter_dir), "--columns"]) == 0
    assert " ".join(map(str, module["columns"])) in capsys.readouterr().out


def test_a_long_list_is_cut_unless_all_is_asked_for(tiny_model_dir, tmp_path, capsys):
    save_adapter(tiny_model_dir, tmp_path / "adapter", target_modules="all-linear")
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "2 more modules; --all lists them" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "adapter"), "--all"]) == 0
    out = capsys.readouterr().out
    assert "more modules" not in out
    assert len(re.findall(r"^  model\.layers\.", out, re.MULTILINE)) == 14


def test_json_holds_everything(adapter_dir, capsys):
    assert main(["inspect", str(adapter_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["folder"] == str(adapter_dir)
    assert (report["method"], report["rank"], len(report["modules"])) == ("PACA", 4, 6)


def test_two_adapters_are_compared(adapter_dir, tiny_model_dir, tmp_path, capsys):
    save_adapter(tiny_model_dir, tmp_path / "other", seed=1, target_modules=["q_proj", "k_proj"])
    words = ["inspect", str(adapter_dir), "--against", str(tmp_path / "other")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "modules of both    2" in out
    assert "shared columns     8 of 8" in out
    assert "model.layers.0.self_attn.k_proj" in out
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["only_a"]) == 4


def test_names_are_printed_as_they_are(adapter_copy, capsys):
    path = adapter_copy / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "[red]x[/red]"}
    path.write_text(json.dumps(config))
    assert main(["inspect", str(adapter_copy)]) == 0
    assert "[red]x[/red]" in capsys.readouterr().out


def test_a_damaged_adapter_is_one_line(adapter_copy, capsys):
    (adapter_copy / "adapter_model.safetensors").write_bytes(b"x")
    assert main(["inspect", str(adapter_copy)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pacatune: error: ")
    assert "truncated or no safetensors file" in err
    assert err.count("\n") == 1


def test_the_strategy_and_a_plot(tiny_model_dir, tmp_path, capsys):
    save_adapter(tiny_model_dir, tmp_path / "adapter", selection="weight_norm")
    words = ["inspect", str(tmp_path / "adapter"), "--plot", str(tmp_path / "columns.png")]
    assert main(words) == 0
    assert (tmp_path / "columns.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["selection", "weight_norm"] in lines
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["selection_options"] = {"num_batches": 100}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert "weight_norm, num_batches 100" in capsys.readouterr().out


def test_an_adapter_is_read_without_peft_or_transformers(tiny_model_dir, tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(tiny_model_dir, folder, rank_pattern={"q_proj": 2})
    code = (
        "import sys\n"
        "from pacatune.cli import main\n"
        f"assert main(['inspect', {str(folder)!r}]) == 0\n"
        f"assert main(['inspect', {str(folder)!r}, '--against', {str(folder)!r}]) == 0\n"
        "heavy = {'peft', 'transformers', 'trl', 'datasets', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
