"""What PaCA launches on a GPU is promised: counted here, in each change, without one."""

from dataclasses import replace

import pytest

from benchmarks import check, kernels
from benchmarks.methods import OURS, SWAP
from benchmarks.results import read

COMMITTED = read("kernels")
OTHER = check.other_versions(COMMITTED.provenance)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def assert_published(rows):
    """Counts are those that are published, where they are of the same versions."""
    assert OTHER or list(check.differences(rows, COMMITTED.rows)) == []


def test_promises_are_kept_and_a_linear_layer_costs_one_kernel_each_way():
    """R4. The factor alpha / r is 2, delta is in float32; neither costs a kernel of its own."""
    rows = kernels.count("eager", "lean", methods=kernels.HELD)
    rows += kernels.count("eager", methods=(SWAP, "lora"))
    assert kernels.exceeded(rows) == []
    numbers = {(row.setting, row.what, row.method): row.value for row in rows}
    assert len(numbers) == len(rows) == 2 * 8 + 4 * 8
    assert_published(rows)

    def beyond(setting, what):
        return numbers[setting, what, OURS] - numbers[setting, what, "frozen"]

    assert beyond("eager", "forward") == 7
    assert beyond("eager", "backward") == 7
    assert beyond("eager", "with accumulation") == 14
    assert beyond("lean", "forward") + beyond("lean", "backward") == 14


@pytest.mark.parametrize("method", ["qpaca", "qlora"])
def test_a_quantised_base_is_counted(method):
    pytest.importorskip("bitsandbytes")
    found = kernels.count("eager", methods=[method])
    assert {row.value for row in found if row.what == "write of columns"} == {0}
    assert_published(found)


def test_sharded_layers_are_counted():
    """R6."""
    found = kernels.count("sharded", methods=[OURS])
    assert len(found) == 2
    assert_published(found)


def test_more_than_promised_is_an_exit_status(monkeypatch, tmp_path, capsys):
    def worse(by):
        ours = {("forward", OURS)}
        return [
            replace(row, value=row.value + by * ((row.what, row.method) in ours))
            for row in COMMITTED.rows
        ]

    for by in (0, 2):
        monkeypatch.setattr(kernels, "count", lambda *settings, by=by: worse(by))
        assert kernels.main(["--output", str(tmp_path)]) == bool(by)
    assert capsys.readouterr().err.splitlines() == [
        "paca, eager: 47 kernels (forward), at most 45 promised",
        "paca, lean: 31 kernels (forward), at most 29 promised",
        "paca, sharded: 52 kernels (forward), at most 50 promised",
    ]
    assert read("kernels", tmp_path).rows == worse(2)
    assert kernels.exceeded(worse(2), ("backward",)) == []
