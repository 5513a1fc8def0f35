"""Files out of packages: what is downloaded, checked and kept."""

import io
import sys
import tarfile
import zipfile
from hashlib import sha256

import pytest

from examples import packaged
from examples.packaged import Archive, Packaged, default_cache, table

METADATA = "Metadata-Version: 2.1\nName: pacatune-probe\nVersion: 1.0\n"


def make_wheel(folder):
    path = folder / "pacatune_probe-1.0-py3-none-any.whl"
    info = "pacatune_probe-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", METADATA)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for name in "ba":
            wheel.writestr(f"probe/{name}.yml", name)
        wheel.writestr("probe/__init__.py", "raise RuntimeError('must not be imported')")
    return path


def make_source(folder):
    """A source archive, whose setup.py is run by pip."""
    path = folder / "pacatune-probe-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {
            "setup.py": "from setuptools import setup\nsetup(name='pacatune-probe', version='1.0')",
            "PKG-INFO": METADATA,
            "probe/a.yml": "a",
            "probe/b.yml": "b",
        }.items():
            entry = tarfile.TarInfo(f"pacatune-probe-1.0/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode()))
    return path


@pytest.fixture(params=[make_wheel, make_source])
def probe(request, tmp_path, monkeypatch):
    """Two files of a package that pip finds."""
    folder = tmp_path / "archives"
    folder.mkdir()
    path = request.param(folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONSTRAINT", "")
    is_source = path.suffix == ".gz"
    digest = sha256(path.read_bytes()).hexdigest()
    top = "pacatune-probe-1.0/probe" if is_source else "probe"
    return Packaged(
        folder="a-probe",
        what="a probe",
        archive=Archive(requirement="pacatune-probe==1.0", sha256=digest, is_source=is_source),
        files=(f"{top}/a.yml", f"{top}/b.yml") if is_source else (f"{top}/*.yml",),
    )


def test_files_are_fetched_once(probe, tmp_path, monkeypatch):
    said = []
    folder = probe.prepare(tmp_path / "cache", said.append)
    assert {path.name for path in folder.iterdir()} == {"a.yml", "b.yml", "source.json"}
    assert (folder / "a.yml").read_text() == "a"
    assert said[0] == "downloading pacatune-probe==1.0 (0 MB): a probe"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert probe.prepare(tmp_path / "cache", pytest.fail) == folder
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a-probe"]


def test_another_hash_is_refused(probe, tmp_path):
    object.__setattr__(probe.archive, "sha256", "0" * 64)
    with pytest.raises(OSError, match=r"could not download pacatune-probe==1\.0 \(.*HASHES"):
        probe.prepare(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_foreign_files_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "pacatune"
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "train.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match="chats was not made here, or is not whole"):
        packaged.prepare("chats", tmp_path)
    assert (tmp_path / "chats" / "train.jsonl").read_text() == "mine"


def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="needs a package; pip install reasoning-gym"):
        packaged.prepare("reverse-words", tmp_path)


def test_the_command_prepares_a_task_with_its_model_and_data(probe, tmp_path, monkeypatch):
    monkeypatch.setitem(table.PACKAGED, "smollm2", probe)
    data = Packaged(folder="some", what="", make=lambda files, to: (to / "train.jsonl").touch())
    monkeypatch.setitem(table.PACKAGED, "chats", data)
    path = packaged.prepare("smollm2-chat", tmp_path)
    text = path.read_text()
    assert path == tmp_path / "smollm2-chat.yaml"
    assert f"eval_path: {tmp_path}/some/test.jsonl" in text
    assert f"path: {tmp_path}/a-probe" in text
    path.write_text("mine")
    assert packaged.prepare("smollm2-chat", tmp_path).read_text() == "mine"
