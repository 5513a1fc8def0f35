"""The output folder of a run: its own, found to be so before anything heavy is imported."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.files.owned_folder import OwnedFolder
from pacatune.training.config_file import CONFIG_NAME, local_paths

if TYPE_CHECKING:
    from pacatune.training.config import RunConfig

# Written last: a run that has it is finished.
REPORT_NAME = "report.json"
# The names that a resumed run may write; its configuration it only reads.
_RESUMED_OUTPUTS = (
    *("checkpoint-*", "*.safetensors*", "*.json", "*.md", "*.png", "*.jinja", "*.tiktoken"),
    *("tokenizer.*", "vocab.*", "merges.txt", "completions", "runs"),
)


def run_folder(folder: str | Path) -> OwnedFolder:
    """Return the output folder of a run, which owns what runs wrote there."""
    return OwnedFolder(
        path=Path(folder).expanduser(), kind="a training run", option="`training.output_dir`"
    )


def check_folder(config: "RunConfig", *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder in which this run would lose or mix something."""
    folder = run_folder(str(config.training.output_dir)).path
    for option, path in local_paths(config).items() if folder.is_dir() else ():
        if Path(path).expanduser().resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"`{option}` ({path}) lies in the output folder {folder}, which this run writes; "
                "choose another `training.output_dir`."
            )
    _check_place(str(config.training.output_dir), resume=resume, overwrite=overwrite)


def _check_place(output_dir: str, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that cannot be made or written, and one that holds what is not this run's."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one of them.")
    output = run_folder(output_dir)
    folder = output.path
    if resume and not is_begun(folder):
        raise ValueError(f"{folder} holds no run to resume; start it without --resume.")
    if resume and is_finished(folder):
        raise ValueError(f"the run in {folder} is finished; there is nothing to resume.")
    output.check(_RESUMED_OUTPUTS if resume else ("*",))
    results = {name.partition("/")[0] for name in output.owned()} - {CONFIG_NAME, "runs"}
    if results and not resume and not overwrite:
        going_on = "" if is_finished(folder) else "continue with --resume, "
        raise FileExistsError(
            f"output folder {folder} holds another run ({', '.join(sorted(results)[:3])}); choose "
            f"another `training.output_dir`, {going_on}or delete it with --overwrite."
        )
    above = (folder.absolute(), *folder.absolute().parents)
    place = next(path for path in above if path.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()  # of no name, since others list the folder
    except OSError as error:
        raise PermissionError(
            f"nothing can be written in {place} ({error.strerror}); choose another "
            "`training.output_dir`."
        ) from error


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a run, of whatever options."""
    return run_folder(folder).is_ours and (folder / CONFIG_NAME).is_file()


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has its result."""
    return (folder / REPORT_NAME).exists()
