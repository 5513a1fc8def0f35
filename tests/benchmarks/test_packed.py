"""The benchmark of a file of 4 bits, on a small model; llama.cpp answers nothing here."""

import pytest

pytest.importorskip("gguf")

from benchmarks import packed
from benchmarks.results import read
from pacatune.adapters.base import load_base
from tests.grid.conftest import build
from tests.grid.files import write_gguf

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in .*gguf")
ROWS = [{"prompt": f"{word} is", "completion": " " + word[::-1]} for word in ["abc", "abe", "acd"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """Has the file where the package would have put it."""
    folder = tmp_path_factory.mktemp("cache")
    file = folder / "smollm2-135m-instruct-gguf" / "model.gguf"
    file.parent.mkdir()
    write_gguf(file, build(tiny_tokenizer), tiny_tokenizer, "Q4_1")
    return folder


def load(file):
    return load_base(str(file), task_type="CAUSAL_LM", dtype="bfloat16")


def test_what_is_not_trained_is_quantised_to_nearly_itself(folder, tmp_path):
    base, output = folder / "smollm2-135m-instruct-gguf" / "model.gguf", tmp_path / "same.gguf"
    model = load(base)
    packed.requantised(base, model, output)
    for name, weight in load(output).named_parameters():
        error = (weight - model.get_parameter(name)).abs().max()
        assert error < 0.2 * weight.abs().max(), name


def test_a_small_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "prepare", lambda name: None)
    monkeypatch.setattr(packed, "default_cache", lambda: folder)
    monkeypatch.setattr(packed, "rows_of", lambda task, part: ROWS)
    monkeypatch.setattr(
        packed, "served", lambda file, rows, threads, beside=None: 50.0 - 9 * bool(beside)
    )
    monkeypatch.setattr(packed, "_NUM_CHOOSING", 1)
    words = ["--steps", "2", "--seeds", "0", "1", "--tasks", "words sorted", "--threads", "1"]
    words += ["--rows", "2", "--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    packed.main(words)
    rows = read("packed", tmp_path).rows
    by_name = {(row.what, row.method): row for row in rows if row.setting == "Q4_1, words sorted"}
    for method in packed.METHODS:
        assert by_name["score", method].value == by_name["score", "base"].value == 50
        assert by_name["loss", method].n == 2
        assert 0 < by_name["bytes changed", method].value < 100
    assert by_name["score", packed.BESIDE].value == 41
    kept = len(list((tmp_path / "work").iterdir()))
    assert kept == sum(len(rates) for rates in packed.RATES.values()) + len(packed.RATES)
    monkeypatch.setattr(packed, "train", None)  # which is not run again
    packed.main(words)
    assert read("packed", tmp_path).rows == rows
