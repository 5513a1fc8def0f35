"""Images of the hub and of torchvision, from files that look like theirs."""

import hashlib
import io
import pickle

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


def hub_folder(folder, **columns):
    """A data set as the hub would give it."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    images = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(6)]
    features = {"image": ImageFeature()}
    values = {"image": images}
    for name, (kind, entries) in columns.items():
        kinds = {"class": ClassLabel(names=["cat", "dog", "owl"])}
        features[name] = kinds.get(kind, Value(kind) if kind != "class" else None)
        values[name] = entries
    folder.mkdir()
    Dataset.from_dict(values, features=Features(features)).to_parquet(folder / "train.parquet")
    return str(folder)


def read(path, split="train", **options):
    return read_hub(ImageDataConfig(path=path, **options), path, split)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_hub_images_with_named_classes(tmp_path):
    path = hub_folder(tmp_path / "d", label=("class", [0, 1, 2, 0, 1, 2]))
    table = read(path)
    assert table.features["label"].names == ["cat", "dog", "owl"]
    assert table["label"][:] == [0, 1, 2, 0, 1, 2]
    assert load_image(table[3]).getpixel((0, 0)) == (60, 0, 0)
    assert table[3]["place"] == f"{path} (train), row 4"


@pytest.mark.parametrize(
    ("kind", "entries", "classes"),
    [
        ("string", ["b", "a", "b", "a", "b", "a"], ["a", "b"]),
        ("int64", [7, 3, 7, 3, 7, 3], ["3", "7"]),
    ],
)
def test_hub_classes_that_are_plain_values(tmp_path, kind, entries, classes):
    table = read(hub_folder(tmp_path / "d", label=(kind, entries)))
    assert table.features["label"].names == classes
    assert table["label"][:] == [1, 0, 1, 0, 1, 0]


def test_hub_column_must_be_chosen_where_there_are_several(tmp_path):
    columns = {"fine": ("class", [0, 1] * 3), "coarse": ("class", [0, 0, 1] * 2)}
    path = hub_folder(tmp_path / "d", **columns)
    with pytest.raises(
        ValueError, match=r"2 columns could be meant .*fine, coarse\); set `data.label_col"
    ):
        read(path)
    assert read(path, label_column="coarse")["label"][:] == [0, 0, 1, 0, 0, 1]
    with pytest.raises(ValueError, match=r"`data.image_column` \('x'\) must be one of image"):
        read(path, label_column="coarse", image_column="x")


@pytest.mark.parametrize(("kind", "missing"), [("class", -1), ("string", None)])
def test_hub_row_without_a_class(tmp_path, kind, missing):
    other = 0 if kind == "class" else "a"
    path = hub_folder(tmp_path / "d", label=(kind, [other, missing, *[other] * 4]))
    with pytest.raises(ValueError, match=r"row 2 has no class in 'label'; give data whose every"):
        read(path)


def test_hub_that_cannot_be_reached():
    with pytest.raises(
        FileNotFoundError, match=r"'owner/birds'\) is neither a file or folder here nor a data"
    ):
        prepare_images(ImageDataConfig(path="owner/birds"))


def test_hub_row_without_an_image(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    (tmp_path / "d").mkdir()
    values = {"image": [Image.new("RGB", (8, 8)), None], "label": ["a", "b"]}
    features = Features({"image": ImageFeature(), "label": Value("string")})
    Dataset.from_dict(values, features=features).to_parquet(tmp_path / "d" / "train.parquet")
    with pytest.raises(ValueError, match=r"row 2: the row has no image"):
        load_image(read(str(tmp_path / "d"))[1])


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """The files of CIFAR-10 with five training images and ten test images."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    rng = np.random.default_rng(0)
    for number in range(1, 6):
        data = rng.integers(0, 256, (1, 3072)).astype(np.uint8)
        write(f"data_batch_{number}", {"data": data, "labels": [number % 2]})
    write("test_batch", {"data": np.zeros((10, 3072), np.uint8), "labels": [0, 1] * 5})
    names = ["airplane", "automobile", *(f"class {n}" for n in range(8))]
    write("batches.meta", {"label_names": names})
    kind = torchvision.datasets.CIFAR10
    train = [[name, sums[name]] for name in sums if name.startswith("data")]
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    return tmp_path


