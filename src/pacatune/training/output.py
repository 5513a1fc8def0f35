"""The folder of a run: never mixed with another run, always left with its last good checkpoint.

A run may go on with another split of the same number of examples: each step sees the examples that
it would have seen, since Trainer deals consecutive batches of one seeded order to the processes.
"""

import json
import math
import re
import socket
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open
from transformers.trainer_pt_utils import AcceleratorConfig

from pacatune.files.owned_folder import OwnedFolder
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

STATE_NAME = "trainer_state.json"
# Written last: a run that has it is finished.
REPORT_NAME = "report.json"
# The names that a resumed run may write; its configuration it only reads.
_RESUMED_OUTPUTS = (
    *("checkpoint-*", "*.safetensors*", "*.json", "*.md", "*.png", "*.jinja", "*.tiktoken"),
    *("tokenizer.*", "vocab.*", "merges.txt", "completions", "runs"),
)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What others write there for a run: TensorBoard's callback and TRL's table of completions.
_LOGS = (
    f"runs/*_{socket.gethostname()}/events.out.tfevents.*",
    "completions/completions_*.parquet",
)
# With other values, what a step sees depends on how it is split.
_USUAL = {
    "train_sampling_strategy": ("random", "sequential"),
    "dataloader_drop_last": (False,),
    "average_tokens_across_devices": (True,),
    "accelerator_config": (AcceleratorConfig(),),
}


@dataclass(kw_only=True)
class TrainedOn:
    """What a checkpoint says of its run; by this it is continued, or refused."""

    fingerprint: str = ""
    """Digest of the training data."""
    split: list[int] = field(default_factory=list)
    """What an optimizer step takes: processes, examples of each in one pass, passes."""
    launched_by: str = ""
    """What decides the form of its states."""

    @property
    def num_examples(self) -> int:
        """Examples per optimizer step."""
        return math.prod(self.split)

    def __str__(self) -> str:
        processes, examples, passes = self.split
        plural = "es" if processes > 1 else ""
        return f"{processes} process{plural} x {examples} examples x {passes} accumulated"

    def to_state(self) -> dict[str, Any]:
        """Return what stands in trainer_state.json, among the states of callbacks."""
        return {"args": asdict(self), "attributes": {}}


def run_folder(folder: str | Path) -> OwnedFolder:
    """Return the output folder of a run, which owns what runs wrote there."""
    return OwnedFolder(
        path=Path(folder).expanduser(), kind="a training run", option="`training.output_dir`"
    )


def check_folder(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder in which this run would lose or mix something.

    It must be possible to make and write it, and it may hold nothing but what is this run's.
    """
    output = run_folder(str(config.training.output_dir))
    folder = output.path
    for option, path in local_paths(config).items() if folder.is_dir() else ():
        if Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"`{option}` ({path}) lies in the output folder {folder}, which this run writes; "
                "choose another `training.output_dir`."
            )
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one of them.")
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


def is_split_fixed(training: Any) -> bool:
    """Whether a run must go on with the same split, for the sake of its steps or of its states."""
    is_usual = all(getattr(training, option) in usual for option, usual in _USUAL.items())
    return not is_usual or training.deepspeed_plugin is not None


def check_same_options(values: dict[str, Any], folder: Path) -> None:
    """Refuse to resume a run with other options than it was started with."""
    changes = changed_keys(read_values(folder / CONFIG_NAME), values)
    if changes:
        raise ValueError(
            f"the run in {folder} was started with other options, so resuming would mix two "
            f"runs ({'; '.join(changes)}); resume with `--config {folder / CONFIG_NAME}`."
        )


def find_checkpoint(now: TrainedOn, folder: Path, *, is_fixed: bool = False) -> Path:
    """Return the checkpoint to continue, once sure that it saw the same data in the same order.

    `is_fixed` says that the split may not change.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"the run in {folder} has no complete checkpoint; start it again without --resume."
        )
    before = trained_on(checkpoint)
    if before.fingerprint != now.fingerprint:
        raise ValueError(
            f"the training data has changed since {checkpoint} was saved, so it cannot be "
            "continued; restore the data, or start again with --overwrite."
        )
    rule = "the same numbers" if is_fixed else "numbers with the same product"
    if before.num_examples != now.num_examples or (is_fixed and before.split != now.split):
        raise ValueError(
            f"{checkpoint} was trained by {before}, and cannot be continued by {now}: this run "
            f"needs {rule}. Set `training.per_device_train_batch_size` and "
            "`training.gradient_accumulation_steps`, or start again with --overwrite."
        )
    return checkpoint


