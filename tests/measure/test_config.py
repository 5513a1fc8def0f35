"""What is measured is checked before any model is built."""

import pytest
import torch

from pacatune.measure import config
from pacatune.measure.config import MicroBatch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ()}, "`methods` is empty; choose from frozen, paca, "),
        ({"methods": ("lorra",)}, r"`methods` \('lorra'\) must be one of .* did you mean 'lora'\?"),
        ({"methods": ("paca", "paca")}, "method 'paca' is named twice"),
        ({"methods": ("paca-resident",), "compiled": True}, "a compiled graph decides by itself"),
        ({"dtype": "int8"}, r"`dtype` \('int8'\) must be one of float32, bfloat16, float16"),
        ({"adapter_dtype": "int8"}, r"`adapter_dtype` \('int8'\) must be one of same, float32"),
        ({"device": "gpu"}, r"`device` \('gpu'\) is unknown to torch; here are cpu"),
        ({"sweep": "rank"}, r"`sweep` \('rank'\) must be one of batch, seq-len"),
        ({"sweep_max": 4}, r"`sweep_max` \(4\) is for a sweep"),
        ({"tokens": ()}, "`tokens` is empty"),
        ({"tokens": (-16,)}, r"`tokens` \(-16\) must be at least 1"),
        ({"tokens": (700,)}, r"`tokens` \(700\) .* above `seq_len` \(512\) a multiple of it"),
        ({"rank": 0}, r"`rank` \(0\) must be at least 1"),
        ({"rank": 33}, r"`rank` \(33\) must be at most `hidden_size` \(32\)"),
        ({"threads": 0}, r"`threads` \(0\) must be at least 1"),
        ({"seconds": -1.0}, r"`seconds` \(-1.0\) must not be negative"),
        ({"seconds": float("nan")}, r"`seconds` \(nan\) must not be negative"),
        ({"dropout": 1.0}, r"`dropout` \(1.0\) must be at least 0 and below 1"),
        ({"memory_limit": 0}, r"`memory_limit` \(0\) must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_a_device_that_is_not_here_is_refused(make_config):
    absent = "xpu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=rf"`device` \('{absent}:7'\) is not on this machine"):
        make_config(device=f"{absent}:7")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("qlora", r"needs bitsandbytes; pip install 'pacatune\[quant\]'"),
    ],
)
def test_methods_that_need_something_say_so(make_config, monkeypatch, method, message):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"method '{method}'.*{message}"):
        make_config(methods=(method,))


def test_settings_are_rows_of_equal_length(make_config):
    config = make_config(tokens=(16, 512, 2048))
    sizes = [(setting.num_rows, setting.num_tokens) for setting in config.settings]
    assert sizes == [(1, 16), (1, 512), (4, 512)]
    assert MicroBatch(num_rows=4, num_tokens=512).label == "4 x 512 tokens"


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("frozen", "lora", "paca"), [("paca", "frozen"), ("paca", "lora")]),
        (("full", "lora"), [("full", "lora")]),
        (("paca", "qlora", "qpaca"), [("paca",), ("qpaca", "qlora")]),
        (("qlora",), [("qlora",)]),
    ],
)
def test_ours_alternates_with_every_other_on_an_equal_base(make_config, names, pairs):
    assert make_config(methods=names).pairs == pairs
