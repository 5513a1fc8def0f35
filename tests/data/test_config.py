import pytest

from pacatune.data import DataConfig
from pacatune.data.read import read_rows


def test_path_is_required():
    with pytest.raises(ValueError, match=r"`data.path` is ''; give a file, a folder"):
        DataConfig()


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_fraction_range(fraction):
    with pytest.raises(ValueError, match=rf"`data.eval_fraction` \({fraction}\) must be in \[0, 1"):
        DataConfig(path="a.jsonl", eval_fraction=fraction)


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
