"""What is known before the weights are loaded: data, targets, and the checkpoint to continue."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from pacatune.data import PreparedData, prepare_data, row_digests
from pacatune.methods import METHODS
from pacatune.training import model as models
from pacatune.training.any_run import AnyRun
from pacatune.training.config import RunConfig
from pacatune.training.config_file import CONFIG_NAME, changed_keys, read_values, to_values
from pacatune.training.output import last_checkpoint, read_state
from pacatune.training.selecting import check_selection

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase


# What `accelerate launch` sets: variable, its default, the option, what it must be, and why.
_FSDP_RULES = (
    (
        "FSDP_VERSION",
        "1",
        "fsdp_version",
        "2",
        "PEFT loads no adapter from the checkpoints of version 1, and says nothing",
    ),
    (
        "FSDP_STATE_DICT_TYPE",
        "SHARDED_STATE_DICT",
        "fsdp_state_dict_type",
        "FULL_STATE_DICT",
        "otherwise no process has the result to save it",
    ),
    (
        "FSDP_CPU_RAM_EFFICIENT_LOADING",
        "false",
        "fsdp_cpu_ram_efficient_loading",
        "false",
        "accelerate cannot send the chosen columns, which are buffers, to the other processes",
    ),
)


@dataclass(frozen=True)
class Run:
    """What is known before the weights are loaded."""

    tokenizer: "PreTrainedTokenizerBase"
    data: PreparedData
    adapter_config: "PeftConfig | None"
    plan: models.Plan


def main_console(config: AnyRun, console: Console | None) -> Console:
    """Return the console of the main process; the others get one that prints nothing."""
    if config.training.process_index != 0:
        return Console(quiet=True)
    return console or Console()


def prepare_run(config: RunConfig, console: Console) -> Run:
    """Load the tokenizer and the data, plan what is trained, and say so.

    Raises:
        ValueError: If the options, the data and the model do not fit together.
    """
    models.check_attention(config)
    check_environment(config)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and config.training.device.type == "cpu":
        # What `accelerate launch` was told; it ignores it on CPUs without a word.
        show_warnings(["accelerate shards nothing on CPUs: this run copies the model."], console)
    tokenizer = models.load_tokenizer(config)
    data = prepare_run_data(config, tokenizer)
    adapter_config = models.make_adapter_config(config)
    check_selection(config, adapter_config)
    plan = models.plan_training(config, adapter_config)
    if plan.max_positions is not None and data.longest > plan.max_positions:
        data.warnings.append(
            f"the longest training example has {data.longest} tokens, but the model was made for "
            f"{plan.max_positions}; lower `training.max_length`."
        )
    held_out = 0 if data.evaluation is None else len(data.evaluation)
    console.print(
        f"data: {len(data.train):,} examples, {held_out:,} held out",
        soft_wrap=True,
        highlight=False,
    )
    console.print(
        f"training {plan.num_trainable_parameters:,} of {plan.num_parameters:,} parameters "
        f"({config.method}): {', '.join(plan.summary()) or 'every weight'}",
        soft_wrap=True,
        highlight=False,
    )
    show_warnings(data.warnings, console)
    return Run(tokenizer, data, adapter_config, plan)


def prepare_run_data(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> PreparedData:
    """Read, encode and check the data of the run."""
    training = config.training
    splits = training.packing and training.packing_strategy == "bfd_split"
    return prepare_data(
        config.data,
        tokenizer,
        max_length=None if splits else training.max_length,
        stop_ids=models.find_stop_ids(config, tokenizer),
        num_processes=training.dataset_num_proc,
    )


def check_environment(config: AnyRun) -> None:
    """Refuse what the process was started with, or lacks, and the trainer would not mind.

    Raises:
        ValueError: Names the setting and the fix.
    """
    from transformers.integrations import get_available_reporting_integrations

    if config.training.n_gpu > 1:
        raise ValueError(
            f"{config.training.n_gpu} GPUs are visible to one process; start one process per GPU "
            "with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _check_fsdp(config.method)
    available = get_available_reporting_integrations()
    for name in config.training.report_to or ():
        if name not in available:
            raise ValueError(
                f"`training.report_to` ({name!r}) is not installed or unknown; available here: "
                f"{', '.join(available) or 'none'}."
            )


def _check_fsdp(method: str) -> None:
    for variable, default, option, needed, reason in _FSDP_RULES:
        value = os.environ.get(variable, default)
        if value.lower() == needed.lower():
            continue
        if option == "fsdp_cpu_ram_efficient_loading" and not METHODS[method].is_paca:
            continue
        raise ValueError(
            f"`{option}` ({value}) in the configuration of accelerate must be {needed}: {reason}."
        )


def show_warnings(warnings: list[str], console: Console) -> None:
    """Print each warning on a line of its own."""
    for warning in warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning), soft_wrap=True)


def fingerprint(data: "Dataset") -> str:
    """Return a digest of every token id and label, in order."""
    return hashlib.blake2b(b"".join(row_digests(data)), digest_size=16).hexdigest()


def check_same_options(config: AnyRun, folder: Path) -> None:
    """Refuse to resume a run with other options than it was started with.

    Raises:
        ValueError: Names each option that differs, with both values.
    """
    changes = changed_keys(read_values(folder / CONFIG_NAME), to_values(config))
    if changes:
        raise ValueError(
            f"the run in {folder} was started with other options, so resuming would mix two "
            f"runs ({'; '.join(changes)}); resume with `--config {folder / CONFIG_NAME}`."
        )


def find_checkpoint(digest: str, folder: Path, num_processes: int) -> Path:
    """Return the checkpoint to continue, once sure that it saw the same data in the same order.

    Args:
        digest: Of the training data.
        folder: Output folder of the run.
        num_processes: Among which the data is shared out.

    Raises:
        ValueError: If no checkpoint is complete, or the data or the number of processes differ.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"the run in {folder} has no complete checkpoint; start it again without --resume."
        )
    state = read_state(checkpoint) or {}
    before = state.get("stateful_callbacks", {}).get("TrainedOn", {}).get("args", {})
    if before.get("fingerprint") != digest:
        raise ValueError(
            f"the training data has changed since {checkpoint} was saved, so it cannot be "
            "continued; restore the data, or start again with --overwrite."
        )
    if before.get("num_processes") != num_processes:
        raise ValueError(
            f"{checkpoint} was trained by {before.get('num_processes')} processes and cannot be "
            f"continued by {num_processes}: each would see other examples. Start as many as "
            "before, or start again with --overwrite."
        )
    return checkpoint
