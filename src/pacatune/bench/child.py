"""Run one measurement in a process of its own, so that memory that ends ends nothing else."""

import logging
import multiprocessing
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from pacatune.bench.config import BenchConfig
from pacatune.bench.device import is_out_of_memory, limit_memory
from pacatune.bench.measure import prepare

__all__ = ["Outcome", "run_in_child"]

_PRELOADED = ["pacatune.bench.preload"]
_MEASURED, _OUT_OF_MEMORY, _FAILED = "measured", "out of memory", "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of one measurement."""

    value: dict[str, Any] | None
    """What was measured; None where memory ended."""
    reason: str = ""
    """How memory ended."""


def run_in_child(
    measure: Callable[..., dict[str, Any]], config: BenchConfig, *args: Any
) -> Outcome:
    """Call `measure(config, *args)` in a new process, within `config.memory_limit`.

    Raises:
        RuntimeError: If it fails for another reason than memory.
    """
    context = _context(config)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, measure, config, args))
    process.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        kind, value = "died", None
    except BaseException:
        process.kill()
        raise
    finally:
        receiver.close()
        process.join()
    if kind == _MEASURED:
        return Outcome(value)
    if kind == _OUT_OF_MEMORY:
        return Outcome(None, value)
    number = -(process.exitcode or 0)
    if kind == "died" and number in _signs_of_memory(config):
        return Outcome(None, f"the process was ended by {signal.Signals(number).name}")
    detail = value or f"exit status {process.exitcode}"
    raise RuntimeError(f"a measurement failed: {measure.__name__}{args}: {detail}")


def _signs_of_memory(config: BenchConfig) -> tuple[int, ...]:
    """Signals by which a process ends that takes too much, or cannot go on without memory."""
    if sys.platform == "win32":
        return ()
    limited = (signal.SIGABRT, signal.SIGSEGV) if config.memory_limit is not None else ()
    return (signal.SIGKILL, *limited)


def _context(config: BenchConfig) -> Any:
    """A server that has imported everything forks fast; accelerators must not be forked."""
    if sys.platform != "linux" or config.torch_device.type != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _serve(
    sender: Connection,
    measure: Callable[..., dict[str, Any]],
    config: BenchConfig,
    args: tuple[Any, ...],
) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # between the packages that we build on
    try:
        prepare(config)
        if config.memory_limit is not None:
            limit_memory(config.memory_limit, config.torch_device)
        sender.send((_MEASURED, measure(config, *args)))
    except KeyboardInterrupt:
        return
    except BaseException as error:
        if is_out_of_memory(error):
            sender.send((_OUT_OF_MEMORY, " ".join(str(error).split())[:300] or "MemoryError"))
        else:
            sender.send((_FAILED, traceback.format_exc()))
