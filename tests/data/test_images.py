"""Images of chats: every kind becomes upright 8-bit RGB."""

import io

import numpy as np
import pytest
from PIL import Image

from pacatune.data.formats import IMAGE, mark_image, open_image, stored_image, to_rgb

GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)
PALETTE = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
PALETTE.putpalette([255, 0, 0, 0, 255, 0])
GREY_ALPHA = np.array([[[40, 255], [40, 0]]], np.uint8)


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
        (PALETTE, {"transparency": 1}, (255, 0, 0), WHITE),
        (Image.fromarray(GREY_ALPHA, "LA"), {}, (40, 40, 40), WHITE),
        (SIXTEEN, {}, BLACK, WHITE),
        (SIXTEEN, {"kind": "TIFF"}, BLACK, WHITE),
    ],
    ids=["palette", "grey with alpha", "16 bits", "16 in TIFF"],
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


def test_image_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (40, 36)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="could be decompression bomb"):
        open_image(stored_image(str(tmp_path / "a.png")))