def open_folder(
    config: RunConfig,
    now: TrainedOn,
    checkpoint: Path | None,
    arguments: Any,
    console: Console,
) -> None:
    """Delete what an older run left and write config.yaml, or say where an older run goes on."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()  # until all have looked at the folder as it was
    if arguments.process_index == 0:
        output = run_folder(arguments.output_dir)
        if checkpoint is None:
            if old := sorted({name.partition("/")[0] for name in output.owned()}):
                say(console, f"deleting from {output.path}: {', '.join(old)}")
            output.start_anew()
            command = config.repeat_command(CONFIG_NAME)
            output.write(CONFIG_NAME, config_text(to_values(config), command))
        else:
            said = f"resuming after step {checkpoint.name.rpartition('-')[2]}: {checkpoint}"
            before = trained_on(checkpoint)
            if before.split != now.split:
                said += (
                    f" ({before} before, {now} now: steps see the same examples, but random "
                    "numbers and rounding differ)"
                )
            say(console, said)
            output.begin()
        for pattern in _LOGS:
            output.claim(pattern)
    PartialState().wait_for_everyone()


def last_checkpoint(folder: Path, *, up_to: float = math.inf) -> Path | None:
    """Return the newest checkpoint, up to a step, that was written to its end."""
    matches = [(path, _CHECKPOINT.fullmatch(path.name)) for path in folder.glob("checkpoint-*")]
    steps = {path: int(match[1]) for path, match in matches if match and int(match[1]) <= up_to}
    newest_first = sorted(steps, key=lambda path: steps[path], reverse=True)
    return next((path for path in newest_first if read_state(path)), None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the trainer's state of a checkpoint, empty where it is missing or cut off."""
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and "global_step" in state else {}


def trained_on(checkpoint: Path) -> TrainedOn:
    """Return what a checkpoint says of its run."""
    states = read_state(checkpoint).get("stateful_callbacks", {})
    return TrainedOn(**states.get(TrainedOn.__name__, {}).get("args", {}))


def what_is_intact(folder: Path) -> str:
    """Return what is left, and what to do, where the disk is full."""
    kept = last_checkpoint(folder)
    if kept is None:
        return "no checkpoint was saved before; make room, then start again."
    return f"{kept} is intact: make room, then continue with --resume."


def refuse_missing_weights(folder: Path) -> None:
    """Refuse files that lack weights, which lay on other processes or disks when they were saved.

    They are safetensors, and sharded checkpoints (torch.distributed.checkpoint).
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            names = [*tensors.keys()]
            empty = [name for name in names if 0 in tensors.get_slice(name).get_shape()]
        if empty or not names:
            raise ValueError(
                f"{path.name} lacks {', '.join(empty[:1]) or 'every weight'}: the values lay on "
                "other processes when it was saved. Let DeepSpeed gather them "
                "(stage3_gather_16bit_weights_on_model_save: true)."
            )
    for metadata in sorted(folder.glob("*/.metadata")):
        entries = FileSystemReader(metadata.parent).read_metadata().storage_data or {}
        parts = {metadata.parent / entry.relative_path for entry in entries.values()}
        if missing := sorted(path for path in parts if not path.is_file()):
            raise ValueError(
                f"{missing[0]} was written by a process that does not share this disk. Put "
                "`training.output_dir` on a disk that all nodes share, or set "
                "fsdp_state_dict_type to FULL_STATE_DICT."
            )
