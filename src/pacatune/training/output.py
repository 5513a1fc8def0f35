"""The folder of a run: never mixed with another run, always left with its last good checkpoint."""

import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open

from pacatune.files.folder import is_write_failure
from pacatune.files.owned_folder import OURS, OwnedFolder
from pacatune.training.config import RunConfig
from pacatune.training.config_file import (
    CONFIG_NAME,
    changed_keys,
    config_text,
    local_paths,
    read_values,
    to_values,
)
from pacatune.training.progress import say
from pacatune.training.split import Split

STATE_NAME = "trainer_state.json"
# Written last: a run that has it is finished.
REPORT_NAME = "report.json"

_STAGING_NAME = f"{OURS}/incomplete"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What others write there for a run: TensorBoard's callback and TRL's table of completions.
_LOGS = (
    f"runs/*_{socket.gethostname()}/events.out.tfevents.*",
    "completions/completions_*.parquet",
)
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


def check_folder(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder in which this run would lose or mix something."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one of them.")
    output = run_folder(str(config.training.output_dir))
    folder = output.path
    _check_place(folder)
    _refuse_inputs(config, folder)
    if resume and not is_begun(folder):
        raise ValueError(f"{folder} holds no run to resume; start it without --resume.")
    if resume and is_finished(folder):
        raise ValueError(f"the run in {folder} is finished; there is nothing to resume.")
    output.check(goes_on=resume, outputs=_RESUMED_OUTPUTS)
    results = {name.partition("/")[0] for name in output.owned()} - {CONFIG_NAME, "runs"}
    if results and not resume and not overwrite:
        going_on = "" if is_finished(folder) else "continue with --resume, "
        raise FileExistsError(
            f"output folder {folder} holds another run ({', '.join(sorted(results)[:3])}); choose "
            f"another `training.output_dir`, {going_on}or delete it with --overwrite."
        )


def _refuse_inputs(config: RunConfig, folder: Path) -> None:
    """Refuse an output folder that is, or holds, what the run reads."""
    for option, path in local_paths(config).items():
        if Path(path).expanduser().resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"`{option}` ({path}) lies in the output folder {folder}, which this run writes; "
                "choose another `training.output_dir`."
            )


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a run, of whatever options."""
    return run_folder(folder).is_ours and (folder / CONFIG_NAME).is_file()


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has its result."""
    return (folder / REPORT_NAME).exists()


def check_same_options(config: RunConfig, folder: Path) -> None:
    """Refuse to resume a run with other options than it was started with."""
    old, new = read_values(folder / CONFIG_NAME), to_values(config)
    changes = changed_keys(old, new)
    if changes:
        raise ValueError(
            f"the run in {folder} was started with other options, so resuming would mix two "
            f"runs ({'; '.join(changes)}); resume with `--config {folder / CONFIG_NAME}`."
        )


def find_checkpoint(digest: str, folder: Path, split: Split, *, fixed: str | None = None) -> Path:
    """Return the checkpoint to continue, once sure that it saw the same data in the same order.

    `digest` is that of the training data; `fixed` says why the split may not change.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"the run in {folder} has no complete checkpoint; start it again without --resume."
        )
    if _trained_on(checkpoint).get("fingerprint") != digest:
        raise ValueError(
            f"the training data has changed since {checkpoint} was saved, so it cannot be "
            "continued; restore the data, or start again with --overwrite."
        )
    before = _trained_split(checkpoint)
    if before.num_examples != split.num_examples:
        raise ValueError(
            f"{checkpoint} was trained by {before} = {before.num_examples} examples per step, and "
            f"{split} = {split.num_examples}: the steps to come would see other examples. Choose "
            "`training.per_device_train_batch_size` and `training.gradient_accumulation_steps` so "
            f"that a step has {before.num_examples}, or start again with --overwrite."
        )
    if before != split and fixed is not None:
        raise ValueError(
            f"{checkpoint} was trained by {before} and cannot be continued by {split}: {fixed}. "
            "Split the steps as before, or start again with --overwrite."
        )
    return checkpoint


def _trained_on(checkpoint: Path) -> dict[str, Any]:
    """Return what `TrainedOn` has kept in a checkpoint."""
    state = read_state(checkpoint) or {}
    kept: dict[str, Any] = state.get("stateful_callbacks", {}).get("TrainedOn", {}).get("args", {})
    return kept


def _trained_split(checkpoint: Path) -> Split:
    kept = {name: value for name, value in _trained_on(checkpoint).items() if name != "fingerprint"}
    return Split(**kept)


def open_folder(config: RunConfig, folder: Path, checkpoint: Path | None, console: Console) -> None:
    """Delete what an older run left and write config.yaml, or say where an older run goes on."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()  # until all have looked at the folder as it was
    if config.training.process_index == 0:
        output = run_folder(folder)
        if checkpoint is not None:
            step = (read_state(checkpoint) or {}).get("global_step")
            said = f"resuming after step {step}: {checkpoint}"
            before, now = _trained_split(checkpoint), Split.of(config.training)
            if cut_off := _cut_off(folder):
                say(console, f"skipped, since it was not saved to its end: {', '.join(cut_off)}")
            if before != now:
                said += (
                    f" ({before} before, {now} now: steps see the same examples, but random "
                    "numbers and rounding differ)"
                )
            say(console, said)
            clear_staging(folder)
        else:
            output.check()
            old = sorted({name.partition("/")[0] for name in output.owned()})
            if old:
                say(console, f"deleting from {folder}: {', '.join(old)}")
            output.clear()
            output.begin()
            output.write(CONFIG_NAME, config_text(config, CONFIG_NAME))
        for pattern in _LOGS:
            output.claim(pattern)
    PartialState().wait_for_everyone()


