"""Processes on CPUs, as torchrun and `accelerate launch` start them, but from the fork server.

`accelerate launch` itself, and torchrun in it, runs in docs/distributed.md.
"""

import socket
import subprocess

from pacatune.training.config_file import config_text, to_values
from tests.forks import CRASHES, Program, check_several_processes, repeated

AGENT = """
import multiprocessing, sys
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser
from pacatune.cli import main
from tests.training.launching import run_rank

multiprocessing.current_process()._config["daemon"] = False  # it has children
options = get_args_parser().parse_args(sys.argv[1:])
config = config_from_args(options)[0]
config.start_method = "fork"
elastic_launch(config, run_rank)(*options.training_script_args)
"""
"""What torchrun does; but its workers are forks that run `pacatune`."""

COMMAND = "import runpy; runpy.run_module('pacatune', run_name='__main__')"

ON_TWO_GPUS = """
import multiprocessing, sys, torch
from torch.distributed import run
from pacatune.cli import main
from tests.training.launching import run_rank

def forked(config, entrypoint):
    def start(*words):
        assert words[:3] == ("-u", "-m", "pacatune")
        return elastic_launch(config, run_rank)(*words[3:])
    config.start_method = "fork"
    return start

multiprocessing.current_process()._config["daemon"] = False  # it has children
elastic_launch, run.elastic_launch = run.elastic_launch, forked
torch.cuda.device_count = lambda: 2
sys.exit(main())
"""
"""`pacatune` where there are two GPUs, in whose place its processes find the CPU.

They are forks, as above.
"""


def run_rank(*words):
    """Be a worker of torchrun."""
    from pacatune.cli import main

    assert main(list(words)) == 0


def launch(*words, code=COMMAND, env=None, timeout=120, num_processes=2):
    """Run `pacatune`, or other code, with these words on all ranks; return what they wrote.

    `env` is what a launcher adds to the environment; each rank has `timeout` seconds.
    """
    done = _run(words, code, env, timeout, num_processes)
    if -done.returncode in CRASHES and "--overwrite" not in words:
        repeated.append(" ".join(map(str, words)))
        again = words if "--resume" in words else [*words, "--overwrite"]
        done = _run(again, code, env, timeout, num_processes)
    assert done.returncode == 0, done.stderr
    return done


def _run(words, code, env, timeout, num_processes):
    check_several_processes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    number = str(num_processes)
    all_ranks = {**(env or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    all_ranks |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "GLOO_SOCKET_IFNAME": "lo"}
    programs = [
        Program(code, *words, env={**all_ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_processes)
    ]
    done = [program.wait(timeout) for program in programs]
    status = next((one.returncode for one in done if one.returncode), 0)
    return subprocess.CompletedProcess(
        words,
        status,
        *("".join(getattr(one, name) for one in done) for name in ("stdout", "stderr")),
    )


def save_config(config, path):
    path.write_text(config_text(to_values(config), config.repeat_command(path.name)))
