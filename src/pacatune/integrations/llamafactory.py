"""LLaMA-Factory, versions 0 and 1, with PaCA: this module in the place of its command.

    python -m pacatune.integrations.llamafactory train config.yaml
    torchrun --nproc-per-node 8 -m pacatune.integrations.llamafactory train config.yaml

Version 0 trains PaCA by `finetuning_type: lora`, and `paca: {...}` has the options that LoRA has
not. Version 1 (`USE_V1=1`, or a command that it alone has) has `peft_config: {name: paca, ...}`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from pacatune.integrations.options import NO_DROPOUT, NOT_FOR_PACA, join_options, refuse_options
from pacatune.names import choose
from pacatune.tuner import PacaConfig

METHOD = "paca"
"""Value of `name` in `peft_config`."""

COMMANDS = ("train", "export")
"""Commands of version 0."""

COMMANDS_OF_VERSION_1 = ("train", "sft", "dpo", "rm", "chat", "merge")
"""Commands of version 1."""

# LLaMA-Factory's names of options that PaCA has under another one.
_NAMES = {"lora_alpha": "paca_alpha"}
# Its version 0's options, and what they are in `PacaConfig`.
_NAMES_IN_VERSION_0 = {
    "lora_rank": "r",
    "lora_alpha": "paca_alpha",
    "lora_target": "target_modules",
    "additional_target": "modules_to_save",
    "use_rslora": "use_rslora",
}
_REFUSED = {
    "lora_dropout": NO_DROPOUT,
    "use_dora": NOT_FOR_PACA,
    "init_lora_weights": NOT_FOR_PACA,
    "export_dir": "`pacatune merge` writes merged models",
}
_LORA_ELSEWHERE = "it makes LoRA by code of its own"
_REFUSED_IN_VERSION_0 = {
    "lora_dropout": NO_DROPOUT,
    "use_dora": NOT_FOR_PACA,
    "pissa_init": NOT_FOR_PACA,
    "pissa_convert": NOT_FOR_PACA,
    "loraplus_lr_ratio": NOT_FOR_PACA,
    "use_unsloth": _LORA_ELSEWHERE,
    "use_kt": _LORA_ELSEWHERE,
    "use_mca": _LORA_ELSEWHERE,
    "use_hyper_parallel": _LORA_ELSEWHERE,
}


def register() -> None:
    """Make the method known to LLaMA-Factory.

    Raises:
        ImportError: If LLaMA-Factory is missing, or has no version 1.
    """
    try:
        from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    PeftPlugin(METHOD).register()(adapt)


def adapt(model: nn.Module, config: dict[str, Any], is_train: bool = False) -> nn.Module:
    """Adapt a model, go on with an adapter, or merge adapters for inference.

    Args:
        model: The base.
        config: `peft_config`: options of `PacaConfig`, or `adapter_name_or_path`.
        is_train: Whether it will be trained.

    Raises:
        ValueError: If an option does not exist, or is refused.
    """
    options = {name: value for name, value in config.items() if name != "name"}
    adapters = options.pop("adapter_name_or_path", None)
    options = _join(options, f"name: {METHOD}")
    if adapters is None:
        paca = PacaConfig(task_type="CAUSAL_LM", inference_mode=not is_train, **options)
        peft_model = get_peft_model(model, paca)
        if is_train:
            peft_model.print_trainable_parameters()
        return peft_model
    adapters = [adapters] if isinstance(adapters, str) else list(adapters)
    if not is_train and not getattr(model, "is_quantized", False):
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        return model
    if len(adapters) != 1 or options:
        raise ValueError(
            f"`adapter_name_or_path` ({adapters}) must be one adapter, whose options count: merge "
            f"the others, and drop from `peft_config` what it has beside ({sorted(options)})."
        )
    return PeftModel.from_pretrained(model, adapters[0], is_trainable=is_train)


def lora_config(
    *, task_type: Any, inference_mode: bool, paca: dict[str, Any] | None = None, **options: Any
) -> PacaConfig:
    """Return PaCA's configuration, in the place of `LoraConfig` in version 0.

    Args:
        task_type: As for `LoraConfig`.
        inference_mode: As for `LoraConfig`.
        paca: Options of `PacaConfig` that LLaMA-Factory has no argument for.
        options: What LLaMA-Factory gives `LoraConfig`.

    Raises:
        ValueError: If an option of LoRA is set that PaCA would not keep, or `paca` is wrong.
    """
    refuse_options(options, _REFUSED, "LLaMA-Factory's PaCA")
    given = {_NAMES.get(name, name): v for name, v in options.items() if name not in _REFUSED}
    theirs = {name: given.pop(ours, None) for name, ours in _NAMES_IN_VERSION_0.items()}
    joined = join_options(theirs, _NAMES_IN_VERSION_0, {} if paca is None else paca, "paca")
    return PacaConfig(task_type=task_type, inference_mode=inference_mode, **joined, **given)


def _join(options: dict[str, Any], method: str) -> dict[str, Any]:
    """Return options as `PacaConfig` has them, checked."""
    refuse_options(options, _REFUSED, method)
    theirs = {name: options.get(name) for name in _NAMES}
    ours = {name: value for name, value in options.items() if name not in (*_NAMES, *_REFUSED)}
    if ours.get("target_modules") == "all":
        ours["target_modules"] = "all-linear"
    return join_options(theirs, _NAMES, ours, "peft_config")


def main() -> None:
    """Run the command of LLaMA-Factory that is in `sys.argv`, with the method known to it.

    Raises:
        ImportError: If LLaMA-Factory is missing, or is too old.
        ValueError: If the command does not exist, or trains or merges LoRA alone.
    """
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    is_version_1 = _is_set("USE_V1")
    known = COMMANDS_OF_VERSION_1 if is_version_1 else {*COMMANDS, *COMMANDS_OF_VERSION_1}
    choose(command, sorted(known), option="command")
    is_version_0 = not is_version_1 and command in COMMANDS
    _run_version_0(command) if is_version_0 else _run_version_1(command)


def _run_version_1(command: str) -> None:
    """Run a command whose `peft_config` may name the method."""
    register()
    from llamafactory.v1 import launcher

    if command == "merge":
        raise ValueError("merge with `pacatune merge`; LLaMA-Factory merges LoRA alone.")
    # Its other entry would start processes itself, in which the method is unknown.
    launcher.main() if command in launcher._DIST_TRAIN_COMMANDS else launcher.launch()


def _run_version_0(command: str) -> None:
    """Run a command that makes PaCA where it would make LoRA."""
    try:
        from llamafactory.hparams import read_args
        from llamafactory.train import tuner
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    sys.argv.pop(1)
    arguments = read_args()
    paca = arguments.pop("paca", None) if isinstance(arguments, dict) else None
    if command == "export":
        if paca:
            raise ValueError("`paca` has options of training; `export` takes the adapter as it is.")
        tuner.export_model(arguments)
        return
    starters = ("USE_RAY",) if "LOCAL_RANK" in os.environ else ("USE_RAY", "FORCE_TORCHRUN")
    for name in filter(_is_set, starters):
        raise ValueError(
            f"{name} is set: LLaMA-Factory would start processes in which PaCA is unknown. Start "
            "them by `torchrun --nproc-per-node N -m pacatune.integrations.llamafactory train "
            "CONFIG`."
        )
    with _paca_in_version_0(paca):
        tuner.run_exp(arguments)


@contextmanager
def _paca_in_version_0(paca: dict[str, Any] | None) -> Iterator[None]:
    """Have version 0 make PaCA's configuration in this block, and refuse what it would not keep."""
    from llamafactory.model import adapter
    from llamafactory.train import tuner

    plain = adapter.LoraConfig, tuner.get_train_args

    def parse_and_check(arguments: Any = None) -> Any:
        parsed = plain[1](arguments)
        _check_version_0(*parsed, paca=paca)
        return parsed

    adapter.LoraConfig, tuner.get_train_args = partial(lora_config, paca=paca), parse_and_check
    try:
        yield
    finally:
        adapter.LoraConfig, tuner.get_train_args = plain


