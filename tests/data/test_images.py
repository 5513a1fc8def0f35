"""Images of folders, the hub and torchvision: found, split, refused, converted, augmented."""

import io
import pickle
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from pacatune.data.config import ImageDataConfig
from pacatune.data.formats import IMAGE, mark_image, open_image, stored_image, to_rgb
from pacatune.data.images import (
    Augmentation,
    ImageDataset,
    class_names,
    load_image,
    prepare_images,
    read_folder,
    read_hub,
    read_torchvision,
)
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


def leave_one(folder):
    for path in sorted((folder / "red").iterdir())[1:]:
        path.unlink()


def rename_other(folder):
    (write_images(folder.with_name("other"), 2) / "red").rename(folder.with_name("other") / "reds")


@pytest.mark.parametrize(
    ("change", "path", "options", "message"),
    [
        (damage, "", {}, r"2 of 30 .* be used: \S+blue/00\.png: .*; \S+red/00\.png: .* Replace or"),
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


def test_photographs_are_upright(tmp_path):
    image = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert to_rgb(stored(image, "JPEG", exif=exif)).size == (4, 8)
    # In a chat as well, whether it is named, held as bytes or opened.
    image.save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    for given in (str(tmp_path / "a.jpg"), {"bytes": content}, Image.open(tmp_path / "a.jpg")):
        (reference,) = IMAGE.findall(mark_image(given))
        assert open_image(stored_image(reference)).size == (4, 8)
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert open_image(stored_image(IMAGE.findall(mark_image(clear))[0])).getpixel((0, 0)) == WHITE


def test_values_of_unknown_range_are_refused():
    for dtype in (np.int32, np.float32):
        image = stored(Image.fromarray(np.ones((2, 2), dtype)), "TIFF")
        with pytest.raises(ValueError, match="its pixels have an unknown range; convert it"):
            to_rgb(image)


@pytest.fixture
def table(tmp_path):
    return read_folder(write_images(tmp_path / "images", 4))


def processor():
    from transformers import BitImageProcessor

    return BitImageProcessor(
        size={"shortest_edge": 20},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.4, 0.5, 0.6],
    )


def dataset(table, kind=None, epoch=0):
    augmentation = None if kind is None else Augmentation(kind, 16, seed=3)
    found = ImageDataset(table.select([1, 5, 9]), processor(), augmentation)
    found.epoch.fill_(epoch)
    return found


def test_items_are_transformed_images_with_their_classes(table):
    images = pickle.loads(pickle.dumps(dataset(table)))  # as for workers that are started anew
    assert len(images) == 3
    assert [images[i]["labels"] for i in range(3)] == [0, 1, 2]
    pixels = images[1]["pixel_values"]
    seen = processor()(load_image(table[5]), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels, seen)
    std, mean = (torch.tensor(values) for values in (images.processor.image_std, [0.4, 0.5, 0.6]))
    np.testing.assert_allclose(images.picture(1), pixels.permute(1, 2, 0) * std + mean, atol=1e-6)


def test_workers_that_stay_see_the_new_epoch(table):
    images = dataset(table, "crop")
    loader = DataLoader(images, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        images.epoch.fill_(epoch)
        seen = [batch["pixel_values"][0] for batch in loader]
        expected = dataset(table, "crop", epoch)
        assert all(torch.equal(one, expected[i]["pixel_values"]) for i, one in enumerate(seen))


@pytest.mark.parametrize("kind", ["flip", "crop"])
def test_augmentation_depends_on_seed_epoch_and_image_alone(table, kind):
    def seen(epoch):
        return torch.stack([dataset(table, kind, epoch)[i]["pixel_values"] for i in range(3)])

    state = torch.get_rng_state()
    first = seen(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(seen(0), first)
    assert any(not torch.equal(seen(epoch), first) for epoch in (1, 2, 3))
    torch.set_rng_state(state)


def test_flip_mirrors_about_half_and_crop_takes_at_least_a_quarter():
    image = Image.fromarray(np.array([[[0] * 3, [255] * 3]], np.uint8))
    flip = Augmentation("flip", 16, seed=0)
    first = [np.asarray(flip(image, 0, index))[0, 0, 0] for index in range(200)]
    assert 70 < sum(value == 255 for value in first) < 130
    rows, columns = np.mgrid[0:200, 0:200]
    image = Image.fromarray(np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8))
    crop = Augmentation("crop", 64, seed=0)
    areas = []
    for index in range(100):
        seen = np.asarray(crop(image, 0, index)).astype(float)
        assert seen.shape == (64, 64, 3)
        height, width = np.ptp(seen[..., 0]), np.ptp(seen[..., 1])
        areas.append(height * width / 200**2)
        assert 0.7 < width / height < 1.45
    assert 0.2 < min(areas) < 0.35
    assert max(areas) > 0.8
