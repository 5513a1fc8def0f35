"""What is found, split and refused before any weight is loaded."""

import pickle

import numpy as np
import pytest
from PIL import Image

from pacatune.data.images import ImageDataConfig, prepare_images
from pacatune.data.images.sources import read_folder, read_sources
from tests.image_models import CLASSES, write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 10)


def prepare(folder, **options):
    return prepare_images(ImageDataConfig(path=str(folder), **options))


def labels(part):
    return [part.source.labels[index] for index in part.indices]


def test_a_fraction_of_each_class_is_held_out(folder):
    data = prepare(folder, eval_fraction=0.2)
    assert data.classes == CLASSES
    assert np.bincount(labels(data.train)).tolist() == [8, 8, 8]
    assert np.bincount(labels(data.evaluation)).tolist() == [2, 2, 2]
    assert not set(data.train.indices) & set(data.evaluation.indices)
    assert data.warnings == []
    again, other = prepare(folder, eval_fraction=0.2), prepare(folder, eval_fraction=0.2, seed=1)
    assert again.evaluation.indices == data.evaluation.indices != other.evaluation.indices
    assert again.fingerprint == data.fingerprint != other.fingerprint


def test_nothing_held_out(folder):
    assert prepare(folder, eval_fraction=0).evaluation is None


def test_limits_per_class(folder):
    data = prepare(folder, eval_fraction=0.3, train_per_class=2, eval_per_class=1)
    assert labels(data.train) == [0, 0, 1, 1, 2, 2]
    assert labels(data.evaluation) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"class 'blue' of .*images has 7 images to choose from"):
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
    assert data.classes == CLASSES
    assert data.train.source.name == str(tmp_path / train)
    assert data.evaluation.source.name == str(tmp_path / (evaluated or train))
    unused = [name for name in parts if name not in (train, evaluated)]
    said = [f"{tmp_path / name} is not used" in " ".join(data.warnings) for name in unused]
    assert (said, len(data.warnings)) == ([True] * len(unused), len(unused))
    other = prepare(tmp_path, eval_path=str(tmp_path / parts[-1]))
    assert other.evaluation.source.name == str(tmp_path / parts[-1])


def test_class_that_is_called_train(tmp_path):
    for name in ("train", "test", "bus"):
        (write_images(tmp_path / "one", 2, ["red"]) / "red").rename(tmp_path / name)
        (tmp_path / "one").rmdir()
    assert read_sources(ImageDataConfig(path=str(tmp_path)))[0].classes == ["bus", "test", "train"]


@pytest.mark.parametrize(
    ("parts", "has_classes", "message"),
    [
        (["train", "val"], False, "train, a part of a data set, holds no folder per class"),
        (["val", "test"], True, "the folders test, val are parts .* none of them is train"),
        (["train", "val", "more"], True, "it has the folder more beside the parts train, val"),
        (["train", "val", "valid"], True, "val and valid are both validation"),
    ],
)
def test_folders_that_may_be_parts_or_classes(tmp_path, parts, has_classes, message):
    for name in parts:
        folder = write_images(tmp_path / name, 2, ["red"])
        if not has_classes:
            for image in (folder / "red").iterdir():
                image.rename(folder / image.name)
            (folder / "red").rmdir()
    with pytest.raises(ValueError, match=f"{message}; .* rename the folders"):
        prepare(tmp_path)


def test_a_split_of_a_folder(folder):
    with pytest.raises(ValueError, match=r"`data.eval_split` \('test'\) .* give `data.eval_path`"):
        prepare(folder, eval_split="test")


def test_evaluation_images_from_elsewhere(folder, tmp_path):
    other = write_images(tmp_path / "other", 2, seed=1)
    data = prepare(folder, eval_path=str(other))
    assert len(data.train.indices) == 30
    assert data.evaluation.source.name == str(other)


def test_images_of_both_parts_are_a_warning(folder, tmp_path):
    data = prepare(folder, eval_path=str(folder))
    assert data.warnings == [
        "30 of 30 evaluation images are also in the training data, so what is measured on them "
        "flatters; remove them from one of the two."
    ]


