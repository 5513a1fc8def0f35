"""Look at every image before training: a broken one should stop nothing later."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pacatune.data.images.sources import ImageSource

# Resized to the model's height, an image of more would take gigabytes.
_MAX_ASPECT = 50
_MOST_THREADS = 32


def check_images(*parts: tuple[ImageSource, Sequence[int]]) -> list[list[str]]:
    """Decode images and return a digest of the pixels of each, by part.

    Args:
        parts: Where they come from, and which of them.

    Raises:
        ValueError: Names the images, of all parts, that cannot be read or are too narrow.
    """

    def examine(pair: tuple[ImageSource, int]) -> tuple[str, str]:
        """Return the digest and what is wrong; one of them is empty."""
        source, index = pair
        try:
            image = source.load(index)
        except ValueError as error:
            return "", str(error)
        width, height = image.size
        if max(width, height) > _MAX_ASPECT * min(width, height):
            return "", f"{source.place(index)}: {width} x {height} pixels are too narrow to resize"
        digest = hashlib.blake2b(f"{width} {height} ".encode(), digest_size=16)
        digest.update(image.tobytes())
        return digest.hexdigest(), ""

    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        pairs = [(source, index) for source, indices in parts for index in indices]
        results = list(pool.map(examine, pairs))
    problems = [problem for _, problem in results if problem]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{len(problems)} of {len(results)} images cannot be used: "
            f"{'; '.join(problems[:3])}{more}. Replace or remove them."
        )
    digests = iter(results)
    return [[next(digests)[0] for _ in indices] for _, indices in parts]


def run_digest(source: ImageSource, indices: Sequence[int], digests: Sequence[str] | None) -> str:
    """Return what tells these training images, in this order and with these classes, from others.

    Args:
        source: Where they come from.
        indices: Which of them.
        digests: Of their pixels, in the order of `indices`; None tells them by their places only.
    """
    found = digests or [source.place(index) for index in indices]
    digest = hashlib.blake2b("\0".join(source.classes).encode(), digest_size=16)
    for index, text in zip(indices, found, strict=True):
        digest.update(f"\0{source.labels[index]} {text}".encode())
    return digest.hexdigest()
