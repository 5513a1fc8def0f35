"""Two processes on CPUs, as torchrun and `accelerate launch` start them, but from the fork server.

`accelerate launch` itself, and torchrun in it, runs in docs/distributed.md.
"""

import socket
import subprocess

from tests.forks import Program

COMMAND = "import runpy; runpy.run_module('pacatune', run_name='__main__')"


def launch(*words, code=COMMAND, env=None, timeout=120):
    """Run `pacatune` with these words on both ranks; return what they wrote, one after the other.

    Args:
        *words: The command line.
        code: Another program.
        env: What a launcher adds to the environment.
        timeout: Seconds for both.
    """
    done = _run(words, code, env, timeout)
    if done.returncode == -11 and "--overwrite" not in words:
        # gloo was seen to crash in native code while it gathered tensors, once in a dozen runs.
        done = _run([*words, "--overwrite"], code, env, timeout)
    assert done.returncode == 0, done.stderr
    return done


def _run(words, code, env, timeout):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {**(env or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    programs = [
        Program(code, *words, env={**both, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    done = [program.wait(timeout) for program in programs]
    status = next((one.returncode for one in done if one.returncode), 0)
    return subprocess.CompletedProcess(
        words,
        status,
        *("".join(getattr(one, name) for one in done) for name in ("stdout", "stderr")),
    )
