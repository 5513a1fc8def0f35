"""The kernel that puts all columns, without a GPU: by Triton's interpreter, and compiled for some.

torch compiles by Triton on CPUs as well, where it finds it; so it is kept beside the environment of
the other tests. What runs here is a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = (
    line
    for line in Path(__file__).with_name("triton.txt").read_text().splitlines()
    if not line.startswith("#")
)
# An A100, an H100, an MI300X; a B200, which the compiler beside the oldest Triton does not know.
TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)]
B200 = ("cuda", 100, 32)
COMPILE = """
import inspect, itertools, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pacatune.residency.kernel import exchange_columns
from pacatune.residency.put import _DTYPES, _triton_dtype

found = []
for target in json.loads(sys.argv[1]):
    for dtype, delta, (adds, takes) in itertools.product(
        _DTYPES, _DTYPES, [(True, False), (False, False), (False, True)]
    ):
        values = {"dtype": _triton_dtype(dtype), "delta_dtype": _triton_dtype(delta)}
        values |= {"adds": adds, "takes": takes, "block": 1024}
        signature = {"table": "*i64", "scalings": "*fp32", "num_blocks": "i32"}
        if "constexprs" in inspect.signature(ASTSource).parameters:  # since Triton 3.3
            signature |= dict.fromkeys(values, "constexpr")
        source = ASTSource(exchange_columns, signature, values)
        made = triton.compile(source, target=GPUTarget(*target))
        found.append((target, adds, [*made.asm], made.asm.get("ptx", "")))
json.dump([triton.__version__, found], sys.stdout)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux"),
]


def run(arguments, tmp_path, triton=NEWEST, **variables):
    folder = ROOT / ".cache" / "triton" / triton
    if triton == OLDEST and sys.version_info >= (3, 14):
        pytest.skip(f"Triton {triton} has no wheels for this Python")
    assert (folder / "installed").is_file(), "`make test` installs what triton.txt lists"
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
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
        from pacatune.residency import put
        put.warnings.warn = lambda message, stacklevel: print(message)
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
    assert len(found) == len(targets) * 27
    for (backend, *_), adds, stages, ptx in found:
        assert ("cubin" if backend == "cuda" else "hsaco") in stages
        assert ("fma.rn.f32" in ptx) == (adds and backend == "cuda")
