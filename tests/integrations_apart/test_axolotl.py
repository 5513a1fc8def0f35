"""Axolotl 0.19 trains PaCA: as transformers' Trainer does, bit for bit; in 4 bits; with DPO."""

import json

import pytest
import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.cli.merge_lora import do_cli as merge_lora
from axolotl.cli.train import do_cli as train
from axolotl.common.datasets import load_datasets
from axolotl.loaders import ModelLoader, load_tokenizer
from pydantic import ValidationError

from pacatune.adapters.merge import merge
from pacatune.tuner import PacaLayer
from tests.data.conftest import write_lines
from tests.integrations_apart import direct

PLUGIN = "pacatune.integrations.axolotl.PacaPlugin"


@pytest.fixture
def write_config(tiny_model_dir, chats, tmp_path):
    def write(**changes):
        options = {"plugins": [PLUGIN], "adapter": "paca", "lora_r": 4, "lora_alpha": 8}
        options |= {"base_model": str(tiny_model_dir), "output_dir": str(tmp_path / "run")}
        data = {"path": str(chats), "ds_type": "json", "type": "chat_template"}
        options |= {"datasets": [data], "dataset_prepared_path": str(tmp_path / "prepared")}
        options |= {"sequence_len": 256, "dataset_num_proc": 1, "save_strategy": "no"}
        options["curriculum_sampling"] = True  # in the order of the file
        options |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "bf16": False}
        options |= {"optimizer": "adamw_torch", "lr_scheduler": "constant", "seed": direct.SEED}
        options |= {"num_epochs": direct.EPOCHS, "learning_rate": direct.RATE}
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump({**options, **changes}))
        return str(path)

    return write


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_trains_as_transformers_does(write_config, tiny_model_dir, tmp_path, quantization):
    checkpointing = {
        # Axolotl's default is the other kind, which sums gradients in another order.
        "gradient_checkpointing": quantization is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    own = {"target_modules": ["q_proj", "down_proj"], "selection": "weight_norm"}
    config = write_config(load_in_4bit=quantization is not None, paca=own, **checkpointing)
    rows = load_datasets(cfg=load_cfg(config)).train_dataset
    assert len(rows) == 4
    bits = quantization and direct.four_bits(bnb_4bit_quant_storage=torch.bfloat16)
    options = {"r": 4, "paca_alpha": 8, **own}
    model = direct.adapted(tiny_model_dir, options=options, quantization=bits)
    more = {"pad_to_multiple_of": 64, **checkpointing}
    direct.train(model, tiny_model_dir, rows, tmp_path / "direct", **more)
    train(config)
    run = tmp_path / "run"
    direct.assert_trained(run)
    direct.assert_same(run, tmp_path / "direct")
    saved = json.loads((run / "adapter_config.json").read_text())
    assert saved["columns"]
    assert (saved["base_quantization"] or {}).get("type") == quantization
    assert merge(str(tiny_model_dir), run, tmp_path / "merged").num_modules == 4


def test_training_goes_on(write_config, tiny_model_dir, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    train(write_config())
    config = write_config(lora_model_dir=str(run), output_dir=str(again))
    rows = load_datasets(cfg=load_cfg(config)).train_dataset
    model = direct.adapted(tiny_model_dir, adapter=run)
    direct.train(model, tiny_model_dir, rows, tmp_path / "direct", pad_to_multiple_of=64)
    train(config)
    direct.assert_same(again, tmp_path / "direct")


def test_preferences(write_config, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{n}?", "chosen": f"{2 * n}.", "rejected": "No."} for n in range(4)]
    write_lines(rows, pairs)
    names = ("prompt", "chosen", "rejected")
    kind = {f"field_{name}": name for name in names}
    kind |= {f"{name}_format": f"{{{name}}}" for name in names}
    data = {"path": str(rows), "ds_type": "json", "split": "train", "type": kind}
    train(write_config(rl="dpo", load_in_4bit=True, datasets=[data]))
    assert len(direct.deltas(tmp_path / "run")) == 2 * 7
    # An update in bfloat16 would have rounded to it.
    assert any(not torch.equal(x, x.bfloat16().float()) for x in direct.deltas(tmp_path / "run"))

    again = write_config(rl="dpo", lora_model_dir=str(tmp_path / "run"))
    cfg = load_cfg(again)
    with pytest.raises(ValueError, match=r"`lora_model_dir` .* is not read with `rl: dpo`"):
        ModelLoader(cfg, load_tokenizer(cfg)).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "`lora_dropout` .0.1. is not for `adapter: paca`: .* dropped"),
        ({"strict": True}, "`strict` .* would write the base unmerged"),
        ({"expert_parallel_size": 2}, "`expert_parallel_size`"),
        ({"paca": {"r": 16}}, "`lora_r` .4. and `paca.r` .16. differ"),
        ({"lora_target_linear": True, "lora_target_modules": ["q_proj"]}, "both say what is"),
        ({"adapter": "lora", "paca": {"random_seed": 2}}, "would be ignored by `adapter: lora`"),
    ],
)
def test_refusals(write_config, options, message):
    with pytest.raises(ValidationError, match=message):
        load_cfg(write_config(**options))


def test_the_page(write_config, tiny_model_dir, chats, tmp_path):
    shown = yaml.safe_load(direct.documented("plugins:"))
    shown |= {"base_model": str(tiny_model_dir), "output_dir": str(tmp_path / "run")}
    shown["datasets"][0]["path"] = str(chats)
    cfg = load_cfg(write_config(**shown))
    model, config = ModelLoader(cfg, load_tokenizer(cfg)).load()
    assert (config.r, config.paca_alpha, config.random_seed) == (16, 16, 7)
    assert sum(isinstance(module, PacaLayer) for module in model.modules()) == 2 * 7


def test_merge_lora_is_refused(write_config, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValidationError, match="Merge with `pacatune merge --model"):
        merge_lora(write_config())
    assert not (tmp_path / "run" / "merged").exists()


def test_lora_is_as_before(write_config):
    changes = {"adapter": "lora", "lora_target_linear": True, "lora_mlp_kernel": False}
    cfg = load_cfg(write_config(**changes, lora_qkv_kernel=False, lora_o_kernel=False))
    model, config = ModelLoader(cfg, load_tokenizer(cfg)).load()
    assert config.peft_type == "LORA"
    assert not any(isinstance(module, PacaLayer) for module in model.modules())
