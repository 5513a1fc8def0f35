"""PaCA in PEFT's comparison on MetaMathQA, with a script in the place of PEFT's."""

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaForCausalLM

from benchmarks.metamath import __main__ as metamath

# Writes what PEFT's script writes, if pacatune has taught PEFT to read the configuration.
SCRIPT = """
import json, pathlib, sys
from peft import PeftConfig
_, _, folder = sys.argv
config = PeftConfig.from_pretrained(folder)
training = json.loads(pathlib.Path(folder, "training_params.json").read_text())
score = training["optimizer_kwargs"]["lr"] + 0.5
info = {"metrics": [{"test accuracy": score}], "train_time": 60.0, "num_trainable_params": 7}
result = {"train_info": {**info, "accelerator_memory_max": 2**31}}
name = folder.removeprefix("experiments/").replace("/", "--")
with open("log", "a") as log:
    log.write(name + "\\n")
pathlib.Path("results", name + ".json").write_text(json.dumps(result))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout of PEFT, with one arm to run at one rate."""
    place = tmp_path / metamath.PLACE
    (place / "results").mkdir(parents=True)
    (place / "run.py").write_text(SCRIPT)
    arm = "paca-rank16-pool64-all-linear"
    monkeypatch.setattr(metamath, "ARMS", {arm: (metamath.ARMS[arm][0], (1e-3,))})
    return place


def test_runs_what_has_no_result_and_changes_nothing_of_others(place, tmp_path, capsys):
    other = place / "experiments" / "paca" / "llama-3.2-3B-rank80-lr3e-4" / "adapter_config.json"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    words = [str(tmp_path), "--seeds", "0", "1"]
    assert metamath.main(words) == 0
    shown = capsys.readouterr().out
    assert "| paca-rank16-pool64-all-linear | 0.001 | 7 | 2 | 50.1 ± 0.0 | 60 | 2.0 |" in shown
    log = (place / "log").read_text().splitlines()
    assert len(set(log)) == len(log) == 2
    assert metamath.main(words) == 0  # nothing is left to run
    assert (place / "log").read_text().splitlines() == log
    assert capsys.readouterr().out == shown
    assert other.read_text() == "{}"
    folder = place / "experiments" / "pacatune" / log[0].partition("--")[2]
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds another configuration; move it away"):
        metamath.main(words)


def test_what_is_no_checkout_of_peft(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"has no method_comparison.* name its checkout"):
        metamath.main([str(tmp_path)])
    with pytest.raises(SystemExit):
        metamath.main([])
    assert "name a checkout of PEFT, or give --dry-run" in capsys.readouterr().err


def test_dry_run(place, capsys):
    assert metamath.main(["--dry-run"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[2] for line in lines] == ["12,386,304"]
    assert all(float(line[3].rstrip("| ")) > 0 for line in lines)


@pytest.mark.parametrize("name", metamath.ARMS)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of PEFT's SHiRA
def test_parameters_are_those_of_peft(name, tmp_path):
    adapter, _ = metamath.ARMS[name]
    metamath.write(tmp_path, adapter, {})
    config = PeftConfig.from_pretrained(str(tmp_path))
    model = get_peft_model(LlamaForCausalLM(metamath.TINY), config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert metamath.count(adapter, metamath.TINY) == trained
    with torch.device("meta"):
        per_column = 774_144 if adapter["target_modules"] == "all-linear" else 114_688
        per_column = per_column if "PACA" in adapter["peft_type"] else 286_720
        assert metamath.count(adapter) == adapter["r"] * per_column
