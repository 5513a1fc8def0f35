"""LLaMA-Factory 0.9.5 trains PaCA, as transformers' Trainer does, bit for bit."""

import importlib.machinery
import importlib.util
import inspect
import json
import sys
import types

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pacatune.adapters.merge import merge
from pacatune.integrations.llamafactory import lora_config, main
from tests.data.conftest import chat, write_lines
from tests.integrations_apart import direct

# It is imported for sounds alone, and the package index has it only for a torch with CUDA.
if importlib.util.find_spec("torchaudio") is None:
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from llamafactory import cli
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import adapter as adapter_module
from llamafactory.model import load_tokenizer, loader
from llamafactory.train import tuner

TAGS = {
    **{"role_tag": "role", "content_tag": "content"},
    **{"user_tag": "user", "assistant_tag": "assistant"},
}
OPTIONS = {"r": 4, "paca_alpha": 8, "selection": "weight_norm", "target_modules": "all-linear"}


@pytest.fixture
def options(tiny_model_dir, chats, tmp_path):
    rows = {"file_name": chats.name, "formatting": "sharegpt", "tags": TAGS}
    rows["columns"] = {"messages": "messages"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"chats": rows}))
    options = {"model_name_or_path": str(tiny_model_dir), "stage": "sft", "do_train": True}
    options |= {"finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 8}
    options |= {"paca": {"selection": "weight_norm"}, "seed": direct.SEED, "use_cpu": True}
    options |= {"dataset": "chats", "dataset_dir": str(tmp_path), "template": "default"}
    options |= {"output_dir": str(tmp_path / "run"), "save_strategy": "no", "report_to": "none"}
    options |= {"num_train_epochs": direct.EPOCHS, "learning_rate": direct.RATE}
    options |= {"lr_scheduler_type": "constant", "optim": "adamw_torch"}
    options |= {"per_device_train_batch_size": 1, "disable_gradient_checkpointing": True}
    return options | {"disable_shuffling": True}


@pytest.fixture
def run(options, tmp_path, monkeypatch):
    """Run a command with a configuration, as a shell would; None drops an option."""

    def start(command="train", config=None, entry=main, **changes):
        path = tmp_path / "config.yaml"
        given = (options if config is None else config) | changes
        given = {name: value for name, value in given.items() if value is not None}
        path.write_text(yaml.safe_dump(given))
        monkeypatch.setattr(sys, "argv", ["llamafactory", command, str(path)])
        entry()

    return start


@pytest.fixture
def rows(options):
    """What the tool makes of the data."""
    plain = {name: value for name, value in options.items() if name != "paca"}
    model, data, training, *_ = get_train_args(plain)
    tokenizer = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data)
    made = get_dataset(template, model, data, training, stage="sft", **tokenizer)["train_dataset"]
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in made]
    assert len(rows) == 4
    return rows


def train_without_it(model, tiny_model_dir, rows, output):
    direct.train(model, tiny_model_dir, rows, output, pad_to_multiple_of=8)


