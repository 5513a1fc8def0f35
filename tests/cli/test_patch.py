import filecmp
import json
import re
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from pacatune.cli import main
from pacatune.cli.patch import SUBCOMMANDS
from tests.adapters.fixtures import save_adapter


@pytest.fixture
def files(tiny_model_dir, adapter_dir, tmp_path, monkeypatch):
    """A folder with a patch of the tiny Llama; paths of the latter and of its adapter."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(tiny_model_dir), "--adapter", str(adapter_dir)]
    assert main(["patch", "make", *words, "--output", "p.safetensors"]) == 0
    return {"base": str(tiny_model_dir), "adapter": str(adapter_dir)}


def run(files, line):
    return main(["patch", *(word.format(**files) for word in line.split())])


def test_help_lists_every_command_of_patch(capsys):
    assert main(["patch", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in SUBCOMMANDS)
    assert main(["patch"]) == 2
    assert main(["patch", "revrt"]) == 2
    assert "unknown command of patch 'revrt'; did you mean 'revert'?" in capsys.readouterr().err


def test_there_and_back(files, tiny_model_dir, capsys):
    assert run(files, "make --adapter {adapter} --output q.safetensors") == 0
    out = capsys.readouterr().out
    assert f"base      {tiny_model_dir.name}\n" in out
    assert "columns   24 of 6 tensors\n" in out
    size = r"\d+\.\d KiB"
    assert re.search(
        rf"written   q.safetensors \({size}: columns before and after 5.0 KiB, "
        rf"the adapter {size}\)",
        out,
    )
    assert run(files, "apply --model {base} --patch p.safetensors --output DIR") == 0
    out = capsys.readouterr().out
    assert re.search(rf"applied   24 columns of 6 tensors: 2.5 KiB of {size}, in disk pages", out)
    assert "verified  the columns before, bit for bit, and those written\n" in out
    assert "written   DIR (" in out
    assert run(files, "revert --model DIR --patch p.safetensors --output DIR2") == 0
    assert "reverted  24 columns" in capsys.readouterr().out
    names = [path.name for path in tiny_model_dir.iterdir()]
    assert filecmp.cmpfiles(tiny_model_dir, "DIR2", names, shallow=False)[1:] == ([], [])
    assert run(files, "to-adapter --patch p.safetensors --output adapter") == 0
    names = ["adapter_config.json", "adapter_model.safetensors", "pacatune.json"]
    assert filecmp.cmpfiles(files["adapter"], "adapter", names, shallow=False)[0] == names
    AutoModelForCausalLM.from_pretrained("DIR")


def test_in_place_and_recover(files, model_copy, capsys):
    files["base"] = str(model_copy)
    assert run(files, "apply --model {base} --patch p.safetensors --in-place") == 0
    assert f"written   {model_copy} (in place)\n" in capsys.readouterr().out
    assert run(files, "apply --model {base} --patch p.safetensors --in-place") == 2
    assert "already holds the columns that would be written" in capsys.readouterr().err
    assert run(files, "recover --model {base}") == 0
    assert "nothing was interrupted here" in capsys.readouterr().out
    assert run(files, "revert --model {base} --patch p.safetensors --in-place") == 0


def test_models_and_patches_are_compared(files, adapter_dir, capsys):
    assert run(files, "apply --model {base} --patch p.safetensors --output DIR") == 0
    capsys.readouterr()
    assert run(files, "diff --model {base} --with DIR --output q.safetensors") == 0
    out, err = capsys.readouterr()
    assert "changed   6 tensors\n" in out
    assert "   6.25% of the columns  model.layers.0.mlp.down_proj.weight\n" in out
    assert "patch     24 columns, 5.0 KiB before and after\nwritten   q.safetensors (" in out
    assert err == "note: a patch of two models has no adapter in it.\n"
    assert run(files, "diff --patch p.safetensors --with q.safetensors") == 0
    out = capsys.readouterr().out
    assert "both      6 tensors, 0 of them differ\noverlap   24 columns of 6 tensors\n" in out
    assert run(files, "diff --model {base} --with {base} --output r.safetensors") == 2
    out, err = capsys.readouterr()
    assert "patch     no: they are equal\n" in out
    assert "give no patch: they are equal. Nothing was written." in err
    assert run(files, "diff --patch p.safetensors --with q.safetensors --output x") == 2
    assert "`--output` is for two models" in capsys.readouterr().err


def test_patches_are_stacked(files, tiny_model_dir, tmp_path, capsys):
    save_adapter(tiny_model_dir, tmp_path / "other", target_modules=["k_proj"])
    assert run(files, "make --adapter other --output other.safetensors --no-adapter") == 0
    assert "without its adapter" in capsys.readouterr().err
    both = "--patch p.safetensors other.safetensors"
    assert run(files, f"stack {both} --output both.safetensors") == 0
    out, err = capsys.readouterr()
    assert "stacked   2 patches: 32 columns of 8 tensors\nwritten   both.safetensors (" in out
    assert "a stack carries no adapter" in err
    assert run(files, f"stack {both} --model {{base}} --output DIR") == 0
    assert run(files, "apply --model {base} --patch both.safetensors --output DIR2") == 0
    assert filecmp.cmp("DIR/model.safetensors", "DIR2/model.safetensors", shallow=False)
    capsys.readouterr()
    twice = "--patch p.safetensors p.safetensors"
    assert run(files, f"stack {twice} --output twice.safetensors") == 2
    assert "the patches overlap: 4 columns of" in capsys.readouterr().err
    assert run(files, f"stack {twice} --output twice.safetensors --overlap sum") == 0
    assert run(files, f"stack {both} --in-place") == 2
    assert "`--in-place` needs --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make --adapter {adapter} --output p.safetensors", "'p.safetensors' exists; choose"),
        ("make --adapter nowhere --output q", "adapter folder 'nowhere' does not exist"),
        ("make --model ./no --adapter {adapter} --output q", "model folder ./no does not exist"),
        ("apply --model {base} --patch nowhere --output d", "patch 'nowhere' does not exist"),
        ("apply --model {base} --patch p.safetensors", "give one of --output, --in-place"),
        ("apply --model ./no --patch p.safetensors --output d", "model folder ./no does not"),
        ("apply --model ./no --patch p.safetensors --in-place", "error: folder 'no' does not"),
        (
            "apply --model {adapter} --patch p.safetensors --output d",
            "it is an adapter, not a base",
        ),
        ("revert --model {base} --patch p.safetensors --output d", "already holds the columns"),
        ("diff --model {base} --with ./no", "model folder ./no does not exist; check `with`"),
        ("to-adapter --patch {adapter}/adapter_model.safetensors --output d", "is no patch"),
        ("recover --model ./no", "error: folder 'no' does not exist"),
    ],
)
def test_a_mistake_is_one_line(files, tmp_path, capsys, line, message):
    capsys.readouterr()
    assert run(files, line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pacatune: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_inspect_knows_a_patch(files, capsys):
    capsys.readouterr()
    assert main(["inspect", "p.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "24 of 6 tensors" in out
    assert "model.layers.0.mlp.down_proj.weight" in out
    assert main(["inspect", "p.safetensors", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"]["model.layers.0.mlp.down_proj.weight"]["dim"] == 1
    assert main(["inspect", "p.safetensors", "--columns"]) == 0
    columns = report["tensors"]["model.layers.0.mlp.down_proj.weight"]["columns"]
    assert " ".join(map(str, columns)) in capsys.readouterr().out
    for words in (["--against", "p.safetensors"], ["--plot", "x.png"]):
        assert main(["inspect", "p.safetensors", *words]) == 2
        assert "is a patch, for which there is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["patch", "--help"], ["patch", "make", "--help"], ["patch", "x"]]
)
def test_help_and_misspelt_words_wait_for_no_torch(words):
    code = (
        "import sys\n"
        "from pacatune.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
