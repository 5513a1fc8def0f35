"""Training that starts from a finished adapter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pacatune.adapters.folder import read_adapter
from pacatune.cli import main
from pacatune.training import LoraSection, PacaSection, train
from pacatune.training.config import RunConfig
from pacatune.training.config_file import read_values
from pacatune.training.language import load_tokenizer
from pacatune.training.start import read_start, settle
from tests.training.launching import save_config

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
PACA = {"r": 3, "paca_alpha": 6, "selection": "weight_norm", "rank_pattern": {"q_proj": 2}}
# So slow that the values of the adapter are those that it had, but for rounding.
STANDSTILL = {"max_steps": 1, "learning_rate": 1e-9, "eval_strategy": "no"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def make_first(make_config, finished, console):
    """The folder of a finished run of two steps; those of a name are trained once."""

    def make(name="paca", method="paca", **options):
        folder = finished / name
        if not folder.exists():
            training = {"output_dir": str(folder), "max_steps": 2, "eval_strategy": "no"}
            train(make_config(method, training=training, **options), console=console)
        return folder

    return make


@pytest.fixture
def paca(make_first):
    return make_first(paca=PacaSection(**PACA), data={"chat_template": TEMPLATE})


def test_columns_and_options_stay_and_values_go_on(make_config, paca, tmp_path, console):
    config = settle(make_config(adapter=str(paca), training=STANDSTILL))
    assert {name: getattr(config.paca, name) for name in PACA} == PACA
    assert load_tokenizer(config).chat_template == TEMPLATE
    report = train(config, console=console)
    out = tmp_path / "out"
    one, two = read_adapter(paca), read_adapter(out)
    assert one.modules.keys() == two.modules.keys()
    for name, update in one.modules.items():
        assert torch.equal(update.indices, two.modules[name].indices)
        assert update.delta.any()
        torch.testing.assert_close(update.delta, two.modules[name].delta, atol=1e-7, rtol=0)
    assert two.scaling("model.layers.0.self_attn.q_proj") == 3
    assert two.sidecar == one.sidecar
    assert two.config.base_model_name_or_path == one.config.base_model_name_or_path
    assert report.adapter == str(paca)
    assert f"| started from | {paca} |" in (out / "report.md").read_text()


def test_sections_may_be_used_again(make_config, paca):
    section = PacaSection()
    given = make_config(adapter=str(paca), paca=section)
    assert settle(given).paca.r == 3
    assert (given.paca.r, section) == (16, PacaSection())


def test_loss_begins_where_it_ended_and_resumed_runs_are_the_same(
    make_config, tmp_path, console, monkeypatch
):
    def run(name, **options):
        training = {"output_dir": str(tmp_path / name), "max_steps": 4, "eval_steps": 4}
        return make_config(training=training, **options)

    first = train(run("first"), console=console)
    start = str(tmp_path / "first")
    whole = train(run("whole", adapter=start), console=console)
    assert whole.eval_loss_before == pytest.approx(first.eval_loss_after, rel=1e-6)
    train(run("cut", adapter=start), console=console)
    for path in (tmp_path / "cut").iterdir():  # as if it had been killed after its checkpoint
        if path.name not in (".pacatune", "checkpoint-2", "config.yaml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["train", "--config", str(tmp_path / "cut/config.yaml"), "--resume"]) == 0
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("method", ["dora", "moslora"])
def test_other_methods(make_config, make_first, tmp_path, console, method):
    folder = make_first(method, method, lora=LoraSection(r=4, target_modules=["q_proj"]))
    config = settle(make_config(method, adapter=str(folder), training=STANDSTILL))
    assert (config.lora.r, config.lora.target_modules) == (4, ["q_proj"])
    train(config, console=console)
    one, two = (
        load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "out")
    )
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=1e-7, rtol=0)
    if method == "dora":
        with pytest.raises(ValueError, match=r"is of the kind 'dora', and `method` \('lora'\)"):
            settle(make_config("lora", adapter=str(folder)))


@pytest.mark.parametrize("selection", ["fixed", "activation_qr"])
def test_an_adapter_whose_selection_chooses_nothing(make_config, paca, tmp_path, selection):
    """Its columns are in its files; what the run saves as its options can be given again."""
    folder = shutil.copytree(paca, tmp_path / selection)
    values = json.loads((folder / "adapter_config.json").read_text()) | {"selection": selection}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    config = settle(settle(make_config(adapter=str(folder))))
    assert config.paca.selection == "random"
    assert read_start(config).columns == read_adapter(paca).config.columns
    save_config(config, tmp_path / "run.yaml")
    settle(RunConfig(**read_values(tmp_path / "run.yaml")))


def test_contradictions(make_config, paca, tmp_path, capsys):
    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            settle(make_config(**{"adapter": str(paca), **options}))

    refused(r"`paca.r` \(4\) contradicts `adapter` .*, which has 3 and", paca=PacaSection(r=4))
    refused(
        r"is of the kind 'paca', and `method` \('lora'\) trains LoRA; change one", method="lora"
    )
    refused(r"and `method` \('full'\) trains Full; change one of them", method="full")
    with pytest.raises(FileNotFoundError, match=r"adapter folder 'no/such/folder'"):
        settle(make_config(adapter="no/such/folder"))
    path = tmp_path / "run.yaml"
    save_config(settle(make_config(adapter=str(paca))), path)
    path.write_text(path.read_text().replace("  r: 3\n", "  r: 16\n"))
    assert main(["train", "--config", str(path)]) == 2  # given, if only as the default
    assert "`paca.r` (16) contradicts `adapter`" in capsys.readouterr().err


def test_tasks_with_a_reference(make_task_config, paca):
    for task in ("dpo", "kto"):
        with pytest.raises(ValueError, match="the reference is the model with the adapter off"):
            make_task_config(task, adapter=str(paca))
    with pytest.raises(ValueError, match=r"merge it \(`pacatune merge`\), which is exact, and"):
        make_task_config("grpo", adapter=str(paca), training={"beta": 0.1})


def test_task_of_another_kind(make_task_config, paca, console):
    config = make_task_config("reward", adapter=str(paca))
    with pytest.raises(ValueError, match="is for the task type CAUSAL_LM, and this run"):
        train(config, console=console)


def test_strangers_folders(make_config, paca, tiny_model_dir, tmp_path, console):
    folder = shutil.copytree(paca, tmp_path / "pickled")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled files can run code when opened and are refused"):
        train(make_config(adapter=str(folder)), console=console)
    model = shutil.copytree(tiny_model_dir, tmp_path / "other")
    tensors = load_file(model / "model.safetensors")
    tensors = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are not those it was trained on"):
        train(make_config(adapter=str(paca), model={"path": str(model)}), console=console)
    assert not (tmp_path / "out").exists()
