"""Whatever a patch says of itself, it is a ValueError or an edit that can be taken back."""

import json
import random
import shutil

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pacatune import patch
from pacatune.cli.entry import main
from pacatune.files.checkpoint import Checkpoint
from pacatune.patch.base import check_base
from pacatune.patch.edit import bits
from pacatune.patch.file import _KEY, _digest
from tests.mutations import mutated


def use(path, bf16_patch, checkpoint, tensors, scratch):
    """Do all that is done with a patch; return its inverse."""
    found = patch.load(path)
    assert main(["inspect", str(path), "--columns"]) == 0
    patch.compare_patches(found, bf16_patch)
    if found.adapter is not None:
        shutil.rmtree(scratch, ignore_errors=True)
        patch.to_adapter(found, scratch)
    patch.stack([found, bf16_patch], overlap="sum")
    check_base(checkpoint, found)
    patch.apply(tensors, found)
    return found.inverse()


def test_mutated_descriptions(bf16_dir, bf16_patch, tmp_path, capsys):
    path = tmp_path / "p.safetensors"
    patch.save(bf16_patch, path)
    with safe_open(path, framework="pt") as file:
        text = file.metadata()[_KEY]
    generator, num_refused = random.Random(0), 0
    # Copies: what is loaded is a map of the file, which is written anew below.
    parts = {name: tensor.clone() for name, tensor in load_file(path).items()}
    checkpoint, tensors = Checkpoint.open(bf16_dir), load_file(bf16_dir / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(300):
        description = json.loads(text)
        del description["digest"]
        description = mutated(description, generator)
        if isinstance(description, dict):
            parsed = json.loads(json.dumps(description))
            description["digest"] = _digest(parts, parsed)
        save_file(parts, path, metadata={"format": "pt", _KEY: json.dumps(description)})
        try:
            inverse = use(path, bf16_patch, checkpoint, tensors, tmp_path / "adapter")
        except ValueError:
            num_refused += 1
        else:
            patch.apply(tensors, inverse)
        assert all(torch.equal(bits(tensors[name]), bits(before[name])) for name in before)
    assert num_refused > 100
    printed = capsys.readouterr().out
    assert all(sign.isprintable() or sign == "\n" for sign in printed)
