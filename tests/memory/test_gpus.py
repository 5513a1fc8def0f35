import pytest

from pacatune.memory.gpus import GPU_GIB, gpu_bytes, parse_bytes


def test_every_gpu_gives_less_than_its_name_says():
    assert gpu_bytes("a100-80g") < 80 * 2**30
    assert gpu_bytes("A100-40G") < 40 * 2**30
    assert all(gpu_bytes(name) == int(size * 2**30) for name, size in GPU_GIB.items())


def test_unknown_gpu_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown GPU 'a100-80gb'; did you mean 'a100-80g'"):
        gpu_bytes("a100-80gb")
    with pytest.raises(ValueError, match="unknown GPU 'xyz'; Known are t4"):
        gpu_bytes("xyz")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gb", 24 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("512MiB", 2**29),
        ("100B", 100),
    ],
)
def test_amounts(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "0GiB", "24G", "1e3MiB", "24 GiBs", ""])
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match="is no amount of memory; write a number above 0 and"):
        parse_bytes(text)
