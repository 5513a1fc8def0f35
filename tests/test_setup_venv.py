"""tools/setup_venv.sh: what it says when something is missing, and that it does nothing twice.

A stand-in for the interpreter notes how it was called; the environments that it "creates" have it
as their python, so no package is installed here.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUANTIZERS = Path("tests/tuner/quantizers.txt")
DEEPSPEED = Path("tests/distributed/deepspeed.txt")
TRITON = Path("tests/residency/triton.txt")
SYSTEM_TOOLS = ("sh", "cat", "cksum", "cp", "dirname", "mkdir", "printf", "pwd", "sed", "touch")

STAND_IN = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
    *version_info*) exit {old} ;;
    *ensurepip,*) exit {no_venv} ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/pyvenv.cfg ;;
    *"--target .cache/deepspeed"*) echo no compiler; exit {no_deepspeed} ;;
    *"--target .cache/triton/"*) echo no wheel; exit {no_triton} ;;
    *"pip install"*) exit {no_network} ;;
    --version) echo Python 3.11.9 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """Copy of what the script reads, in a path with a space."""
    folder = tmp_path / "a checkout"
    (folder / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "setup_venv.sh", folder / "tools")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path in (QUANTIZERS, DEEPSPEED, TRITON):
        (folder / path).parent.mkdir(parents=True)
        shutil.copy(ROOT / path, folder / path)
    (folder / "bin").mkdir()
    for tool in SYSTEM_TOOLS:
        if (found := shutil.which(tool)) is not None:
            (folder / "bin" / tool).symlink_to(found)
    return folder


OUTCOMES = dict.fromkeys(("old", "no_venv", "no_network", "no_deepspeed", "no_triton"), 0)


def put_python(folder, name="python3", **outcomes):
    path = folder / "bin" / name
    path.write_text(STAND_IN.format(**OUTCOMES | outcomes))
    path.chmod(0o755)


def setup(folder, *, extra="demo", **settings):
    environment = {"PATH": str(folder / "bin"), "CALLS": str(folder / "calls"), **settings}
    command = ["/bin/sh", str(folder / "tools" / "setup_venv.sh"), *filter(None, [extra])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")


def calls(folder):
    return (folder / "calls").read_text().splitlines()


def test_first_call_installs_and_the_second_does_nothing(checkout):
    put_python(checkout)
    first = setup(checkout)
    assert first.returncode == 0, first.stderr
    assert "creating .venv with Python 3.11.9" in first.stdout
    assert any(call.endswith("-e .[demo]") for call in calls(checkout))
    number = len(calls(checkout))
    assert setup(checkout).stdout == ""
    assert len(calls(checkout)) == number


@pytest.mark.parametrize(
    ("name", "message", "log"),
    [
        ("deepspeed", "no DeepSpeed, so its tests are skipped", "deepspeed: no compiler"),
        ("triton", "no Triton 3.2.0, so it does not test the kernel", "triton/3.2.0: no wheel"),
    ],
)
def test_a_machine_without_a_package_is_told_and_set_up(checkout, name, message, log):
    put_python(checkout, **{f"no_{name}": 1})
    first = setup(checkout, extra="dev")
    assert first.returncode == 0, first.stderr
    path, said = log.split(": ")
    assert f"{message}; .cache/{path}.log says why" in first.stdout
    assert (checkout / ".cache" / f"{path}.log").read_text() == f"{said}\n"
    assert setup(checkout, extra="dev").stdout == "", "it is not tried each time"


def test_what_installs_again(checkout):
    """Another extra, a changed pyproject.toml, a checkout that was moved."""
    put_python(checkout)
    setup(checkout)
    assert "installing pacatune[dev]" in setup(checkout, extra="dev").stdout
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert "installing pacatune[demo]" in setup(checkout).stdout
    moved = checkout.rename(checkout.with_name("moved"))
    assert "installing pacatune[demo]" in setup(moved).stdout


@pytest.mark.parametrize(
    ("python", "options", "message"),
    [
        (None, {}, "no Python >= 3.11 found; install one, or name it: make PYTHON="),
        ({"old": 1}, {"PYTHON": "python3"}, "PYTHON=python3 is not a Python >= 3.11; name another"),
        ({"no_venv": 1}, {}, "python3 lacks the venv module; install it"),
        ({"no_network": 1}, {}, "pip could not install the packages"),
        ({}, {"extra": ""}, "usage: sh tools/setup_venv.sh EXTRA"),
    ],
)
def test_what_is_missing(checkout, python, options, message):
    if python is not None:
        put_python(checkout, **python)
    for _ in range(2):  # a failed setup must not leave a stamp
        result = setup(checkout, **options)
        assert result.returncode != 0
        assert message in result.stderr


def test_old_python_is_passed_over(checkout):
    put_python(checkout, "python3", old=1)
    put_python(checkout, "python3.12")
    assert setup(checkout).returncode == 0
