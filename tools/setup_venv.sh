#!/bin/sh
# Make .venv ready: sh tools/setup_venv.sh EXTRA   (an extra of pyproject.toml: demo, dev)
#
# Creates .venv where it is missing and installs the package with that extra. A stamp in .venv names what
# was installed, so the next call returns at once and needs no network. PYTHON=... chooses the interpreter
# of a new .venv; pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply as usual.
set -eu
extra=${1:?usage: sh tools/setup_venv.sh EXTRA}
cd -- "$(dirname -- "$0")/.."
python=.venv/bin/python
stamp=.venv/installed-$extra

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.14 python; do
        if is_new_enough "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
        [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a Python >= 3.11; name another one."
    done
    die 'no Python >= 3.11 found; install one, or name it: make PYTHON=/path/to/python3.11 ...'
}

# Quantisers that PEFT imports wherever it finds them, slowly and with warnings: kept beside .venv.
apart=tests/tuner/quantizers.txt
# accelerate imports it in every Trainer that finds it; it compiles code, which not every machine can.
zero=tests/distributed/deepspeed.txt
# Versions of Triton. torch compiles by it on a CPU, too, once it is found; a gigabyte, for one kernel.
kernel=tests/residency/triton.txt

# The folder counts too: a copied or moved checkout would otherwise import the code of the old place.
wanted="$(cat pyproject.toml "$apart" "$zero" "$kernel" | cksum) $(pwd -P)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x "$python" ]; then
    exit 0
fi

if [ ! -x "$python" ] || [ ! -f .venv/pyvenv.cfg ]; then
    found=$(find_python)
    "$found" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$found lacks the venv module; install it (Debian and Ubuntu: apt install python3-venv)."
    echo "setup: creating .venv with $("$found" --version)"
    "$found" -m venv .venv || die "could not create .venv; remove what is there and try again."
fi
is_new_enough "$python" || die ".venv has no Python >= 3.11; remove .venv and try again."
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
    die '.venv has no pip; remove .venv and try again.'

echo "setup: installing pacatune[$extra] into .venv (the first time takes minutes)"
# Without build isolation nothing is downloaded when all that is asked for is already there.
"$python" -m pip install -q --disable-pip-version-check 'setuptools>=77' &&
    "$python" -m pip install -q --no-compile --disable-pip-version-check --no-build-isolation -e ".[$extra]" ||
    die 'pip could not install the packages (its message is above); is there a network connection?'
if [ "$extra" = dev ]; then
    "$python" -m pip install -q --disable-pip-version-check --upgrade --no-deps \
        --target .cache/quantizers -r "$apart" ||
        die "pip could not install what $apart lists (its message is above)."
    mkdir -p .cache
    DS_BUILD_OPS=0 "$python" -m pip install -q --disable-pip-version-check --no-build-isolation \
        --upgrade --no-deps --target .cache/deepspeed -r "$zero" >.cache/deepspeed.log 2>&1 ||
        echo "setup: no DeepSpeed, so its tests are skipped; .cache/deepspeed.log says why."
    for version in $(sed '/^#/d' "$kernel"); do
        folder=.cache/triton/$version
        mkdir -p "$folder"
        [ -f "$folder/installed" ] || {
            "$python" -m pip install -q --disable-pip-version-check --upgrade --no-deps \
                --target "$folder" "triton==$version" >"$folder.log" 2>&1 &&
                touch "$folder/installed" ||
                echo "setup: no Triton $version, so it does not test the kernel; $folder.log says why."
        }
    done
fi
printf '%s' "$wanted" >"$stamp"
