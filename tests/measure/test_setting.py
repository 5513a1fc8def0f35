"""What can be asked for, and what is refused."""

import pytest
import torch

from pacatune.measure.setting import Setting


def setting(**options):
    return Setting(model="llama3-8b", **options)


def test_names_of_methods_on_quantised_bases():
    assert setting(method="qpaca") == setting(method="paca", quantization="nf4")
    assert setting(method="qlora", quantization="fp4").quantization == "fp4"


@pytest.mark.parametrize(
    ("option", "value", "nearest"),
    [
        ("method", "pacca", "paca"),
        ("method", "qlorra", "qlora"),
        ("dtype", "bfloat", "bfloat16"),
        ("adapter_dtype", "float", "float32"),
        ("quantization", "nf5", "nf4"),
        ("lean", "of", "off"),
        ("loss", "chunk", "chunked"),
        ("sharding", "fsdp", "fsdp2"),
    ],
)
def test_unknown_choice_suggests_the_nearest(option, value, nearest):
    match = rf"`{option}` \('{value}'\) must be one of .*; did you mean '{nearest}'\?"
    with pytest.raises(ValueError, match=match):
        setting(**{option: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
@pytest.mark.parametrize(
    "option", ["rank", "batch_size", "seq_len", "gradient_accumulation", "num_gpus"]
)
def test_sizes_must_be_whole_and_positive(option, value):
    with pytest.raises(ValueError, match=f"`{option}` .* must be a whole number of at least 1"):
        setting(**{option: value})


def test_one_token_has_nothing_to_learn():
    with pytest.raises(ValueError, match=r"`seq_len` \(1\) must be at least 2"):
        setting(seq_len=1)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_dropout_is_a_share(value):
    with pytest.raises(ValueError, match=r"`dropout` .* must be in \[0, 1\)"):
        setting(method="lora", dropout=value)


@pytest.mark.parametrize("method", ["paca", "full"])
def test_dropout_where_there_is_none(method):
    with pytest.raises(ValueError, match=f"`dropout` .* with `method` \\('{method}'\\)"):
        setting(method=method, dropout=0.1)


@pytest.mark.parametrize("method", ["full", "dora"])
def test_methods_that_are_not_on_quantised_bases(method):
    with pytest.raises(ValueError, match=f"`quantization` .* with `method` \\('{method}'\\)"):
        setting(method=method, quantization="nf4")


def test_sharding_needs_devices_and_devices_need_sharding():
    with pytest.raises(ValueError, match=r"`num_gpus` \(2\) with `sharding` \('none'\)"):
        setting(num_gpus=2)
    with pytest.raises(ValueError, match=r"`sharding` \('zero3'\) with `num_gpus` \(1\)"):
        setting(sharding="zero3")


def test_changes_are_checked_too():
    with pytest.raises(ValueError, match="`rank`"):
        setting().but(rank=0)


def test_dtypes():
    assert setting().trained_dtype == torch.float32
    assert setting(method="full").trained_dtype == torch.bfloat16
    assert setting(dtype="float32").compute_dtype == torch.bfloat16
    assert setting(dtype="float16").compute_dtype == torch.float16


def test_loss_follows_lean():
    assert setting(lean="off").loss_kind == "logits"
    assert setting(lean="auto").loss_kind == "chunked"
    assert setting(lean="auto", loss="logits").loss_kind == "logits"
