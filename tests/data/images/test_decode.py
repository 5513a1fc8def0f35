import io

import numpy as np
import pytest
from PIL import Image

from pacatune.data.images.sources import to_rgb

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


def test_grey_is_the_same_in_each_channel():
    rgb = pixels(stored(Image.fromarray(GRADIENT)))
    assert np.array_equal(rgb, np.repeat(GRADIENT[..., None], 3, axis=2))


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


def test_palette_with_a_transparent_colour():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    rgb = pixels(stored(image, transparency=1))
    assert rgb[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_grey_with_alpha():
    image = Image.fromarray(np.array([[[40, 255], [40, 0]]], np.uint8), "LA")
    assert pixels(stored(image))[0].tolist() == [[40] * 3, [255] * 3]


def test_cmyk_and_one_bit():
    cmyk = pixels(stored(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "TIFF"))
    assert cmyk[0, 0].tolist() == [255, 255, 255]
    assert pixels(stored(Image.new("1", (2, 2), 1)))[0, 0].tolist() == [255, 255, 255]


def test_photographs_are_upright():
    image = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert to_rgb(stored(image, "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize(
    ("dtype", "words"), [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")]
)
def test_values_of_unknown_range_are_refused(dtype, words):
    image = stored(Image.fromarray(np.ones((2, 2), dtype)), "TIFF")
    with pytest.raises(ValueError, match=f"its pixels are {words} of unknown range; convert it"):
        to_rgb(image)
