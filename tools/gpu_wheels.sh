#!/bin/sh
# Collect what tools/gpu_check.py, which runs the tests marked `gpu`, needs beside torch and transformers:
#
#   sh tools/gpu_wheels.sh FOLDER                     default: .cache/gpu-wheels
#
# and on the GPU machine, which needs no network, in the checkout:
#
#   python -m pip install --no-index --no-deps FOLDER/*.whl
#   python tools/gpu_check.py --output OUT.json
#
# Wheels are for Linux on x86-64. PYTHON_VERSION (3.12) and CUDA (130: CUDA 13.0) are those of the GPU
# machine; of bitsandbytes, whose wheel holds a library for each CUDA, only this one is kept. PYTHON
# names the interpreter whose pip downloads; pip's own settings (PIP_INDEX_URL, ...) apply as usual.
set -eu
folder=${1:-.cache/gpu-wheels}
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
cuda=${CUDA:-130}

die() {
    printf 'gpu_wheels: %s\n' "$*" >&2
    exit 1
}

[ -z "$(ls -A "$folder" 2>/dev/null)" ] || die "$folder is not empty; remove it, or name another folder."

# In the ranges of pyproject.toml; --no-deps keeps torch, transformers and what they need out.
download() {
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: \
        --python-version "$version" --implementation cp --abi "cp$(printf %s "$version" | tr -d .)" \
        --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
        --dest "$folder" "$@" ||
        die 'pip could not download the wheels (its message is above); is there a network connection?'
}

mkdir -p "$folder"
download 'peft>=0.21,<1' 'accelerate>=1.10,<2' 'trl>=1.16,<2' 'datasets>=4,<6' \
    'jsonargparse>=4.40,<5' docstring_parser typeshed_client multiprocess dill xxhash \
    'rich>=13,<16' markdown-it-py mdurl pygments 'pytest>=8.3,<10' pluggy iniconfig
download 'bitsandbytes>=0.50,<1'

"$python" - "$folder" "$cuda" <<'EOF' || exit 1
import sys
import zipfile
from pathlib import Path

folder, cuda = Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob("bitsandbytes-*.whl")
kept = f"bitsandbytes/libbitsandbytes_cuda{cuda}.so"
with zipfile.ZipFile(wheel) as whole:
    libraries = [name for name in whole.namelist() if name.endswith(".so")]
    if kept not in libraries:
        known = ", ".join(sorted(name.rpartition("_")[2].removesuffix(".so") for name in libraries))
        sys.exit(f"gpu_wheels: bitsandbytes has no library for CUDA={cuda}; it has {known}.")
    lost = {name for name in libraries if name != kept}
    stripped = wheel.with_suffix(".stripped")
    with zipfile.ZipFile(stripped, "w", zipfile.ZIP_DEFLATED) as smaller:
        for name in whole.namelist():
            if name in lost:
                continue
            content = whole.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(
                    line for line in lines if line.split(",", 1)[0] not in lost
                ).encode()
            smaller.writestr(name, content)
stripped.replace(wheel)
EOF

echo "$folder: $(du -sh "$folder" | cut -f 1) in $(ls "$folder" | wc -l) wheels"
