"""The one way to a file of a folder that a stranger made: plain files, inside that folder."""

from pathlib import Path


def find_file(folder: Path, name: str) -> Path:
    """Return the path of a regular file in the folder; refuse a link to outside of it.

    The hub's cache links `models--NAME/snapshots/REVISION/FILE` to a file in `models--NAME/blobs`;
    such links are followed, wherever the cache lies.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it leads out of the folder, or is a pipe, a device or a folder.
    """
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{str(folder)!r} has no {name}; is it the right folder?")
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in _roots(folder.resolve())):
        raise ValueError(
            f"{path} is a link to {target}, outside of the folder; copy the file into the folder."
        )
    if not target.is_file():
        raise ValueError(f"{path} is not a regular file; such a folder holds plain files only.")
    return path


def check_files(folder: Path) -> None:
    """Hold each file that a tokenizer may be made of to `find_file`: transformers opens them."""
    for path in (*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")):
        if path.exists() and not path.is_dir():
            find_file(folder, str(path.relative_to(folder)))


def _roots(folder: Path) -> list[Path]:
    """Return where the files of a resolved folder may be: in it, or in the hub's cache of it."""
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return [folder, parent.parent / "blobs"]
    return [folder]
