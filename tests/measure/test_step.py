"""Measurements in processes of their own: their value, the end of memory, and other errors."""

import os
import signal

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pacatune.measure import step
from pacatune.measure.setting import MicroBatch
from pacatune.measure.step import _Run, count, prepare, run_in_child, run_point, time_together
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
    "paca-resident": (0, 2 * N * RANK * NUM_OUT),
    "paca-transient": (2 * N * RANK * NUM_OUT, 4 * N * RANK * NUM_OUT),
    "qpaca": (0, 2 * N * RANK * NUM_OUT),
    "qlora": (2 * N * RANK * (NUM_IN + NUM_OUT), 4 * N * RANK * (NUM_IN + NUM_OUT)),
}


@pytest.mark.parametrize("method", BEYOND)
def test_operations_are_those_of_the_formulas(make_config, method):
    counted = count(make_config(methods=(method,)), SETTING, method)
    forward, backward = BEYOND[method]
    assert counted["forward_flops"] == FORWARD + forward
    assert counted["backward_flops"] == BACKWARD + backward


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_kept_bytes_are_those_of_the_formulas(make_config, dtype, itemsize):
    config = make_config(dtype=dtype)
    rows = {
        method: count(config, SETTING, method)
        for method in ("frozen", "full", "lora", "paca", "paca-resident", "paca-transient")
    }
    linear = {method: row["saved_bytes_by_kind"]["linear"] for method, row in rows.items()}
    assert linear["frozen"] == 0
    for method in ("paca", "paca-resident", "paca-transient"):
        assert linear[method] == NUM_LAYERS * 7 * N * RANK * itemsize
        beyond = rows[method]["saved_bytes"] - rows["frozen"]["saved_bytes"]
        assert beyond == linear[method]
    # One tensor for query, key and value, one for o, one for gate and up, one for down; that for o
    # is kept by the attention as well.
    inputs = NUM_LAYERS * N * (2 * HIDDEN + MLP) * itemsize
    assert linear["full"] == inputs
    assert linear["lora"] == inputs + NUM_LAYERS * 7 * N * RANK * itemsize
    for row in rows.values():
        assert sum(row["saved_bytes_by_kind"].values()) == row["saved_bytes"]


def test_float32_adapters_on_16_bits_run_under_autocast(make_config):
    options = {"methods": ("paca",), "dtype": "bfloat16"}
    same = count(make_config(**options), SETTING, "paca")
    finer = count(make_config(**options, adapter_dtype="float32"), SETTING, "paca")
    for key in ("forward_flops", "num_trainable_parameters"):
        assert finer[key] == same[key]
    for row in (same, finer):
        assert row["saved_bytes_by_kind"]["linear"] == NUM_LAYERS * 7 * N * RANK * 2


def test_peak_memory_holds_the_weights_and_what_is_kept(make_config):
    # Large enough that a page does not matter.
    config = make_config(methods=("full",), tokens=(2048,), seq_len=2048)
    row = count(config, MicroBatch(num_rows=1, num_tokens=2048), "full")
    assert row["peak_of"].startswith("resident set")
    assert row["peak_bytes"] > row["saved_bytes"] > 2**20


def test_every_step_is_timed_by_phases(make_config):
    config = make_config(methods=("frozen", "paca"))
    timed = time_together(config, SETTING, ("paca", "frozen"))
    assert list(timed["phases"]) == ["paca", "frozen"]
    for rounds in timed["phases"].values():
        assert len(rounds) == config.min_rounds
        assert all(forward > 0 and backward > 0 for forward, backward, _ in rounds)
    assert set(timed["noise"]) == {"load_average", "num_cores_of_others"}


def test_points_have_the_rate_of_their_step(make_config):
    point = run_point(make_config(sweep="batch"), SETTING, "paca")
    assert point["sentences_per_second"] == pytest.approx(2 / (1e-3 * point["step_ms"]))
    assert point["tokens_per_second"] == pytest.approx(6 * point["sentences_per_second"])
    assert point["step_ms_quartile_1"] <= point["step_ms"] <= point["step_ms_quartile_3"]
    assert "step_ms" not in run_point(make_config(sweep="seq-len"), SETTING, "paca")


def test_compiled_models_are_counted_without_their_modules(make_config, monkeypatch):
    options = []
    # The compiler itself takes minutes and would be torch's test.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: options.append(given))
    config = make_config(methods=("paca",), compiled=True)
    row = count(config, SETTING, "paca")
    assert options == [{"dynamic": False}]
    assert row["saved_bytes"] > 0
    assert not {"saved_bytes_by_kind", "forward_flops"} & set(row)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("method", ["frozen", "paca"])
def test_a_compiled_step_is_one_graph(make_config, monkeypatch, method):
    compile_model, graphs = torch.nn.Module.compile, CompileCounterWithBackend("eager")
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **given: compile_model(self, backend=graphs)
    )
    torch.compiler.reset()
    run = _Run(make_config(methods=(method,), compiled=True), SETTING, method)
    for _ in range(2):
        run.step()
    torch.compiler.reset()
    assert graphs.frame_count == 1


class Watch:
    """A clock that tells what the device would be waited for."""

    def __init__(self, device):
        self.events = []

    def mark(self):
        self.events.append("mark")

    def seconds(self):
        self.events.append("wait")
        return (1.0, 2.0, 3.0)


def test_a_step_waits_for_the_device_at_its_end_alone(make_config, monkeypatch):
    watches = []
    monkeypatch.setattr(
        step, "Stopwatch", lambda device: watches.append(Watch(device)) or watches[-1]
    )
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *args: pytest.fail("waited"))
    assert _Run(make_config(), SETTING, "paca").step() == (1.0, 2.0, 3.0)
    (watch,) = watches
    assert watch.events == ["mark", "mark", "mark", "mark", "wait"]


def test_processes_are_set_up_as_asked(make_config):
    prepare(make_config(threads=2))
    assert torch.get_num_threads() == 2
    assert torch.get_float32_matmul_precision() == "highest"
