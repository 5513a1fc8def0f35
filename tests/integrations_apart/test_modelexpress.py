"""modelexpress's own receiver takes a folder of versions, without its server and object store."""

from pathlib import Path

import pytest
import torch
from modelexpress_rl.inference.receiver import (
    ObjectStorageGeneratorConfig,
    _LocalCheckpoint,
    _S3Version,
)
from modelexpress_rl.object_storage import ObjectStorageType
from modelexpress_rl.train import WeightPayloadFormat
from peft import get_peft_model
from safetensors.torch import load_file

from pacatune import PacaConfig
from pacatune.sync import ColumnSource, DeltaFolder
from tests.conftest import build_model
from tests.sync.ranks import trained_state


def build(seed=0):
    return build_model(50, seed).bfloat16()


def adapt(**options):
    options = {"r": 4, "target_modules": "all-linear", "init_weights": False, **options}
    return get_peft_model(build(), PacaConfig(**options))


def nudge(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-5 * torch.randn(parameter.shape, generator=generator))


class Files:
    """In place of its client of an object store."""

    def get(self, path):
        return Path(path).read_bytes()


class Receiver:
    """What an engine of modelexpress does at a sync, but for loading the checkpoint."""

    def __init__(self, base, cache):
        config = ObjectStorageGeneratorConfig(
            storage_type=ObjectStorageType.S3,
            initial_base_version_id="000000",
            seed_checkpoint_path=base,
            refit_checkpoint_dir=cache,
        )
        self.checkpoint = _LocalCheckpoint(model_name="model", s3=Files(), config=config)
        self.checkpoint.initialize()

    def take(self, folder, number):
        version = f"{number:06}"
        index = folder / f"weight_v{version}" / "model.safetensors.index.json"
        form = WeightPayloadFormat.XOR_DELTA
        found = _S3Version(version, f"{number - 1:06}", form, str(index))
        prepared = self.checkpoint.prepare(found)
        self.checkpoint.activate(prepared)
        return load_file(prepared.path / "model.safetensors")


@pytest.fixture
def base(tmp_path):
    build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_its_checkpoint_has_the_bits_of_a_merge(base, tmp_path):
    receiver, folder = Receiver(base, tmp_path / "cache"), tmp_path / "sync"

    def sync(source, writer):
        columns = source.send(writer)
        held, expected = receiver.take(folder, writer.version), trained_state(source.model)
        assert held.keys() == expected.keys()
        for name, tensor in held.items():
            assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name
        return columns

    # The second adapter has other columns; its trainer, and the one after it, were started anew.
    for model in (adapt(), other := adapt(r=3, target_modules=["q_proj", "down_proj"]), other):
        source, writer = ColumnSource(model), DeltaFolder(folder, base=base)
        assert sync(source, writer).last is None
        for seed in range(2):
            nudge(model, seed)
            assert sync(source, writer).last is not None
        assert sync(source, writer).num_bytes == 0
    assert writer.version == 12


def test_another_base_and_a_missed_version_are_refused(base, tmp_path):
    source, writer = ColumnSource(adapt()), DeltaFolder(tmp_path / "sync", base=base)
    for _ in range(2):
        source.send(writer)
        nudge(source.model, 0)
    build(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(Exception, match="checksum differs"):
        Receiver(tmp_path / "other", tmp_path / "one").take(writer.folder, 1)
    with pytest.raises(Exception, match="does not match exact base"):
        Receiver(base, tmp_path / "two").take(writer.folder, 2)
