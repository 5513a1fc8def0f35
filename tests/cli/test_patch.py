"""`pacatune patch`: an adapter as an edit of a checkpoint, there and back."""

import filecmp
import json

import pytest
from transformers import AutoModelForCausalLM

from pacatune.cli import main
from tests.adapters.fixtures import save_adapter


@pytest.fixture
def files(tiny_model_dir, adapter_dir, tmp_path, monkeypatch):
    """A folder with a patch of the tiny Llama; paths of the latter and of its adapter."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(tiny_model_dir), "--adapter", str(adapter_dir)]
    assert main(["patch", "make", *words, "--output", "p.safetensors"]) == 0
    return {"base": str(tiny_model_dir), "adapter": str(adapter_dir)}


@pytest.fixture
def patch(files, capsys):
    """Run a command of patch; return its status, what it prints and what it notes."""

    def run(line):
        capsys.readouterr()
        status = main(["patch", *(word.format(**files) for word in line.split())])
        return (status, *capsys.readouterr())

    return run


def test_there_and_back(files, patch, tiny_model_dir):
    status, out, _ = patch("make --adapter {adapter} --output q.safetensors")
    assert status == 0
    assert "columns   24 of 6 tensors\n" in out
    assert ": columns before and after 5.0 KiB, the adapter " in out
    status, out, _ = patch("apply --model {base} --patch p.safetensors --output DIR")
    assert status == 0
    assert "applied   24 columns of 6 tensors: 2.5 KiB of " in out
    assert "verified  the columns before, bit for bit, and those written\n" in out
    AutoModelForCausalLM.from_pretrained("DIR")
    status, out, _ = patch("revert --model DIR --patch p.safetensors --output DIR2")
    assert (status, "reverted  24 columns" in out) == (0, True)
    names = [path.name for path in tiny_model_dir.iterdir()]
    assert filecmp.cmpfiles(tiny_model_dir, "DIR2", names, shallow=False)[1:] == ([], [])
    assert patch("to-adapter --patch p.safetensors --output adapter")[0] == 0
    names = ["adapter_config.json", "adapter_model.safetensors", "pacatune.json"]
    assert filecmp.cmpfiles(files["adapter"], "adapter", names, shallow=False)[0] == names


def test_in_place_and_recover(files, patch, model_copy):
    files["base"] = str(model_copy)
    status, out, _ = patch("apply --model {base} --patch p.safetensors --in-place")
    assert (status, f"written   {model_copy} (in place)\n" in out) == (0, True)
    status, _, err = patch("apply --model {base} --patch p.safetensors --in-place")
    assert status == 2
    assert "already holds the columns that would be written" in err
    status, out, _ = patch("recover --model {base}")
    assert (status, "nothing was interrupted here" in out) == (0, True)
    assert patch("revert --model {base} --patch p.safetensors --in-place")[0] == 0


def test_models_are_compared(patch):
    assert patch("apply --model {base} --patch p.safetensors --output DIR")[0] == 0
    status, out, err = patch("diff --model {base} --with DIR --output q.safetensors")
    assert status == 0
    assert "   6.25% of the columns  model.layers.0.mlp.down_proj.weight\n" in out
    assert "patch     24 columns, 5.0 KiB before and after\nwritten   q.safetensors (" in out
    assert err == "note: a patch of two models has no adapter in it.\n"
    status, out, err = patch("diff --model {base} --with {base} --output r.safetensors")
    assert (status, "patch     no: they are equal\n" in out) == (2, True)
    assert "give no patch: they are equal. Nothing was written." in err


def test_patches_are_stacked(patch, tiny_model_dir, tmp_path):
    save_adapter(tiny_model_dir, tmp_path / "other", target_modules=["k_proj"])
    status, _, err = patch("make --adapter other --output other.safetensors --no-adapter")
    assert (status, "without its adapter" in err) == (0, True)
    both = "stack --patch p.safetensors other.safetensors"
    status, out, err = patch(f"{both} --output both.safetensors")
    assert status == 0
    assert "stacked   2 patches: 32 columns of 8 tensors\nwritten   both.safetensors (" in out
    assert "a stack carries no adapter" in err
    for name, model in (("p", "{base}"), ("other", "DIR-p"), ("both", "{base}")):
        words = f"--model {model} --patch {name}.safetensors --output DIR-{name}"
        assert patch(f"apply {words}")[0] == 0
    assert filecmp.cmp("DIR-other/model.safetensors", "DIR-both/model.safetensors", shallow=False)


P = "--patch p.safetensors"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make --adapter {adapter} --output p.safetensors", "'p.safetensors' exists; choose"),
        (f"apply --model {{base}} {P}", "give one of --output, --in_place"),
        ("to-adapter --patch {adapter}/adapter_model.safetensors --output d", "is no patch"),
    ],
)
def test_a_mistake_is_one_line(files, tmp_path, refused, line, message):
    assert message in refused("patch", *(word.format(**files) for word in line.split()))
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_inspect_knows_a_patch(files, shown):
    name = "model.layers.0.mlp.down_proj.weight"
    assert "24 of 6 tensors" in shown("inspect", "p.safetensors")
    report = json.loads(shown("inspect", "p.safetensors", "--json"))
    assert report["tensors"][name]["dim"] == 1
    columns = " ".join(map(str, report["tensors"][name]["columns"]))
    assert columns in shown("inspect", "p.safetensors", "--columns")
