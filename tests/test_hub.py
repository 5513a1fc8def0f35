"""A name that is nowhere is answered in one line, by the right option."""

import pytest

from pacatune.adapters.base import empty_base, load_tokenizer
from pacatune.data.read import read_rows
from pacatune.pretrained import load_config

MODEL = r"\('nosuch/model'\) is neither a file or folder here nor a model of the hub that can be re"


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: load_config("nosuch/model"), f"`model.path` {MODEL}"),
        (lambda: empty_base("nosuch/model", task_type=None), f"`model` {MODEL}"),
        (lambda: load_tokenizer("nosuch/model"), f"`model` {MODEL}"),
        (lambda: list(read_rows("no/data")), r"`data.path` .* data set of the hub"),
        (lambda: list(read_rows("no/data", option="data.eval_path")), r"`data.eval_path` \('no/da"),
    ],
)
def test_name_that_is_nowhere(load, message):
    with pytest.raises(FileNotFoundError, match=message):
        load()
