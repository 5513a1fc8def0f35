import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from pacatune.files import tensor_file


def write_raw(path, header, data=b""):
    """Write a safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter_model.safetensors"


def test_written_tensors_are_read_back(path):
    tensors = {"a.b": torch.arange(6.0).view(2, 3), "c": torch.tensor([1, 2]), "d": torch.zeros(0)}
    tensor_file.write_tensors(tensors | {"t": tensors["a.b"].t()}, path)
    result = tensor_file.read_tensors(path)
    assert torch.equal(result.pop("t"), tensors["a.b"].t())
    assert result.keys() == tensors.keys()
    assert all(torch.equal(result[name], tensors[name]) for name in tensors)
    assert tensor_file.read_layout(path).tensors["c"]["shape"] == [2]


def test_files_that_are_not_whole_or_something_else_are_refused(path):
    save_file({"a": torch.ones(100)}, path)
    whole = path.read_bytes()
    torch.save({"a": torch.ones(1)}, path)
    pickle = path.read_bytes()
    for data in (*(whole[:kept] for kept in (0, 5, 8, 40, 400)), whole + b"more", pickle):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            tensor_file.read_tensors(path)


@pytest.mark.parametrize("size", [tensor_file.MAX_HEADER_BYTES + 1, 2**62])
def test_a_header_that_claims_too_much_is_refused_before_it_is_read(path, size):
    path.write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(ValueError, match=rf"a header of {size} bytes; at most 16777216 are read"):
        tensor_file.read_tensors(path)


def test_an_oversized_file_is_refused_before_it_is_read(path):
    with path.open("wb") as file:
        file.truncate(tensor_file.MAX_FILE_BYTES + 1)  # sparse: takes no room
    with pytest.raises(ValueError, match=r"is 17179869185 bytes; at most 17179869184 are read"):
        tensor_file.read_tensors(path)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a b", "a..b", "", "a\x1b[2J", "a" * 513, "a\\b"]
)
def test_names_that_are_paths_or_unprintable_are_refused(path, name):
    save_file({name: torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"holds a tensor named .* words of letters, digits"):
        tensor_file.read_tensors(path)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        *(b"not json", b"[]", {"a": 1}),
        {"a": {**ENTRY, "dtype": "F31"}},
        {"a": {**ENTRY, "shape": [2**62, 2**62]}},
        {"a": ENTRY, "b": ENTRY},
    ],
)
def test_a_wrong_header_is_refused(path, header):
    with pytest.raises(ValueError, match=r"is truncated or no safetensors file .*Copy it again"):
        tensor_file.read_tensors(write_raw(path, header, b"\0" * 4))
    twice = f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'.encode()
    with pytest.raises(ValueError, match="the key 'a' stands twice"):
        tensor_file.read_tensors(write_raw(path, twice, b"\0" * 4))
