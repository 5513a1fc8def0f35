"""ms-swift 4.6 trains PaCA, as transformers' Trainer does, bit for bit, and merges it."""

import json

import pytest
from swift import export_main, rlhf_main, sft_main
from swift.pipelines import SwiftSft
from swift.tuner_plugin import tuners_map
from transformers import TrainingArguments

from pacatune.adapters.merge import merge
from pacatune.integrations.ms_swift import PacaTuner, register
from tests.data.conftest import chat, write_lines
from tests.integrations_apart import direct

OPTIONS = {"r": 4, "paca_alpha": 8, "selection": "weight_norm"}


@pytest.fixture
def arguments(tiny_model_dir, tmp_path, chats):
    plugin = tmp_path / "paca_plugin.py"
    plugin.write_text(
        "from pacatune.integrations.ms_swift import register\n\nregister(selection='weight_norm')\n"
    )

    def words(**changes):
        options = {"model": tiny_model_dir, "model_type": "llama", "template": "chatml"}
        options |= {"use_hf": True, "torch_dtype": "float32", "gradient_checkpointing": False}
        options |= {"external_plugins": plugin, "tuner_type": "paca"}
        options |= {"lora_rank": 4, "lora_alpha": 8, "seed": direct.SEED}
        options |= {"output_dir": tmp_path / "run", "add_version": False, "report_to": "none"}
        options |= {"num_train_epochs": direct.EPOCHS, "learning_rate": direct.RATE}
        options |= {"lr_scheduler_type": "constant", "optim": "adamw_torch"}
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        options |= {"weight_decay": 0, "adam_beta2": 0.999}
        options |= {"dataset": chats, "split_dataset_ratio": 0, "dataset_num_proc": 1}
        options |= {"dataset_shuffle": False, "train_dataloader_shuffle": False}
        options |= {"dataloader_num_workers": 0}
        return [
            word
            for name, value in {**options, **changes}.items()
            for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
        ]

    return words


@pytest.fixture(autouse=True)
def _trainer(monkeypatch):
    # ms-swift puts a callback of its own, which reads it, into every Trainer.
    monkeypatch.setattr(TrainingArguments, "max_epochs", None, raising=False)


@pytest.fixture
def rows(arguments):
    """What the tool makes of the data."""
    encoded = SwiftSft(arguments())._prepare_dataset()[0]
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in encoded]
    assert len(rows) == 4
    return rows


def test_trains_as_transformers_does(arguments, rows, tiny_model_dir, tmp_path):
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    model = direct.adapted(tiny_model_dir, options={**OPTIONS, "target_modules": targets})
    direct.train(model, tiny_model_dir, rows, tmp_path / "direct")
    run = tmp_path / "run" / f"checkpoint-{4 * direct.EPOCHS}"
    sft_main(arguments())
    direct.assert_trained(run)
    direct.assert_same(run, tmp_path / "direct")
    assert json.loads((run / "adapter_config.json").read_text())["columns"]

    # Its own merge, and ours.
    merged = tmp_path / "swift-merged"
    export_main(
        [
            *("--adapters", str(run), "--merge_lora", "true", "--output_dir", str(merged)),
            *("--use_hf", "true", "--torch_dtype", "float32", "--device_map", "cpu"),
        ]
    )
    merge(str(tiny_model_dir), run, tmp_path / "merged")
    direct.assert_same(merged, tmp_path / "merged", "model")

    # And on from there.
    direct.train(
        direct.adapted(tiny_model_dir, adapter=run), tiny_model_dir, rows, tmp_path / "direct2"
    )
    sft_main(arguments(adapters=run, load_args=False, output_dir=tmp_path / "again"))
    direct.assert_same(tmp_path / "again" / run.name, tmp_path / "direct2")


def test_quantised_base(arguments, rows, tiny_model_dir, tmp_path):
    model = direct.adapted(tiny_model_dir, options=OPTIONS, quantization=direct.four_bits())
    direct.train(model, tiny_model_dir, rows, tmp_path / "direct")
    sft_main(arguments(quant_method="bnb", quant_bits=4, bnb_4bit_compute_dtype="float32"))
    run = tmp_path / "run" / f"checkpoint-{4 * direct.EPOCHS}"
    direct.assert_trained(run)
    direct.assert_same(run, tmp_path / "direct")
    with pytest.raises(ValueError, match=r"trained on a quantised base.* use `pacatune merge`"):
        export_main(["--adapters", str(run), "--merge_lora", "true", "--use_hf", "true"])


def test_preferences(arguments, tmp_path):
    row = {"messages": chat("Two and two?", "Four."), "rejected_response": "No."}
    rows = write_lines(tmp_path / "pairs.jsonl", [row])
    rlhf_main([*arguments(dataset=rows), "--rlhf_type", "dpo", "--max_length", "256"])
    direct.assert_trained(tmp_path / "run" / f"checkpoint-{direct.EPOCHS}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "`lora_dropout` .0.1. is not for `--tuner_type paca`: .* dropped"),
        ({"init_weights": "pissa"}, "`init_weights` .'pissa'."),
        ({"lora_rank": 0}, "`r` .0. must be an integer of at least 1"),
    ],
)
def test_refusals(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sft_main(arguments(**options))


def test_the_page():
    exec(direct.documented("# paca_plugin.py"), {})
    assert PacaTuner.options == {"random_seed": 1}
    register()


def test_options_of_register():
    with pytest.raises(ValueError, match=r"`register.nd` does not exist"):
        register(nd=2)
    register()
    assert (tuners_map["paca"], PacaTuner.options) == (PacaTuner, {})
