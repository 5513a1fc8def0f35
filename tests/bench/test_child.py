"""Measurements in processes of their own: their value, the end of memory, and other errors."""

import os
import signal

import pytest
import torch

from pacatune.bench.child import run_in_child


def _value(config, number):
    return {"number": number, "threads": torch.get_num_threads(), "process": os.getpid()}


def _take_memory(config, num_bytes):
    return {"sum": torch.ones(num_bytes // 4).sum().item()}


def _end_by(config, number):
    os.kill(os.getpid(), number)


def _fail(config):
    raise ValueError("no memory was short")


def test_a_value_comes_from_another_process(make_config):
    value = run_in_child(_value, make_config(threads=2), 7).value
    assert (value["number"], value["threads"]) == (7, 2)
    assert value["process"] != os.getpid()


def test_memory_ends_at_the_limit(make_config):
    config = make_config(memory_limit=200 * 2**20)
    assert run_in_child(_take_memory, config, 2**20).value == {"sum": 2**18}
    outcome = run_in_child(_take_memory, config, 400 * 2**20)
    assert outcome.value is None
    assert "can't allocate memory: you tried to allocate 419430400 bytes" in outcome.reason


def test_a_process_that_the_system_ends_had_no_memory(make_config):
    outcome = run_in_child(_end_by, make_config(), signal.SIGKILL)
    assert outcome.reason == "the process was ended by SIGKILL"
    limited = make_config(memory_limit=2**30)
    assert run_in_child(_end_by, limited, signal.SIGABRT).reason.endswith("SIGABRT")
    with pytest.raises(RuntimeError, match=r"a measurement failed: _end_by\(.*exit status -6"):
        run_in_child(_end_by, make_config(), signal.SIGABRT)


def test_other_errors_are_errors(make_config):
    with pytest.raises(RuntimeError, match=r"(?s)a measurement failed: _fail.*no memory was short"):
        run_in_child(_fail, make_config())
