"""What PaCA launches on a GPU is promised: counted here, in each change, without one."""

import json

import pytest

from benchmarks import check, kernels, tables
from benchmarks.methods import OURS, SWAP

COMMITTED = check.committed("kernels")
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
    if other := check.other_versions(COMMITTED):
        pytest.skip(other)
    assert list(check.differences({"rows": rows}, COMMITTED)) == []


@pytest.mark.parametrize("method", ["qpaca", "qlora"])
def test_a_quantised_base_is_counted(method):
    pytest.importorskip("bitsandbytes")
    counted = kernels.count_layer(kernels.MODELS[method], is_lean=False)
    committed = next(row for row in COMMITTED["rows"] if row["method"] == method)
    if not check.other_versions(COMMITTED):
        assert counted == {name: committed[name] for name in counted}
    assert counted["column_write"] == 0


def test_more_than_promised_is_an_exit_status(monkeypatch, tmp_path, capsys, rows):
    kinds = {kernels.count_compiled: "compiled", kernels.count_sharded: "sharded"}
    monkeypatch.setattr(kernels, "count_each", lambda count: COMMITTED[kinds[count]])
    more = [row | {"forward": row["forward"] + (row["method"] == OURS)} for row in rows]
    for found, status in ((rows, 0), (more, 1)):
        monkeypatch.setattr(kernels, "count_all", lambda models, found=found: found)
        assert kernels.main(["--json", str(tmp_path / "new" / "out.json")]) == status
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 2
    assert message[0].startswith(f"paca: {rows[1]['forward'] + 1} kernels (forward), at most")
    result = json.loads((tmp_path / "new" / "out.json").read_text())
    assert result["rows"] == more
    assert result["promised"]["beyond_frozen"]["forward"] == 7


def test_compiled_layers_keep_their_promises():
    """Counting them takes a C++ compiler a minute: `make bench` does, and fails if they do not."""
    assert kernels.exceeded_beside("compiled", COMMITTED["compiled"]) == []
    worse = [row | {"forward": row["forward"] + 2} for row in COMMITTED["compiled"][1:]]
    (message,) = kernels.exceeded_beside("compiled", [COMMITTED["compiled"][0], *worse])
    assert message.startswith("paca, compiled: 14 kernels (forward), at most 13 promised")


def test_sharded_layers_keep_their_promises():
    rows = COMMITTED["sharded"]
    assert kernels.exceeded_beside("sharded", rows) == []
    counted = kernels.count_sharded(kernels.MODELS[OURS])
    if not check.other_versions(COMMITTED):
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


def test_the_table_shows_what_is_beyond_frozen(tmp_path):
    (tmp_path / "kernels.json").write_text(json.dumps(COMMITTED))
    lines = tables.table("kernels", tmp_path).splitlines()
    assert lines[2].startswith("| frozen | 38 |")
    assert "(+7)" in next(line for line in lines if line.startswith("| paca |"))
