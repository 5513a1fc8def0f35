import numpy as np
import pytest
import torch
from PIL import Image

from pacatune.data.images import Augmentation, ImageDataset, Preprocessing
from pacatune.data.images.sources import read_folder
from tests.image_models import write_images

PREPROCESSING = Preprocessing(size=16, resize=20)


@pytest.fixture
def source(tmp_path):
    return read_folder(write_images(tmp_path / "images", 4))


def dataset(source, kind=None, epoch=0):
    augmentation = None if kind is None else Augmentation(kind, seed=3)
    found = ImageDataset(source, [1, 5, 9], PREPROCESSING, augmentation)
    found.epoch = epoch
    return found


def test_items_are_transformed_images_with_their_classes(source):
    images = dataset(source)
    assert len(images) == 3
    assert [images[i]["labels"] for i in range(3)] == [0, 1, 2]
    assert torch.equal(images[1]["pixel_values"], PREPROCESSING(source.load(5)))
    assert images.place(2).endswith("red/01.png")


def test_without_augmentation_nothing_changes(source):
    assert torch.equal(
        dataset(source, "none")[0]["pixel_values"], dataset(source)[0]["pixel_values"]
    )


@pytest.mark.parametrize("kind", ["flip", "crop"])
def test_augmentation_depends_on_seed_epoch_and_image_alone(source, kind):
    def seen(epoch):
        return torch.stack([dataset(source, kind, epoch)[i]["pixel_values"] for i in range(3)])

    state = torch.get_rng_state()
    first = seen(0)
    torch.rand(5)
    assert torch.equal(seen(0), first)
    assert any(not torch.equal(seen(epoch), first) for epoch in (1, 2, 3))
    torch.set_rng_state(state)


def test_flip_mirrors_about_half_of_the_images():
    image = Image.fromarray(np.array([[[0] * 3, [255] * 3]], np.uint8))
    flip = Augmentation("flip", seed=0)
    first = [np.asarray(flip(image, 16, 0, index))[0, 0, 0] for index in range(200)]
    assert 70 < sum(value == 255 for value in first) < 130


def test_crop_takes_at_least_a_quarter():
    rows, columns = np.mgrid[0:200, 0:200]
    image = Image.fromarray(np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8))
    crop = Augmentation("crop", seed=0)
    areas = []
    for index in range(100):
        seen = np.asarray(crop(image, 64, 0, index)).astype(float)
        assert seen.shape == (64, 64, 3)
        height, width = np.ptp(seen[..., 0]), np.ptp(seen[..., 1])
        areas.append(height * width / 200**2)
        assert 0.7 < width / height < 1.45
    assert 0.2 < min(areas) < 0.35
    assert max(areas) > 0.8
