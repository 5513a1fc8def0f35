"""Runs that a launcher starts again by the same command, after a process was killed."""

import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from pacatune.training import train
from pacatune.training.output import run_folder
from pacatune.training.recipe import start_or_resume
from tests.examples.test_launch import edited, started
from tests.forks import Program
from tests.training.launching import AGENT, COMMAND, launch, save_config
from tests.training.runs import QUIET, assert_same
from tests.training.test_distributed import config_of


def workers_of(agent):
    pid = agent.process.pid
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_process_is_started_again(make_config, data_path, tmp_path):
    """Two agents of torchrun with two processes each find each other on the loopback interface."""
    config = config_of(make_config, data_path, tmp_path, "killed", 2)
    config.data.eval_path = None
    save_config(config, tmp_path / "run.yaml")
    whole = ["--training.output_dir", tmp_path / "whole"]
    launch("train", "--config", tmp_path / "run.yaml", *whole, num_processes=4)

    text = edited("torchrun.sh", NODES=2, GPUS=2, CONFIG=tmp_path / "run.yaml")
    given = started("torchrun.sh", text, tmp_path, "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given[given.index("--rdzv-endpoint") + 1] = f"127.0.0.1:{port}"
    env = {"GLOO_SOCKET_IFNAME": "lo"}
    env |= dict(re.findall(r"^export (\w+)=(\w+)$", text, re.MULTILINE))
    agents = [Program(AGENT, *given, env=env) for _ in range(2)]
    folder = tmp_path / "killed"
    while not (folder / "checkpoint-2").exists():
        assert all(agent.is_alive() for agent in agents), [agent.wait().stderr for agent in agents]
        time.sleep(0.01)
    os.kill(workers_of(agents[0])[0], signal.SIGKILL)
    done = [agent.wait() for agent in agents]
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert "".join(one.stdout for one in done).count("resuming after step") == 1
    assert_same(tmp_path / "whole", folder)


def test_a_run_without_a_checkpoint_begins_anew(make_config, tmp_path, console):
    """Killed before its first checkpoint, while it saved it."""
    whole = make_config(training={"output_dir": str(tmp_path / "whole"), "max_steps": 2})
    start_or_resume(whole, console=console)
    assert "resuming" not in console.file.getvalue()
    folder = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", folder)
    for name in ("report.json", "checkpoint-2/trainer_state.json"):
        (folder / name).unlink()
    config = make_config(training={"output_dir": str(folder), "max_steps": 2})
    start_or_resume(config, console=console)
    assert f"deleting from {folder}: README.md, adapter_config.json" in console.file.getvalue()
    assert_same(tmp_path / "whole", folder)

    # One that is finished stays as it is, whatever is started again.
    before = (folder / "report.json").stat().st_mtime_ns
    assert start_or_resume(config, console=console) is None
    assert f"the run in {folder} is finished" in console.file.getvalue()
    assert (folder / "report.json").stat().st_mtime_ns == before
    other = make_config(training={"output_dir": str(folder), "max_steps": 3})
    with pytest.raises(ValueError, match=r"other options.*training.max_steps: 2 -> 3"):
        start_or_resume(other, console=console)


def test_killed_before_its_configuration_was_written(make_config, tmp_path, console):
    run_folder(tmp_path / "out").begin()
    (tmp_path / "out/.pacatune/partial").write_text("task")
    assert start_or_resume(make_config(training={"max_steps": 1}), console=console).num_steps == 1


def test_processes_that_see_different_folders_are_refused(make_config, tmp_path):
    train(make_config(training={"max_steps": 2}), console=QUIET)
    (tmp_path / "out/report.json").unlink()
    save_config(make_config(training={"max_steps": 2}), tmp_path / "run.yaml")
    elsewhere = f"sys.argv += ['--training.output_dir', f'{tmp_path}/out' + '-2' * rank]"
    code = f"import os, sys; rank = int(os.environ['RANK']); {elsewhere}; {COMMAND}"
    with pytest.raises(AssertionError, match=r"see different things in .*checkpoint-2, no checkpo"):
        launch("train", "--config", tmp_path / "run.yaml", "--auto_resume", code=code)
