"""Measurements in processes of their own: their value, the end of memory, and other errors."""

import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import popen_forkserver

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pacatune.measure import step
from pacatune.measure.setting import MicroBatch
from pacatune.measure.step import (
    PHASES,
    count,
    make_step,
    run_in_child,
    run_point,
    time_together,
)
from tests.measure.conftest import HIDDEN, MLP, NUM_LAYERS, RANK, VOCAB


def _value(config, number):
    precision = torch.get_float32_matmul_precision()
    return number, torch.get_num_threads(), precision, os.getpid()


def _take_memory(config, num_bytes):
    return torch.ones(num_bytes // 4).sum().item()


def _end_by(config, number):
    os.kill(os.getpid(), number)


def _fail(config):
    raise ValueError("no memory was short")


def test_a_value_comes_from_another_process_whose_memory_ends_at_the_limit(make_config):
    *value, process = run_in_child(_value, make_config(threads=2), 7)
    assert value == [7, 2, "highest"]
    assert process != os.getpid()
    assert run_in_child(_take_memory, make_config(memory_limit=200 * 2**20), 2**20) == 2**18


@pytest.mark.parametrize(
    ("measure", "options", "error", "message"),
    [
        ((_take_memory, 2**28), {"memory_limit": 2**27}, MemoryError, "you tried to allocate 2684"),
        ((_end_by, signal.SIGKILL), {}, MemoryError, "the system ended the process"),
        ((_end_by, signal.SIGSEGV), {}, RuntimeError, "ended with exit status -11"),
        ((_end_by, signal.SIGSEGV), {"memory_limit": 2**30}, MemoryError, "the system ended the"),
        ((_value, 7), {"values": {"model_type": "vit"}}, ValueError, "causal"),
        ((_fail,), {}, ValueError, "no memory was short"),
    ],
)
def test_errors_of_another_process(make_config, measure, options, error, message):
    """Memory ended where an allocation fails, the system ends it, or it crashes under a limit."""
    function, *args = measure
    with pytest.raises(error, match=message):
        run_in_child(function, make_config(**options), *args)


def test_the_exit_status_is_asked_for_once(make_config, monkeypatch):
    """The pool's own thread asks as well, and it comes but once."""
    read = popen_forkserver.forkserver.read_signed

    def read_slowly(sentinel):
        is_ours = threading.current_thread() is threading.main_thread()
        time.sleep(0.6 if is_ours else 0.1)
        return read(sentinel)

    monkeypatch.setattr(popen_forkserver.forkserver, "read_signed", read_slowly)
    with pytest.raises(MemoryError, match="the system ended the process"):
        run_in_child(_end_by, make_config(), signal.SIGKILL)


SETTING = MicroBatch(num_rows=2, num_tokens=6)
N = 12
# Of the linear layers of the blocks: weights, and in and out features over all of them.
NUM_WEIGHTS = NUM_LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP)
NUM_IN = NUM_LAYERS * (6 * HIDDEN + MLP)
NUM_OUT = NUM_LAYERS * (5 * HIDDEN + 2 * MLP)
# Two products in the forward pass, five in the backward, which recomputes the scores.
ATTENTION = NUM_LAYERS * 2 * 6 * 6 * HIDDEN * 2
WHOLE = 2 * N * (NUM_WEIGHTS + HIDDEN * VOCAB)
LORA = (2 * N * RANK * (NUM_IN + NUM_OUT), 4 * N * RANK * (NUM_IN + NUM_OUT))
# Method -> operations beyond those of the frozen model, forward and backward.
BEYOND = {
    "frozen": (0, 0),
    "full": (0, WHOLE),
    "lora": LORA,
    "paca": (0, 2 * N * RANK * NUM_OUT),
    "paca-transient": (2 * N * RANK * NUM_OUT, 4 * N * RANK * NUM_OUT),
    "qpaca": (0, 2 * N * RANK * NUM_OUT),
    "qlora": LORA,
}


def counted(config, method, setting=SETTING):
    return {row.what: row.value for row in count(config, setting, method)}