def _missing(error: ModuleNotFoundError) -> ImportError:
    """Say what to install."""
    name = (error.name or "llamafactory").partition(".")[0]
    return ImportError(
        f"pacatune.integrations.llamafactory needs LLaMA-Factory >= 0.9.5 and what it imports "
        f"({error}): pip install {name}"
    )


def _is_set(name: str) -> bool:
    """Return whether an environment variable is on, as LLaMA-Factory reads it."""
    return os.environ.get(name, "").lower() in ("true", "y", "1")


def _check_version_0(
    model: Any, data: Any, training: Any, finetuning: Any, *_: Any, paca: dict[str, Any] | None
) -> None:
    """Refuse what would train something else, before anything is loaded."""
    if finetuning.finetuning_type != "lora":
        raise ValueError(
            f"`finetuning_type` is {finetuning.finetuning_type!r}; PaCA takes the place of `lora`: "
            "set that, or run `llamafactory-cli`."
        )
    refuse_options(vars(model) | vars(finetuning), _REFUSED_IN_VERSION_0, "PaCA")
    if model.adapter_name_or_path and paca and not finetuning.create_new_adapter:
        raise ValueError(
            f"`paca` ({paca}) has options of a new adapter, and `adapter_name_or_path` "
            f"({model.adapter_name_or_path}) goes on with one, whose own count: drop `paca`."
        )
    # Targets are not known before the model is.
    theirs = {name: getattr(finetuning, name) for name in ("lora_rank", "lora_alpha", "use_rslora")}
    join_options(theirs, _NAMES_IN_VERSION_0, {} if paca is None else paca, "paca")


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(str(error))
    except ValueError as error:
        sys.exit(f"pacatune.integrations.llamafactory: {error}")