def test_trains_as_transformers_does(run, rows, tiny_model_dir, tmp_path):
    run()
    direct.assert_trained(tmp_path / "run")
    model = direct.adapted(tiny_model_dir, options=OPTIONS)
    train_without_it(model, tiny_model_dir, rows, tmp_path / "direct")
    direct.assert_same(tmp_path / "run", tmp_path / "direct")

    # On from there.
    first = tmp_path / "run"
    run(adapter_name_or_path=str(first), paca=None, output_dir=str(tmp_path / "again"))
    model = direct.adapted(tiny_model_dir, adapter=first)
    train_without_it(model, tiny_model_dir, rows, tmp_path / "direct2")
    direct.assert_same(tmp_path / "again", tmp_path / "direct2")

    # Its merged model is ours.
    config = {"model_name_or_path": str(tiny_model_dir), "adapter_name_or_path": str(first)}
    config |= {"template": "default", "infer_dtype": "float32"}
    run("export", config, export_dir=str(tmp_path / "exported"))
    merge(str(tiny_model_dir), first, tmp_path / "merged")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_quantised_base(run, rows, tiny_model_dir, tmp_path):
    run(quantization_bit=4, bf16=False)
    direct.assert_trained(tmp_path / "run")
    quantization = direct.four_bits(bnb_4bit_quant_storage=torch.float32)
    model = direct.adapted(tiny_model_dir, options=OPTIONS, quantization=quantization)
    train_without_it(model, tiny_model_dir, rows, tmp_path / "direct")
    direct.assert_same(tmp_path / "run", tmp_path / "direct")


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_preferences(run, stage, tmp_path):
    columns = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
    table = {"file_name": "pairs.jsonl", "formatting": "sharegpt", "tags": TAGS, "ranking": True}
    info = {"pairs": table | {"columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    rows = []
    for number in range(4):
        question, right = chat(f"{number}?", "Yes.")
        wrong = right | {"content": "No."}
        rows.append({"messages": [question], "chosen": right, "rejected": wrong})
    write_lines(tmp_path / "pairs.jsonl", rows)
    run(dataset="pairs", stage=stage)
    direct.assert_trained(tmp_path / "run")


def test_the_page(run, options, monkeypatch):
    shown = yaml.safe_load(direct.documented("# lf.yaml"))
    made = []

    def make(model, config):
        made.append(config)
        raise InterruptedError

    monkeypatch.setattr(adapter_module, "get_peft_model", make)
    places = ("model_name_or_path", "dataset", "dataset_dir", "output_dir", "use_cpu")
    here = {name: options[name] for name in places}
    with pytest.raises(InterruptedError):
        run("train", shown, **here, bf16=False)
    (config,) = made
    assert (config.r, config.paca_alpha, config.random_seed) == (16, 16, 7)
    assert len(config.target_modules) == 7


def test_the_changed_import(run, rows, tiny_model_dir, tmp_path, monkeypatch):
    """The real `model/adapter.py` with the one import that the page names."""
    source, theirs = inspect.getsource(adapter_module), "from peft import LoraConfig, "
    assert source.count(theirs) == 1
    ours = "from pacatune.integrations.llamafactory import lora_config as LoraConfig\n"
    source = source.replace(theirs, f"{ours}from peft import ")
    changed = types.ModuleType(adapter_module.__name__)
    changed.__package__ = adapter_module.__package__
    exec(compile(source, "adapter.py", "exec"), vars(changed))
    monkeypatch.setattr(loader, "init_adapter", changed.init_adapter)
    run(paca=None, entry=cli.main)
    model = direct.adapted(tiny_model_dir, options=OPTIONS | {"selection": "random"})
    train_without_it(model, tiny_model_dir, rows, tmp_path / "direct")
    direct.assert_same(tmp_path / "run", tmp_path / "direct")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetuning_type": "full"}, "`finetuning_type` is 'full'; PaCA takes the place of"),
        ({"lora_dropout": 0.1}, r"`lora_dropout` \(0.1\) is not for `PaCA`: .* drop it"),
        ({"paca": {"r": 2}}, r"`lora_rank` \(4\) and `paca.r` \(2\) differ"),
        ({"adapter_name_or_path": "there"}, "`paca` .* has options of a new adapter"),
    ],
)
def test_refusals(run, changes, message, monkeypatch):
    monkeypatch.setattr(tuner, "run_sft", None)  # nothing is loaded before
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_the_changed_import_refuses_too():
    options = {"r": 4, "lora_alpha": 8, "use_dora": False, "target_modules": ["q_proj"]}
    kinds = {"task_type": "CAUSAL_LM", "inference_mode": False}
    config = lora_config(**options, **kinds, lora_dropout=0.0, modules_to_save=None)
    assert (config.r, config.paca_alpha, config.target_modules) == (4, 8, {"q_proj"})
    with pytest.raises(ValueError, match=r"`init_lora_weights` .'pissa'. is not for `LLaMA-Fact"):
        lora_config(**options, **kinds, init_lora_weights="pissa")
    with pytest.raises(TypeError, match="nd"):
        lora_config(**options, **kinds, nd=2)


@pytest.mark.parametrize("name", ["FORCE_TORCHRUN", "USE_RAY"])
def test_processes_of_its_own_are_refused(run, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"{name} is set.* by `torchrun --nproc-per-node N -m pac"):
        run()


def test_commands(run):
    with pytest.raises(ValueError, match=r"`command` \('trian'\) .* did you mean 'train'"):
        run("trian")
    with pytest.raises(ValueError, match="`paca` has options of training"):
        run("export")