def last_checkpoint(folder: Path, *, up_to: float = math.inf) -> Path | None:
    """Return the newest checkpoint, up to a step, that was written to its end."""
    matches = [(path, _CHECKPOINT.fullmatch(path.name)) for path in folder.glob("checkpoint-*")]
    steps = {path: int(match[1]) for path, match in matches if match and int(match[1]) <= up_to}
    newest_first = sorted(steps, key=lambda path: steps[path], reverse=True)
    return next((path for path in newest_first if read_state(path) is not None), None)


def _cut_off(folder: Path) -> list[str]:
    """Return the names of checkpoints that a process that was killed has left unfinished."""
    staged = {path.name for path in (folder / _STAGING_NAME).glob("checkpoint-*")}
    in_place = {path.name for path in folder.glob("checkpoint-*") if read_state(path) is None}
    return sorted(staged | in_place)


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """Return the trainer's state of a checkpoint, None where it is missing or cut off."""
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


@contextmanager
def staged(folder: Path, what: str, *, owner: bool = True) -> Iterator[Path]:
    """Give a folder inside `folder` for files that are not complete yet, deleted by its owner.

    If writing fails, the error says what is still intact.
    """
    staging = folder / _STAGING_NAME
    staging.mkdir(parents=True, exist_ok=True)
    is_in_the_way = False
    try:
        yield staging
    except FileExistsError as error:
        is_in_the_way = True
        raise FileExistsError(f"{error} Until the next run, {what} is in {staging}.") from error
    except Exception as error:
        if not is_write_failure(error):
            raise
        clear_staging(folder)
        kept = last_checkpoint(folder)
        fix = (
            f"{kept} is intact: make room, then continue with --resume."
            if kept
            else "No checkpoint was saved before; make room, then start again."
        )
        raise OSError(f"could not save {what} in {folder} ({error}). {fix}") from error
    finally:
        if owner and not is_in_the_way:
            clear_staging(folder)


def clear_staging(folder: Path) -> None:
    """Delete what a process that was killed while saving has left."""
    shutil.rmtree(folder / _STAGING_NAME, ignore_errors=True)


def refuse_empty_tensors(folder: Path) -> None:
    """Refuse files without tensors, or with empty ones: weights that were sharded when saved."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            names = tensors.keys()
            if not names:
                raise ValueError(
                    f"{path.name} holds no tensor: none of the trained weights reached the process "
                    "that saves. Let DeepSpeed gather them "
                    "(stage3_gather_16bit_weights_on_model_save: true)."
                )
            for name in names:
                shape = tensors.get_slice(name).get_shape()
                if 0 in shape:
                    raise ValueError(
                        f"tensor {name!r} has shape {tuple(shape)} in {path.name}: it was saved "
                        "while its values lay on other processes. Let DeepSpeed gather them "
                        "(stage3_gather_16bit_weights_on_model_save: true)."
                    )


def refuse_missing_shards(folder: Path) -> None:
    """Refuse a sharded checkpoint (torch.distributed.checkpoint) that lacks files it names."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for metadata in sorted(folder.glob("*/.metadata")):
        entries = FileSystemReader(metadata.parent).read_metadata().storage_data or {}
        names = {entry.relative_path for entry in entries.values()}
        missing = sorted(name for name in names if not (metadata.parent / name).is_file())
        if missing:
            raise ValueError(
                f"{missing[0]} of {metadata.parent.name} was written by a process that does not "
                "share this disk. Put `training.output_dir` on a disk that all nodes share, or set "
                "fsdp_state_dict_type to FULL_STATE_DICT."
            )


def _check_place(folder: Path) -> None:
    ancestors = (folder.absolute(), *folder.absolute().parents)
    nearest = next(path for path in ancestors if path.exists())
    if not os.access(nearest, os.W_OK):
        raise PermissionError(
            f"nothing can be written in {nearest}; choose another `training.output_dir`."
        )
