"""What can be estimated and measured, and what is refused before any model is built."""

import pytest
import torch

from pacatune.measure import setting as settings
from pacatune.measure.setting import MicroBatch, Setting


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


def test_choices_are_held_by_their_full_names():
    assert setting(dtype="fp16", adapter_dtype="bf16").dtype == "float16"
    assert setting(dtype="fp16", adapter_dtype="bf16").adapter_dtype == "bfloat16"
    bench = settings.BenchConfig(values={}, title="m", dtype="fp32", sweep="seq_len")
    assert (bench.dtype, bench.sweep) == ("float32", "seq-len")


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
@pytest.mark.parametrize(
    "option", ["rank", "batch_size", "seq_len", "gradient_accumulation", "num_gpus"]
)
def test_sizes_must_be_whole_and_positive(option, value):
    with pytest.raises(ValueError, match=f"`{option}` .* must be a whole number of at least 1"):
        setting(**{option: value})


@pytest.mark.parametrize("level", [0, 4, 2.0])
def test_lean_levels(level):
    with pytest.raises(ValueError, match=r"`lean_level` \(.*\) must be 1, 2 or 3\."):
        setting(lean_level=level)
    with pytest.raises(ValueError, match=r"`lean_level` \(2\) with `lean` \('off'\): nothing is"):
        setting(lean_level=2, lean="off")
    with pytest.raises(ValueError, match=r"`lean_level` \(4\) must be 0, 1, 2 or 3\."):
        settings.check_lean_level(4, least=0)


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
    with pytest.raises(ValueError, match=r"`sharding` \('none'\) and `num_gpus` \(2\) say"):
        setting(num_gpus=2)
    with pytest.raises(ValueError, match=r"`sharding` \('zero3'\) and `num_gpus` \(1\) say"):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ()}, "`methods` is empty; choose from frozen, paca, "),
        ({"methods": ("lorra",)}, r"`methods` \('lorra'\) must be one of .* did you mean 'lora'\?"),
        ({"methods": ("paca-transient",), "compiled": True}, "a compiled graph decides by itself"),
        ({"dtype": "int8"}, r"`dtype` \('int8'\) must be one of auto, float32, bfloat16, float16"),
        ({"adapter_dtype": "int8"}, r"`adapter_dtype` \('int8'\) must be one of same, float32"),
        ({"device": "gpu"}, r"`device` \('gpu'\) is unknown to torch; choose cpu or auto"),
        ({"sweep": "rank"}, r"`sweep` \('rank'\) must be one of batch, seq-len"),
        ({"sweep_max": 4}, r"`sweep_max` \(4\) is for a sweep"),
        ({"tokens": ()}, "`tokens` is empty"),
        ({"tokens": (-16,)}, r"`tokens` \(-16\) must be at least 1"),
        ({"tokens": (700,)}, r"`tokens` \(700\) .* above `seq_len` \(512\) a multiple of it"),
        ({"lean_level": -1}, r"`lean_level` \(-1\) must be 0, 1, 2 or 3"),
        (
            {"lean_level": 1, "compiled": True},
            r"`compiled` with `lean_level` \(1\) or one of paca-transient: a",
        ),
        ({"rank": 0}, r"`rank` \(0\) must be a whole number of at least 1"),
        ({"threads": 0}, r"`threads` \(0\) must be a whole number of at least 1"),
        ({"seconds": -1.0}, r"`seconds` \(-1.0\) must not be negative"),
        ({"seconds": float("nan")}, r"`seconds` \(nan\) must not be negative"),
        ({"dropout": 1.0}, r"`dropout` \(1.0\) must be in \[0, 1\)"),
        ({"memory_limit": 0}, r"`memory_limit` \(0\) must be a whole number of at least 1"),
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
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
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


@pytest.mark.parametrize(("is_fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_what_is_left_to_the_machine_is_settled(make_config, monkeypatch, is_fast, dtype):
    monkeypatch.setattr(settings.precision, "bfloat16_is_fast", lambda use_cpu: is_fast)
    config = make_config(dtype="auto", threads=None)
    assert (config.dtype, config.threads) == (dtype, settings.num_cores())
