"""Adapters of each kind of weight, through everything that is done to finished adapters (R7)."""

import pytest
import torch

from pacatune.adapters.export import export_lora
from pacatune.adapters.fingerprint import fingerprint
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.loading import attach, check_base
from tests.adapters import kinds
from tests.adapters.fixtures import edit_json, error_in_peft
from tests.releases import has

pytestmark = [
    # With the base's embedding, which `make` leaves out of the file again.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    # What the notes of an export say as well.
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd:UserWarning"),
]
# Older releases of PEFT build LoRA of other shapes on these experts.
LEAST_PEFT = {"mixtral": "0.20", "qwen2": "0.20", "qwen3": "0.20", "llama4": "0.19"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    found = {}

    def base_of(kind):
        if kind not in found:
            folder = tmp_path_factory.mktemp("bases") / kind
            kinds.build(kind).save_pretrained(folder)  # or the test is skipped
            found[kind] = folder
        return found[kind]

    return base_of


def make(kind, base, folder, **options):
    model = kinds.save(kind, base, folder, **options)
    model.save_pretrained(folder, save_embedding_layers=False)  # the base's own, that is
    return model


@pytest.mark.parametrize("kind", kinds.OPTIONS)
def test_exports_to_lora_that_plain_peft_runs_alike(kind, bases, tmp_path):
    base, adapter, lora = bases(kind), tmp_path / "adapter", tmp_path / "lora"
    make(kind, base, adapter)
    if not has("peft", LEAST_PEFT.get(kind, "0.18")):
        with pytest.raises(ValueError, match=r"LoRA for the experts of .* needs PEFT 0\.(19|20)"):
            export_lora(str(base), adapter, lora)
        return
    result = export_lora(str(base), adapter, lora)
    assert error_in_peft(base, adapter, lora) < 1e-5
    assert result.rounding < 1e-6
    is_convolution, has_groups = kind in kinds.CONVOLUTIONS, kind == "convnext"
    notes = " ".join(result.notes)
    assert ("convolutions have ranks of their own" in notes) == is_convolution
    assert ("with groups but cannot merge" in notes) == has_groups


@pytest.mark.parametrize("kind", kinds.OPTIONS)
def test_knows_its_base(kind, bases, tmp_path):
    make(kind, bases(kind), tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    base, other = kinds.build(kind), kinds.build(kind)
    assert check_base(adapter, base) == []
    columns = {name: update.indices for name, update in adapter.modules.items()}
    before = fingerprint(base, columns)["modules"]
    peft_model, _ = attach(base, adapter)
    assert fingerprint(peft_model, columns)["modules"] == before
    assert any(before.values())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    with pytest.raises(ValueError, match=r"weights of .* adapted modules are not those"):
        check_base(adapter, other)


def test_a_configuration_without_its_parameters_is_refused(bases, tmp_path):
    make("mixtral", bases("mixtral"), tmp_path / "adapter", r=3)
    path = tmp_path / "adapter" / "adapter_config.json"
    edit_json(path, target_parameters=["experts.other", "experts.down_proj"])
    with pytest.raises(ValueError, match="fits its 3 columns only as one of `target_param"):
        read_adapter(tmp_path / "adapter")
