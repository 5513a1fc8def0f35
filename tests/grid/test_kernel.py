"""The kernel that decodes blocks, without a GPU: by Triton's interpreter, and compiled for some."""

import json
import shutil

import pytest

from pacatune.grid.formats import GRIDS
from tests.triton_apart import B200, MARKS, NEWEST, OLDEST, TARGETS, run

# The interpreter truncates where it makes bfloat16.
INTERPRET = """
import torch
from pacatune.grid.decoding import _try
from pacatune.grid.formats import GRIDS
for name in GRIDS:
    for dtype in (torch.float32, torch.float16):
        _try(torch.device("cpu"), name, dtype)
    print(name)
"""
COMPILE = """
import inspect, json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pacatune.grid.decoding import kernel_options
from pacatune.grid.formats import GRIDS
from pacatune.grid.kernel import decode_blocks

signature = {"rows": "*u8", "places": "*i32", "levels": "*fp32", "scales": "*fp32"}
sizes = ("num_values", "row_values", "scale_rows", "scale_columns")
found = []
for target in json.loads(sys.argv[1]):
    for grid in GRIDS.values():
        for dtype, kind in ((tl.bfloat16, "*bf16"), (tl.float16, "*fp16"), (tl.float32, "*fp32")):
            values = {"dtype": dtype, **kernel_options(grid)}
            types = signature | {"values": kind} | dict.fromkeys(sizes, "i32")
            if "constexprs" in inspect.signature(ASTSource).parameters:  # since Triton 3.3
                types |= dict.fromkeys(values, "constexpr")
            source = ASTSource(decode_blocks, types, values)
            options = {"enable_fp_fusion": False}
            made = triton.compile(source, target=GPUTarget(*target), options=options)
            found.append((target, [*made.asm], made.asm.get("ptx", "")))
json.dump([triton.__version__, found], sys.stdout)
"""

pytestmark = MARKS


def test_its_bits_by_the_interpreter(tmp_path):
    said = run(["-c", INTERPRET], tmp_path, TRITON_INTERPRET="1")
    assert said.split() == list(GRIDS)


@pytest.mark.parametrize(
    ("triton", "targets"), [(OLDEST, TARGETS), (NEWEST, [*TARGETS, B200])], ids=["oldest", "newest"]
)
def test_it_is_compiled_for_gpus_that_are_not_here(tmp_path, triton, targets):
    """What a GPU's compiler would refuse is found here; each operation rounds."""
    # The oldest one leaves the last stage for AMD to ROCm's linker, which is not here.
    stand_in = {"TRITON_HIP_LLD_PATH": shutil.which("true")} if triton == OLDEST else {}
    said = run(["-c", COMPILE, json.dumps(targets)], tmp_path, triton, **stand_in)
    version, found = json.loads(said)
    assert version == triton
    assert len(found) == len(targets) * len(GRIDS) * 3
    for (backend, *_), stages, ptx in found:
        assert ("cubin" if backend == "cuda" else "hsaco") in stages
        assert "fma" not in ptx
        assert ("mul" in ptx) == (backend == "cuda")
