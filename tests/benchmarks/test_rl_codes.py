"""A sampler of FP8: a small run has every row, and codes are what the trainer computes with."""

import torch
from safetensors.torch import load_file

from benchmarks import rl_codes, rl_methods
from benchmarks.results import read
from pacatune.adapters.base import load_base
from tests.releases import needs

pytestmark = needs("compressed_tensors")


def test_a_small_run(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(rl_methods, "base_path", lambda: str(tiny_model_dir))
    monkeypatch.setattr(rl_methods, "RANK", 2)
    words = ["--steps", "2", "--seeds", "2", "--drawn", "8", "--threads", "1"]
    rl_codes.main([*words, "--output", str(tmp_path)])
    found = {(row.what, row.method): row for row in read("rl_codes", tmp_path).rows}
    same = found["largest difference, fixed tokens", "paca, on codes"]
    assert same.each == {"seed 0": 0.0, "seed 1": 0.0}
    for method in ("paca", "lora"):
        assert found["largest difference, fixed tokens", method].value > 0
    for method in rl_codes.METHODS:
        assert found["k3_kl", method].n == 2
        assert found["loss, sampler", method].value > 0
    sent = {method: found[rl_methods.SENT, method].value for method in rl_codes.METHODS}
    assert 0 < sent["paca"] < sent["lora-adapter"] < sent["lora"]


def test_codes_are_near_to_the_weights(tiny_model_dir, tmp_path):
    folder = rl_codes.write_coded(tiny_model_dir, tmp_path / "coded")
    dtypes = {one.dtype for one in load_file(folder / "model.safetensors").values()}
    assert torch.float8_e4m3fn in dtypes
    plain, coded = (
        load_base(str(path), task_type="CAUSAL_LM", dtype="float32").state_dict()
        for path in (tiny_model_dir, folder)
    )
    for name, weight in plain.items():
        limit = 0.07 * weight.abs() + 1e-2 * weight.abs().max()  # 3 bits of mantissa, and zero
        assert ((coded[name] - weight).abs() <= limit).all(), name
