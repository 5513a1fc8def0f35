"""Peaks of a process, the memory of known GPUs, and amounts of memory."""

import subprocess
import sys

import pytest

from pacatune.measure.device import GPU_GIB, gpu_bytes, parse_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_peaks_of_a_process_are_what_was_there_at_once():
    # In a process of its own: what others have freed here would be given back in between.
    code = """
import torch
from pacatune.measure.device import peak_process_bytes, reset_peak_process_bytes
before = peak_process_bytes()
torch.ones(75 * 2**20)
print(peak_process_bytes() - before)
reset_peak_process_bytes()
print(peak_process_bytes() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, anew = (int(line) / 2**20 for line in run.stdout.split())
    assert 250 < peak < 350
    # The kernel counts the pages of a process now and then.
    assert anew < 50


def test_every_gpu_gives_less_than_its_name_says():
    assert gpu_bytes("A100-40G") < 40 * 2**30
    assert all(gpu_bytes(name) == int(size * 2**30) for name, size in GPU_GIB.items())
    with pytest.raises(ValueError, match="unknown GPU 'a100-80gb'; did you mean 'a100-80g'"):
        gpu_bytes("a100-80gb")
    with pytest.raises(ValueError, match=r"unknown GPU 'xyz'; none is like it\. Known are t4"):
        gpu_bytes("xyz")


def test_amounts_of_memory():
    amounts = {"24GiB": 24 * 2**30, "24 gb": 24 * 10**9, "1.5TiB": 3 * 2**39, "512MiB": 2**29}
    amounts |= {"100B": 100, str(4 * 2**30): 4 * 2**30}
    assert {text: parse_bytes(text) for text in amounts} == amounts
    for text in ("24", "1000", "GiB", "-1GiB", "0GiB", "24G", "1e3MiB", "24 GiBs", ""):
        with pytest.raises(ValueError, match=r"`memory` .* is no amount of memory; write a number"):
            parse_bytes(text)
