#!/bin/sh
# Run the tests with real training tools on the CPU:
#
#   sh tools/test_integrations.sh [TOOL] [PYTEST_OPTIONS]     TOOL: a file of tools/integrations
#
# Each has an environment of its own, .venv-TOOL, since each pins other releases. It is made anew where
# its file or pyproject.toml changes. torch comes from the package index, a build for GPUs of several GB
# unless pip's settings name another; the tests need no GPU.
set -eu
cd -- "$(dirname -- "$0")/.."
tools=$(cd tools/integrations && ls -- *.txt | sed 's/\.txt$//')
if [ $# -gt 0 ] && [ -f "tools/integrations/$1.txt" ]; then
    tools=$1
    shift
fi
for tool in $tools; do
    list=tools/integrations/$tool.txt
    python=.venv-$tool/bin/python
    stamp=.venv-$tool/installed
    wanted="$(cat pyproject.toml "$list" | cksum) $(pwd -P)"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "test-integrations: making .venv-$tool (the first time takes minutes and 3 GB)"
        [ -x "$python" ] || "${PYTHON:-python3}" -m venv ".venv-$tool"
        pip="$python -m pip install -q --disable-pip-version-check"
        # Its first line is the tool, which would bring in much that no test needs.
        grep -v '^#' "$list" | tail -n +2 >".venv-$tool/needs.txt"
        $pip -r ".venv-$tool/needs.txt" -e .
        $pip --no-deps "$(grep -v '^#' "$list" | head -n 1)"
        printf '%s' "$wanted" >"$stamp"
    fi
    # What these tools warn of is not ours.
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$python" -m pytest -q -W default -p no:cacheprovider \
        tests/integrations_apart/test_"$(echo "$tool" | tr - _)"*.py "$@"
done
