"""Training that starts from a finished adapter."""

import shutil

import pytest
import torch

from pacatune.adapters.folder import read_adapter
from pacatune.cli import main
from pacatune.selection import load_columns
from pacatune.training import PacaSection, train
from pacatune.training.config import RunConfig
from pacatune.training.config_file import read_values
from pacatune.training.language import load_tokenizer
from pacatune.training.start import read_start
from tests.adapters.fixtures import edit_json, edit_tensors
from tests.training.launching import save_config
from tests.training.runs import QUIET, assert_close, read_json, refused

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
PACA = {"r": 3, "paca_alpha": 6, "selection": "weight_norm", "rank_pattern": {"q_proj": 2}}
# So slow that the values of the adapter are those that it had, but for rounding.
STANDSTILL = {"max_steps": 1, "learning_rate": 1e-9, "eval_strategy": "no"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def make_first(make_config, finished):
    """The folder of a finished run of two steps; that of a method is trained once."""

    def make(method, **options):
        folder = finished / method
        if not folder.exists():
            training = {"output_dir": str(folder), "max_steps": 2, "eval_strategy": "no"}
            train(make_config(method, training=training, **options), console=QUIET)
        return folder

    return make


@pytest.fixture
def paca(make_first):
    return make_first("paca", paca=PACA, data={"chat_template": TEMPLATE})


def test_columns_and_options_stay_and_values_go_on(make_config, paca, tmp_path):
    section = PacaSection()
    config = make_config(adapter=str(paca), paca=section, training=STANDSTILL)
    assert {name: getattr(config.paca, name) for name in PACA} == PACA
    assert section == PacaSection()  # which may be used again
    assert load_tokenizer(config).chat_template == TEMPLATE
    report = train(config, console=QUIET)
    out = tmp_path / "out"
    one, two = read_adapter(paca), read_adapter(out)
    assert_close(paca, out, atol=1e-7, rtol=0)
    for name, update in one.modules.items():
        assert torch.equal(update.indices, two.modules[name].indices)
        assert update.delta.any()
    assert two.scaling("model.layers.0.self_attn.q_proj") == 3
    assert two.sidecar == one.sidecar
    assert report.adapter == paca.name
    assert f"| started from | {paca.name} |" in (out / "report.md").read_text()


def test_loss_begins_where_it_ended_and_resumed_runs_are_the_same(
    make_config, tmp_path, assert_resumes
):
    first = train(make_config(training={"max_steps": 4}), console=QUIET)
    assert_resumes(2, make_config, training={"max_steps": 4}, adapter=str(tmp_path / "out"))
    before = read_json(tmp_path / "whole/report.json")["eval_loss_before"]
    assert before == pytest.approx(first.eval_loss_after, rel=1e-6)


def test_another_method(make_config, make_first, tmp_path):
    folder = make_first("dora", lora={"r": 4, "target_modules": ["q_proj"]})
    config = make_config("dora", adapter=str(folder), training=STANDSTILL)
    assert (config.lora.r, config.lora.target_modules) == (4, ["q_proj"])
    train(config, console=QUIET)
    assert_close(folder, tmp_path / "out", atol=1e-7, rtol=0)


@pytest.mark.parametrize("selection", ["fixed", "activation_qr"])
def test_an_adapter_whose_selection_chooses_nothing(make_config, paca, tmp_path, selection):
    """Its columns are in its files; what the run saves as its options can be given again."""
    folder = shutil.copytree(paca, tmp_path / selection)
    edit_json(folder / "adapter_config.json", selection=selection)
    config = make_config(adapter=str(folder))
    assert config.paca.selection == "random"
    assert read_start(config).columns == load_columns(paca)
    save_config(config, tmp_path / "run.yaml")
    assert RunConfig(**read_values(tmp_path / "run.yaml")) == config


def test_contradictions(
    make_config, make_task_config, make_first, paca, tiny_model_dir, tmp_path, capsys
):
    dora = make_first("dora", lora={"r": 4, "target_modules": ["q_proj"]})
    for match, options in (
        (r"`paca.r` \(4\) contradicts `adapter` .*, which has 3 and", {"paca": {"r": 4}}),
        (r"'paca', and `method` \('lora'\) trains LoRA; change one", {"method": "lora"}),
        (r"of the kind 'dora', and `method` \('lora'\)", {"method": "lora", "adapter": str(dora)}),
    ):
        with pytest.raises(ValueError, match=match):
            make_config(**{"adapter": str(paca), **options})
    path = tmp_path / "run.yaml"
    save_config(make_config(adapter=str(paca)), path)
    path.write_text(path.read_text().replace("  r: 3\n", "  r: 16\n"))
    assert main(["train", "--config", str(path)]) == 2  # given, if only as the default
    assert "`paca.r` (16) contradicts `adapter`" in capsys.readouterr().err

    with pytest.raises(ValueError, match="is for the task type CAUSAL_LM, and this run"):
        make_task_config("reward", adapter=str(paca))
    model = shutil.copytree(tiny_model_dir, tmp_path / "other")
    edit_tensors(model / "model.safetensors", lambda one: [x.add_(1) for x in one.values()])
    config = make_config(adapter=str(paca), model={"path": str(model)})
    refused("are not those it was trained on", config)
    assert not (tmp_path / "out").exists()
