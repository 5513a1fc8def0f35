"""The packaged images: out of an archive like bigbench's, split and written once."""

import base64
import dataclasses
import hashlib
import io
import json
import tarfile

import pytest
from PIL import Image

from pacatune.data.images import ImageDataConfig, prepare_images
from pacatune.data.packaged import cifar10
from pacatune.data.packaged.packages import sha256_of

NAMES = ("cat", "dog")


def examples(number):
    found = []
    for index in range(number):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (index, 0, 0)).save(file, "PNG")
        scores = {name: int(place == index % 2) for place, name in enumerate(NAMES)}
        content = base64.b64encode(file.getvalue()).decode()
        found.append({"input": content, "target_scores": scores})
    return found


def test_images_are_split_by_class_and_kept_bit_for_bit(tmp_path):
    rows = examples(20)
    cifar10.write_images(rows, tmp_path, num_test_per_class=3)
    data = prepare_images(ImageDataConfig(path=str(tmp_path)))
    assert data.classes == list(NAMES)
    assert len(data.train.indices) == 14
    assert len(data.evaluation.indices) == 6
    assert data.warnings == []  # no image in both parts
    for path in tmp_path.rglob("*.png"):
        number = int(path.stem)
        assert path.read_bytes() == base64.b64decode(rows[number]["input"])
        assert path.parent.name == NAMES[number % 2]
    cifar10.write_images(rows, tmp_path / "again", num_test_per_class=3)
    parts = [
        {path.name for path in (tmp_path / part).glob("*/*")} for part in ("test", "again/test")
    ]
    assert parts[0] == parts[1]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A source archive that pip finds, with the task in it; its setup.py is run by pip."""
    wheels = tmp_path / "archives"
    wheels.mkdir()
    name = "pacatune-probe-1.0"
    content = json.dumps({"examples": examples(8)}).encode()
    setup = b"from setuptools import setup\nsetup(name='pacatune-probe', version='1.0')\n"
    info = b"Metadata-Version: 2.1\nName: pacatune-probe\nVersion: 1.0\n"
    members = {"setup.py": setup, "PKG-INFO": info, "tasks/task.json": content}
    with tarfile.open(wheels / f"{name}.tar.gz", "w:gz") as tar:
        for member, data in members.items():
            entry = tarfile.TarInfo(f"{name}/{member}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    for variable, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONSTRAINT": "",
    }.items():
        monkeypatch.setenv(variable, value)
    task = dataclasses.replace(
        cifar10.TASK,
        package="pacatune-probe",
        version="1.0",
        archive_sha256=sha256_of(wheels / f"{name}.tar.gz"),
        member=f"{name}/tasks/task.json",
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setattr(cifar10, "TASK", task)
    monkeypatch.setattr(cifar10, "NUM_TEST_PER_CLASS", 1)
    return task


def test_fetched_once(tmp_path, archive, monkeypatch):
    said = []
    folder = cifar10.prepare_cifar10(tmp_path / "cache", said.append)
    assert said[0].startswith(
        "downloading pacatune-probe 1.0 (358 MB): the test images of CIFAR-10"
    )
    assert said[1].startswith("writing 8 images to ")
    assert len(list(folder.rglob("*.png"))) == 8
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert cifar10.prepare_cifar10(tmp_path / "cache", said.append) == folder
    assert len(said) == 2


def test_without_a_network(tmp_path, archive, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match=r"could not download pacatune-probe==1.0: .*--data FOLDER"):
        cifar10.prepare_cifar10(tmp_path / "cache", lambda line: None)
    assert not list((tmp_path / "cache").iterdir())


def test_archive_without_the_file(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(cifar10, "TASK", dataclasses.replace(archive, member="x/y.json"))
    with pytest.raises(ValueError, match=r"pacatune-probe-1\.0\.tar\.gz holds no x/y\.json"):
        cifar10.prepare_cifar10(tmp_path / "cache", lambda line: None)
