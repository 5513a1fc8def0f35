import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

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
    found.epoch.fill_(epoch)
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


def test_workers_that_stay_see_the_new_epoch(source):
    images = dataset(source, "crop")
    loader = DataLoader(images, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        images.epoch.fill_(epoch)
        seen = [batch["pixel_values"][0] for batch in loader]
        expected = dataset(source, "crop", epoch)
        assert all(torch.equal(one, expected[i]["pixel_values"]) for i, one in enumerate(seen))


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


@pytest.fixture
def image():
    """Smooth, with edges, and of odd proportions."""
    rows, columns = np.mgrid[0:90, 0:140]
    pixels = np.stack([rows * 2, columns, (rows // 20 + columns // 30) % 2 * 255], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def processors():
    import transformers

    return {
        "vit": transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
        "bit": transformers.BitImageProcessor(
            size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32}
        ),
        "convnext": transformers.ConvNextImageProcessor(
            size={"shortest_edge": 32}, crop_pct=0.75, resample=3
        ),
        "not normalised": transformers.ViTImageProcessor(
            size={"height": 32, "width": 32}, do_normalize=False, resample=0
        ),
    }


@pytest.mark.parametrize("name", ["vit", "bit", "convnext", "not normalised"])
def test_equals_that_of_transformers(image, name):
    processor = processors()[name]
    ours = Preprocessing.from_transformers(processor.to_dict())
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    error = (ours(image) - theirs).abs()
    # One step of 255, by the smallest deviation: they resize tensors, Pillow's filter rounds.
    assert error.quantile(0.99) < 1.5 / 255 / min(ours.std)
    assert error.max() < 8 / 255 / min(ours.std)


@pytest.mark.parametrize("crop", [{"crop_pct": 0.75}, {"crop_pct": 1.0, "crop_mode": "squash"}])
def test_equals_that_of_timm(image, crop):
    from timm.data import create_transform

    settings = {
        "input_size": (3, 32, 32),
        "interpolation": "bicubic",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        **crop,
    }
    ours = Preprocessing.from_timm(settings)
    assert torch.allclose(ours(image), create_transform(**settings)(image), atol=1e-6)


def test_upright_images_are_cropped_in_the_middle():
    pixels = np.zeros((60, 20, 3), np.uint8)
    pixels[20:40] = 255
    seen = Preprocessing(size=20, resize=20).crop(Image.fromarray(pixels))
    assert np.asarray(seen).min() == 255


@pytest.mark.parametrize("squash", [False, True])
def test_saved_and_read_again_also_by_transformers(image, tmp_path, squash):
    from transformers import AutoImageProcessor

    ours = Preprocessing(
        size=32, resize=40 if not squash else 32, squash=squash, mean=(0.1, 0.2, 0.3)
    )
    ours.save(tmp_path)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert Preprocessing.from_transformers(values) == ours
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")
    error = (theirs["pixel_values"][0] - ours(image)).abs()
    assert error.quantile(0.99) < 1.5 / 255 / min(ours.std)


@pytest.mark.parametrize(
    "ours",
    [
        Preprocessing(size=96, resize=110),
        Preprocessing(size=224, resize=224, squash=True, resample=1, std=(1.0, 2.0, 3.0)),
    ],
)
def test_timm_entries_come_back(ours):
    assert Preprocessing.from_timm(ours.to_timm()) == ours


def test_another_size_keeps_the_share_that_is_cropped():
    assert Preprocessing(size=224, resize=256).resized_to(98) == Preprocessing(size=98, resize=112)


def test_what_is_not_supported():
    with pytest.raises(ValueError, match=r"`size` .*is not a square; only squares are supported"):
        Preprocessing.from_transformers({"size": {"height": 32, "width": 48}})
    with pytest.raises(ValueError, match=r"does not scale pixels to \[0, 1\].*use another model"):
        Preprocessing.from_transformers({"size": {"height": 8, "width": 8}, "do_rescale": False})
    with pytest.raises(ValueError, match=r"`crop_mode` \('border'\) is not supported; it must be"):
        Preprocessing.from_timm({"input_size": (3, 8, 8), "crop_mode": "border"})