def test_files_that_are_no_images_are_left_out_and_named(folder):
    (folder / "red" / "notes.txt").touch()
    (folder / "LICENSE").touch()
    (folder / ".DS_Store").touch()
    (folder / ".cache").mkdir()
    (warning,) = prepare(folder).warnings
    assert warning.startswith("2 files are no images of a class and left out: ")
    assert "notes.txt" in warning
    assert "LICENSE" in warning


def test_images_in_deeper_folders(folder):
    (folder / "red" / "more").mkdir()
    (folder / "red" / "03.png").rename(folder / "red" / "more" / "03.PNG")
    assert len(read_folder(folder).files) == 30


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
    index = data.train.source.files.index(folder / "red" / "00.png")
    with pytest.raises(ValueError, match=r"red/00\.png: cannot identify image file"):
        data.train.source.load(index)
    (folder / "red" / "00.png").rename(folder / "red" / "99.png")
    other = prepare(folder, eval_fraction=0, check_images=False)
    assert other.fingerprint != data.fingerprint


def test_unreadable_images_of_both_parts_are_named_at_once(folder):
    for path in (folder / "red").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"10 of 30 images cannot be used: .* and 7 more"):
        prepare(folder, eval_fraction=0.5)


def test_strips_are_refused(folder):
    Image.new("RGB", (1, 60)).save(folder / "red" / "strip.png")
    with pytest.raises(ValueError, match=r"strip\.png: 1 x 60 pixels are too narrow to resize"):
        prepare(folder)


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
    with pytest.raises(
        ValueError, match=r"no images \(.*\) in the folder of the class 'violet'; pu"
    ):
        prepare(folder)


def test_one_class_only(tmp_path):
    write_images(tmp_path / "images", 3, ["red"])
    with pytest.raises(ValueError, match=r"has one class only \('red'\); a classifier needs at l"):
        prepare(tmp_path / "images")


def test_images_without_class_folders(tmp_path, folder):
    with pytest.raises(ValueError, match="holds no folders; put the images of each class into a f"):
        prepare(folder / "red")


def test_single_image_of_a_class_cannot_be_held_out(folder):
    write_images(folder / "x", 1, ["red"])
    (folder / "x" / "red" / "00.png").rename(folder / "x" / "00.png")
    (folder / "x" / "red").rmdir()
    with pytest.raises(ValueError, match=r"class 'x' of .* has one image, so none can be held out"):
        prepare(folder)
    assert prepare(folder, eval_fraction=0).evaluation is None


def test_other_classes_in_the_evaluation_images(folder, tmp_path):
    other = write_images(tmp_path / "other", 2)
    (other / "red").rename(other / "crimson")
    with pytest.raises(
        ValueError,
        match=r"must have the same classes, but 'red' only in the first and 'crimson' only in the",
    ):
        prepare(folder, eval_path=str(other))


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "a/b/c"])
def test_missing_folder(path):
    with pytest.raises(
        FileNotFoundError, match=f"{path} does not exist; `data.path` must be a fol"
    ):
        prepare(path)


def test_file_instead_of_a_folder(folder):
    with pytest.raises(FileNotFoundError, match=r"00\.png is a file; `data.path` must be a folder"):
        prepare(folder / "red" / "00.png")


def test_sources_can_be_sent_to_other_processes(folder):
    source = pickle.loads(pickle.dumps(read_folder(folder)))
    assert source.load(3).size == (40, 36)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, r"`data.path` is ''; give a folder with a folder of images per class"),
        ({"eval_fraction": 1}, r"`data.eval_fraction` \(1\) must be in \[0, 1\)"),
        ({"image_size": 0}, r"`data.image_size` \(0\) must be at least 1, or null"),
        ({"train_per_class": 0}, r"`data.train_per_class` \(0\) must be at least 1"),
        ({"augmentation": "mirror"}, r"`data.augmentation` \('mirror'\) must be 'none', 'flip'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataConfig(**{"path": "x", **options})
