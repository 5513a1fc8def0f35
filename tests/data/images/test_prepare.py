"""What is found, split and refused before any weight is loaded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pacatune.data.config import ImageDataConfig
from pacatune.data.images import class_names, load_image, prepare_images, read_images
from tests.image_models import CLASSES, write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 10)


def prepare(folder, **options):
    return prepare_images(ImageDataConfig(path=str(folder), **options))


def places(table):
    return list(table["place"])


def labels(table):
    return sorted(table["label"])


def home(table):
    """Name of the folder with the classes' folders."""
    return Path(table["place"][0]).parent.parent.name


def test_a_fraction_of_each_class_is_held_out(folder):
    data = prepare(folder, eval_fraction=0.2)
    assert class_names(data.train) == CLASSES
    assert np.bincount(labels(data.train)).tolist() == [8, 8, 8]
    assert np.bincount(labels(data.evaluation)).tolist() == [2, 2, 2]
    assert not set(places(data.train)) & set(places(data.evaluation))
    assert data.warnings == []
    again, other = prepare(folder, eval_fraction=0.2), prepare(folder, eval_fraction=0.2, seed=1)
    assert places(again.evaluation) == places(data.evaluation) != places(other.evaluation)
    assert again.fingerprint == data.fingerprint != other.fingerprint


def test_nothing_held_out(folder):
    assert prepare(folder, eval_fraction=0).evaluation is None


def test_limits_per_class(folder):
    data = prepare(folder, eval_fraction=0.3, train_per_class=2, eval_per_class=1)
    assert labels(data.train) == [0, 0, 1, 1, 2, 2]
    assert labels(data.evaluation) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"a class has 7 images to choose from; lower"):
        prepare(folder, eval_fraction=0.3, train_per_class=8)


@pytest.mark.parametrize(
    ("parts", "train", "evaluated"),
    [
        (["train", "test"], "train", "test"),
        (["Training", "Testing"], "Training", "Testing"),
        (["train", "validation"], "train", "validation"),
        (["train", "val", "test"], "train", "val"),
        (["training", "dev", "eval"], "training", "dev"),
        (["train"], "train", None),
    ],
)
def test_folders_of_parts(tmp_path, parts, train, evaluated):
    for number, name in enumerate(parts):
        write_images(tmp_path / name, 4, seed=number)
    data = prepare(tmp_path)
    assert class_names(data.train) == CLASSES
    assert home(data.train) == train
    assert home(data.evaluation) == (evaluated or train)
    unused = [name for name in parts if name not in (train, evaluated)]
    said = [f"{tmp_path / name} is not used" in " ".join(data.warnings) for name in unused]
    assert (said, len(data.warnings)) == ([True] * len(unused), len(unused))
    other = prepare(tmp_path, eval_path=str(tmp_path / parts[-1]))
    assert home(other.evaluation) == parts[-1]


def test_class_that_is_called_train(tmp_path):
    for name in ("train", "test", "bus", "steam train"):
        (write_images(tmp_path / "one", 2, ["red"]) / "red").rename(tmp_path / name)
        (tmp_path / "one").rmdir()
    train, _, _ = read_images(ImageDataConfig(path=str(tmp_path)))
    assert train.features["label"].names == ["bus", "steam train", "test", "train"]
    assert len(train) == 8


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["val", "test"], "must lie right in the folders .* remove red; red; test and 1 more"),
        (["train", "val", "valid"], "must lie right in the folders .* remove red; red; red and 3"),
        (
            ["train", "val", "more"],
            "must lie right in the folders .* remove more; red; red and 3",
        ),
    ],
)
def test_folders_that_may_be_parts_or_classes(tmp_path, parts, message):
    for name in parts:
        write_images(tmp_path / name, 2, ["red"])
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path)


def test_a_split_of_a_folder(folder):
    for option in ("split", "eval_split"):
        with pytest.raises(ValueError, match=r"is local: the split 'test' .* `data.eval_path`"):
            prepare(folder, **{option: "test"})
    with pytest.raises(FileNotFoundError, match=r"`data.eval_path` \('owner/birds'\) is neither"):
        prepare(folder, eval_path="owner/birds")


def test_evaluation_images_from_elsewhere(folder, tmp_path):
    other = write_images(tmp_path / "other", 2, seed=1)
    data = prepare(folder, eval_path=str(other))
    assert len(data.train) == 30
    assert home(data.evaluation) == "other"


def test_images_of_both_parts_are_a_warning(folder, tmp_path):
    data = prepare(folder, eval_path=str(folder))
    assert data.warnings == [
        "30 of 30 evaluation images are also in the training data, so what is measured on them "
        "flatters; remove them from one of the two."
    ]


