"""Launch files: each is run by a real shell, and what it starts is read by the real launchers.

Of the cluster's commands, small programs stand in that start one node of the job.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pacatune.cli import launch, main

ROOT = Path(__file__).parents[2]
PARSERS = ROOT / ".venv-launch" / "bin" / "python"
ON_HOST = {"PORT": "29511"}
ON_SLURM = {
    "SLURM_JOB_ID": "3210042",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NODEID": "1",
    "SLURM_CPUS_PER_TASK": "4",
}
ON_SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
ON_KUBEFLOW = {
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29500",
    "PET_NODE_RANK": "1",
}
# Format -> what its environment sets, and what the first node's address and port are.
PLACES = {
    "torchrun": (ON_HOST, "first", 29511),
    "slurm": (ON_SLURM, "n1", 20042),
    "skypilot": (ON_SKYPILOT, "10.0.0.1", 29500),
    "kubeflow": (ON_KUBEFLOW, "job-node-0-0.job", 29500),
}
STAND_INS = {
    "torchrun": "printf '%s\\0' torchrun \"$@\" > started",
    "accelerate": "printf '%s\\0' accelerate \"$@\" > started",
    "scontrol": "printf 'n1\\nn2\\n'",
    "srun": 'shift; exec "$@"',
    "pip": 'echo "$@" > installed',
    "python": f'exec {shlex.quote(sys.executable)} "$@"',
}


@pytest.fixture
def config_path(tmp_path):
    """A run whose file has a name that shells take apart."""
    path = tmp_path / "my run's.yaml"
    (tmp_path / "data.jsonl").touch()
    path.write_text(
        "  model: {path: some/model}  # indented, as YAML allows\n"
        f"  data: {{path: {tmp_path / 'data.jsonl'}}}\n"
        "  training:\n    output_dir: out\n    per_device_train_batch_size: 3\n"
        "    gradient_accumulation_steps: 2\n    tf32: true\n    bf16: true\n"
    )
    return path


def text_of(*words):
    return launch.render(launch._parse([str(word) for word in words]))


def script_of(place, text):
    """The shell script of a launch file."""
    if place == "skypilot":
        return yaml.safe_load(text)["run"]
    if place == "kubeflow":
        *shell, script = yaml.safe_load(text)["spec"]["trainer"]["command"]
        assert shell == ["bash", "-euc"]
        return script
    return text


def started(place, text, folder, *words):
    """The words of the launcher that one node of the job starts."""
    for name, code in STAND_INS.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{code}\n")
        path.chmod(0o755)
    (folder / "launch.sh").write_text(script_of(place, text))
    env = os.environ | PLACES[place][0]
    env["PATH"] = f"{folder / 'bin'}{os.pathsep}{env['PATH']}"
    subprocess.run(["bash", "-eu", "launch.sh", *words], cwd=folder, env=env, check=True)
    return (folder / "started").read_text().split("\0")[:-1]


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_torchrun_gets_the_run_and_the_size_of_the_job(place, nodes, config_path, tmp_path):
    from torch.distributed.run import get_args_parser

    words = ["--print", place, "--config", config_path, "--nodes", nodes, "--gpus", 4]
    words += ["--max-restarts", 3] if nodes == 2 else []
    text = text_of(*words, "--", "--training.run_name", "a  name")
    name, *given = started(place, text, tmp_path, "first")
    assert name == "torchrun"
    options = get_args_parser().parse_args(given)
    assert (options.nnodes, options.nproc_per_node) == (str(nodes), "4")
    assert (options.module, options.training_script) == (True, "pacatune")
    path = "run.yaml" if place == "kubeflow" else str(config_path)
    run_name = ["--training.run_name", "a  name"]
    again = ["--auto_resume"] if nodes == 2 else []
    assert options.training_script_args == ["train", "--config", path, *run_name, *again]
    assert options.max_restarts == (3 if nodes == 2 else 0)
    if nodes == 1:
        assert options.standalone
    else:
        _, head, port = PLACES[place]
        assert options.rdzv_backend == "c10d"
        assert options.rdzv_endpoint == f"{head}:{port}"
    if place == "kubeflow":
        assert yaml.safe_load((tmp_path / path).read_text()) == yaml.safe_load(
            config_path.read_text()
        )


@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
@pytest.mark.parametrize("place", PLACES)
def test_accelerate_gets_its_file_and_the_rank_of_the_node(place, sharding, config_path, tmp_path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    shown = {"torchrun": f"accelerate-{sharding}"}.get(place, place)
    words = ["--print", shown, "--config", config_path, "--nodes", 2, "--gpus", 4]
    words += ["--max-restarts", 3]
    text = text_of(*words, *([] if place == "torchrun" else [f"--{sharding}"]))
    name, launch_word, *given = started(place, text, tmp_path, "first", "1")
    assert (name, launch_word) == ("accelerate", "launch")
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    env = environment_of(options)
    _, head, port = PLACES[place]
    assert (options.nnodes, options.nproc_per_node, options.node_rank) == ("2", "4", 1)
    assert options.rdzv_endpoint == f"{head}:{port}"
    assert (options.max_restarts, options.rdzv_backend) == (3, "c10d")
    if sharding == "fsdp2":
        assert (env["ACCELERATE_USE_FSDP"], env["FSDP_VERSION"]) == ("true", "2")
    else:
        assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
        assert env["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
    installs = "pip install 'pacatune[train]'" + (" deepspeed\n" if sharding == "zero3" else "\n")
    assert (installs in text) == (place in ("skypilot", "kubeflow"))
    path = "run.yaml" if place == "kubeflow" else str(config_path)
    assert [options.training_script, *options.training_script_args] == [
        "pacatune",
        *("train", "--config", path, "--auto_resume"),
    ]


def environment_of(options):
    """What the processes of `accelerate launch` get."""
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    if not options.use_deepspeed:
        return prepare_multi_gpu_env(options)
    options.deepspeed_fields_from_accelerate_config = ""
    command, env = prepare_deepspeed_cmd_env(options)
    assert command is None  # accelerate starts torchrun, and not DeepSpeed's own launcher by ssh
    return env


def test_the_command_prints_what_sbatch_reads(config_path, tmp_path, capsys):
    words = ["--print", "slurm", "--config", str(config_path), "--nodes", "2", "--gpus", "8"]
    assert main(["launch", *words]) == 0
    out, err = capsys.readouterr()
    directives = [line for line in out.splitlines() if line.startswith("#SBATCH")]
    assert directives[:4] == [
        "#SBATCH --job-name=pacatune-my-run-s",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
    ]
    assert out.startswith("#!/usr/bin/env bash\n")
    assert out.endswith("\n")
    assert "16 processes x 3 examples x 2 accumulated = 96 examples per optimizer step" in err
    assert "restarts" not in err
    assert f"every node needs: data.path ({tmp_path / 'data.jsonl'})" in err
    # sbatch runs nothing before it has read its directives.
    first_command = out.index("set -euo")
    assert all(out.index(line) < first_command for line in directives)


def test_what_restarts_need_is_said(config_path, capsys):
    words = ["launch", "--print", "slurm", "--config", str(config_path), "--nodes", "2"]
    words += ["--max-restarts", "2", "--", "--training.save_strategy", "no"]
    assert main(words) == 0
    err = capsys.readouterr().err
    assert "for restarts, all nodes must share the disk of out\n" in err
    assert "`training.save_strategy` is no: after a restart, the run begins anew" in err


@pytest.mark.parametrize("place", ["skypilot", "kubeflow"])
def test_an_image_spares_the_install(place, config_path, tmp_path):
    words = ["--print", place, "--config", config_path, "--gpus", 2]
    plain = yaml.safe_load(text_of(*words))
    values = yaml.safe_load(text_of(*words, "--image", "host:5000/our: image"))
    if place == "skypilot":
        assert plain["setup"] == "pip install 'pacatune[train]'\n"
        assert "setup" not in values
        assert values["resources"] == {
            "accelerators": "H100:2",
            "image_id": "docker:host:5000/our: image",
        }
        return
    trainer = values["spec"]["trainer"]
    assert trainer["image"] == "host:5000/our: image"
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 2}}
    assert "image" not in plain["spec"]["trainer"]
    assert "pip install" in script_of(place, json.dumps(plain))
    assert "pip install" not in script_of(place, json.dumps(values))


def test_a_file_is_written_once(config_path, tmp_path, capsys):
    words = ["launch", "--print", "torchrun", "--config", str(config_path)]
    words += ["--output", str(tmp_path / "launch.sh")]
    assert main(words) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "launch.sh").read_text().startswith("#!/usr/bin/env bash\n")
    assert main(words) == 2
    assert "launch.sh exists; remove it, or name another file." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "argument --nodes: '0' is not a number of at least 1"),
        (["--gpus", "two"], "argument --gpus: 'two' is not a number of at least 1"),
        (["--print", "slrum"], "must be one of torchrun, accelerate-fsdp2, accelerate-zero3, sl"),
        (["--fsdp2", "--zero3"], "argument --zero3: not allowed with argument --fsdp2"),
        (
            ["--print", "accelerate-fsdp2", "--zero3"],
            "`--zero3` contradicts --print accelerate-fsdp2; drop one.",
        ),
        (["--image", "i"], "`--image` is for --print skypilot and kubeflow."),
        (["--accelerator", "A100"], "`--accelerator` is for --print skypilot."),
        (["--name", "My_run"], "`--name` ('My_run') must be at most 50 small letters"),
        (
            ["--max-restarts", "2", "--", "--overwrite"],
            "`--max-restarts` (2) lets the run go on by itself, and each restart would repeat --ov",
        ),
        (["--config", "no.yaml"], "config file no.yaml does not exist"),
        (["--", "--training.learning_rte", "1"], "did you mean 'training.learning_rate'?"),
        (["--", "--training.max_steps", "many"], "`training.max_steps` (many) must be an integer"),
        (["--", "--method", "lroa"], "`method` ('lroa') must be one of"),
    ],
)
def test_what_is_wrong_is_one_line(words, message, config_path, capsys):
    assert main(["launch", "--print", "slurm", "--config", str(config_path), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_name_from_any_file_is_one_that_kubernetes_takes(tmp_path):
    for stem in ("Über-lang" * 20, "...", "a_b"):
        options = launch._parse(["--print", "slurm", "--config", str(tmp_path / f"{stem}.yaml")])
        assert launch._NAME.fullmatch(options.name), options.name


def read_by_its_parser(place, text, tmp_path):
    """A launch file as the package reads it that it is for."""
    if not PARSERS.exists():
        pytest.skip("`make test-launch` installs SkyPilot and Kubeflow's models")
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    command = [PARSERS, ROOT / "tools" / "read_launch.py", place, path]
    env = os.environ | {"HOME": str(tmp_path)}  # where SkyPilot keeps its state
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("image", [[], ["--image", "ours:5"]])
def test_kubeflow_takes_the_job(image, config_path, tmp_path):
    words = ["--print", "kubeflow", "--config", config_path, "--nodes", 2, "--gpus", 8, *image]
    text = text_of(*words)
    # It drops what it does not know.
    assert read_by_its_parser("kubeflow", text, tmp_path) == yaml.safe_load(text)


@pytest.mark.parametrize("image", [[], ["--image", "ours:5"]])
def test_skypilot_takes_the_task(image, config_path, tmp_path):
    words = ["--print", "skypilot", "--config", config_path, "--nodes", 2, "--gpus", 8, *image]
    text = text_of(*words)
    task = read_by_its_parser("skypilot", text, tmp_path)
    values = yaml.safe_load(text)
    assert task["resources"].pop("accelerators") == {"H100": 8}
    del values["resources"]["accelerators"]
    for name in ("name", "num_nodes", "workdir", "run"):
        assert task[name] == values[name]
    assert task.get("setup") == values.get("setup")
    images = task["resources"].get("image_id") or {}  # by region
    assert list(images.values()) == [f"docker:{name}" for name in image[1:]]
