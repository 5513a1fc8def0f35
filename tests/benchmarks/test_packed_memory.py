"""The benchmark of training in blocks, on a small model."""

import shutil
import subprocess

import pytest

pytest.importorskip("gguf")

from benchmarks import packed_memory
from benchmarks.results import module_of, read
from tests.conftest import build_model
from tests.grid.files import write_gguf

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in .*gguf")


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """Has the file where the package would have put it."""
    file = tmp_path / "smollm2-135m-instruct-gguf" / "model.gguf"
    file.parent.mkdir()
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    others = {"token_embd": "Q4_1", "output.weight": "Q4_1"}
    write_gguf(file, build_model(len(tiny_tokenizer), **sizes), tiny_tokenizer, "Q4_1", others)
    return tmp_path


def test_a_small_run(folder, tiny_model_dir, monkeypatch, capsys):
    methods = {name: packed_memory.METHODS[name] for name in ("packed", "dequantised")}
    monkeypatch.setattr(packed_memory, "METHODS", methods)
    monkeypatch.setattr(packed_memory, "prepare", lambda name: None)
    monkeypatch.setattr(packed_memory, "default_cache", lambda: folder)
    monkeypatch.setattr(packed_memory, "in_q4_k", shutil.copy)  # which takes llama.cpp's wheel
    monkeypatch.setattr(packed_memory, "SIMULATED", {"paca": {"method": "paca"}})
    monkeypatch.setattr(packed_memory, "DEVICES", (1,))

    real = subprocess.run

    def here(command, **options):
        if "benchmarks.packed_memory" not in command:
            return real(command, **options)
        capsys.readouterr()
        packed_memory.main(command[command.index("benchmarks.packed_memory") + 1 :])
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(subprocess, "run", here)
    words = ["--tokens", "16", "--seconds", "0", "--min-rounds", "2", "--threads", "1"]
    words += ["--large", "64", "2", "4", "2", "96", "50", "--steps", "2"]
    packed_memory.main([*words, "--simulated", str(tiny_model_dir), "--output", str(folder)])
    rows = read("packed_memory", folder).rows
    found = {(row.what, row.method, row.setting): row.value for row in rows}
    assert found["weights / file", "packed", "Q4_1"] < 1
    assert found["weights", "packed", "Q4_1"] < found["weights", "dequantised", "Q4_1"] / 3
    kept = [found["kept for backward", name, "Q4_1, 16 tokens"] for name in methods]
    assert kept[0] <= 1.1 * kept[1]
    assert found["step", "packed / dequantised", "Q4_K, 16 tokens"] > 0
    large = "Q4_0, 16 tokens, 2 steps"
    assert found["last loss", "packed", large] < found["first loss", "packed", large]
    # What is simulated counts buffers too.
    simulated = found["weights", "estimate", "Q4_0"]
    assert found["weights", "packed", large] == pytest.approx(simulated, rel=0.1)
    assert found["longest", "paca", "checkpointed blocks, 1 GiB"] > 0


@pytest.mark.parametrize("name", ["rl_codes", "step-compiled", "packed-part"])
def test_the_module_of_a_result(name):
    assert module_of(name) in ("rl", "step", "packed")
    assert module_of("packed_memory") == "packed_memory"
