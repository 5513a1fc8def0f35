"""The benchmark of files of few bits, on a small model."""

import pytest
import torch

pytest.importorskip("gguf")

from benchmarks import packed_files
from benchmarks.packed import RATES
from benchmarks.packed_files import FORMS, Base, base_file, requantised
from pacatune.adapters.base import load_base
from pacatune.patch.packed import merge_packed
from tests.grid.conftest import ROWS, model_file, run_dir  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in .*gguf")


@pytest.fixture(scope="module")
def base(model_file):  # noqa: F811
    # F16 and formats that gguf does not write are no part of it.
    found = Base(model_file)
    found.modules = lambda: [f"model.layers.{n}.self_attn.{m}_proj" for n in (0, 1) for m in "qkvo"]
    return found


def test_every_form_has_rates():
    assert {form.method for form in FORMS.values()} == RATES.keys()


def test_a_file_of_another_format_is_read_and_holds_the_same(base, tmp_path, monkeypatch):
    source = tmp_path / "smollm2-135m-instruct-gguf" / "model.gguf"
    source.parent.mkdir()
    source.write_bytes(base.file.read_bytes())
    monkeypatch.setattr(packed_files, "default_cache", lambda: tmp_path)
    other = Base(base_file("Q8_0", tmp_path))
    kinds = {entry.dtype for entry in other.checkpoint.entries.values()}
    assert kinds & {"Q8_0", "Q4_1"} == {"Q8_0"}
    for module in base.modules():
        expected = base.model.get_submodule(module).weight
        error = (other.model.get_submodule(module).weight - expected).abs().max()
        assert error <= 0.01 * expected.abs().max(), module


def test_what_is_not_trained_stays_as_it_is(base, tmp_path):
    output = tmp_path / "same.gguf"
    requantised(base, base.model, output, keeps_scales=True)
    assert output.read_bytes() == base.file.read_bytes()
    requantised(base, base.model, output)
    again = load_base(str(output), task_type="CAUSAL_LM", dtype="bfloat16")
    for name, weight in base.model.named_parameters():
        error = (again.get_parameter(name) - weight).abs().max()
        assert error < 0.2 * weight.abs().max(), name


def test_a_written_file_is_scored_as_it_is_read(base, run_dir, tmp_path):  # noqa: F811
    output = tmp_path / "tuned.gguf"
    merge_packed(base.file, run_dir, output, verify=False)
    again = load_base(str(output), task_type="CAUSAL_LM", dtype="bfloat16")
    found = base.with_file(output)
    for module in base.modules():
        expected = again.get_submodule(module).weight
        assert torch.equal(found.get_submodule(module).weight, expected), module
