"""What PaCA launches on a GPU is promised: counted here, in each change, without one."""

from dataclasses import replace

import pytest

from benchmarks import check, kernels
from benchmarks.methods import OURS, SWAP
from benchmarks.results import read

COMMITTED = read("kernels")
OTHER = check.other_versions(COMMITTED.provenance)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def rows():
    found = kernels.count("eager", "lean", methods=kernels.HELD)
    return found + kernels.count("eager", methods=(SWAP, "lora"))


def test_promises_are_kept(rows):
    assert kernels.exceeded(rows) == []


def test_a_linear_layer_costs_one_kernel_each_way(rows):
    """The factor alpha / r is 2 and delta is in float32, so neither costs a kernel of its own."""
    numbers = {(row.setting, row.what, row.method): row.value for row in rows}

    def beyond(setting, what):
        return numbers[setting, what, OURS] - numbers[setting, what, "frozen"]

    assert beyond("eager", "forward") == 7
    assert beyond("eager", "backward") == 7
    assert beyond("eager", "with accumulation") == 14
    assert beyond("whole-tensor passes", "forward") == 0
    assert beyond("whole-tensor passes", "backward") == 7  # dy, once per layer
    assert beyond("lean", "forward") + beyond("lean", "backward") == 14


@pytest.mark.skipif(bool(OTHER), reason=OTHER)
def test_counts_are_those_that_are_published(rows):
    assert len(rows) == 2 * 8 + 4 * 10
    assert list(check.differences(rows, COMMITTED.rows)) == []


@pytest.mark.parametrize("method", ["qpaca", "qlora"])
def test_a_quantised_base_is_counted(method):
    pytest.importorskip("bitsandbytes")
    found = kernels.count("eager", methods=[method])
    assert {row.value for row in found if row.what == "write of columns"} == {0}
    if not OTHER:
        assert list(check.differences(found, COMMITTED.rows)) == []


def test_more_than_promised_is_an_exit_status(monkeypatch, tmp_path, capsys):
    def is_forward(row):
        return row.method == OURS and row.what == "forward"

    for more in (0, 2):

        def count(*settings, more=more):
            return [
                replace(row, value=row.value + more) if is_forward(row) else row
                for row in COMMITTED.rows
            ]

        monkeypatch.setattr(kernels, "count", count)
        assert kernels.main(["--output", str(tmp_path / "new")]) == bool(more)
    assert capsys.readouterr().err.splitlines() == [
        "paca, eager: 47 kernels (forward), at most 45 promised",
        "paca, lean: 31 kernels (forward), at most 29 promised",
        "paca, compiled: 14 kernels (forward), at most 13 promised",
        "paca, sharded: 52 kernels (forward), at most 50 promised",
    ]
    assert len(read("kernels", tmp_path / "new").rows) > 50


def test_some_counts_alone_may_be_held():
    one = next(r for r in COMMITTED.rows if r.setting == "eager" and r.what == "optimizer in all")
    worse = replace(one, method=OURS, value=3)
    assert kernels.exceeded([worse], ("forward", "backward")) == []
    (message,) = kernels.exceeded([worse])
    assert message == "paca, eager: 3 kernels (optimizer in all), at most 2 promised"


def test_sharded_layers_are_counted():
    found = kernels.count("sharded", methods=[OURS])
    assert len(found) == 2
    assert OTHER or not list(check.differences(found, COMMITTED.rows))


def test_calls_in_generated_code_are_counted():
    code = """
def call(self, args):
    cpp_fused_add_0(buf0, buf1)
    assert_size_stride(buf1, (2,), (1,), 'torch.ops.aten.cumsum.default')
    # buffer buf1 (op: torch.ops.aten.cumsum.default) is assumed to be not aligned
    buf2 = torch.ops.aten.cumsum.default(buf1, dim=-1)
    extern_kernels.mm(buf1, buf2, out=buf3)
    triton_poi_fused_mul_1.run(buf3, buf4, 64, stream=stream0)
    return (buf4,)
"""
    assert kernels._num_calls(code) == 4
