"""Options of data that cannot be, or that contradict each other."""

import pytest

from pacatune.data.config import DataConfig, PromptDataConfig, TextClassConfig
from pacatune.data.read import read_rows


def several(*datasets, **options):
    return {"path": "", "datasets": list(datasets), **options}


def one(**source):
    return several({"path": "a", **source})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DataConfig, {"eval_fraction": -0.1}, r"`data.eval_fraction` \(-0.1\) must be in"),
        (DataConfig, {"mix_strategy": "all_exhausted"}, "is for `data.datasets` with weights"),
        (DataConfig, several("a"), "`data.datasets` has 'a'; each must be a mapping, as {path"),
        (DataConfig, one(weight=0), r"`weight` \(0\) of a in `data.datasets`"),
        (DataConfig, several({"path": "a", "weight": 1}, {"path": "b"}), "give all one, or none"),
        (DataConfig, one(format="msgs"), r"`data.datasets.format` \('msgs'\) must be"),
        (DataConfig, one(weights=1), r"`data.datasets` \('weights'\) .* mean 'weight'"),
        (DataConfig, one() | {"path": "b"}, "`data.path` is for a single data set, and"),
        (DataConfig, one() | {"format": "text"}, "`data.format` is for a single"),
        (
            PromptDataConfig,
            {"chat_template_kwargs": {"tools": 1}},
            "`data.chat_tem.* sets 'tools',",
        ),
        (TextClassConfig, {"max_length": 0}, r"`data.max_length` \(0\) must be at least 1, or"),
    ],
)
def test_wrong_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"path": "x", **options})


def test_a_split_of_local_data(tmp_path):
    (tmp_path / "a.jsonl").touch()
    config = DataConfig(path=str(tmp_path / "a.jsonl"), eval_split="test")
    for split in (config.evaluation_source()[0].split, "validation"):
        with pytest.raises(ValueError, match=rf"a.jsonl\) is local: the split '{split}' is for da"):
            next(read_rows(config.path, split=split))
    assert DataConfig(path="org/a", eval_split="test").evaluation_source()[0].split == "test"
    options = {"split": "x", "name": "y", "eval_path": config.path}
    (source, _) = DataConfig(path="org/a", **options).evaluation_source()
    assert (source.split, source.name) == ("train", None)
    with pytest.raises(ValueError, match=r"a.jsonl\) is local: `data.name` \('y'\) is for da"):
        next(read_rows(config.path, name="y"))
