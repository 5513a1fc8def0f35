"""Names that people write."""

import pytest

from pacatune.names import choose, did_you_mean, guess, nearest
from pacatune.precision import FLOATS, dtype_name, torch_dtype


def test_the_nearest_name():
    assert nearest("lorra", ["paca", "lora"]) == "lora"
    assert nearest("A100-80", ["a100-80g", "h100"]) == "a100-80g"
    assert nearest("PACA", ["PACA", "paca"]) == "PACA"
    assert nearest("adam", ["paca", "lora"]) is None
    assert nearest("xyz", iter(["paca", "lora"]), cutoff=0) in ("paca", "lora")


def test_what_is_said_of_a_wrong_name():
    assert guess("lorra", ["paca", "lora"]) == "did you mean 'lora'? "
    assert guess("xyz", ["paca", "lora"]) == ""
    assert did_you_mean("lorra", ["paca", "lora"]) == "did you mean 'lora'?"
    assert did_you_mean("xyz", ["paca", "lora"]) == "choose from paca, lora."


def test_hyphens_and_underscores_are_the_same():
    assert choose("paca_lean", ["paca-lean", "lora_dropout"], option="o") == "paca-lean"
    assert choose("lora-dropout", ["paca-lean", "lora_dropout"], option="o") == "lora_dropout"
    with pytest.raises(ValueError, match=r"^`o` \('lora-dropuot'\) must .*'lora_dropout'\?$"):
        choose("lora-dropuot", ["paca-lean", "lora_dropout"], option="o")


@pytest.mark.parametrize(
    ("short", "full"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_short_names_of_number_formats(short, full):
    assert choose(short, FLOATS, option="o") == full
    assert dtype_name(torch_dtype(short)) == full
    with pytest.raises(ValueError, match=r"'bf16'.* must be one of nf4, fp4"):
        choose("bf16", ["nf4", "fp4"], option="o")
