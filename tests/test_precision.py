from types import SimpleNamespace

import pytest
import torch

from pacatune import precision


def test_devices_are_checked_before_they_are_used():
    assert precision.choose_device("cpu") == torch.device("cpu")
    assert precision.choose_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(
        ValueError, match=r"`device` \('warp'\) is unknown to torch; choose cpu or auto"
    ):
        precision.choose_device("warp")


def test_the_accelerator_is_taken_unless_another_device_is_asked_for(monkeypatch):
    fake = SimpleNamespace(
        is_available=lambda: True,
        current_accelerator=lambda: torch.device("xpu", 0),
        device_count=lambda: 1,
    )
    monkeypatch.setattr(torch, "accelerator", fake)
    assert precision.choose_device("auto") == torch.device("xpu", 0)
    assert precision.choose_device("xpu") == torch.device("xpu")
    assert precision.choose_device("cpu") == torch.device("cpu")
    for absent in ("xpu:1", "cuda"):
        with pytest.raises(ValueError, match="is not on this machine; choose cpu, xpu or auto"):
            precision.choose_device(absent)


def test_the_end_of_memory_is_told_from_other_errors():
    words = ("MPS backend out of memory (MPS allocated: 1 GB)", "can't allocate memory: you tried")
    short = [MemoryError(), torch.OutOfMemoryError("CUDA"), *map(RuntimeError, words)]
    other = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")]
    assert [precision.is_out_of_memory(error) for error in short + other] == [True] * 4 + [
        False
    ] * 2


def test_name_of_no_number_format():
    assert precision.torch_dtype("float64") is torch.float64
    with pytest.raises(ValueError, match=r"`dtype` \('bfloat'\) must .*did you mean 'bfloat16'\?"):
        precision.torch_dtype("bfloat")
    with pytest.raises(ValueError, match=r"`adapter_dtype` \('int8'\) must be one of float64, "):
        precision.torch_dtype("int8", option="adapter_dtype")


@pytest.mark.parametrize(
    ("dtype", "checkpoint", "full", "expected"),
    [
        ("auto", torch.float32, False, torch.float32),
        ("auto", torch.float16, False, torch.float32),
        ("auto", None, False, torch.float32),
        ("auto", torch.bfloat16, True, torch.float32),
        ("bfloat16", torch.float32, True, torch.bfloat16),
        ("float16", torch.float32, False, torch.float16),
    ],
)
def test_dtype_on_the_cpu(dtype, checkpoint, full, expected):
    assert precision.choose_dtype(dtype, checkpoint, full=full, use_cpu=True) == expected


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_kept_where_it_is_fast(monkeypatch, fast):
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda use_cpu: fast)
    dtype = precision.choose_dtype("auto", torch.bfloat16, full=False, use_cpu=True)
    assert dtype == (torch.bfloat16 if fast else torch.float32)


def test_bfloat16_speed_is_known_from_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for used in ("AVX512", "AVX2"):  # of a processor that has both
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda used=used: used)
        assert precision.bfloat16_is_fast(use_cpu=True) == (used == "AVX512")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not precision.bfloat16_is_fast(use_cpu=True)
