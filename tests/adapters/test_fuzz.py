"""Whatever bytes an adapter holds, reading it gives an adapter or a ValueError."""

import contextlib
import random
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pacatune.adapters.folder import read_adapter
from pacatune.files.json_file import parse_json_object

FILES = ("adapter_model.safetensors", "adapter_config.json", "pacatune.json")


@pytest.fixture(scope="module")
def victim(adapter_dir, tmp_path_factory):
    """A small adapter, so that a random byte often hits the header, and its files' bytes."""
    folder = shutil.copytree(adapter_dir, tmp_path_factory.mktemp("fuzz") / "adapter")
    path = folder / "adapter_model.safetensors"
    small = {name: value for name, value in load_file(path).items() if "layers.0.mlp" in name}
    save_file(small, path)
    return folder, {name: (folder / name).read_bytes() for name in FILES}


def mutate(raw, generator):
    """Change, insert, delete or move a few bytes."""
    result = bytearray(raw)
    for _ in range(generator.choice([1, 1, 2, 8])):
        position = generator.randrange(len(result))
        match generator.randrange(5):
            case 0:
                result[position] = generator.randrange(256)
            case 1:
                result[position:position] = generator.randbytes(generator.randrange(1, 9))
            case 2:
                del result[position : position + generator.randrange(1, 30)]
            case 3:
                result[position] ^= 1 << generator.randrange(8)
            case 4:
                start = generator.randrange(len(result))
                result[position:position] = result[start : start + 20]
        if not result:
            return b""
    return bytes(result)


@pytest.mark.parametrize("name", FILES)
def test_mutated_files_give_an_adapter_or_a_value_error(victim, name):
    folder, originals = victim
    generator = random.Random(f"seed of {name}")
    num_refused = 0
    for _ in range(400):
        (folder / name).write_bytes(mutate(originals[name], generator))
        try:
            adapter = read_adapter(folder)
        except ValueError:
            num_refused += 1
        else:
            assert all(torch.isfinite(delta).all() for delta, *_ in adapter.modules.values())
    (folder / name).write_bytes(originals[name])
    assert num_refused > 100
    read_adapter(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=200) | st.text(alphabet='{}[]",:\\0eE-.nul ', max_size=200).map(str.encode)
)
def test_any_bytes_are_an_object_or_a_value_error(raw):
    with contextlib.suppress(ValueError):
        assert isinstance(parse_json_object(raw, source="it"), dict)
