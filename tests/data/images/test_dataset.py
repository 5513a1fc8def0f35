import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pacatune.data.images import Augmentation, ImageDataset, load_image, read_folder
from tests.image_models import write_images


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
