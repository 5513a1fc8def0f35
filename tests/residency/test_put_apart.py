"""The kernel that puts all columns, without a GPU: interpreted by Triton, and compiled for some."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.triton_apart import B200, MARKS, NEWEST, OLDEST, TARGETS, run

COMPILE = """
import inspect, itertools, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pacatune.residency.kernel import exchange_columns
from pacatune.residency.put import _DTYPES, _triton_dtype

found = []
for target in json.loads(sys.argv[1]):
    for dtype, delta, (adds, mixes, takes) in itertools.product(
        _DTYPES, _DTYPES, [(1, 0, 0), (1, 1, 0), (0, 0, 0), (0, 0, 1)]
    ):
        values = {"dtype": _triton_dtype(dtype), "delta_dtype": _triton_dtype(delta)}
        values |= {"adds": bool(adds), "mixes": bool(mixes), "takes": bool(takes), "block": 1024}
        signature = {"table": "*i64", "scalings": "*fp32", "num_blocks": "i32"}
        if "constexprs" in inspect.signature(ASTSource).parameters:  # since Triton 3.3
            signature |= dict.fromkeys(values, "constexpr")
        source = ASTSource(exchange_columns, signature, values)
        made = triton.compile(source, target=GPUTarget(*target))
        found.append((target, bool(adds), [*made.asm], made.asm.get("ptx", "")))
json.dump([triton.__version__, found], sys.stdout)
"""

pytestmark = MARKS


def test_its_bits_by_the_interpreter(tmp_path):
    """By the newest one's: before, what it did for an `fma` rounded twice."""
    options = ["-q", "-o", "filterwarnings=ignore", "-p", "no:cacheprovider"]
    test = str(Path(__file__).with_name("test_put.py"))
    said = run(["-m", "pytest", *options, test], tmp_path, TRITON_INTERPRET="1")
    assert "passed" in said
    assert "skipped" not in said


@pytest.mark.parametrize("triton", [OLDEST, NEWEST], ids=["oldest", "newest"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has a GPU")
def test_a_triton_that_launches_nothing_is_not_used(tmp_path, triton):
    code = """if True:
        import torch
        import warnings
        from pacatune.residency import put
        warnings.warn = lambda message, stacklevel: print(message)
        assert not put._works(torch.device("cpu"), torch.float32, torch.float32)
    """
    assert "fails on cpu (RuntimeError: 0 active drivers" in run(["-c", code], tmp_path, triton)


@pytest.mark.parametrize(
    ("triton", "targets"), [(OLDEST, TARGETS), (NEWEST, [*TARGETS, B200])], ids=["oldest", "newest"]
)
def test_it_is_compiled_for_gpus_that_are_not_here(tmp_path, triton, targets):
    """What a GPU's compiler would refuse is found here; the sum is rounded once in float32."""
    # The oldest one leaves the last stage for AMD to ROCm's linker, which is not here.
    stand_in = {"TRITON_HIP_LLD_PATH": shutil.which("true")} if triton == OLDEST else {}
    said = run(["-c", COMPILE, json.dumps(targets)], tmp_path, triton, **stand_in)
    version, found = json.loads(said)
    assert version == triton
    assert len(found) == len(targets) * 36
    for (backend, *_), adds, stages, ptx in found:
        assert ("cubin" if backend == "cuda" else "hsaco") in stages
        assert ("fma.rn.f32" in ptx) == (adds and backend == "cuda")
