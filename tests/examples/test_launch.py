"""Files to copy: a real shell runs each, and what it starts is read by the real launchers.

Of the cluster's commands, small programs stand in that start one node of the job.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"
ON_SLURM = {
    "SLURM_JOB_ID": "3210042",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "16",
}
ON_SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "CONFIG": "run.yaml",
}
ON_KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29500",
}
# File -> what its environment sets, and where the nodes find each other.
PLACES = {
    "torchrun.sh": ({"PORT": "29511"}, "first:29511"),
    "slurm.sh": (ON_SLURM, "n1:20042"),
    "skypilot.yaml": (ON_SKYPILOT, "10.0.0.1:29500"),
    "kubeflow.yaml": (ON_KUBEFLOW, "job-node-0-0.job:29500"),
}
STAND_INS = {
    "torchrun": "printf '%s\\0' \"$@\" > started",
    "scontrol": "printf 'n1\\nn2\\n'",
    "srun": 'shift; exec "$@"',
}


def edited(name, **values):
    """The text of a file in which a user has changed some of the lines that are to be edited."""
    text = (LAUNCH / name).read_text()
    for variable, value in values.items():
        line = f"{variable}={shlex.quote(str(value))}".replace("\\", r"\\")
        text, number = re.subn(rf"^{variable}=\S+", line, text, flags=re.MULTILINE)
        assert number == 1, variable
    return text


def script_of(name, text):
    if name == "skypilot.yaml":
        return yaml.safe_load(text)["run"]
    if name == "kubeflow.yaml":
        *shell, script = yaml.safe_load(text)["spec"]["trainer"]["command"]
        assert shell == ["bash", "-euc"]
        return script
    return text


def started(name, text, folder, *words):
    """The words that torchrun gets on one node of the job."""
    for program, code in STAND_INS.items():
        path = folder / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{code}\n")
        path.chmod(0o755)
    (folder / "launch.sh").write_text(script_of(name, text))
    env = os.environ | PLACES[name][0]
    env["PATH"] = f"{folder / 'bin'}{os.pathsep}{env['PATH']}"
    subprocess.run(["bash", "-eu", "launch.sh", *words], cwd=folder, env=env, check=True)
    return (folder / "started").read_text().split("\0")[:-1]


@pytest.mark.parametrize("name", PLACES)
def test_torchrun_gets_the_run_and_the_size_of_the_job(name, tmp_path):
    from torch.distributed.run import get_args_parser

    given = started(name, edited(name), tmp_path, "first")
    options = get_args_parser().parse_args(given)
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "8", 3)
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", PLACES[name][1])
    assert (options.module, options.training_script) == (True, "pacatune")
    assert options.training_script_args == ["train", "--config", "run.yaml", "--auto_resume"]
    if name == "kubeflow.yaml":
        run = yaml.safe_load((tmp_path / "run.yaml").read_text())
        assert run.keys() == {"model", "data", "training"}


def test_sbatch_reads_all_its_directives():
    before, _, after = (LAUNCH / "slurm.sh").read_text().partition("\nCONFIG=run.yaml")
    assert before.count("\n#SBATCH --") == 7
    assert all(line.startswith("#") for line in before.splitlines())
    assert "#SBATCH" not in after


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_takes_its_file_on_one_machine_and_on_several(name, tmp_path):
    options, text = accelerate_options(LAUNCH / f"{name}.yaml"), edited(f"{name}.yaml")
    assert (options.num_machines, options.num_processes, options.machine_rank) == (1, 2, 0)
    assert options.mixed_precision == "no"
    for line, other in (("machines: 1", 2), ("processes: 2", 16), ("process_ip: null", "first")):
        assert text.count(line) == 1
        text = text.replace(line, f"{line.partition(' ')[0]} {other}")
    (tmp_path / "accelerate.yaml").write_text(text)
    words = ["--machine_rank", "1", "--max_restarts", "3", "--rdzv_backend", "c10d"]
    options = accelerate_options(tmp_path / "accelerate.yaml", *words)
    env = environment_of(options)
    assert (options.nnodes, options.nproc_per_node, options.node_rank) == ("2", "8", 1)
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", "first:29500")
    assert (env.get("ACCELERATE_USE_FSDP"), env.get("ACCELERATE_USE_DEEPSPEED")) == {
        "ddp": (None, None),
        "fsdp2": ("true", None),
        "zero3": (None, "true"),
    }[name]
    if name == "fsdp2":
        assert env["FSDP_VERSION"] == "2"
    if name == "zero3":
        assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
        assert env["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


def accelerate_options(path, *words):
    """What `accelerate launch` makes of a file and the words beside it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ["--config_file", str(path), *words, "-m", "pacatune"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def environment_of(options):
    """What the processes of `accelerate launch` get."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    if not options.use_deepspeed:
        return prepare_multi_gpu_env(options)
    options.deepspeed_fields_from_accelerate_config = ""
    command, env = prepare_deepspeed_cmd_env(options)
    assert command is None  # accelerate starts torchrun, and not DeepSpeed's own launcher by ssh
    return env
