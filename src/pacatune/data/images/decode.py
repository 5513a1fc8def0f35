"""From whatever an image file holds to eight bits of red, green and blue."""

import numpy as np
from PIL import Image, ImageOps


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image upright, on white where it is transparent, in 8-bit RGB.

    Greyscale, palettes, CMYK and 16 bits are converted; Pillow alone would cut 16 bits off at 255
    and show whatever colour lies under transparent pixels.

    Args:
        image: As opened; it is decoded here.

    Raises:
        ValueError: If the range of its values is not known.
        OSError: If the file is damaged.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind} of unknown range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")
