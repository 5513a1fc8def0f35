"""Processes in one gloo group, kept over many tests: starting them costs more than any test."""

import functools
import gc
import os
import pickle
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection

from tests.forks import CRASHES, check_several_processes, repeated, server


class Pair:
    """Runs a function on all processes at once and returns what each returned.

    Args:
        folder: Where they find each other.
        world_size: Number of processes.
        prepare: Called first in each, if given.
    """

    def __init__(self, folder, world_size=2, prepare=None):
        self.folder, self.world_size, self.prepare = folder, world_size, prepare
        self.start()

    def start(self):
        check_several_processes()
        context, rendezvous = server(), tempfile.mktemp(dir=self.folder)
        self.connections, self.processes = [], []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            where = (theirs, rank, self.world_size, rendezvous, self.prepare)
            process = context.Process(target=serve, args=where, daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function, *args, timeout=120, **options):
        """Return the results of all ranks in order; raise what went wrong on any.

        After a crash in native code, new processes run it once more.
        """
        results, errors = self._run(function, args, options, timeout)
        if errors and self.close() & {*CRASHES}:
            repeated.append(function.__name__)
            self.start()
            results, errors = self._run(function, args, options, timeout)
        if errors:
            self.close()
            raise RuntimeError("\n".join(errors))
        return results

    def _run(self, function, args, options, timeout):
        # Not Connection.send: with it torch would pass tensors as handles of the process's memory.
        message = pickle.dumps((function, args, options))
        for connection in self.connections:
            connection.send_bytes(message)
        results, errors = [], []
        for rank, connection in enumerate(self.connections):
            # Once one has failed, the others may wait for it for ever.
            result, error = receive(connection, 2 if errors else timeout)
            results.append(result)
            if error is not None:
                errors.append(f"rank {rank}: {error}")
        return results, errors

    @property
    def is_alive(self):
        return all(process.is_alive() for process in self.processes)

    def close(self):
        """End the processes; return the signals that have ended some before."""
        for process in self.processes:
            process.join(0.1)
        crashed = {-process.exitcode for process in self.processes if process.exitcode}
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.kill()
            process.join()
            connection.close()
        return crashed


def receive(connection: Connection, timeout: float):
    """Return (result, None) or (None, what went wrong)."""
    if not connection.poll(timeout):
        return None, f"no answer within {timeout} seconds"
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return None, "the process has ended"


def serve(connection: Connection, rank, world_size, rendezvous, prepare):
    """Join the group, then run what comes in until the other end is closed."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(world_size))
    if prepare is not None:
        prepare()
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    share_groups()
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    while True:
        try:
            function, args, options = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = (function(*args, **options), None)
        except Exception:
            answer = (None, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))


def share_groups():
    """Let meshes have one group of the same ranks: its threads wake a hundred times a second."""
    from torch.distributed import device_mesh

    make = device_mesh.new_group

    @functools.cache
    def new_group(ranks, options):
        return make(list(ranks), **dict(options))

    device_mesh.new_group = lambda ranks, **options: new_group(tuple(ranks), tuple(options.items()))
