"""tools/gpu_wheels.sh: what it keeps of bitsandbytes, and what it says when something is wrong."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_wheels.sh"
PYTHON = """#!/bin/sh
echo "$*" >>"{calls}"
case "$*" in
    *bitsandbytes*) cp "{wheel}" "{folder}" ;;
    *"pip download"*) exit {no_network} ;;
    *) exec "{python}" "$@" ;;
esac
"""
NAMES = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda128", "cuda130")]
RECORD = "bitsandbytes-0.50.2.dist-info/RECORD"


@pytest.fixture
def collect(tmp_path):
    def run(*, no_network=0, folder=None, **settings):
        wheel = tmp_path / "bitsandbytes-0.50.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as whole:
            for name in NAMES:
                whole.writestr(name, b"library")
            whole.writestr("bitsandbytes/__init__.py", "")
            whole.writestr(RECORD, "".join(f"{name},sha256=x,1\n" for name in NAMES))
        python, target = tmp_path / "python", folder or tmp_path / "wheels"
        python.write_text(
            PYTHON.format(
                calls=tmp_path / "calls", wheel=wheel, folder=target, python=sys.executable,
                no_network=no_network,
            )
        )  # fmt: skip
        python.chmod(0o755)
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **settings}
        command = ["/bin/sh", str(SCRIPT), str(target)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(("settings", "kept"), [({}, NAMES[2]), ({"CUDA": "128"}, NAMES[1])])
def test_one_library_of_bitsandbytes_is_kept(collect, tmp_path, settings, kept):
    done = collect(**settings)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as stripped:
        assert stripped.namelist() == [kept, "bitsandbytes/__init__.py", RECORD]
        assert stripped.read(RECORD).decode() == f"{kept},sha256=x,1\n"
    calls = (tmp_path / "calls").read_text()
    assert "--python-version 3.12 --implementation cp --abi cp312 " in calls
    assert "torch" not in calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"CUDA": "131"}, "has no library for CUDA=131; it has cpu, cuda128, cuda130."),
        ({"no_network": 1}, "could not download the wheels (its message is above)"),
        ({"folder": SCRIPT.parent}, "is not empty; remove it, or name another folder."),
    ],
)
def test_what_is_wrong(collect, options, message):
    done = collect(**options)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("gpu_wheels: ")
    assert done.stderr.count("\n") == 1
