"""What PaCA launches on a GPU is promised: counted here, in each change, without one."""

import pytest

from benchmarks import check, kernels
from benchmarks.methods import OURS, SWAP
from benchmarks.results import read

COMMITTED, MADE = check.committed("kernels")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def rows():
    models = kernels.MODELS
    rows = kernels.count_all({name: models[name] for name in ("frozen", OURS)})
    return rows + kernels.count_all({name: models[name] for name in (SWAP, "lora")}, (False,))


def test_promises_are_kept(rows):
    assert kernels.exceeded(rows) == []


def test_a_linear_layer_costs_one_kernel_each_way(rows):
    """The factor alpha / r is 2 and delta is in float32, so neither costs a kernel of its own."""
    (frozen, ours), (lean_frozen, lean_ours) = (
        [next(r for r in rows if (r["method"], r["is_lean"]) == (name, is_lean)) for name in pair]
        for is_lean, pair in ((False, ("frozen", OURS)), (True, ("frozen", OURS)))
    )
    assert ours["forward"] - frozen["forward"] == 7
    assert ours["backward"] - frozen["backward"] == 7
    assert ours["accumulating"] - frozen["accumulating"] == 14
    assert ours["passes_forward"] == frozen["passes_forward"]
    assert ours["passes_backward"] - frozen["passes_backward"] == 7  # dy, once per layer
    both = sum(lean_ours[n] - lean_frozen[n] for n in ("forward", "backward"))
    assert both == 14


def test_counts_are_those_that_are_published(rows):
    if other := check.other_versions(MADE):
        pytest.skip(other)
    for setting, is_lean in (("eager", False), ("lean", True)):
        counts = [row for row in rows if row["is_lean"] == is_lean]
        found = kernels.rows_of(setting, counts)
        assert len(found) > 10
        assert list(check.differences(found, COMMITTED)) == []


@pytest.mark.parametrize("method", ["qpaca", "qlora"])
def test_a_quantised_base_is_counted(method):
    pytest.importorskip("bitsandbytes")
    counted = kernels.count_layer(kernels.MODELS[method], is_lean=False)
    assert counted["column_write"] == 0
    if not check.other_versions(MADE):
        found = kernels.rows_of("eager", [{"method": method, **counted}])
        assert list(check.differences(found, COMMITTED)) == []


def committed(setting):
    """The committed counts of a setting, by method, under the names that they are counted by."""
    keys = {name: key for key, name in kernels.NAMES.items()}
    found = {}
    for row in COMMITTED:
        if row.setting == setting:
            found.setdefault(row.method, {"method": row.method})[keys[row.what]] = row.value
    return [*found.values()]


def test_more_than_promised_is_an_exit_status(monkeypatch, tmp_path, capsys, rows):
    kinds = {kernels.count_compiled: "compiled", kernels.count_sharded: "sharded"}
    monkeypatch.setattr(kernels, "count_each", lambda count: committed(kinds[count]))
    more = [row | {"forward": row["forward"] + (row["method"] == OURS)} for row in rows]
    for found, status in ((rows, 0), (more, 1)):

        def count_all(models, lean, found=found):
            return [row for row in found if row["is_lean"] in lean]

        monkeypatch.setattr(kernels, "count_all", count_all)
        assert kernels.main(["--output", str(tmp_path / "new")]) == status
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 2
    assert message[0].startswith(f"paca: {rows[1]['forward'] + 1} kernels (forward), at most")
    assert len(read("kernels", tmp_path / "new").rows) > 50


def test_compiled_layers_keep_their_promises():
    """Counting them takes a C++ compiler a minute: `make bench` does, and fails if they do not."""
    rows = committed("compiled")
    assert kernels.exceeded_beside("compiled", rows) == []
    worse = [row | {"forward": row["forward"] + 2} for row in rows[1:]]
    (message,) = kernels.exceeded_beside("compiled", [rows[0], *worse])
    assert message.startswith("paca, compiled: 14 kernels (forward), at most 13 promised")


def test_sharded_layers_keep_their_promises():
    rows = committed("sharded")
    assert kernels.exceeded_beside("sharded", rows) == []
    counted = kernels.count_sharded(kernels.MODELS[OURS])
    if not check.other_versions(MADE):
        assert {"method": OURS, **counted} == rows[1]


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
