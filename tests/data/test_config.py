import pytest

from pacatune.data import DataConfig


def test_path_is_required():
    with pytest.raises(ValueError, match=r"`data.path` is ''; give a .jsonl"):
        DataConfig()


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_fraction_range(fraction):
    with pytest.raises(ValueError, match=rf"`data.eval_fraction` \({fraction}\) must be in \[0, 1"):
        DataConfig(path="a.jsonl", eval_fraction=fraction)
