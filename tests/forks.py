"""Processes that begin where torch, transformers and PEFT are imported, and nothing of ours.

Their imports take seconds. One server for each process of pytest pays for them, once; what it forks
is as fresh as a new program, which imports, patches and dies alone.
"""

import contextlib
import gc
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = (
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "peft",
    "trl.trainer.sft_trainer",
    "matplotlib.figure",
)

# Tests that start several processes, which compute in step: of two such programs at a time, each
# would wait for the other's processes. One of pytest's processes runs these (tests/conftest.py).
SEVERAL_PROCESSES = (
    "tests/distributed/",
    "tests/docs/test_blocks.py::test_blocks_of_several_processes_run",
    "tests/sync/test_transport.py",
    "tests/training/test_deepspeed.py",
    "tests/training/test_distributed.py",
    "tests/training/test_restart.py",
)


# gloo was seen to crash in native code while it gathered tensors, once in a dozen runs of all.
CRASHES = (signal.SIGSEGV, signal.SIGABRT)
repeated = []
"""What was run again after such a crash; tests/conftest.py tells it."""


def check_several_processes():
    """Whoever starts several processes is one of SEVERAL_PROCESSES."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    assert test.startswith(SEVERAL_PROCESSES), f"{test}: add its file to forks.SEVERAL_PROCESSES"


def spare_the_disk():
    """Wait for no disk, which takes 4 ms for each file: no power fails in a test."""
    os.fsync = lambda handle: None


def server():
    """Start the server where none runs, and return multiprocessing's context of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTS))
    multiprocessing.forkserver.ensure_running()
    return context


class Program:
    """Code that runs as a program of its own, in a process that the server forks.

    Args:
        code: Its text.
        *arguments: What follows in `sys.argv`.
        env: Changes of the environment.
    """

    def __init__(self, code, *arguments, env=None):
        self._output = tempfile.TemporaryDirectory()
        words = [str(word) for word in arguments]
        self.process = server().Process(
            target=_execute, args=(code, words, env or {}, self._output.name), daemon=True
        )
        self.process.start()

    def is_alive(self):
        return self.process.is_alive()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=300):
        """Return its exit status and what it wrote."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        written = [Path(self._output.name, name).read_text() for name in ("stdout", "stderr")]
        self._output.cleanup()
        return subprocess.CompletedProcess("forked", self.process.exitcode, *written)


def run_python(code, *arguments, env=None):
    """Run code as a program of its own; return its exit status and what it wrote."""
    return Program(code, *arguments, env=env).wait()


def _execute(code, arguments, env, output):
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(env)
    sys.argv = ["-c", *arguments]
    spare_the_disk()
    gc.freeze()  # what the server made is never garbage
    warnings.simplefilter("ignore")
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


def run_cases(first: str, cases: dict[str, str], *, new: bool = False) -> dict[str, str]:
    """Return what the code of each case prints after `first`, or its traceback.

    `first` runs once; each case in a process of its own. Where it is `new`, nothing was imported
    before.
    """
    job = json.dumps([first, cases])
    if new:
        command = [sys.executable, "-W", "ignore", __file__, job]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    else:
        result = run_python("from tests import forks; forks._main()", job)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def _run(code: str) -> str:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})
    except BaseException:
        return printed.getvalue() + traceback.format_exc()
    return printed.getvalue().strip()


def _run_apart(code: str) -> str:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, _run(code)[-8000:].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        printed = pipe.read()
    os.wait()
    return printed


def _main() -> None:
    warnings.simplefilter("ignore")
    first, cases = json.loads(sys.argv[1])
    exec(first, {})
    print(json.dumps({name: _run_apart(code) for name, code in cases.items()}))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    _main()
