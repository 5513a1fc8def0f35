"""LLaMA-Factory v1: `peft_config: {name: paca, ...}`, by this module in the place of its command.

    python -m pacatune.integrations.llamafactory sft config.yaml
    torchrun --nproc-per-node 8 -m pacatune.integrations.llamafactory sft config.yaml

docs/integrations.md has a configuration, and what to change in version 0.
"""

import sys
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from pacatune.integrations.options import NO_DROPOUT, NOT_FOR_PACA, join_options, refuse_options
from pacatune.tuner import PacaConfig

METHOD = "paca"
"""Value of `name` in `peft_config`."""

# LLaMA-Factory's names of options that PaCA has under another one.
_NAMES = {"lora_alpha": "paca_alpha"}
_REFUSED = {
    "lora_dropout": NO_DROPOUT,
    "use_dora": NOT_FOR_PACA,
    "init_lora_weights": NOT_FOR_PACA,
    "export_dir": "`pacatune merge` writes merged models",
}


def register() -> None:
    """Make the method known to LLaMA-Factory.

    Raises:
        ImportError: If LLaMA-Factory is missing, or has no version 1.
    """
    try:
        from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin
    except ModuleNotFoundError as error:
        raise ImportError(
            f"pacatune.integrations.llamafactory needs LLaMA-Factory >= 0.9.5 ({error}): pip "
            "install llamafactory"
        ) from error
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


def lora_config(*, task_type: Any, inference_mode: bool, **options: Any) -> PacaConfig:
    """Return PaCA's configuration, in the place of `LoraConfig` in a changed version 0.

    Raises:
        ValueError: If an option of LoRA is set that PaCA would not keep.
    """
    joined = _join(options, "LLaMA-Factory's PaCA")
    return PacaConfig(task_type=task_type, inference_mode=inference_mode, **joined)


def _join(options: dict[str, Any], method: str) -> dict[str, Any]:
    """Return options as `PacaConfig` has them, checked."""
    refuse_options(options, _REFUSED, method)
    theirs = {name: options.get(name) for name in _NAMES}
    ours = {name: value for name, value in options.items() if name not in (*_NAMES, *_REFUSED)}
    if ours.get("target_modules") == "all":
        ours["target_modules"] = "all-linear"
    return join_options(theirs, _NAMES, ours, "peft_config")


def main() -> None:
    """Run a command of LLaMA-Factory v1, which is in `sys.argv`, with the method known to it."""
    register()
    from llamafactory.v1 import launcher

    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "merge":
        raise ValueError("merge with `pacatune merge`; LLaMA-Factory merges LoRA alone.")
    # Its other entry would start processes itself, in which the method is unknown.
    launcher.main() if command in launcher._DIST_TRAIN_COMMANDS else launcher.launch()


if __name__ == "__main__":
    try:
        main()
    except (ImportError, ValueError) as error:
        sys.exit(f"pacatune.integrations.llamafactory: {error}")
