"""Adapters of each kind of weight (R7): whatever way their columns take, they arrive with the bits
of one merge; as LoRA they compute the same; and they know their base.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pacatune import patch
from pacatune.adapters.base import load_base
from pacatune.adapters.export import export_lora
from pacatune.adapters.fingerprint import fingerprint
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.loading import attach, check_base
from pacatune.adapters.merge import merge
from pacatune.ops.columns import bits
from pacatune.sync import ColumnReceiver, ColumnSource, element_patches
from tests.adapters import kinds
from tests.adapters.fixtures import edit_json, error_in_peft
from tests.patch.conftest import contents
from tests.releases import has

pytestmark = [
    # With the base's embedding, which `case` leaves out of the file again.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    # What the notes of an export say as well.
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd:UserWarning"),
]
# Older releases of PEFT build LoRA of other shapes on these experts.
LEAST_PEFT = {"mixtral": "0.20", "qwen2": "0.20", "qwen3": "0.20", "llama4": "0.19"}


def load(folder):
    return load_base(str(folder), task_type=None)


def assert_bits(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(bits(tensor), bits(expected[name])), name


@dataclass
class Case:
    """An adapter of one kind of weight: on its base in memory, and both in folders."""

    kind: str
    base: Path
    adapter: Path
    model: Any

    @property
    def plain(self):
        return load(self.base).state_dict()

    def by_merge(self, folder):
        assert merge(str(self.base), self.adapter, folder / "out").is_verified
        return load(folder / "out")

    def by_a_patch_of_its_files(self, folder):
        made, notes = patch.make(self.base, self.adapter)
        assert notes == []
        assert made.num_bytes < sum(path.stat().st_size for path in self.base.iterdir()) / 2
        patch.apply_to_folder(self.base, made, folder / "out")
        patch.apply_to_folder(folder / "out", made, folder / "back", revert=True)
        assert contents(folder / "back") == contents(self.base)
        return load(folder / "out")

    def by_a_patch_in_memory(self, folder):
        made, _ = patch.make(self.base, self.adapter)
        model = load(self.base)
        patch.apply(model, made)
        found = copy.deepcopy(model)
        patch.revert(model, made)
        assert_bits(model, self.plain)
        return found

    def by_a_sync(self, folder):
        source, server = ColumnSource(self.model), load(self.base)
        receiver = ColumnReceiver(server)
        receiver.apply(source.columns())
        found = copy.deepcopy(server)
        receiver.revert()
        assert_bits(server, self.plain)
        return found

    def by_elements(self, folder):
        source, server = ColumnSource(self.model), load(self.base)
        state = server.state_dict()
        for part in element_patches(source.columns()):
            state[part.name].view(-1)[part.indices.long()] = part.values
        return server


PATHS = {name: path for name, path in vars(Case).items() if name.startswith("by_")}
IN_MEMORY = ("by_a_patch_in_memory", "by_a_sync", "by_elements")
REFUSED = {
    **{("convnext", name): "convolution with groups" for name in PATHS if name != "by_merge"},
    **{(kind, IN_MEMORY[0]): "tensors in another form" for kind in ("mixtral", "qwen2", "qwen3")},
}


@pytest.fixture(scope="module", params=[*kinds.OPTIONS, *(f"{k}, mixed" for k in kinds.OPTIONS)])
def case(request, tmp_path_factory):
    kind, _, is_mixed = request.param.partition(", ")
    options = {"dtype": "bfloat16", **({"channels": 5} if is_mixed else {})}
    folder = tmp_path_factory.mktemp(kind)
    base, adapter = folder / "base", folder / "adapter"
    kinds.build(kind).bfloat16().save_pretrained(base)
    model = kinds.save(kind, base, adapter, **options)
    model.save_pretrained(adapter, save_embedding_layers=False)
    return Case(kind, base, adapter, model)


@pytest.mark.parametrize("path", PATHS)
def test_bits(case, path, tmp_path):
    message = REFUSED.get((case.kind, path))
    if message is not None:
        with pytest.raises(ValueError, match=message):
            PATHS[path](case, tmp_path)
        return
    expected = copy.deepcopy(case.model).merge_and_unload().state_dict()
    assert any(not torch.equal(tensor, case.plain[name]) for name, tensor in expected.items())
    assert_bits(PATHS[path](case, tmp_path), expected)


def test_plain_peft_runs_its_lora_alike(case, tmp_path):
    if not has("peft", LEAST_PEFT.get(case.kind, "0.18")):
        with pytest.raises(ValueError, match=r"LoRA for the experts of .* needs PEFT 0\.(19|20)"):
            export_lora(str(case.base), case.adapter, tmp_path)
        return
    result = export_lora(str(case.base), case.adapter, tmp_path)
    assert error_in_peft(case.base, case.adapter, tmp_path) < 1e-5
    assert result.rounding < 1e-6
    is_convolution, has_groups = case.kind in kinds.CONVOLUTIONS, case.kind == "convnext"
    notes = " ".join(result.notes)
    assert ("convolutions have ranks of their own" in notes) == is_convolution
    assert ("with groups but cannot merge" in notes) == has_groups


def test_it_knows_its_base(case):
    adapter, base = read_adapter(case.adapter), load(case.base)
    assert check_base(adapter, base) == []
    columns = {name: update.indices for name, update in adapter.modules.items()}
    before = fingerprint(base, columns)["modules"]
    peft_model, _ = attach(base, adapter)
    assert fingerprint(peft_model, columns)["modules"] == before
    assert any(before.values())
    other = load(case.base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    with pytest.raises(ValueError, match=r"weights of .* adapted modules are not those"):
        check_base(adapter, other)


def test_a_configuration_without_its_parameters_is_refused(tmp_path):
    kinds.build("mixtral").save_pretrained(tmp_path / "base")
    kinds.save("mixtral", tmp_path / "base", tmp_path / "adapter", r=3)
    path = tmp_path / "adapter" / "adapter_config.json"
    edit_json(path, target_parameters=["experts.other", "experts.down_proj"])
    with pytest.raises(ValueError, match="fits its 3 columns only as one of `target_param"):
        read_adapter(tmp_path / "adapter")