@pytest.mark.parametrize("method", BEYOND)
def test_operations_are_those_of_the_formulas(make_config, method):
    numbers = counted(make_config(methods=(method,)), method)
    found = [round(1e9 * numbers[f"{phase} operations"]) for phase in ("forward", "backward")]
    forward, backward = BEYOND[method]
    assert found == [WHOLE + 2 * ATTENTION + forward, WHOLE + 5 * ATTENTION + backward]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_kept_bytes_are_those_of_the_formulas(make_config, dtype, itemsize):
    config = make_config(dtype=dtype)
    methods = ("frozen", "full", "lora", "paca", "paca-transient", "shira")
    rows = {method: counted(config, method) for method in methods}
    linear = {method: row["kept by linear"] for method, row in rows.items()}
    # Beside full's inputs: places and values of the sparse part of each weight.
    assert linear["shira"] > linear["full"]
    assert linear["frozen"] == 0
    columns = NUM_LAYERS * 7 * N * RANK * itemsize
    for method in ("paca", "paca-transient"):
        beyond = rows[method]["kept for backward"] - rows["frozen"]["kept for backward"]
        assert beyond == linear[method] == columns
    # One tensor for query, key and value, one for o, one for gate and up, one for down; that for o
    # is kept by the attention as well.
    inputs = NUM_LAYERS * N * (2 * HIDDEN + MLP) * itemsize
    assert (linear["full"], linear["lora"]) == (inputs, inputs + columns)
    for row in rows.values():
        parts = [value for what, value in row.items() if what.startswith("kept by ")]
        assert sum(parts) == row["kept for backward"]
    if dtype == "bfloat16":  # float32 adapters run under autocast
        finer = counted(make_config(dtype=dtype, adapter_dtype="float32"), "paca")
        for what in ("forward operations", "trained parameters", "kept by linear"):
            assert finer[what] == rows["paca"][what]


def test_peak_memory_holds_what_is_kept(make_config):
    config = make_config(methods=("full",), tokens=(2048,), seq_len=2048)
    row = counted(config, "full", MicroBatch(num_rows=1, num_tokens=2048))
    assert row["peak"] > row["kept for backward"] > 2**20


def test_every_step_is_timed_by_phases(make_config):
    config = make_config(methods=("frozen", "paca"))
    rows = time_together(config, SETTING, ("paca", "frozen"))
    times = [(row.method, row.what) for row in rows if row.unit == "ms"]
    assert times == [(m, what) for m in ("paca", "frozen") for what in (*PHASES, "step")]
    assert {row.n for row in rows} == {config.min_rounds}
    assert all(row.low <= row.value <= row.high for row in rows)
    assert all(row.value > 0 for row in rows if row.what != "optimizer")
    ratios = [(row.method, row.what) for row in rows if row.unit == "ratio"]
    assert ratios == [("paca / frozen", what) for what in ("step", "forward", "backward")]
    found = {(row.method, row.what): row.value for row in rows}
    quotient = found["paca", "step"] / found["frozen", "step"]
    assert found["paca / frozen", "step"] == pytest.approx(quotient)
    rate = 12 / (1e-3 * found["paca", "step"])
    assert found["paca", "throughput"] == pytest.approx(rate)


def test_points_have_the_rate_of_their_step(make_config):
    point = {row.what: row for row in run_point(make_config(sweep="batch"), SETTING, "paca")}
    assert point["throughput"].unit == "sentences/s"
    assert point["throughput"].value == pytest.approx(2 / (1e-3 * point["step"].value))
    (peak,) = run_point(make_config(sweep="seq-len"), SETTING, "paca")
    assert peak.what == "peak"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("method", ["frozen", "paca"])
def test_a_compiled_step_is_one_graph_and_counted_without_its_modules(
    make_config, monkeypatch, method
):
    """R8: the columns are in the graph."""
    # The compiler itself takes minutes and would be torch's test.
    compile_model, graphs = torch.nn.Module.compile, CompileCounterWithBackend("eager")

    def compile_once(self, *, dynamic):
        assert dynamic is False
        compile_model(self, backend=graphs)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_once)
    torch.compiler.reset()
    row = counted(make_config(methods=(method,), compiled=True), method)
    torch.compiler.reset()
    assert row.keys() == {"trained parameters", "peak", "kept for backward"}
    assert graphs.frame_count == 1


def test_a_step_waits_for_the_device_at_its_end_alone(make_config, monkeypatch):
    events = []

    class Watch:
        """A clock that tells what the device would be waited for."""

        def __init__(self, device, clock):
            self.num_marks = 0

        def mark(self):
            events.append("mark")
            self.num_marks += 1

        def seconds(self):
            events.append("wait")
            return tuple(float(number) for number in range(1, self.num_marks))

    monkeypatch.setattr(step, "Stopwatch", Watch)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *args: pytest.fail("waited"))
    one = make_step(make_config(), SETTING, "paca")
    assert one() == (1.0, 2.0, 3.0)
    assert events == ["mark"] * 4 + ["wait"]
    # Forward and backward of two micro-batches take turns.
    assert replace(one, accumulation=2)() == (1.0 + 3.0, 2.0 + 4.0, 5.0)
    assert one.seconds() == 6.0
