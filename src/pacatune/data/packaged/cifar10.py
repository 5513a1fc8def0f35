"""CIFAR-10's test images out of a Python package, as folders of PNG files.

The source archive of `bigbench` has all 10,000 of them (1,000 per class) in one JSON file. They
are split here into a part to train on and one to evaluate on, so an accuracy on them is not the
accuracy on CIFAR-10 that papers report. BIG-bench asks that its data stay out of training
corpora: train throw-away models on it only.
"""

import base64
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pacatune.data.packaged.packages import PackagedFile, prepare_folder

TASK = PackagedFile(
    package="bigbench",
    version="1.0.0",
    archive_sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    num_megabytes=358,
    member="bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json",
    sha256="226298409875f5b93ccda063863181f88723d39bac7eeef28a79843ae0aace31",
    what="the test images of CIFAR-10, in BIG-bench, Apache-2.0",
    is_source=True,
    otherwise="or give images: --data FOLDER",
)
NUM_TEST_PER_CLASS = 200

_FOLDER = "cifar10-test-images"
_NUM_BYTES = 60_000_000


def prepare_cifar10(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Return a folder with `train` (800 per class) and `test` (200 per class), made the first time.

    Args:
        cache: Folder that keeps it for the next time; see `default_cache`.
        say: Called with one line per step that takes a while.

    Raises:
        ValueError: If a hash differs.
        OSError: If the package cannot be downloaded, or the disk is too full.
    """

    def make(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
            task = json.loads(TASK.find(Path(scratch), say).read_bytes())
        say(f"writing {len(task['examples']):,} images to {cache / _FOLDER}")
        write_images(task["examples"], folder, NUM_TEST_PER_CLASS)
        return {
            "images": TASK.what,
            "package": TASK.requirement,
            "file": TASK.member,
            "file_sha256": TASK.sha256,
            "note": "a split of the test images, so not the usual accuracy on CIFAR-10",
        }

    return prepare_folder(cache / _FOLDER, _NUM_BYTES, make, say)


def write_images(examples: list[dict[str, Any]], folder: Path, num_test_per_class: int) -> None:
    """Write images by part and class, `num_test_per_class` of each into `test`, chosen at random.

    Args:
        examples: `input` is a PNG in base64, `target_scores` gives 1 to its class.
        folder: Gets `train` and `test`.
        num_test_per_class: Test images of each class.
    """
    by_class: dict[str, list[tuple[int, str]]] = {}
    for number, example in enumerate(examples):
        name = max(example["target_scores"], key=example["target_scores"].get)
        by_class.setdefault(name, []).append((number, example["input"]))
    for name in sorted(by_class):
        random.Random(name).shuffle(by_class[name])
        for place, (number, content) in enumerate(by_class[name]):
            part = "test" if place < num_test_per_class else "train"
            path = folder / part / name / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
