"""What can be estimated, and what is refused before any model is built."""

import itertools

import pytest
import torch

from pacatune.measure.setting import Setting


def setting(**options):
    return Setting(model="llama3-8b", **options)


def test_names_dtypes_and_losses():
    assert setting(method="qpaca") == setting(method="paca", quantization="nf4")
    assert setting(method="qlora", quantization="fp4").quantization == "fp4"
    assert setting(dtype="fp16", adapter_dtype="bf16").adapter_dtype == "bfloat16"
    assert setting().trained_dtype == torch.float32
    assert setting(method="full").trained_dtype == torch.bfloat16
    assert setting(dtype="float32").compute_dtype == torch.bfloat16
    assert setting(dtype="float16").compute_dtype == torch.float16
    assert (setting(lean="off").loss_kind, setting(lean="auto").loss_kind) == ("logits", "chunked")
    assert setting(lean="auto", loss="logits").loss_kind == "logits"


UNKNOWN = {"method": ("qlorra", "qlora"), "dtype": ("bfloat", "bfloat16"), "lean": ("of", "off")}
UNKNOWN |= {"adapter_dtype": ("float", "float32"), "quantization": ("nf5", "nf4")}
UNKNOWN |= {"loss": ("chunk", "chunked"), "sharding": ("fsdp", "fsdp2")}
SIZES = ("rank", "batch_size", "seq_len", "gradient_accumulation", "num_gpus")


def test_choices_are_known_and_sizes_whole_and_positive():
    for option, (value, nearest) in UNKNOWN.items():
        match = rf"`{option}` \('{value}'\) must be one of .*; did you mean '{nearest}'\?"
        with pytest.raises(ValueError, match=match):
            setting(**{option: value})
    for option, value in itertools.product(SIZES, (0, 1.5, True)):
        match = rf"`{option}` \({value}\) must be a whole number of at least 1"
        with pytest.raises(ValueError, match=match):
            setting().but(**{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lean_level": 0}, r"`lean_level` \(0\) must be 1, 2 or 3\."),
        ({"lean_level": 2, "lean": "off"}, r"`lean_level` \(2\) with `lean` \('off'\): nothi"),
        ({"seq_len": 1}, r"`seq_len` \(1\) must be at least 2"),
        ({"method": "lora", "dropout": 1.0}, r"`dropout` \(1.0\) must be in \[0, 1\)"),
        ({"method": "paca", "dropout": 0.1}, r"`dropout` \(0.1\) with `method` \('paca'\)"),
        ({"method": "full", "quantization": "nf4"}, r"`quantization` .* `method` \('full'\)"),
        ({"num_gpus": 2}, r"`sharding` \('none'\) and `num_gpus` \(2\) say"),
    ],
)
def test_what_cannot_be_estimated_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        setting(**options)
