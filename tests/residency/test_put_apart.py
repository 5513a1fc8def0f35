"""The kernel that puts all columns, without a GPU: by Triton's interpreter, and compiled for some.

torch compiles by Triton on CPUs as well, where it finds it; so it is kept beside the environment of
the other tests. What runs here is a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache" / "triton"
# An A100, an H100, a B200 and an MI300X.
TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
COMPILE = """
import itertools, json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pacatune.residency.put import _DTYPES, _kernel, _triton_dtype

kernel, found = _kernel(), []
for target in json.loads(sys.argv[1]):
    for dtype, delta, (adds, takes) in itertools.product(
        _DTYPES, _DTYPES, [(True, False), (False, False), (False, True)]
    ):
        values = {"dtype": _triton_dtype(dtype), "delta_dtype": _triton_dtype(delta)}
        values |= {"adds": adds, "takes": takes, "block": 1024}
        signature = {"table": "*i64", "scalings": "*fp32"} | dict.fromkeys(values, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=values)
        made = triton.compile(source, target=GPUTarget(*target))
        found.append((target, adds, [*made.asm], made.asm.get("ptx", "")))
json.dump(found, sys.stdout)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux"),
]


def run(arguments, tmp_path, **variables):
    assert FOLDER.is_dir(), "`make test` installs what tests/residency/triton.txt lists"
    path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**os.environ, **settings, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_its_bits_by_the_interpreter(tmp_path):
    options = ["-q", "-o", "filterwarnings=ignore", "-p", "no:cacheprovider"]
    test = str(Path(__file__).with_name("test_put.py"))
    said = run(["-m", "pytest", *options, test], tmp_path, TRITON_INTERPRET="1")
    assert "passed" in said
    assert "skipped" not in said


def test_it_is_compiled_for_gpus_that_are_not_here(tmp_path):
    """What a GPU's compiler would refuse is found here; the sum is rounded once in float32."""
    found = json.loads(run(["-c", COMPILE, json.dumps(TARGETS)], tmp_path))
    assert len(found) == len(TARGETS) * 27
    for (backend, *_), adds, stages, ptx in found:
        assert ("cubin" if backend == "cuda" else "hsaco") in stages
        assert ("fma.rn.f32" in ptx) == (adds and backend == "cuda")
