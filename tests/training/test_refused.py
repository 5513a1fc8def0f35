"""What is refused, is refused before any weight is loaded and anything is written."""

import importlib.metadata

import pytest
from accelerate.utils import DeepSpeedPlugin

from pacatune import installation, pretrained
from pacatune.training import recipe
from pacatune.training.arguments import SharedDefaults
from pacatune.training.language import Task
from tests.training.runs import refused, write_rows

WRAPPED = {"packing": True, "packing_strategy": "wrapped"}
EAGER, REQUIRED = {"attn_implementation": "eager"}, {"lean": "require"}
Q = {"r": 2, "target_modules": ["q_proj"]}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LOADING = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
PARALLEL = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
SHARDED = r"`paca.selection` \(.*\) needs .* which FSDP and ZeRO-3 shard; choose"


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(Task, "load_model", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": ""}])
    yield
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"path": "bad.jsonl"}}, r"bad.jsonl, row 2: 'text' is "),
        ({"task": "grpo", "reward": ["my_rewards:no"]}, "'my_rewards' has no attribute 'no'"),
        ({"data": {"chat_template": "t.jinja"}}, r"`data.chat_template` \('t.jinja'\) is neither"),
        ({"training": {"eos_token": "<no>"}}, r"`training.eos_token` \('<no>'\) is not in the voc"),
        # The model
        ({"model": {"attn_implementation": "flash_attention_2"}}, "FlashAttention2 .* installed"),
        (REQUIRED | {"model": EAGER}, "this model cannot be all lean, which 'require' ask"),
        (REQUIRED | {"method": "lora_dropout", "lean_level": 2}, r"level 1: dropout \(0.05\) "),
        # What is trained
        ({"paca": {"rank_pattern": {"q_prj": 2}}}, r"`rank_pattern`: 'q_prj' matches nothing .* '"),
        ({"paca": Q | {"selection": {"q_proj": [0, 99]}}}, "column 99 for 'model.layers.0.self_at"),
        ({"paca": {"selection": "./none"}}, r"none'\) is no strategy, and no file or folder of th"),
        ({"paca": {"selection": "gradent"}}, r"`paca.selection` \('gradent'\) .* mean 'gradient'"),
        ({"training": WRAPPED}, r"_strategy` \('wrapped'\) lets examples attend to each other"),
    ],
)
def test_options(make_config, make_task_config, rewards_module, options, message):
    make = make_task_config if "task" in options else make_config
    refused(message, make(**options))


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (FSDP | {"FSDP_VERSION": "1"}, {}, r"`fsdp_version` \(1\) .* must be 2: PEFT loads no"),
        (FSDP | LOADING, {}, r"_loading` \(true\) .* must be false: accelerate cannot send"),
        (FSDP, {"paca": {"selection": "gradient"}}, SHARDED),
        (PARALLEL | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, r"_tp_size` \(2\) .* must be 1: `pac"),
        (PARALLEL | {"PARALLELISM_CONFIG_SP_SIZE": "2"}, {}, r"_sp_size` \(2\) .* must be 1"),
    ],
)
def test_ways_to_shard(make_config, monkeypatch, environment, options, message):
    """R6: what would lose the adapter, or columns that no process can choose."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(message, make_config(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"paca": {"selection": "gradient"}},
            r"\('gradient'\) .* whole model, which FSDP and ZeRO-3 sh",
        ),
        ({"method": "full"}, r"`zero3_save_16bit_model` \(false\) .* must be true: .* \('full'\)"),
    ],
)
def test_deepspeed(make_config, monkeypatch, options, message):
    def resolved(self):
        made = plain(self)
        made.deepspeed_plugin = DeepSpeedPlugin(zero_stage=3)
        return made

    plain = SharedDefaults.resolved
    monkeypatch.setattr(SharedDefaults, "resolved", resolved)
    refused(message, make_config(**options))


def test_what_the_machine_lacks(make_config, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    refused(r"needs bitsandbytes; pip install -e '.\[quant\]'", make_config("qpaca"))

    # Its checkpoints have parts of tensors.
    def version(name):
        return "1.14.0" if name == "accelerate" else importlib.metadata.version(name)

    config = make_config()
    with monkeypatch.context() as patch:
        patch.setattr(installation, "version", version)
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        refused("FSDP2 needs accelerate 1.15 or newer, and this is 1", config)
    monkeypatch.setattr(type(config.training), "n_gpu", 2)
    refused("2 GPUs are visible .*`torchrun --nproc_per_node 2 YOUR_SCRIPT`", config)


def test_fsdp_that_accelerate_ignores_is_said(make_config, monkeypatch, console):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    recipe.show_plan(Task(make_config()), console)
    assert console.file.getvalue().count("warning: accelerate shards nothing on CPUs") == 1
