"""Images of the hub and of torchvision, from files that look like theirs."""

import io
import pickle
from unittest.mock import Mock

import numpy as np
import pytest
import torchvision
from PIL import Image

from pacatune.data.config import ImageDataConfig
from pacatune.data.images import (
    class_names,
    load_image,
    prepare_images,
    read_hub,
    read_torchvision,
    to_rgb,
)

FINE, COARSE = ("class", [0, 1] * 3), ("class", [0, 0, 1] * 2)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read a data set as the hub would give it: columns are a kind and its values each."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(columns, missing=(), **options):
        images = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(6)]
        values = {"image": [None if i in missing else one for i, one in enumerate(images)]}
        features = {"image": ImageFeature()}
        for name, (kind, values[name]) in columns.items():
            names = ["cat", "dog", "owl"]
            features[name] = ClassLabel(names=names) if kind == "class" else Value(kind)
        table = Dataset.from_dict(values, features=Features(features))
        (tmp_path / "d").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "d" / "train.parquet")
        path = str(tmp_path / "d")
        return read_hub(ImageDataConfig(path=path, **options), path, "train")

    return run


@pytest.mark.parametrize(
    ("kind", "values", "classes"),
    [
        ("class", [1, 0, 2, 0, 1, 0], ["cat", "dog", "owl"]),
        ("int64", [7, 3, 8, 3, 7, 3], ["3", "7", "8"]),
    ],
)
def test_hub_images(read, tmp_path, kind, values, classes):
    table = read({"label": (kind, values)})
    assert table.features["label"].names == classes
    assert table["label"][:] == [1, 0, 2, 0, 1, 0]
    assert load_image(table[3]).getpixel((0, 0)) == (60, 0, 0)
    assert table[3]["place"] == f"{tmp_path / 'd'} (train), row 4"


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"fine": FINE, "coarse": COARSE}, {}, r"2 columns .*fine, coarse\); set `data.label_col"),
        ({"fine": FINE}, {"image_column": "x"}, r"`data.image_column` \('x'\) must be one of ima"),
        ({"label": ("class", [0, -1] * 3)}, {}, "row 2 has no class in 'label'; give data whose"),
    ],
)
def test_hub_data_that_is_refused(read, columns, options, message):
    with pytest.raises(ValueError, match=message):
        read(columns, **options)


def test_hub_columns_and_rows(read):
    table = read({"fine": FINE, "coarse": COARSE}, missing=[1], label_column="coarse")
    assert table["label"][:] == COARSE[1]
    with pytest.raises(ValueError, match="row 2: the row has no image"):
        load_image(table[1])


def test_cifar10(tmp_path, monkeypatch):
    """Of its files, with five training images and ten test images."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 3072)).astype(np.uint8)
    files = {f"data_batch_{n + 1}": {"data": pixels[n], "labels": [n % 2]} for n in range(5)}
    files["test_batch"] = {"data": np.zeros((10, 3072), np.uint8), "labels": [0, 1] * 5}
    files["batches.meta"] = {"label_names": [f"class {n}" for n in range(10)]}
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, content in files.items():
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))
    config = ImageDataConfig(path="torchvision:CIFAR10", eval_split="test", root=str(tmp_path))
    data = prepare_images(config)
    assert class_names(data.train)[:2] == ["class 0", "class 1"]
    assert data.train["label"][:] == [0, 1, 0, 1, 0]
    assert len(data.evaluation) == 10
    image = pixels[4].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(load_image(data.train[4])), image)
    assert data.train[4]["place"] == "torchvision:CIFAR10 (train), image 5"


def test_pets_train_on_what_is_called_trainval(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    names = [f"{breed}_{number}" for number in range(2) for breed in ("Abyssinian", "beagle")]
    for part in ("trainval", "test"):
        lines = [f"{name} {1 + name.startswith('b')} 1 1\n" for name in names]
        (folder / "annotations" / f"{part}.txt").write_text("".join(lines))
    for name in names:
        Image.new("RGB", (9, 7), (len(name), 0, int(name[-1]))).save(folder / f"images/{name}.jpg")
    config = ImageDataConfig(path="x", root=str(tmp_path))
    table = read_torchvision(config, "OxfordIIITPet", "train")
    assert table[1]["place"] == "torchvision:OxfordIIITPet (trainval), image 2"
    assert table.features["label"].names == ["Abyssinian", "Beagle"]
    assert table["label"][:] == [0, 1, 0, 1]
    assert load_image(table[1]).size == (9, 7)


SCIPY = ModuleNotFoundError("No module named 'scipy'", name="scipy")


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("owner/birds", "train", r"'owner/birds'\) is neither a file or folder here nor a data"),
        ("torchvision:MNIST", "train", r"torchvision:` \('MNIST'\) must be one of CIFAR10"),
        ("torchvision:CIFAR100", "train", r"is not in .* and cannot be downloaded \(no route\);"),
        ("torchvision:Flowers102", "train", "No module named 'scipy'.*; .* install what is"),
    ],
)
def test_sets_and_splits_that_are_not_there(tmp_path, monkeypatch, path, split, message):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no route")))
    monkeypatch.setattr(torchvision.datasets, "Flowers102", Mock(side_effect=SCIPY))
    config = ImageDataConfig(path=path, split=split, root=str(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        prepare_images(config)


GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)
PALETTE = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
PALETTE.putpalette([255, 0, 0, 0, 255, 0])
GREY_ALPHA = np.array([[[40, 255], [40, 0]]], np.uint8)
ALPHA = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)


def stored(image, kind="PNG", **options):
    """An image as it comes back from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


SIXTEEN = Image.fromarray(GRADIENT.astype(np.uint16) * 256 + 77)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "options", "first", "last"),
    [
        (Image.fromarray(GRADIENT), {}, BLACK, WHITE),
        (PALETTE, {"transparency": 1}, (255, 0, 0), WHITE),
        (Image.fromarray(GREY_ALPHA, "LA"), {}, (40, 40, 40), WHITE),
        (Image.fromarray(ALPHA), {}, (10, 20, 30), WHITE),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 0)), {"kind": "TIFF"}, WHITE, WHITE),
        (Image.new("1", (2, 2), 1), {}, WHITE, WHITE),
        (SIXTEEN, {}, BLACK, WHITE),
        (SIXTEEN, {"kind": "TIFF"}, BLACK, WHITE),
    ],
    ids=["grey", "palette", "grey with alpha", "alpha", "CMYK", "one bit", "16 bits", "16 in TIFF"],
)
def test_every_mode_becomes_rgb(image, options, first, last):
    """Transparent pixels are white, whatever they hide; 16 bits keep their range."""
    rgb = to_rgb(stored(image, **options))
    assert rgb.mode == "RGB"
    assert (rgb.getpixel((0, 0)), rgb.getpixel((rgb.width - 1, rgb.height - 1))) == (first, last)
    if image is SIXTEEN:
        assert np.array_equal(np.asarray(rgb)[..., 0], GRADIENT)


def test_photographs_are_upright():
    image = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert to_rgb(stored(image, "JPEG", exif=exif)).size == (4, 8)


def test_values_of_unknown_range_are_refused():
    for dtype in (np.int32, np.float32):
        image = stored(Image.fromarray(np.ones((2, 2), dtype)), "TIFF")
        with pytest.raises(ValueError, match="its pixels have an unknown range; convert it"):
            to_rgb(image)