def test_only_images_are_read_and_only_right_in_the_folder_of_a_class(folder):
    (folder / "red" / "notes.txt").touch()
    (folder / "LICENSE").touch()
    (folder / ".cache").mkdir()
    (folder / "red" / "03.png").rename(folder / "red" / "03.PNG")
    assert len(prepare(folder, eval_fraction=0).train) == 30
    (folder / "red" / "more").mkdir()
    (folder / "red" / "03.PNG").rename(folder / "red" / "more" / "03.png")
    with pytest.raises(
        ValueError, match=r"must lie right in the folders of their classes, .* remove more"
    ):
        prepare(folder)


def test_class_folder_that_is_a_link(folder, tmp_path):
    (folder / "red").rename(tmp_path / "red")
    (folder / "red").symlink_to(tmp_path / "red")
    assert len(prepare(folder, eval_fraction=0).train) == 30


def test_folder_with_signs_of_patterns(folder, tmp_path):
    moved = folder.rename(tmp_path / "[a]* .b")
    assert len(prepare(moved, eval_fraction=0).train) == 30


def test_unreadable_images_are_named(folder):
    (folder / "red" / "00.png").write_bytes(b"not an image")
    whole = (folder / "blue" / "00.png").read_bytes()
    (folder / "blue" / "00.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"2 of 30 images cannot be used: .*00\.png: .*; .*00"
    ) as e:
        prepare(folder, eval_fraction=0)
    assert "blue/00.png" in str(e.value)
    assert "red/00.png" in str(e.value)
    assert "Replace or remove them." in str(e.value)


def test_images_are_not_read_where_that_is_not_wanted(folder):
    (folder / "red" / "00.png").write_bytes(b"not an image")
    data = prepare(folder, eval_fraction=0, check_images=False)
    row = data.train[places(data.train).index(str(folder / "red" / "00.png"))]
    with pytest.raises(ValueError, match=r"red/00\.png: cannot identify image file"):
        load_image(row)
    (folder / "red" / "00.png").rename(folder / "red" / "99.png")
    other = prepare(folder, eval_fraction=0, check_images=False)
    assert other.fingerprint != data.fingerprint


def test_unreadable_images_of_both_parts_are_named_at_once(folder):
    for path in (folder / "red").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"10 of 30 images cannot be used: .* and 7 more"):
        prepare(folder, eval_fraction=0.5)


def test_image_bombs_are_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"images cannot be used: .*could be decompression bomb"):
        prepare(folder)


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


def test_empty_class(folder):
    (folder / "violet").mkdir()
    with pytest.raises(ValueError, match=r"some in each .* mend or remove violet"):
        prepare(folder)


@pytest.mark.parametrize("classes", [["red"], []])
def test_fewer_than_two_classes(tmp_path, classes):
    write_images(tmp_path, 3, classes)
    with pytest.raises(ValueError, match=r"has one class only, 'red'|holds no folders; put the"):
        prepare(tmp_path)


def test_single_image_of_a_class_cannot_be_held_out(folder):
    write_images(folder / "x", 1, ["red"])
    (folder / "x" / "red" / "00.png").rename(folder / "x" / "00.png")
    (folder / "x" / "red").rmdir()
    with pytest.raises(ValueError, match=r"least populated class in label column has only 1"):
        prepare(folder)
    assert prepare(folder, eval_fraction=0).evaluation is None


def test_other_classes_in_the_evaluation_images(folder, tmp_path):
    other = write_images(tmp_path / "other", 2)
    (other / "red").rename(other / "crimson")
    with pytest.raises(ValueError, match="do not have crimson; red in common; rename or remove"):
        prepare(folder, eval_path=str(other))


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "a/b/c"])
def test_missing_folder(path):
    with pytest.raises(FileNotFoundError, match=f"{path} does not exist; check `data.path`"):
        prepare(path)


def test_file_instead_of_a_folder(folder):
    with pytest.raises(ValueError, match=r"00\.png holds no folders; put the images of each class"):
        prepare(folder / "red" / "00.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, r"`data.path` is ''; give a file, a folder or"),
        ({"eval_fraction": 1}, r"`data.eval_fraction` \(1\) must be in \[0, 1\)"),
        ({"image_size": 0}, r"`data.image_size` \(0\) must be at least 1, or null"),
        ({"train_per_class": 0}, r"`data.train_per_class` \(0\) must be at least 1"),
        (
            {"augmentation": "mirror"},
            r"`data.augmentation` \('mirror'\) must be one of none, flip, crop",
        ),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataConfig(**{"path": "x", **options})
