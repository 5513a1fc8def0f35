"""`python -m pacatune.trl`: TRL's own scripts with our configuration."""

import json

import pytest
import torch
import trl
from datasets import load_dataset
from safetensors.torch import load_file

from pacatune import PacaConfig
from pacatune.trl import main
from tests.data.conftest import write_lines

# TRL 1.16 uses the old names of checkpointing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing[_a-z]*` is deprecated:FutureWarning"
)

WORDS = ["One and one?", "Two and two?", "Three and three?", "Four and four?"]

SAME = {"learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 2}
SAME |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}


@pytest.fixture
def folder(tmp_path):
    """A data set of the kind that is asked for, as TRL's scripts load it."""

    def write(make_row):
        path = tmp_path / "data"
        path.mkdir()
        write_lines(path / "train.jsonl", map(make_row, WORDS))
        return str(path)

    return write


@pytest.fixture
def words(tiny_model_dir, tmp_path):
    options = {"model_name_or_path": tiny_model_dir, "output_dir": tmp_path / "run"}
    options |= {name: str(value).lower() for name, value in SAME.items()}
    options |= {"lora_r": 4, "lora_alpha": 8}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def tensors(path):
    return load_file(path / "adapter_model.safetensors")


def test_sft_is_that_of_the_trainer(folder, words, tiny_model_dir, tmp_path):
    data = folder(lambda word: {"prompt": word, "completion": " Many."})
    plain = trl.ModelConfig, trl.get_peft_config
    options = '{"selection": "weight_norm"}'
    main(["sft", *words, "--dataset_name", data, "--paca", options])
    assert (trl.ModelConfig, trl.get_peft_config) == plain

    dtype = {"model_init_kwargs": {"dtype": "float32"}}
    config = {"r": 4, "paca_alpha": 8, "selection": "weight_norm", "task_type": "CAUSAL_LM"}
    trainer = trl.SFTTrainer(
        str(tiny_model_dir),
        args=trl.SFTConfig(str(tmp_path / "direct"), **SAME, **dtype),
        train_dataset=load_dataset(data)["train"],
        peft_config=PacaConfig(**config),
    )
    trainer.train()
    trainer.save_model()
    run, direct = tensors(tmp_path / "run"), tensors(tmp_path / "direct")
    assert run.keys() == direct.keys()
    for name, tensor in run.items():
        assert torch.equal(tensor, direct[name]), name
        assert not name.endswith("paca_delta") or tensor.abs().max() > 0


PAIR = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
GRPO = [
    *("--reward_funcs", "think_format_reward", "--num_generations", "2"),
    *("--max_completion_length", "4", "--temperature", "2.0"),
]


@pytest.mark.parametrize(("script", "row", "more"), [("dpo", PAIR, []), ("grpo", {}, GRPO)])
def test_other_scripts(folder, words, tmp_path, script, row, more):
    config = tmp_path / "config.yaml"
    config.write_text("paca: {random_seed: 7}\n")
    data = folder(lambda word: {"prompt": [{"role": "user", "content": word}], **row})
    main([script, "--config", str(config), *words, "--dataset_name", data, *more])
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (saved["r"], saved["paca_alpha"], saved["random_seed"]) == (4, 8, 7)
    assert tensors(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora_dropout", "0.1"], r"`lora_dropout` \(0.1\) is not for `python -m pacatune.trl`"),
        (["--load_in_4bit"], "`load_in_4bit` .* bfloat16"),
        (["--use_peft", "false"], "`use_peft` is false"),
    ],
)
def test_refusals(folder, words, options, message):
    data = folder(lambda word: {"text": word})
    with pytest.raises(ValueError, match=message):
        main(["sft", *words, "--dataset_name", data, *options])
    with pytest.raises(ValueError, match=r"`script` \('stf'\) must be one of .* mean 'sft'"):
        main(["stf"])
