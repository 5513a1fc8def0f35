"""DeepSpeed under `pacatune train`: two processes on CPUs (gloo) give the adapter of one.

`make test-distributed` runs this file; no other test of a Trainer may find DeepSpeed.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pacatune.cli import main
from tests.distributed import zero
from tests.docs.blocks import read_blocks
from tests.examples.test_launch import LAUNCH, environment_of
from tests.training import runs
from tests.training.launching import launch, save_config
from tests.training.runs import assert_same, read_json
from tests.training.test_distributed import config_of, cut, launched

TIMEOUT = 600
# DeepSpeed keeps smaller weights whole, which are all of the tiny model's.
SHARD_ALL = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.fixture(scope="module")
def built():
    return zero.build()


@pytest.fixture
def environment(built, tmp_path):
    """The environment that `accelerate launch` makes of our file, by stage."""

    def make(stage):
        words = ["--zero_stage", str(stage)]
        if stage == 3:
            path = tmp_path / "deepspeed.json"
            path.write_text(json.dumps(SHARD_ALL))
            words += ["--deepspeed_config_file", str(path)]
        return environment_of(launched("zero3", *words)) | built

    return make


@pytest.fixture
def train_both(make_config, data_path, tmp_path, environment):
    """Train in one process, and in two with DeepSpeed; return both folders."""

    def run(stage, *, steps, method="paca", quantization=None, adapter=None, **training):
        folders = tmp_path / "one", tmp_path / "two"
        start = [] if adapter is None else ["--adapter", str(adapter)]
        for folder, batch_size in zip(folders, (8, 4), strict=True):
            names = (data_path, tmp_path, folder.name)
            config = config_of(make_config, *names, batch_size, quantization)
            config.method = method
            config.paca.modules_to_save = ["lm_head"] if adapter else None
            vars(config.training).update(max_steps=steps, save_steps=4, **training)
            save_config(config, folder.with_suffix(".yaml"))
        assert main(["train", "--config", str(folders[0].with_suffix(".yaml")), *start]) == 0
        words = ["train", "--config", folders[1].with_suffix(".yaml"), *start]
        launch(*words, env=environment(stage), timeout=TIMEOUT)
        one, two = (read_json(folder, "report.json") for folder in folders)
        assert two["num_trainable_parameters"] == one["num_trainable_parameters"]
        assert two["num_steps"] == steps
        assert dict(one["train_losses"]) == pytest.approx(dict(two["train_losses"]), rel=1e-4)
        return folders

    return run


# Sums of gradients in another order: 2e-8 is usual, and 1e-6 was seen of single values whose first
# gradients are near 0, by which Adam divides. A step moves a value by 5e-3.
assert_close = partial(runs.assert_close, rtol=0, atol=5e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_equal_one(train_both, environment, stage):
    """R6: with states, gradients or weights sharded, resumed too."""
    one, two = train_both(stage, steps=10)
    assert_close(one, two)
    parts = list((two / "checkpoint-8").glob("global_step8/*_optim_states.pt"))
    assert len(parts) == 2

    # Resumed from the middle, the very same.
    folder = cut(two, 7, "cut")
    words = ["train", "--config", two.with_suffix(".yaml"), "--resume"]
    words += ["--training.output_dir", folder]
    launch(*words, env=environment(stage), timeout=TIMEOUT)
    assert_same(two, folder)


def test_all_weights_are_sharded_and_saved_whole(train_both):
    one, two = train_both(3, steps=3, method="full", learning_rate=1e-3)
    assert_close(one, two, "model.safetensors")


def test_starting_from_an_adapter_with_a_head(train_both, make_config, data_path, tmp_path):
    first = config_of(make_config, data_path, tmp_path, "first", 8)
    first.paca.modules_to_save = ["lm_head"]
    vars(first.training).update(max_steps=2)
    save_config(first, tmp_path / "first.yaml")
    assert main(["train", "--config", str(tmp_path / "first.yaml")]) == 0
    one, two = train_both(3, steps=4, adapter=tmp_path / "first")
    assert_close(one, two)
    assert "base_model.model.lm_head.weight" in load_file(two / "adapter_model.safetensors")


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_in_four_bits(train_both, stage):
    pytest.importorskip("bitsandbytes")
    assert_close(*train_both(stage, steps=3, quantization="nf4"))


def test_bfloat16_is_that_of_deepspeed(train_both, tmp_path):
    """It holds all weights in it; those that its optimizer steps on have 32 bits."""
    _, two = train_both(3, steps=3, bf16=True)
    saved = load_file(two / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if "delta" in name} == {torch.bfloat16}
    assert main(["merge", "--adapter", str(two), "--output", str(tmp_path / "merged")]) == 0


def test_the_command_of_the_page(built, make_config, data_path, tmp_path):
    """`accelerate launch` itself, with our file as it is."""
    blocks = read_blocks("docs/distributed.md")
    (code,) = [block.code for block in blocks if "--config_file zero3.yaml" in block.code]
    shutil.copy(LAUNCH / "zero3.yaml", tmp_path)
    config = config_of(make_config, data_path, tmp_path, "my-run", 4)
    config.training.max_steps = 2
    save_config(config, tmp_path / "run.yaml")
    env = os.environ | built | {"PYTHONPATH": os.environ["PYTHONPATH"]}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("my-run/checkpoint-2/global_step2/zero_pp_rank_1_*"))
    assert main(["inspect", str(tmp_path / "my-run")]) == 0
