"""What can be estimated and measured, and what is refused before any model is built."""

import itertools

import pytest
import torch

from pacatune.measure import setting as settings
from pacatune.measure.setting import MicroBatch, Setting


def setting(**options):
    return Setting(model="llama3-8b", **options)


def test_names_dtypes_and_losses():
    assert setting(method="qpaca") == setting(method="paca", quantization="nf4")
    assert setting(method="qlora", quantization="fp4").quantization == "fp4"
    assert setting(dtype="fp16", adapter_dtype="bf16").adapter_dtype == "bfloat16"
    bench = settings.BenchConfig(values={}, title="m", dtype="fp32", sweep="seq_len")
    assert (bench.dtype, bench.sweep) == ("float32", "seq-len")
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ()}, "`methods` is empty; choose from frozen, paca, "),
        ({"methods": ("lorra",)}, r"`methods` \('lorra'\) must be one of .* did you mean 'lora'\?"),
        ({"methods": ("paca-transient",), "compiled": True}, "a compiled graph decides by itself"),
        ({"dtype": "int8"}, r"`dtype` \('int8'\) must be one of auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, r"`device` \('gpu'\) is unknown to torch; choose cpu or auto"),
        ({"sweep": "rank"}, r"`sweep` \('rank'\) must be one of batch, seq-len"),
        ({"sweep_max": 4}, r"`sweep_max` \(4\) is for a sweep"),
        ({"tokens": ()}, "`tokens` is empty"),
        ({"tokens": (-16,)}, r"`tokens` \(-16\) must be at least 1"),
        ({"tokens": (700,)}, r"`tokens` \(700\) .* above `seq_len` \(512\) a multiple of it"),
        ({"lean_level": -1}, r"`lean_level` \(-1\) must be 0, 1, 2 or 3"),
        ({"lean_level": 1, "compiled": True}, r"`compiled` with `lean_level` \(1\) or one of pac"),
        ({"seconds": float("nan")}, r"`seconds` \(nan\) must not be negative"),
    ],
)
def test_what_cannot_be_measured_is_refused(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_methods_that_need_something_say_so(make_config, monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    needs = r"method 'qlora' needs bitsandbytes; pip install -e '.\[quant\]'"
    with pytest.raises(ValueError, match=needs):
        make_config(methods=("qlora",))


def test_settings_are_rows_of_equal_length(make_config):
    config = make_config(tokens=(16, 512, 2048))
    sizes = [(setting.num_rows, setting.num_tokens) for setting in config.settings]
    assert sizes == [(1, 16), (1, 512), (4, 512)]
    assert MicroBatch(num_rows=4, num_tokens=512).label == "4 x 512 tokens"


def test_ours_alternates_with_every_other_on_an_equal_base(make_config):
    for names, pairs in {
        ("frozen", "lora", "paca"): [("paca", "frozen"), ("paca", "lora")],
        ("full", "lora"): [("full", "lora")],
        ("paca", "qlora", "qpaca"): [("paca",), ("qpaca", "qlora")],
    }.items():
        assert make_config(methods=names).pairs == pairs


@pytest.mark.parametrize(("is_fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_what_is_left_to_the_machine_is_settled(make_config, monkeypatch, is_fast, dtype):
    monkeypatch.setattr(settings.precision, "bfloat16_is_fast", lambda use_cpu: is_fast)
    config = make_config(dtype="auto", threads=None)
    assert (config.dtype, config.threads) == (dtype, settings.num_cores())
