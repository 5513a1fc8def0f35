"""Measurements in processes of their own: their value, the end of memory, and other errors."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pacatune.measure import step
from pacatune.measure.methods import Contender
from pacatune.measure.setting import MicroBatch
from pacatune.measure.step import (
    PHASES,
    Step,
    count,
    make_step,
    prepare,
    run_in_child,
    run_point,
    time_together,
)
from tests.measure.conftest import HIDDEN, MLP, NUM_LAYERS, RANK, VOCAB


def _value(config, number):
    return {"number": number, "threads": torch.get_num_threads(), "process": os.getpid()}


def _take_memory(config, num_bytes):
    return {"sum": torch.ones(num_bytes // 4).sum().item()}


def _end_by(config, number):
    os.kill(os.getpid(), number)


def _fail(config):
    raise ValueError("no memory was short")


def test_a_value_comes_from_another_process(make_config):
    value = run_in_child(_value, make_config(threads=2), 7)
    assert (value["number"], value["threads"]) == (7, 2)
    assert value["process"] != os.getpid()


def test_memory_ends_at_the_limit(make_config):
    config = make_config(memory_limit=200 * 2**20)
    assert run_in_child(_take_memory, config, 2**20) == {"sum": 2**18}
    with pytest.raises(MemoryError, match="can't allocate memory: you tried to allocate 419430400"):
        run_in_child(_take_memory, config, 400 * 2**20)


def test_a_process_that_the_system_ends_had_no_memory(make_config):
    with pytest.raises(MemoryError, match="the system ended the process"):
        run_in_child(_end_by, make_config(), signal.SIGKILL)


def test_a_process_that_crashes_had_memory(make_config):
    with pytest.raises(RuntimeError, match="ended with exit status -11"):
        run_in_child(_end_by, make_config(), signal.SIGSEGV)
    with pytest.raises(MemoryError, match="the system ended the process"):
        run_in_child(_end_by, make_config(memory_limit=2**30), signal.SIGSEGV)


def test_what_prepares_a_process_may_fail(make_config):
    values = {"model_type": "vit"}
    with pytest.raises(ValueError, match="causal"):
        run_in_child(_value, make_config(values=values), 7)


def test_other_errors_are_errors(make_config):
    with pytest.raises(ValueError, match="no memory was short"):
        run_in_child(_fail, make_config())


SETTING = MicroBatch(num_rows=2, num_tokens=6)
N = 12
# Of the linear layers of the blocks: weights, and in and out features over all of them.
NUM_WEIGHTS = NUM_LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP)
NUM_IN = NUM_LAYERS * (6 * HIDDEN + MLP)
NUM_OUT = NUM_LAYERS * (5 * HIDDEN + 2 * MLP)
# Two products in the forward pass, five in the backward, which recomputes the scores.
ATTENTION = NUM_LAYERS * 2 * 6 * 6 * HIDDEN * 2
FORWARD = 2 * N * (NUM_WEIGHTS + HIDDEN * VOCAB) + 2 * ATTENTION
BACKWARD = 2 * N * (NUM_WEIGHTS + HIDDEN * VOCAB) + 5 * ATTENTION
# Method -> operations beyond those of the frozen model, forward and backward.
BEYOND = {
    "frozen": (0, 0),
    "full": (0, 2 * N * (NUM_WEIGHTS + HIDDEN * VOCAB)),
    "lora": (2 * N * RANK * (NUM_IN + NUM_OUT), 4 * N * RANK * (NUM_IN + NUM_OUT)),
    "paca": (0, 2 * N * RANK * NUM_OUT),
    "paca-transient": (2 * N * RANK * NUM_OUT, 4 * N * RANK * NUM_OUT),
    "qpaca": (0, 2 * N * RANK * NUM_OUT),
    "qlora": (2 * N * RANK * (NUM_IN + NUM_OUT), 4 * N * RANK * (NUM_IN + NUM_OUT)),
}


def counted(config, method, setting=SETTING):
    return {row.what: row.value for row in count(config, setting, method)}


@pytest.mark.parametrize("method", BEYOND)
def test_operations_are_those_of_the_formulas(make_config, method):
    numbers = counted(make_config(methods=(method,)), method)
    for phase, least, beyond in zip(
        ("forward", "backward"), (FORWARD, BACKWARD), BEYOND[method], strict=True
    ):
        assert round(1e9 * numbers[f"{phase} operations"]) == least + beyond


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_kept_bytes_are_those_of_the_formulas(make_config, dtype, itemsize):
    config = make_config(dtype=dtype)
    rows = {
        method: counted(config, method)
        for method in ("frozen", "full", "lora", "paca", "paca-transient", "shira")
    }
    # Beside full's inputs: places and values of the sparse part of each weight.
    assert rows["shira"]["kept by linear"] > rows["full"]["kept by linear"]
    linear = {method: row["kept by linear"] for method, row in rows.items()}
    assert linear["frozen"] == 0
    for method in ("paca", "paca-transient"):
        assert linear[method] == NUM_LAYERS * 7 * N * RANK * itemsize
        beyond = rows[method]["kept for backward"] - rows["frozen"]["kept for backward"]
        assert beyond == linear[method]
    # One tensor for query, key and value, one for o, one for gate and up, one for down; that for o
    # is kept by the attention as well.
    inputs = NUM_LAYERS * N * (2 * HIDDEN + MLP) * itemsize
    assert linear["full"] == inputs
    assert linear["lora"] == inputs + NUM_LAYERS * 7 * N * RANK * itemsize
    for row in rows.values():
        parts = [value for what, value in row.items() if what.startswith("kept by ")]
        assert sum(parts) == row["kept for backward"]


def test_float32_adapters_on_16_bits_run_under_autocast(make_config):
    options = {"methods": ("paca",), "dtype": "bfloat16"}
    same = counted(make_config(**options), "paca")
    finer = counted(make_config(**options, adapter_dtype="float32"), "paca")
    for what in ("forward operations", "trained parameters"):
        assert finer[what] == same[what]
    for row in (same, finer):
        assert row["kept by linear"] == NUM_LAYERS * 7 * N * RANK * 2


def test_peak_memory_holds_the_weights_and_what_is_kept(make_config):
    # Large enough that a page does not matter.
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


def test_compiled_models_are_counted_without_their_modules(make_config, monkeypatch):
    options = []
    # The compiler itself takes minutes and would be torch's test.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: options.append(given))
    row = counted(make_config(methods=("paca",), compiled=True), "paca")
    assert options == [{"dynamic": False}]
    assert row.keys() == {"trained parameters", "peak", "kept for backward"}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("method", ["frozen", "paca"])
def test_a_compiled_step_is_one_graph(make_config, monkeypatch, method):
    compile_model, graphs = torch.nn.Module.compile, CompileCounterWithBackend("eager")
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **given: compile_model(self, backend=graphs)
    )
    torch.compiler.reset()
    run = make_step(make_config(methods=(method,), compiled=True), SETTING, method)
    for _ in range(2):
        run()
    torch.compiler.reset()
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


def test_a_step_takes_any_loss_and_batch():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = (torch.ones(4, 3), torch.zeros(4, 2))
    one = Step(
        contender=Contender("full", model, optimizer),
        batch=batch,
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        clock=time.process_time,
    )
    before = one.forward().item()
    assert min(one()) >= 0
    assert one.forward().item() != before
    assert model.weight.grad is None


def test_processes_are_set_up_as_asked(make_config):
    prepare(make_config(threads=2))
    assert torch.get_num_threads() == 2
    assert torch.get_float32_matmul_precision() == "highest"
