"""What is found, split and refused before any weight is loaded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pacatune.data.config import ImageDataConfig
from pacatune.data.images import class_names, load_image, prepare_images
from tests.image_models import CLASSES, write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 10)


def prepare(folder, **options):
    return prepare_images(ImageDataConfig(path=str(folder), **options))


def places(table):
    return list(table["place"])


def num_per_class(table):
    return np.bincount(table["label"]).tolist()


def home(table):
    """Name of the folder with the classes' folders."""
    return Path(table["place"][0]).parent.parent.name


def test_a_fraction_of_each_class_is_held_out(folder):
    data = prepare(folder, eval_fraction=0.2)
    assert class_names(data.train) == CLASSES
    assert (num_per_class(data.train), num_per_class(data.evaluation)) == ([8, 8, 8], [2, 2, 2])
    assert not set(places(data.train)) & set(places(data.evaluation))
    assert data.warnings == []
    again, other = prepare(folder, eval_fraction=0.2), prepare(folder, eval_fraction=0.2, seed=1)
    assert places(again.evaluation) == places(data.evaluation) != places(other.evaluation)
    assert again.fingerprint == data.fingerprint != other.fingerprint
    assert prepare(folder, eval_fraction=0).evaluation is None


def test_limits_per_class(folder):
    data = prepare(folder, eval_fraction=0.3, train_per_class=2, eval_per_class=1)
    assert (num_per_class(data.train), num_per_class(data.evaluation)) == ([2, 2, 2], [1, 1, 1])
    with pytest.raises(ValueError, match=r"a class has 7 images to choose from; lower"):
        prepare(folder, eval_fraction=0.3, train_per_class=8)


@pytest.mark.parametrize(
    ("parts", "evaluated"),
    [
        (["Training", "Testing"], "Testing"),
        (["train", "val", "test"], "val"),
        (["train"], "train"),
    ],
)
def test_folders_of_parts(tmp_path, parts, evaluated):
    for number, name in enumerate(parts):
        write_images(tmp_path / name, 4, seed=number)
    data = prepare(tmp_path)
    assert class_names(data.train) == CLASSES
    assert (home(data.train), home(data.evaluation)) == (parts[0], evaluated)
    assert data.warnings == [f"{tmp_path / name} is not used." for name in parts[2:]]
    other = prepare(tmp_path, eval_path=str(tmp_path / parts[-1]))
    assert home(other.evaluation) == parts[-1]


def test_class_that_is_called_train(tmp_path):
    for name in ("train", "test", "bus", "steam train"):
        (write_images(tmp_path / "one", 2, ["red"]) / "red").rename(tmp_path / name)
        (tmp_path / "one").rmdir()
    train = prepare(tmp_path, eval_fraction=0, check_images=False).train
    assert class_names(train) == ["bus", "steam train", "test", "train"]
    assert len(train) == 8


def test_evaluation_images_from_elsewhere(folder, tmp_path):
    data = prepare(folder, eval_path=str(write_images(tmp_path / "other", 2, seed=1)))
    assert (len(data.train), home(data.evaluation), data.warnings) == (30, "other", [])
    assert prepare(folder, eval_path=str(folder)).warnings == [
        "30 of 30 evaluation images are also in the training data, so what is measured on them "
        "flatters; remove them from one of the two."
    ]


def test_only_images_are_read_whatever_the_folders_are_called(folder, tmp_path):
    (folder / "red" / "notes.txt").touch()
    (folder / "LICENSE").touch()
    (folder / ".cache").mkdir()
    (folder / "red" / "03.png").rename(folder / "red" / "03.PNG")
    (folder / "red").rename(tmp_path / "red")
    (folder / "red").symlink_to(tmp_path / "red")
    moved = folder.rename(tmp_path / "[a]* .b")
    assert len(prepare(moved, eval_fraction=0).train) == 30


def test_images_are_not_read_where_that_is_not_wanted(folder):
    (folder / "red" / "00.png").write_bytes(b"not an image")
    data = prepare(folder, eval_fraction=0, check_images=False)
    row = data.train[places(data.train).index(str(folder / "red" / "00.png"))]
    with pytest.raises(ValueError, match=r"red/00\.png: cannot identify image file"):
        load_image(row)
    (folder / "red" / "00.png").rename(folder / "red" / "99.png")
    other = prepare(folder, eval_fraction=0, check_images=False)
    assert other.fingerprint != data.fingerprint


def test_fingerprint_is_of_pixels_classes_and_order(folder):
    first = prepare(folder, eval_fraction=0).fingerprint
    path = folder / "red" / "00.png"
    with Image.open(path) as image:
        image.load()
    image.save(path, compress_level=1)  # other bytes, the same pixels
    assert prepare(folder, eval_fraction=0).fingerprint == first
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)
    second = prepare(folder, eval_fraction=0).fingerprint
    (folder / "red").rename(folder / "scarlet")
    assert len({first, second, prepare(folder, eval_fraction=0).fingerprint}) == 3


def damage(folder):
    """Spoil an image wholly, and one in part."""
    (folder / "red" / "00.png").write_bytes(b"not an image")
    whole = (folder / "blue" / "00.png").read_bytes()
    (folder / "blue" / "00.png").write_bytes(whole[: len(whole) // 2])


def damage_class(folder):
    for path in (folder / "red").iterdir():
        path.write_bytes(b"not an image")


def leave_one(folder):
    for path in sorted((folder / "red").iterdir())[1:]:
        path.unlink()


def rename_other(folder):
    (write_images(folder.with_name("other"), 2) / "red").rename(folder.with_name("other") / "reds")


@pytest.mark.parametrize(
    ("change", "path", "options", "message"),
    [
        (damage, "", {}, r"2 of 30 .* be used: \S+blue/00\.png: .*; \S+red/00\.png: .* Replace or"),
        (damage_class, "", {"eval_fraction": 0.5}, "10 of 30 images cannot be used: .* and 7 more"),
        (lambda here: (here / "red/a").mkdir(), "", {}, "must lie right in .* mend or remove a"),
        (lambda here: (here / "violet").mkdir(), "", {}, "some in each .* mend or remove violet"),
        (leave_one, "", {}, "least populated class in label column has only 1"),
        (rename_other, "", {"eval_path": "other"}, "do not have red; reds in common; rename or"),
        (None, "", {"eval_split": "test"}, "is local: the split 'test' .* `data.eval_path`"),
        (None, "red", {}, "holds no folders; put the images of each class into a folder"),
        (None, "nowhere", {}, "/nowhere does not exist; check `data.path`"),
    ],
)
def test_what_is_refused(folder, monkeypatch, change, path, options, message):
    monkeypatch.chdir(folder.parent)
    if change:
        change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(folder / path, **options)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("train val valid", "must lie right in the folders .* remove red; red; red and 3"),
        (".", "has one class only, 'red'; give at least two"),
    ],
)
def test_folders_that_may_be_parts_or_classes(tmp_path, parts, message):
    for name in parts.split():
        write_images(tmp_path / name, 2, ["red"])
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path)


def test_image_bombs_are_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"images cannot be used: .*could be decompression bomb"):
        prepare(folder)
