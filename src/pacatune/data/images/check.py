"""Look at every image before training: a broken one should stop nothing later."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pacatune.data.images.sources import ImageSource

# Resized to the model's height, an image of more would take gigabytes.
_MAX_ASPECT = 50
_MOST_THREADS = 32


def check_images(source: ImageSource, indices: Sequence[int]) -> list[str]:
    """Decode images and return a digest of the pixels of each.

    Args:
        source: Where they come from.
        indices: Which of them.

    Raises:
        ValueError: Names the images that cannot be read or are too narrow.
    """

    def examine(index: int) -> tuple[str, str]:
        """Return the digest and what is wrong; one of them is empty."""
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
        results = list(pool.map(examine, indices))
    problems = [problem for _, problem in results if problem]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{len(problems)} of {len(results)} images cannot be used: "
            f"{'; '.join(problems[:3])}{more}. Replace or remove them."
        )
    return [digest for digest, _ in results]


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