def test_cifar10(cifar):
    config = ImageDataConfig(path="torchvision:CIFAR10", eval_split="test", root=str(cifar))
    data = prepare_images(config)
    assert class_names(data.train)[:2] == ["airplane", "automobile"]
    assert data.train["label"][:] == [1, 0, 1, 0, 1]
    assert len(data.evaluation) == 10
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3072)).astype(np.uint8)
    first = np.asarray(load_image(data.train[0]))
    assert np.array_equal(first, pixels.reshape(3, 32, 32).transpose(1, 2, 0))
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


def test_torchvision_sets_and_splits_that_are_not_there(tmp_path):
    config = ImageDataConfig(path="x", root=str(tmp_path))
    with pytest.raises(ValueError, match=r"torchvision:` \('MNIST'\) must be one of CIFAR10"):
        prepare_images(ImageDataConfig(path="torchvision:MNIST"))
    with pytest.raises(ValueError, match=r"`data.split` \('val'\) must be one of train, test"):
        read_torchvision(config, "CIFAR100", "val")


def test_torchvision_set_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    config = ImageDataConfig(path="torchvision:CIFAR100", root=str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"is not in .* and cannot be downloaded \(no route"
    ):
        prepare_images(config)


def test_torchvision_set_that_needs_another_package(tmp_path, monkeypatch):
    def lacks(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(torchvision.datasets, "Flowers102", lacks)
    config = ImageDataConfig(path="torchvision:Flowers102", root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"No module named 'scipy'\); .* install what is m"):
        prepare_images(config)


GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)


def stored(image, kind="PNG", **options):
    """An image as it comes back from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def pixels(image):
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    return np.asarray(converted)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(kind):
    sixteen = GRADIENT.astype(np.uint16) * 256 + 77
    rgb = pixels(stored(Image.fromarray(sixteen), kind))
    assert np.array_equal(rgb[..., 0], GRADIENT)


def test_transparent_pixels_are_white_whatever_they_hide():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0] = (10, 20, 30, 255)
    rgba[1] = (10, 20, 30, 0)
    rgb = pixels(stored(Image.fromarray(rgba)))
    assert rgb[0, 0].tolist() == [10, 20, 30]
    assert rgb[1, 0].tolist() == [255, 255, 255]


PALETTE = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
PALETTE.putpalette([255, 0, 0, 0, 255, 0])


@pytest.mark.parametrize(
    ("image", "options", "first", "last"),
    [
        (Image.fromarray(GRADIENT), {}, [0] * 3, [255] * 3),
        (PALETTE, {"transparency": 1}, [255, 0, 0], [255] * 3),
        (
            Image.fromarray(np.array([[[40, 255], [40, 0]]], np.uint8), "LA"),
            {},
            [40] * 3,
            [255] * 3,
        ),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 0)), {"kind": "TIFF"}, [255] * 3, [255] * 3),
        (Image.new("1", (2, 2), 1), {}, [255] * 3, [255] * 3),
    ],
    ids=["grey", "palette", "grey with alpha", "CMYK", "one bit"],
)
def test_other_modes(image, options, first, last):
    rgb = pixels(stored(image, **options))
    assert (rgb[0, 0].tolist(), rgb[-1, -1].tolist()) == (first, last)


def test_photographs_are_upright():
    image = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert to_rgb(stored(image, "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_unknown_range_are_refused(dtype):
    image = stored(Image.fromarray(np.ones((2, 2), dtype)), "TIFF")
    with pytest.raises(ValueError, match="its pixels have an unknown range; convert it"):
        to_rgb(image)
